"""Lists of `path label` lines, as PySlowFast and MMAction write them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mgtrain.data.reading import numbered_lines
from mgtrain.data.videos import Videos, leaves_root
from mgtrain.errors import DataError, UsageError

NO_LABEL = "-"
MOST_CLASSES = 1_000_000


def read_list(root: str, source: str, classes: Sequence[str] | None, outside_root: bool = False) -> Videos:
    """The videos of the text file `source`: one `path label` or `path,label` per line, paths relative to `root`.

    The label is the last field, so paths may contain spaces and commas. It is the number of a class, or its name where
    `classes` are given; without them the classes are the numbers up to the largest. Several labels of one video are
    joined by semicolons (`3;17`), a dash stands for none, and either makes the set multi-label. Empty lines and lines
    that start with # are skipped. The video files need not exist.

    A path that leads out of the root (`..`, or absolute) is refused unless `outside_root`. Links are not followed for
    this, so a root of links to other disks is fine.
    """
    listing = Path(root, source)
    lines = [(number, line) for number, line in numbered_lines(listing) if not line.startswith("#")]
    numbers = {name: number for number, name in enumerate(classes or ())}
    separator = _separator([line for _, line in lines], numbers)
    meaning: dict[str, int | tuple[int, ...]] = {}  # label as written -> as meant
    row_of: dict[str, int] = {}  # path -> its first place in `rows`
    rows: list[tuple[str, int | tuple[int, ...], int]] = []  # path, label, line
    for number, line in lines:
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
        raise DataError(f"{listing}: lists no video; write one `path label` per line")
    if not classes:
        highest = max(
            (n for label in meaning.values() for n in ([label] if isinstance(label, int) else label)), default=0
        )
        classes = [str(n) for n in range(highest + 1)]
    return Videos.of(root, ((path, label) for path, label, _ in rows), classes)


def write_lists(folder: Path, lists: Mapping[str, tuple[Videos, Iterable[int]]]) -> list[Path]:
    """Write the given rows of each set as a list, `folder/<name>.csv`, and their classes as `folder/classes.txt`.

    With the same `data.root` and `data.format=list` a recipe reads the same videos, classes and labels from them.

    Raises:
        UsageError: one of the files exists with other contents, or cannot be written.
        DataError: a list cannot contain one of the paths.
    """
    texts = {f"{name}.csv": _text(videos, rows) for name, (videos, rows) in lists.items()}
    classes = next(iter(lists.values()))[0].classes
    texts["classes.txt"] = "".join(f"{name}\n" for name in classes)
    try:
        for name, text in texts.items():
            path = folder / name
            if path.exists() and (not path.is_file() or path.read_bytes() != text.encode()):
                raise UsageError(f"{path}: exists with other contents; remove it, or choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_bytes(text.encode())
    except OSError as error:
        raise UsageError(f"{folder}: cannot be written to: {error.strerror}; choose another folder") from None
    return [folder / name for name in texts]


def _text(videos: Videos, rows: Iterable[int]) -> str:
    """Lines that `read_list` reads back."""
    place = {name: number for number, name in enumerate(videos.classes)}
    # Write the name where the number is the name of another class, which it would be read as.
    words = [name if place.get(str(n), n) != n else str(n) for n, name in enumerate(videos.classes)]
    lines = []
    for row in rows:
        name = videos.name(row)
        path = f"./{name}" if name[0] in "# " else name
        if path != path.rstrip() or re.search(r"[\r\n\udc80-\udcff]", path) or leaves_root(path):
            raise DataError(
                f"{videos.path(row)!r}: a list cannot contain this path; it must be UTF-8, within {videos.root}, "
                "without line breaks or spaces at its end; rename the file"
            )
        lines.append(f"{path} {';'.join(words[n] for n in videos.labels(row)) or NO_LABEL}\n")
    return "".join(lines)


def _parse_label(line: str, path: str, text: str, numbers: dict[str, int], where: str) -> int | tuple[int, ...]:
    """The number of the label, or those of several labels."""
    parts = [text] if text in numbers else [part.strip() for part in text.split(";")]
    if parts == [NO_LABEL]:
        return ()
    labels = [numbers[part] if part in numbers else int(part) for part in parts if part in numbers or _is_number(part)]
    if len(labels) < len(parts) or not path:
        allowed = "the number or the name of a class" if numbers else "the number of a class (0, 1, ...)"
        raise DataError(f"{where}: {line!r} does not end in a label; write `path label`, where the label is {allowed}")
    for label in labels:
        if not 0 <= label < (len(numbers) or MOST_CLASSES):
            raise DataError(
                f"{where}: label {label} is out of range; it must be 0 to {(len(numbers) or MOST_CLASSES) - 1}"
            )
    return labels[0] if len(labels) == 1 else tuple(sorted(set(labels)))


def _is_number(text: str) -> bool:
    return text.isascii() and text.removeprefix("-").isdigit() and len(text) < 10


def _split(line: str, separator: str | None) -> tuple[str, str]:
    """The line before and after its last separator; None is white space."""
    path, *label = line.rsplit(separator, 1)
    return (path.strip(), label[0].strip()) if label else (path, "")


def _separator(lines: list[str], numbers: dict[str, int]) -> str | None:
    """The separator before this file's labels: comma, or white space (None), whichever gives more valid labels."""

    def valid(separator: str | None) -> int:
        texts = (_split(line, separator)[1] for line in lines)
        return sum(text in numbers or all(map(_is_number, text.split(";"))) for text in texts)

    return "," if any("," in line for line in lines) and valid(",") >= valid(None) else None


def _within(path: str, root: str, where: str, outside_root: bool) -> str:
    """The path relative to the root; `DataError` if it leads out of the root and that is not allowed."""
    if path[0] not in "./" and os.path.normpath(path) == path:
        return path  # fast: there may be a million
    absolute_root = os.path.abspath(root)
    relative = os.path.relpath(os.path.join(absolute_root, path), absolute_root)
    if leaves_root(relative) and not outside_root:
        raise DataError(
            f"{where}: {path!r} is outside of {root}; set data.root to a folder that contains all videos, "
            "or allow it with data.outside_root=true"
        )
    return relative
