"""Charades: a CSV whose column `actions` holds every action with its times, `c092 11.90 21.20;c147 0.00 12.60`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from mgtrain.data.videos import Finder, Table, Videos, check_exists, read_lines
from mgtrain.errors import DataError

CLASSES = 157
CLASS_NAMES = "Charades_v1_classes.txt"  # beside the list of videos: lines such as `c000 Holding some clothes`
FOLDERS = ("Charades_v1", "Charades_v1_480", "videos", "")  # relative to the root


def read_charades(root: str, source: str, classes: Sequence[str] | None) -> Videos:
    """The videos of `Charades_v1_train.csv` (or `_test`) that are there, as `<id>` with any suffix; multi-label.

    They are looked for in `root/Charades_v1`, `root/Charades_v1_480`, `root/videos` and `root`. A video has the classes
    of all its actions, and a clip of it those of the actions that happen in it; either may have none. Without `classes`
    these are the lines of `Charades_v1_classes.txt` beside `source`, or c000 to c156. Rows without a video are left out
    and counted.
    """
    listing = Path(root, source)
    check_exists(Path(root), "folder of videos")
    check_exists(listing, "Charades CSV")
    table = Table(listing)
    absent = [column for column in ("id", "actions") if column not in table.columns]
    if absent:
        raise DataError(f"{listing}:1: no column {absent[0]!r}; use the Charades_v1_*.csv as they are published")
    names = tuple(classes or _read_classes(listing))
    finder = Finder(root)
    found, spans = [], []
    for line, row in table:
        actions = [action for action in row["actions"].split(";") if action.strip()]
        known = sorted(_action(action, len(names), f"{listing}:{line}") for action in actions)
        file = finder.find(row["id"], FOLDERS)
        if file is not None:
            found.append((file, [number for number, _, _ in known]))
            spans += [(start, end) for _, start, end in known]
    if not found and not finder.missing:
        raise DataError(f"{listing}: no row in it; it has to list videos, one per line")
    if not found:
        raise finder.none_found(listing, FOLDERS)
    return Videos.of(root, found, names, finder.missing, finder.missing_names, spans)


def _action(action: str, classes: int, where: str) -> tuple[int, float, float]:
    """Class, start and end in seconds of an action such as `c092 11.90 21.20`; without times it is all of the video."""
    code, *times = action.split()
    number = int(code[1:]) if re.fullmatch("c[0-9]{1,9}", code) else classes
    if number >= classes:
        raise DataError(f"{where}: {code!r} is no class; it has to be c000 to c{classes - 1:03}")
    try:
        start, end = map(float, times or (0.0, math.inf))
        if not start <= end:
            raise ValueError
    except ValueError:
        raise DataError(f"{where}: {action!r}: has to be a class, and the seconds of its start and its end") from None
    return number, start, end


def _read_classes(listing: Path) -> list[str]:
    file = listing.with_name(CLASS_NAMES)
    if file.exists():
        return [line.strip() for line in read_lines(file) if line.strip()]
    return [f"c{number:03}" for number in range(CLASSES)]
