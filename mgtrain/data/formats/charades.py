"""Charades: a CSV whose column `actions` lists actions with their times, `c092 11.90 21.20;c147 0.00 12.60`."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

from mgtrain.data.formats.locate import Row, locate
from mgtrain.data.formats.reading import numbered_lines, read_table
from mgtrain.data.videos import Videos
from mgtrain.errors import DataError

CLASSES = [f"c{number:03}" for number in range(157)]
CLASS_NAMES = "Charades_v1_classes.txt"  # next to the list of videos: lines such as `c000 Holding some clothes`
FOLDERS = ("Charades_v1", "Charades_v1_480", "videos", "")  # to search, relative to the root


def read_charades(root: str, source: str, classes: Sequence[str] | None) -> Videos:
    """The videos `<id>` of `Charades_v1_train.csv` (or `_test`), with `actions` `c092 11.90 21.20;c147 0.00 12.60`.

    A video has the classes of all its actions, a clip those of the actions during the clip; either may have none.
    `classes` defaults to the lines of `Charades_v1_classes.txt` next to `source`, or c000 to c156.
    """
    listing = Path(root, source)
    named = listing.with_name(CLASS_NAMES)
    names = classes or ([text for _, text in numbered_lines(named)] if named.exists() else CLASSES)
    rows = []
    for line, row in read_table(listing, ("id", "actions"), "use the Charades_v1_*.csv as published"):
        where = f"{listing}:{line}"
        actions = sorted(_action(text, len(names), where) for text in row["actions"].split(";") if text.strip())
        spans = [(start, end) for _, start, end in actions]
        rows.append(Row(where, row["id"], [number for number, _, _ in actions], FOLDERS, spans))
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
