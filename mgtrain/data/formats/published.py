"""Kinetics, Something-Something, Charades, UCF101 and HMDB51, with the annotation files that their authors publish.

These list videos without a folder, and most without a suffix; `locate` finds the files.
"""

import errno
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from mgtrain.data.formats.reading import is_video, numbered_lines, read_file, read_table
from mgtrain.data.videos import Videos
from mgtrain.errors import DataError

KINETICS_COLUMNS = ("label", "youtube_id", "time_start", "time_end", "split")
SOMETHING_LABELS = ("something-something-v2-labels.json", "labels.json")  # next to the list of videos
CHARADES_CLASSES = [f"c{number:03}" for number in range(157)]
CHARADES_NAMES = "Charades_v1_classes.txt"  # next to the list of videos: lines such as `c000 Holding some clothes`
UCF_CLASSES = "classInd.txt"  # next to the list: lines such as `1 ApplyEyeMakeup`
HMDB_SPLITS = "testTrainMulti_7030_splits"  # a file `<class>_test_split<1 to 3>.txt` for each class
HMDB_PARTS = {"train": "1", "test": "2"}  # marks of a video in a split's file; 0: in neither

# Folders to search for videos, relative to the root; those of UCF101 and HMDB51 have a folder for each class.
REPLACEMENTS = os.path.join("replacement", "replacement_for_corrupted_k400")  # where the CVDF's scripts unpack them
SOMETHING_FOLDERS = ("20bn-something-something-v2", "videos", "frames", "rawframes", "")
CHARADES_FOLDERS = ("Charades_v1", "Charades_v1_480", "videos", "")
UCF_FOLDERS = ("UCF-101", "videos", "")
HMDB_FOLDERS = ("hmdb51_org", "hmdb51", "videos", "")


class Row(NamedTuple):
    """A video that an annotation file lists."""

    where: str  # file and line, for messages
    video: str  # name of the file, without suffix
    label: str | Sequence[int]  # name of the class, or numbers of the classes
    folders: Iterable[str]  # to search in this order, relative to the root
    spans: Sequence[tuple[float, float]] = ()  # start and end of each label, seconds; empty: the whole video


def locate(root: str, listing: Path, rows: Sequence[Row], classes: Sequence[str]) -> Videos:
    """Find the rows' files or folders of frames, `<folder>/<video>.*` or `<folder>/<video>`; the others are `missing`.

    Raises `DataError` if there are no rows, a label is not a class, or no video exists.
    """
    if not rows:
        raise DataError(f"{listing}: lists no video; use the published file")
    numbers = {name: number for number, name in enumerate(classes)}
    files_in = cache(lambda folder: _files(os.path.join(root, folder)))
    found: list[tuple[str, int | Sequence[int]]] = []
    spans: list[tuple[float, float]] = []
    missing: list[str] = []
    for row in rows:
        label = numbers.get(row.label) if isinstance(row.label, str) else row.label
        if label is None:
            raise DataError(
                f"{row.where}: {row.label!r} is not one of the {len(classes)} classes; fix the label or the classes"
            )
        for folder in row.folders:
            if file := files_in(folder).get(row.video):
                found.append((os.path.join(folder, file), label))
                spans += row.spans
                break
        else:
            missing.append(row.video)
    if not found:
        places = ", ".join(str(Path(root, folder)) for folder in rows[0].folders)
        raise DataError(
            f"{listing}: none of its {len(missing)} videos exists; looked for {missing[0]}.* and the others in {places}"
        )
    return Videos.of(root, found, classes, len(missing), missing, spans or None)


def _files(folder: str) -> dict[str, str]:
    """What a folder holds, by name without suffix: videos before other files before folders; empty if there is none."""
    try:
        with os.scandir(folder) as entries:
            found = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            return {}
        raise
    folders = {name: name for name, is_folder in found if is_folder}
    files = sorted((name for name, is_folder in found if not is_folder), key=is_video)
    return folders | {os.path.splitext(name)[0]: name for name in files}


def read_kinetics(root: str, source: str, classes: Sequence[str] | None) -> Videos:
    """The videos of an official Kinetics CSV, named `<id>_<start>_<end>` with six digits and any suffix.

    They may be among the CVDF's replacements of corrupted Kinetics-400 videos, or in `root/<split>/<label>`,
    `root/<split>`, `root/<label>` or `root`. The split is that of the row or the name of the CSV (`val.csv` finds
    `val/` although its rows say `validate`), and a folder's name may have underscores instead of a label's spaces.
    `classes` defaults to all labels of the CSV in alphabetical order, with or without a video.
    """
    listing = Path(root, source)
    rows = []
    for line, row in read_table(listing, KINETICS_COLUMNS, f"the first line must be {','.join(KINETICS_COLUMNS)}"):
        where, label, split = f"{listing}:{line}", row["label"], row["split"]
        try:
            start, end = float(row["time_start"]), float(row["time_end"])
            if not (0 <= start < 1e6 and 0 <= end < 1e6):  # six digits
                raise ValueError
        except ValueError:
            times = f"{row['time_start']!r} and {row['time_end']!r}"
            raise DataError(f"{where}: the times {times} are not numbers of seconds; fix this line") from None
        for name in (label, split):
            if os.path.isabs(name) or os.pardir in name.split(os.sep):
                raise DataError(f"{where}: {name!r} leads out of {root}; it must be a name within it")
        video = f"{row['youtube_id']}_{int(start):06d}_{int(end):06d}"
        rows.append(Row(where, video, label, _kinetics_folders(label, split, listing.stem)))
    return locate(root, listing, rows, classes or sorted({str(row.label) for row in rows}))


@cache  # so that all rows of a class share a tuple
def _kinetics_folders(label: str, split: str, stem: str) -> tuple[str, ...]:
    """The folders to search: the replacement first, then the most specific first."""
    labels = dict.fromkeys((label, label.replace(" ", "_")))
    splits = dict.fromkeys((split, stem))
    return (REPLACEMENTS, *(os.path.join(s, f) for s in splits for f in labels), *splits, *labels, "")


def read_something_something(root: str, source: str, classes: Sequence[str] | None) -> Videos:
    """The videos `<id>` of `something-something-v2-train.json` (or `-validation`), a JSON list.

    A video's class is its template without brackets, such as "Putting something on something". `classes` defaults to
    those that the file of labels next to `source` numbers.
    """
    listing = Path(root, source)
    entries = _load(listing)
    if not isinstance(entries, list):
        raise DataError(f'{listing}: not a list of videos; it must be [{{"id": ..., "template": ...}}, ...]')
    names = classes or _something_classes(listing)
    rows = []
    for place, entry in enumerate(entries, start=1):
        try:
            template = str(entry["template"]).replace("[", "").replace("]", "")
            rows.append(Row(f"{listing}: entry {place}", str(entry["id"]), template, SOMETHING_FOLDERS))
        except (TypeError, KeyError):
            raise DataError(
                f"{listing}: entry {place} has no id or no template; use the list of training or validation videos "
                "(that of test videos has no labels)"
            ) from None
    return locate(root, listing, rows, names)


def _something_classes(listing: Path) -> list[str]:
    """The classes in the order of their numbers."""
    file = next((path for path in map(listing.with_name, SOMETHING_LABELS) if path.exists()), None)
    if file is None:
        files = " or ".join(SOMETHING_LABELS)
        raise DataError(f"{listing.parent}: no {files}; put the file of labels next to {listing.name}")
    numbers = _load(file)
    try:
        names = sorted(numbers, key=lambda name: int(numbers[name]))
        complete = [int(numbers[name]) for name in names] == list(range(len(names)))
    except (AttributeError, TypeError, ValueError, OverflowError):
        complete = False
    if not complete:
        raise DataError(f'{file}: the classes are not numbered 0, 1, ...; it must be {{"Approaching something": "0"}}')
    return names


def _load(path: Path) -> Any:
    try:
        return json.loads(read_file(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {error}; get the file again") from None


def read_charades(root: str, source: str, classes: Sequence[str] | None) -> Videos:
    """The videos `<id>` of `Charades_v1_train.csv` (or `_test`), with `actions` `c092 11.90 21.20;c147 0.00 12.60`.

    A video has the classes of all its actions, a clip those of the actions during the clip; either may have none.
    `classes` defaults to the lines of `Charades_v1_classes.txt` next to `source`, or c000 to c156.
    """
    listing = Path(root, source)
    named = listing.with_name(CHARADES_NAMES)
    names = classes or ([text for _, text in numbered_lines(named)] if named.exists() else CHARADES_CLASSES)
    rows = []
    for line, row in read_table(listing, ("id", "actions"), "use the Charades_v1_*.csv as published"):
        where = f"{listing}:{line}"
        actions = sorted(_action(text, len(names), where) for text in row["actions"].split(";") if text.strip())
        spans = [(start, end) for _, start, end in actions]
        rows.append(Row(where, row["id"], [number for number, _, _ in actions], CHARADES_FOLDERS, spans))
    return locate(root, listing, rows, names)


def _action(action: str, classes: int, where: str) -> tuple[int, float, float]:
    """Class, start and end in seconds of an action such as `c092 11.90 21.20`; without times it spans the video."""
    code, *times = action.split()
    number = int(code[1:]) if re.fullmatch("c[0-9]{1,9}", code) else classes
    if number >= classes:
        raise DataError(f"{where}: {code!r} is not a class; it must be c000 to c{classes - 1:03}")
    try:
        start, end = map(float, times or (0.0, math.inf))
        if not start <= end:
            raise ValueError
    except ValueError:
        raise DataError(f"{where}: {action!r}: must be a class, and its start and end in seconds") from None
    return number, start, end


def read_ucf101(root: str, source: str, classes: Sequence[str] | None) -> Videos:
    """The videos of `trainlist01.txt` or `testlist01.txt`: lines `Archery/v_Archery_g08_c01.avi 3`.

    A video's class is its folder; the number, which the lists of test videos lack, is ignored. `classes` defaults to
    `classInd.txt` next to `source`, in its order.
    """
    listing = Path(root, source)
    names = classes or _ucf_classes(listing.with_name(UCF_CLASSES))
    rows = []
    for line, text in numbered_lines(listing):
        label, _, video = re.sub(r" \d+$", "", text).rpartition("/")
        rows.append(_in_class_folder(f"{listing}:{line}", video, label or text, UCF_FOLDERS))
    return locate(root, listing, rows, names)


def _ucf_classes(file: Path) -> list[str]:
    """The classes of `classInd.txt`, in the order of their numbers."""
    rows = [line.split() for _, line in numbered_lines(file)]
    if any(len(row) != 2 or not row[0].isdecimal() for row in rows):
        raise DataError(f"{file}: must have lines such as `1 ApplyEyeMakeup`; get the file again")
    return [name for _, name in sorted((int(number), name) for number, name in rows)]


def read_hmdb51(root: str, source: str, classes: Sequence[str] | None) -> Videos:
    """The videos of one split: `source` is `train1`, `test1`, `train2` ... `test3`, or a path that ends so.

    The files `<class>_test_split1.txt` are in the path's folder or its subfolder `testTrainMulti_7030_splits`.
    """
    path = Path(root, source)
    part = re.fullmatch("(train|test)([1-3])", path.name)
    if part is None:
        raise DataError(f"{path}: HMDB51 has no split {path.name!r}; use train1 to train3 or test1 to test3")
    ending = f"_test_split{part[2]}.txt"
    folders = (path.parent / HMDB_SPLITS, path.parent)
    files = next((files for folder in folders if (files := sorted(folder.glob(f"*{ending}")))), None)
    if files is None:
        raise DataError(f"{folders[0]}: no file <class>{ending}; put the data set's splits there")
    rows = []
    for file in files:
        for line, text in numbered_lines(file):
            video, _, mark = text.rpartition(" ")
            if mark not in ("0", "1", "2"):
                raise DataError(f"{file}:{line}: {text!r} does not end in 0, 1 or 2; get the file again")
            if mark == HMDB_PARTS[part[1]]:
                label = file.name.removesuffix(ending)
                rows.append(_in_class_folder(f"{file}:{line}", video.strip(), label, HMDB_FOLDERS))
    return locate(root, path, rows, classes or [file.name.removesuffix(ending) for file in files])


def _in_class_folder(where: str, file: str, label: str, folders: Sequence[str]) -> Row:
    """A video in the folder of its class, with any suffix."""
    return Row(where, file.rpartition(".")[0] or file, label, [str(Path(folder, label)) for folder in folders])
