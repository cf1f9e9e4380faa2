"""Which part of a video a row of a list is: recognized by the names of columns, or by numbers before the label."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from mgtrain.data.stretch import NUMBER, Stretch, parted
from mgtrain.data.videos import EXAMPLES

STARTS = ("start", "start_time", "start_seconds", "start_sec", "start_timestamp", "t_start", "begin")
ENDS = ("end", "end_time", "end_seconds", "end_sec", "end_timestamp", "t_end", "stop", "stop_time", "stop_timestamp")
FIRST_FRAMES, END_FRAMES = ("start_frame", "frame_start"), ("end_frame", "stop_frame", "frame_end")
COUNTS = ("frames", "num_frames", "n_frames", "total_frames", "frame_count")
CLOCK = re.compile(rf"(?:(?:([0-9]+):)?([0-9]+):)?({NUMBER})", re.ASCII)  # 75.5, 1:15.5 or 00:01:15.5
BEFORE_LABEL = [  # two numbers, and one
    re.compile(r"(.*?[^\s,;])" + rf"[\s,;]+((?:[0-9]+:)*{NUMBER})" * count, re.DOTALL | re.ASCII) for count in (2, 1)
]


class Columns(NamedTuple):
    """Where a row says which part of a video it is; `start` is None where all parts start at the first frame."""

    unit: str  # t: seconds, f: numbers of frames, n: the number of the first frame, and how many frames
    start: int | None
    end: int

    def stretch(self, cells: Sequence[str]) -> Stretch | None:
        """The stretch that a row's cells give; None where they are empty, which stands for the whole video.

        An empty end is the video's.

        >>> print(Columns("t", 1, 2).stretch(["a.mp4", "1:00", "75.5"]), Columns("n", 1, 2).stretch(["a", "30", "60"]))
        #t=60,75.5 #f=30,90
        >>> print(Columns("t", 1, 2).stretch(["a.mp4", "1:00", ""]), Columns("t", 1, 2).stretch(["a.mp4", "", "7"]))
        #t=60 #t=0,7

        Raises:
            ValueError: the cells are not numbers, or there is nothing between them.
        """
        named = dict(enumerate(cells))
        start, end = ("" if n is None else named.get(n, "").strip() for n in (self.start, self.end))
        if not end and (not start or self.unit == "n"):
            return None
        if self.unit == "t":
            return checked(Stretch("t", _seconds(start or "0"), _seconds(end) if end else math.inf))
        first, last = _whole(start or "0"), _whole(end) if end else math.inf
        return checked(Stretch("f", first, first + last if self.unit == "n" else last))


def named_columns(names: Sequence[str]) -> Columns | None:
    """The columns that a header names."""
    known = (STARTS, ENDS, FIRST_FRAMES, END_FRAMES, COUNTS)
    start, end, first, last, count = (next((names.index(name) for name in of if name in names), None) for of in known)
    if start is not None and end is not None:
        return Columns("t", start, end)
    if first is not None and last is not None:
        return Columns("f", first, last)
    return None if count is None else Columns("n", start if first is None else first, count)


def cells_before_label(root: str, texts: Sequence[str]) -> list[tuple[str, ...]]:
    """The path and the two numbers, or else the one, before the label of each row; none unless all rows have them.

    There are none where files are named so.

    >>> cells_before_label("", ["a 7/b.mp4 1.5,20"])
    [('a 7/b.mp4', '1.5', '20')]
    """
    if any(os.path.lexists(os.path.join(root, text)) for text in texts[:EXAMPLES]):
        return []
    for pattern in BEFORE_LABEL:
        cells = []
        for text in texts:
            match = pattern.fullmatch(text)
            if match is None or parted(text)[1]:
                break
            cells.append(match.groups())
        else:
            return cells
    return []


def checked(stretch: Stretch) -> Stretch:
    """The stretch, if it has anything in it; else `ValueError`."""
    if not stretch.start < stretch.end:
        raise ValueError(f"{stretch.start:g} to {stretch.end:g} has nothing in it")
    return stretch


def _whole(text: str) -> int:
    if re.fullmatch(r"[0-9]{1,12}(\.0+)?", text, re.ASCII) is None:
        raise ValueError(f"{text!r} is not a number of frames")
    return int(float(text))


def _seconds(text: str) -> float:
    clock = CLOCK.fullmatch(text)
    if clock is None:
        raise ValueError(f"{text!r} is not a time such as 75.5 or 00:01:15.5")
    hours, minutes, seconds = clock.groups()
    return 3600 * int(hours or 0) + 60 * int(minutes or 0) + float(seconds)
