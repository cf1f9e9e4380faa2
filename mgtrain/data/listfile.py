"""Lists of `path label` lines, as PySlowFast and MMAction write them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mgtrain.data.videos import Videos, check_exists, leaves_root, read_lines
from mgtrain.errors import DataError, UsageError

NO_LABEL = "-"
MOST_CLASSES = 1_000_000


def read_list(root: str, source: str, classes: Sequence[str] | None, outside_root: bool = False) -> Videos:
    """The videos of the text file `source`: one `path label` or `path,label` per line, paths relative to `root`.

    The label is the last field, so paths may hold spaces and commas. It is the number of a class, or its name where
    `classes` are given; without them the classes are the numbers up to the largest. Several labels of one video are
    joined by semicolons (`3;17`), a dash stands for none, and either makes the set multi-label. Empty lines and lines
    that start with # are skipped. The videos themselves are not looked for.

    A path that leads out of the root by its words (`..`, or absolute) is refused unless `outside_root`. Links are not
    looked at, so a root full of links to other disks is as good as any.
    """
    listing = Path(root, source)
    check_exists(Path(root), "folder of videos")
    check_exists(listing, "list of videos")
    lines = [line.strip() for line in read_lines(listing)]
    numbers = {name: number for number, name in enumerate(classes or ())}
    separator = _separator(lines, numbers)
    meaning: dict[str, int | tuple[int, ...]] = {}  # label as written -> as meant
    row_of: dict[str, int] = {}  # path -> its first place in `rows`
    rows: list[tuple[str, int | tuple[int, ...], int]] = []  # path, label, line
    for number, line in enumerate(lines, start=1):
        if not line or line.startswith("#"):
            continue
        path, text = _split(line, separator)
        if text not in meaning or not path:
            meaning[text] = _parse_label(line, path, text, numbers, f"{listing}:{number}")
        path = _within(path, root, f"{listing}:{number}", outside_root)
        label = meaning[text]
        row = row_of.setdefault(path, len(rows))
        rows.append((path, label, number))
        _, known, first = rows[row]
        if known != label:
            raise DataError(f"{listing}:{number}: {path!r} has label {label}, but {known} in line {first}; keep one")
    if not rows:
        raise DataError(f"{listing}: no video in it; write one `path label` per line")
    if not classes:
        highest = max((n for label in meaning.values() for n in _each(label)), default=0)
        classes = [str(n) for n in range(highest + 1)]
    return Videos.of(root, ((path, label) for path, label, _ in rows), classes)


def write_lists(folder: Path, lists: Mapping[str, tuple[Videos, Iterable[int]]]) -> list[Path]:
    """Write the given rows of each set as a list, `folder/<name>.csv`, and their classes as `folder/classes.txt`.

    With `data.root` as it was and `data.format=list` a recipe reads the same videos, classes and labels from them.

    Raises:
        UsageError: one of the files is there already and says something else, or cannot be written.
        DataError: a path that no list can hold.
    """
    texts = {f"{name}.csv": _text(videos, rows) for name, (videos, rows) in lists.items()}
    classes = next(iter(lists.values()))[0].classes
    texts["classes.txt"] = "".join(f"{name}\n" for name in classes)
    try:
        for name, text in texts.items():
            path = folder / name
            if path.exists() and (not path.is_file() or path.read_bytes() != text.encode()):
                raise UsageError(f"{path}: is there already and would change; remove it, or choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_bytes(text.encode())
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written to: {error.strerror}; choose another folder") from None
    return [folder / name for name in texts]


def _text(videos: Videos, rows: Iterable[int]) -> str:
    """Lines that `read_list` reads back."""
    place = {name: number for number, name in enumerate(videos.classes)}
    # A number that is the name of another class would be read as that class: then the name is written.
    words = [name if place.get(str(n), n) != n else str(n) for n, name in enumerate(videos.classes)]
    lines = []
    for row in rows:
        name = videos.name(row)
        path = f"./{name}" if name[0] in "# " else name
        if path != path.rstrip() or re.search(r"[\r\n\udc80-\udcff]", path) or leaves_root(path):
            raise DataError(
                f"{videos.path(row)!r}: a list cannot hold this path; it has to be UTF-8, within {videos.root}, "
                "without line breaks and spaces at its end; rename the file"
            )
        lines.append(f"{path} {';'.join(words[n] for n in videos.labels(row)) or NO_LABEL}\n")
    return "".join(lines)


def _parse_label(line: str, path: str, text: str, numbers: dict[str, int], where: str) -> int | tuple[int, ...]:
    """A label, or the labels, in numbers."""
    parts = [text] if text in numbers else [part.strip() for part in text.split(";")]
    if parts == [NO_LABEL]:
        return ()
    labels = [numbers.get(part, int(part) if _is_number(part) else None) for part in parts]
    if None in labels or not path:
        allowed = "the number or the name of a class" if numbers else "the number of a class (0, 1, ...)"
        raise DataError(f"{where}: {line!r} does not end in a label; write `path label`, the label being {allowed}")
    known = [label for label in labels if label is not None]
    for label in known:
        if not 0 <= label < (len(numbers) or MOST_CLASSES):
            allowed = f"0 to {(len(numbers) or MOST_CLASSES) - 1}"
            raise DataError(f"{where}: label {label} is out of range; it has to be {allowed}")
    return known[0] if len(known) == 1 else tuple(sorted(set(known)))


def _each(label: int | tuple[int, ...]) -> tuple[int, ...]:
    return (label,) if isinstance(label, int) else label


def _is_number(text: str) -> bool:
    return text.isascii() and text.removeprefix("-").isdigit() and len(text) < 10


def _split(line: str, separator: str | None) -> tuple[str, str]:
    """The line before and after its last separator; None stands for white space."""
    path, *label = line.rsplit(separator, 1)
    return (path.strip(), label[0].strip()) if label else (path, "")


def _separator(lines: list[str], numbers: dict[str, int]) -> str | None:
    """What is before the labels of this file: the one of comma and white space (None) that leaves more valid labels."""

    def valid(separator: str | None) -> int:
        texts = (_split(line, separator)[1] for line in lines if line and not line.startswith("#"))
        return sum(text in numbers or all(map(_is_number, text.split(";"))) for text in texts)

    return "," if any("," in line for line in lines) and valid(",") >= valid(None) else None


def _within(path: str, root: str, where: str, outside_root: bool) -> str:
    """The path relative to the root; `DataError` if it leads out of it and that is not allowed."""
    if path[0] not in "./" and os.path.normpath(path) == path:
        return path  # the short way: there may be a million
    absolute_root = os.path.abspath(root)
    relative = os.path.relpath(os.path.join(absolute_root, path), absolute_root)
    if leaves_root(relative) and not outside_root:
        raise DataError(
            f"{where}: {path!r} is outside of {root}; set data.root to a folder that holds all videos, "
            "or allow it with data.outside_root=true"
        )
    return relative
