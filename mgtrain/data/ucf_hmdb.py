"""UCF101 and HMDB51: three splits each, in the text files that the data sets come with."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mgtrain.data.videos import Finder, Videos, check_exists, read_lines
from mgtrain.errors import DataError

UCF_CLASSES = "classInd.txt"  # beside the list: lines such as `1 ApplyEyeMakeup`
UCF_FOLDERS = ("UCF-101", "videos", "")  # relative to the root; in them a folder for each class
HMDB_FOLDERS = ("hmdb51_org", "hmdb51", "videos", "")
HMDB_SPLITS = "testTrainMulti_7030_splits"  # a file `<class>_test_split<1 to 3>.txt` for each class
HMDB_PARTS = {"train": "1", "test": "2"}  # what a split's file marks a video with; 0: in neither


def read_ucf101(root: str, source: str, classes: Sequence[str] | None) -> Videos:
    """The videos of `trainlist01.txt` or `testlist01.txt` that are there: lines `Archery/v_Archery_g08_c01.avi 3`.

    A video's class is its folder; the number, which counts from 1 and which the lists of test videos lack, is not
    looked at. Without `classes` they are those of `classInd.txt` beside `source`, in its order. Videos are looked for
    in `root/UCF-101`, `root/videos` and `root`. Lines without a video are left out and counted.
    """
    listing = Path(root, source)
    check_exists(Path(root), "folder of videos")
    check_exists(listing, "list of videos")
    names = tuple(classes or _read_class_index(listing.with_name(UCF_CLASSES)))
    entries = []
    for line, text in enumerate(read_lines(listing), start=1):
        if not text.strip():
            continue
        label, _, video = re.sub(r" \d+$", "", text.strip()).rpartition("/")
        if label not in names:
            raise DataError(
                f"{listing}:{line}: {text.strip()!r} is not in the folder of one of the {len(names)} classes; it has "
                "to be `<class>/<video>`"
            )
        entries.append((label, video.rpartition(".")[0] or video))
    return _found(root, listing, entries, names, UCF_FOLDERS)


def read_hmdb51(root: str, source: str, classes: Sequence[str] | None) -> Videos:
    """The videos of one split: `source` is `train1`, `test1`, `train2` ... `test3`, or a path that ends so.

    The files `<class>_test_split1.txt` are looked for in the path's folder, or in `testTrainMulti_7030_splits` there.
    Videos are looked for, within a folder for each class, in `root/hmdb51_org`, `root/hmdb51`, `root/videos` and
    `root`. Lines without a video are left out and counted.
    """
    path = Path(root, source)
    check_exists(Path(root), "folder of videos")
    part = re.fullmatch("(train|test)([1-3])", path.name)
    if part is None:
        raise DataError(f"{path}: no split of HMDB51 is called {path.name!r}; name train1 to train3 or test1 to test3")
    ending = f"_test_split{part[2]}.txt"
    folders = (path.parent / HMDB_SPLITS, path.parent)
    files = next((found for folder in folders if (found := sorted(folder.glob(f"*{ending}")))), None)
    if files is None:
        raise DataError(f"{folders[0]}: no file <class>{ending}; put the data set's splits there")
    names = tuple(classes or [file.name.removesuffix(ending) for file in files])
    entries = []
    for file in files:
        label = file.name.removesuffix(ending)
        if label not in names:
            raise DataError(f"{file}: {label!r} is none of the {len(names)} classes; list it in classes.txt")
        for line, text in enumerate(read_lines(file), start=1):
            video, _, mark = text.strip().rpartition(" ")
            if text.strip() and mark not in ("0", "1", "2"):
                raise DataError(f"{file}:{line}: {text.strip()!r} does not end in 0, 1 or 2; get the file anew")
            if mark == HMDB_PARTS[part[1]]:
                entries.append((label, video.strip().rpartition(".")[0] or video.strip()))
    return _found(root, path, entries, names, HMDB_FOLDERS)


def _found(
    root: str, listing: Path, entries: Sequence[tuple[str, str]], names: tuple[str, ...], folders: Sequence[str]
) -> Videos:
    """The videos, (class, name without suffix), that are in the folder of their class in one of `folders`."""
    if not entries:
        raise DataError(f"{listing}: no video in it; get the file anew")
    finder, numbers = Finder(root), {name: number for number, name in enumerate(names)}
    found = []
    for label, video in entries:
        file = finder.find(video, [str(Path(folder, label)) for folder in folders])
        if file is not None:
            found.append((file, numbers[label]))
    if not found:
        raise finder.none_found(listing, [str(Path(folder, entries[0][0])) for folder in folders])
    return Videos.of(root, found, names, finder.missing, finder.missing_names)


def _read_class_index(file: Path) -> list[str]:
    """The classes of `classInd.txt`, in the order of their numbers."""
    check_exists(file, "file of classes")
    rows = [line.split() for line in read_lines(file) if line.strip()]
    if any(len(row) != 2 or not row[0].isdecimal() for row in rows):
        raise DataError(f"{file}: has to have lines such as `1 ApplyEyeMakeup`; get the file anew")
    return [name for _, name in sorted((int(number), name) for number, name in rows)]
