"""Lists of `path label` lines, as PySlowFast and MMAction write them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mgtrain.datasets.videos import Videos, check_exists, read_lines
from mgtrain.errors import DataError


def read_list(root: str, source: str, classes: Sequence[str] | None) -> Videos:
    """The videos of the text file `source`: one `path label` or `path,label` per line, paths relative to `root`.

    The label is the last field, so paths may hold spaces and commas. It is the number of a class, or its name where
    `classes` are given; without them the classes are the numbers up to the largest. Empty lines and lines that start
    with # are skipped. The videos themselves are not looked for.
    """
    listing = Path(root, source)
    check_exists(Path(root), "folder of videos")
    check_exists(listing, "list of videos")
    lines = [(number, line.strip()) for number, line in enumerate(read_lines(listing), start=1)]
    lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not lines:
        raise DataError(f"{listing}: no video in it; write one `path label` per line")

    numbers = {name: number for number, name in enumerate(classes or ())}
    separator = _separator([line for _, line in lines], numbers)
    labels: dict[str, tuple[int, int]] = {}  # path -> label, line
    entries = []
    for number, line in lines:
        where = f"{listing}:{number}"
        path, _, text = (part.strip() for part in _split(line, separator))
        label = numbers.get(text, int(text) if _is_number(text) else None)
        if label is None or not path:
            allowed = "the number or the name of a class" if classes else "the number of a class (0, 1, ...)"
            raise DataError(f"{where}: {line!r} does not end in a label; write `path label`, the label being {allowed}")
        if label < 0 or (classes and label >= len(classes)):
            highest = f"0 to {len(classes) - 1}" if classes else "0 or more"
            raise DataError(f"{where}: label {label} is out of range; it has to be {highest}")
        path = _inside(path, root, where)
        known, line_of_known = labels.setdefault(path, (label, number))
        if known != label:
            raise DataError(f"{where}: {path!r} has label {label}, but {known} in line {line_of_known}; keep one")
        entries.append((path, label))
    return Videos.of(root, entries, classes or [str(n) for n in range(1 + max(label for _, label in entries))])


def _is_number(text: str) -> bool:
    return text.isascii() and text.removeprefix("-").isdigit()


def _split(line: str, separator: str | None) -> tuple[str, str, str]:
    """The line before and after its last separator; None stands for white space."""
    path, *label = line.rsplit(separator, 1)
    return path, separator or " ", label[0] if label else ""


def _separator(lines: list[str], numbers: dict[str, int]) -> str | None:
    """What is before the labels of this file: the one of comma and white space (None) that leaves more valid labels."""

    def valid(separator: str | None) -> int:
        labels = (_split(line, separator)[2].strip() for line in lines)
        return sum(label in numbers or _is_number(label) for label in labels)

    return "," if valid(",") >= valid(None) and any("," in line for line in lines) else None


def _inside(path: str, root: str, where: str) -> str:
    """The path relative to the root; `DataError` if it leads out of it. Links are not followed."""
    absolute_root = os.path.abspath(root)
    relative = os.path.relpath(os.path.join(absolute_root, path), absolute_root)
    if relative == os.pardir or relative.startswith(os.pardir + os.sep):
        raise DataError(f"{where}: {path!r} is outside of {root}; set the root to a folder that holds all videos")
    return relative
