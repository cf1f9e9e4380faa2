"""Recognize how a list of videos is written: separator, header, quotes, backslashes, parts of videos."""

import csv
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import NamedTuple

from mgtrain.data.formats.reading import is_video
from mgtrain.data.stretch import NUMBER, Stretch, parted
from mgtrain.data.videos import EXAMPLES

# Names of columns in a header, the most likely first: of path and label, of a part's times, frames or length.
PATHS = ("path", "video_path", "file_path", "filepath", "filename", "file_name", "file", "video", "video_name", "clip",
         "name")  # fmt: skip
LABELS = ("label", "label_id", "class_id", "target", "class", "class_name", "label_name", "category", "action")
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
        """The stretch that a row's cells give; None, the whole video, if they are empty. An empty end is the video's.

        >>> print(Columns("t", 1, 2).stretch(["a.mp4", "1:00", "75.5"]), Columns("n", 1, 2).stretch(["a", "30", "60"]))
        #t=60,75.5 #f=30,90
        >>> print(Columns("t", 1, 2).stretch(["a.mp4", "1:00", ""]), Columns("t", 1, 2).stretch(["a.mp4", "", "7"]))
        #t=60 #t=0,7

        Raises `ValueError` if the cells are not numbers, or there is nothing between them.
        """
        start, end = _cell(cells, self.start), _cell(cells, self.end)
        if not end and (not start or self.unit == "n"):
            return None
        read = _seconds if self.unit == "t" else _whole
        first, last = read(start or "0"), read(end) if end else math.inf
        stretch = Stretch("t" if self.unit == "t" else "f", first, first + last if self.unit == "n" else last)
        if not stretch.start < stretch.end:
            raise ValueError(f"{stretch.start:g} to {stretch.end:g} has nothing in it")
        return stretch


def named_columns(names: Sequence[str]) -> Columns | None:
    """The columns of parts of videos that a header names."""
    known = (STARTS, ENDS, FIRST_FRAMES, END_FRAMES, COUNTS)
    start, end, first, last, count = (_column(names, of) for of in known)
    if start is not None and end is not None:
        return Columns("t", start, end)
    if first is not None and last is not None:
        return Columns("f", first, last)
    return None if count is None else Columns("n", start if first is None else first, count)


@dataclass(frozen=True, slots=True)
class Dialect:
    """How to split a line into a path and a label. Either may be in double quotes, with doubled quotes inside."""

    separator: str | None  # None: white space
    header: bool = False  # the first line names the columns
    columns: tuple[int, int] | None = None  # of path and label; None: the label is the last field
    names: int = 0  # columns that the header names
    stretch: Columns | None = None  # of the part of the video that a row is
    remark: str = ""  # what was recognized beyond `path label`

    def fields(self, line: str) -> list[str]:
        return _cells(line, self.separator or " ")

    def split(self, line: str) -> tuple[str, str]:
        """The path and the label of a line; empty if the line has no such field.

        Raises `ValueError` if it has more cells than the header, which leaves open what they mean.
        """
        if self.columns:
            cells = self.fields(line)
            if any(map(str.strip, cells[self.names :])):
                raise ValueError(
                    f'has {len(cells)} cells, but the header {self.names}; quote a path with separators ("a,b.mp4"), '
                    'and separate several labels by semicolons in quotes ("3;17")'
                )
            return _cell(cells, self.columns[0]), _cell(cells, self.columns[1])
        if '"' in line and len(cells := self.fields(line)) == 2:
            return cells[0].strip(), cells[1].strip()
        path, *last = line.rsplit(self.separator, 1)
        return (_unquoted(path.strip()), _unquoted(last[0].strip())) if last else (path, "")


def recognize(lines: Sequence[str], is_label: Callable[[str], bool]) -> Dialect:
    """The dialect of a list. A header that names a path and a label decides, or else the most valid labels.

    The separators to try are comma, white space and semicolon; the first of equals is chosen.
    """
    for separator in (",", ";", "\t", None) if lines else ():
        names = [cell.strip().lower() for cell in (_cells(lines[0], separator) if separator else lines[0].split())]
        path, label, stretch = _column(names, PATHS), _column(names, LABELS), named_columns(names)
        if path is not None and label is not None and (separator or len(names) == 2 or stretch):
            columns = (path, label) if separator or stretch else None
            remark = f"path from column {names[path]!r}, label from {names[label]!r}"
            dialect = Dialect(separator, True, columns, len(names), remark=remark)
            if stretch is None or (stretch.unit == "n" and is_video(_cell(dialect.fields("".join(lines[1:2])), path))):
                return dialect
            used = " and ".join(repr(names[n]) for n in stretch[1:] if n is not None)
            return replace(dialect, stretch=stretch, remark=f"{remark}, the part of the video from {used}")

    def valid(separator: str | None) -> int:
        dialect = Dialect(separator)
        return sum(is_label(dialect.split(line)[1]) for line in lines)

    present = [sep for sep in (",", None, ";") if sep is None or any(sep in line for line in lines)]
    return Dialect(max(present, key=valid))


def with_slashes(root: str, paths: Sequence[str]) -> bool:
    """Whether backslashes in these paths separate folders, as on Windows: no existing file has such a name."""
    written = [path for path in paths if "\\" in path]
    return bool(written) and not any("/" in path or os.path.lexists(os.path.join(root, path)) for path in written)


def quoted(path: str) -> str:
    """The path, in quotes if it starts and ends with a quote."""
    return path if _unquoted(path) == path else '"' + path.replace('"', '""') + '"'


def _cell(cells: Sequence[str], column: int | None) -> str:
    return cells[column].strip() if column is not None and column < len(cells) else ""


def _column(names: Sequence[str], known: Sequence[str]) -> int | None:
    """Where a header has the first of the known names that it has."""
    return next((names.index(name) for name in known if name in names), None)


def _unquoted(text: str) -> str:
    return text[1:-1].replace('""', '"') if len(text) > 1 and text[0] == text[-1] == '"' else text


def _cells(line: str, separator: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=separator, skipinitialspace=True, strict=True), [])
    except csv.Error:
        return [line]


def cells_before_label(root: str, texts: Sequence[str]) -> list[tuple[str, ...]]:
    """The path and the two numbers, or else the one, before the label of each row; none unless all rows have them.

    There are none where files or stretches are named so.

    >>> cells_before_label("", ["a 7/b.mp4 1.5,20"])
    [('a 7/b.mp4', '1.5', '20')]
    """
    files = any(os.path.lexists(os.path.join(root, text)) for text in texts[:EXAMPLES])
    if files or any(parted(text)[1] for text in texts):
        return []
    for pattern in BEFORE_LABEL:
        matches = [*takewhile(bool, (pattern.fullmatch(text) for text in texts))]
        if len(matches) == len(texts):
            return [match.groups() for match in matches if match]
    return []


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
