"""Lists of `path label` lines, the format of PySlowFast and MMAction."""

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mgtrain.data.formats.dialect import Columns, Dialect, cells_before_label, quoted, recognize, with_slashes
from mgtrain.data.formats.reading import is_video, numbered_lines
from mgtrain.data.stretch import Stretch, parted
from mgtrain.data.videos import EXAMPLES, Videos, leaves_root
from mgtrain.errors import DataError, UsageError
from mgtrain.processes.files import write_whole

log = logging.getLogger(__name__)

NO_LABEL = "-"
NUMBER_OF_CLASS = re.compile(r"-?[0-9]{1,9}(\.0+)?", re.ASCII)  # pandas writes 3.0 in a column with missing values
MOST_CLASSES = 1_000_000
SAMPLE = 10_000  # lines to recognize a list's dialect from


def read_list(root: str, source: str, classes: Sequence[str] | None, outside_root: bool = False) -> Videos:
    """The videos of the text file `source`: one `path label` or `path,label` per line, paths relative to `root`.

    The label is the last field, so paths may contain spaces and commas. If the first line names the columns, as in
    `path,label`, path and label are found by name and other columns are ignored. Either may be in double quotes. A
    label is the number of a class, or with `classes` its name; without `classes` the classes are the numbers up to the
    largest label. Several labels of a video are separated by semicolons (`3;17`), a dash means none, and either makes
    the set multi-label. Empty lines and lines that start with # are skipped. The video files need not exist.

    Paths outside the root (`..`, or absolute) are refused unless `outside_root`. Symbolic links are not resolved, so
    the root may contain links to other disks. `remarks` describe what was recognized beyond `path label`. Raises
    `DataError` if a line is not valid, or there is no video.
    """
    listing = Path(root, source)
    lines = [(number, line) for number, line in numbered_lines(listing) if not line.startswith("#")]
    numbers = {name: number for number, name in enumerate(classes or ())}

    def is_label(text: str) -> bool:
        return _labels_of(text, numbers) is not None

    if lines and {"youtube_id", "time_start"} <= set(re.split(r"\W+", lines[0][1])):
        raise DataError(f"{listing}: is a list of Kinetics; set data.format=kinetics")
    dialect = recognize([line for _, line in lines[:SAMPLE]], is_label)
    lines = lines[dialect.header :]
    fields = []
    for number, line in lines:
        try:
            fields.append(dialect.split(line))
        except ValueError as error:
            raise DataError(f"{listing}:{number}: {line!r}: {error}") from None
    remarks = [dialect.remark] if dialect.remark else []
    if with_slashes(root, [path for path, _ in fields]):
        remarks.append("backslashes read as slashes")
        fields = [(path.replace("\\", "/"), text) for path, text in fields]
    columns = dialect.stretch
    cells: Iterable[Sequence[str]] = (dialect.fields(line) for _, line in lines)
    if not dialect.columns and all(map(is_label, {text for _, text in fields})):
        before_label = cells_before_label(root, [path for path, _ in fields])
        if before_label:
            number, line = lines[0]
            columns, form = _columns_before_label(root, before_label, f"{listing}:{number}: {line!r}")
            cells = before_label
            fields = [(path, text) for (path, *_), (_, text) in zip(before_label, fields, strict=True)]
            remarks.append(f"read as `{form}`")
    stretches: list[Stretch | None] = [None] * len(lines)
    if columns:
        both = zip(cells, lines, strict=True)
        stretches = [_stretch(columns, row, f"{listing}:{number}: {line!r}") for row, (number, line) in both]
    meaning: dict[str, int | tuple[int, ...]] = {}  # text of a label -> its number or numbers
    first_of: dict[str, tuple[int | tuple[int, ...], int]] = {}  # path -> label and line of its first row
    rows: list[tuple[str, int | tuple[int, ...]]] = []
    for (number, line), (name, text), stretch in zip(lines, fields, stretches, strict=True):
        where = f"{listing}:{number}"
        if text not in meaning or not name:
            meaning[text] = _parse_label(line, name, text, numbers, where, dialect)
        path, written = parted(name)
        if written and not written.start < written.end:
            nothing = f"{written.start:g} to {written.end:g} has nothing in it"
            raise DataError(f"{where}: {name!r}: {nothing}; the end must be after the start")
        path = f"{_within(path, root, where, outside_root)}{stretch or written or ''}"
        label = meaning[text]
        known, first = first_of.setdefault(path, (label, number))
        if known != label:
            raise DataError(f"{where}: {path!r} has label {label}, but {known} in line {first}; keep one")
        rows.append((path, label))
    _check_numbers(meaning, numbers, listing)
    if not rows:
        raise DataError(f"{listing}: lists no video; write one `path label` per line")
    if not classes:
        labels = {n for label in meaning.values() for n in ([label] if isinstance(label, int) else label)} or {0}
        classes = [str(n) for n in range(max(labels) + 1)]
        if 0 not in labels and len(labels) == max(labels) > 1:
            remarks.append(
                f"labels run from 1 to {max(labels)}, so class 0 has no video; to count from 1, name the classes 1 to "
                f"{max(labels)}, one per line, in {listing.parent / 'classes.txt'} and set data.classes={max(labels)}"
            )
    return replace(Videos.of(root, rows, classes), remarks=tuple(f"{listing}: {remark}" for remark in remarks))


def _columns_before_label(root: str, cells: Sequence[Sequence[str]], first: str) -> tuple[Columns, str]:
    """The columns of the path and the numbers before each label, and their form; `first` describes the first row."""
    start = len(cells[0]) == 3
    files = any(is_video(path) or os.path.isfile(os.path.join(root, path)) for path, *_ in cells[:EXAMPLES])
    if files and not start:
        raise DataError(
            f"{first} is `path number label`, which is for folders of frames; write `path label` or `path start end "
            "label`, or name the columns in a first line such as `path,number,label`"
        )
    form = "path start end label" if files else f"path {'start ' * start}frames label"
    return Columns("t" if files else "n", 1 if start else None, 1 + start), form


def _stretch(columns: Columns, cells: Sequence[str], where: str) -> Stretch | None:
    try:
        return columns.stretch(cells)
    except ValueError as error:
        what = "start and end are seconds" if columns.unit == "t" else "frames are whole numbers, counted from 0"
        raise DataError(f"{where}: {error}; {what}, with the end after the start") from None


def _labels_of(text: str, numbers: Mapping[str, int]) -> list[int] | None:
    """The numbers of the classes that a label names or numbers, none for a dash; None if it is not a label."""
    parts = [text] if text in numbers else [part.strip() for part in text.split(";")]
    if parts == [NO_LABEL] and NO_LABEL not in numbers:
        return []
    if not all(part in numbers or NUMBER_OF_CLASS.fullmatch(part) for part in parts):
        return None
    return [numbers[part] if part in numbers else int(float(part)) for part in parts]


def _check_numbers(labels: Iterable[str], numbers: Mapping[str, int], listing: Path) -> None:
    """If all classes are named by numbers, raise `DataError` unless all labels are names, or all count from 0."""
    if not all(map(NUMBER_OF_CLASS.fullmatch, numbers)):
        return
    parts = {part.strip() for text in labels for part in text.split(";")} - {NO_LABEL}
    name = min((part for part in parts if part in numbers and numbers[part] != int(float(part))), default=None)
    number = min((part for part in parts if part not in numbers), default=None)
    if name and number:
        raise DataError(
            f"{listing}: label {name} is the name of a class, but {number} is none, so it may be the number of class "
            f"{[*numbers][int(float(number))]!r}; write the names of all classes, or rename the classes to words"
        )


def _parse_label(
    line: str, path: str, text: str, numbers: Mapping[str, int], where: str, dialect: Dialect
) -> int | tuple[int, ...]:
    """The number of the label, or those of several labels."""
    labels = _labels_of(text, numbers)
    if labels is None or not path:
        allowed = "the number of a class (0, 1, ...), or its name, if classes.txt beside the list has a name per line"
        if numbers:
            allowed = "the number or the name of a class"
        if not dialect.header and len(dialect.fields(line)) > 2:
            allowed += ", or name the columns in a first line such as `path,label,name`"
        raise DataError(f"{where}: {line!r} does not end in a label; write `path label`, where the label is {allowed}")
    most = len(numbers) or MOST_CLASSES
    for label in labels:
        if not 0 <= label < most:
            raise DataError(f"{where}: label {label} is out of range; it must be 0 to {most - 1}")
    return labels[0] if len(labels) == 1 else tuple(sorted(set(labels)))


def _within(path: str, root: str, where: str, outside_root: bool) -> str:
    """The path relative to the root. Raises `DataError` if it is outside the root, unless that is allowed."""
    if path[0] not in "./" and os.path.normpath(path) == path:
        return path  # the fast path, for lists of a million videos
    absolute_root = os.path.abspath(root)
    relative = os.path.relpath(os.path.join(absolute_root, path), absolute_root)
    if leaves_root(relative) and not outside_root:
        raise DataError(
            f"{where}: {path!r} is outside of {root}; set data.root (--root of init) to a folder with all "
            "videos, or allow it with data.outside_root=true"
        )
    return relative


def write_lists(folder: Path, lists: Mapping[str, tuple[Videos, Iterable[int]]]) -> list[Path]:
    """Write the given rows of each set as a list, `folder/<name>.csv`, and their classes as `folder/classes.txt`.

    With the same `data.root` and `data.format=list` a recipe reads the same videos, classes and labels from them. A
    list has no times of labels; a warning says so. Raises `DataError` if a list cannot contain one of the paths, and
    `UsageError` if one of the files exists with other contents, or cannot be written.
    """
    contents = {folder / f"{name}.csv": _text(videos, rows).encode() for name, (videos, rows) in lists.items()}
    if any(videos.timed for videos, _ in lists.values()):
        log.warning(
            "a list has no times of labels, so each clip gets all labels of its video; to train on the labels of each "
            "clip, keep the original files and their data.format"
        )
    classes = next(iter(lists.values()))[0].classes
    contents[folder / "classes.txt"] = "".join(f"{name}\n" for name in classes).encode()
    try:
        for path, content in contents.items():
            if path.exists() and (not path.is_file() or path.read_bytes() != content):
                raise UsageError(f"{path}: exists with other contents; choose another folder, or remove it")
        for path, content in contents.items():
            if not path.exists():
                write_whole(path, content)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}; choose another folder") from None
    return [*contents]


def _text(videos: Videos, rows: Iterable[int]) -> str:
    """Lines from which `read_list` reads the same videos."""
    place = {name: number for number, name in enumerate(videos.classes)}
    # Write a class's name if all are numbers, or if its number is the name of another class.
    numbered = all(map(NUMBER_OF_CLASS.fullmatch, videos.classes))
    words = [name if numbered or place.get(str(n), n) != n else str(n) for n, name in enumerate(videos.classes)]
    lines = []
    for row in rows:
        name = videos.name(row)
        path = quoted(f"./{name}" if name[0] in "# " else name)
        if path != path.rstrip() or re.search(r"[\r\n\udc80-\udcff]", path) or leaves_root(path):
            raise DataError(
                f"{videos.path(row)!r}: a list cannot contain this path; it must be UTF-8, within {videos.root}, "
                "without line breaks or spaces at its end; rename the file"
            )
        lines.append(f"{path} {';'.join(words[n] for n in videos.labels(row)) or NO_LABEL}\n")
    return "".join(lines)
