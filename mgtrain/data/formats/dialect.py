"""Recognize how a list of videos is written: separator, header, quotes, backslashes."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mgtrain.data.formats.folder import is_video
from mgtrain.data.formats.times import Columns, named_columns

# Names of columns in a header, the most likely first.
PATHS = ("path", "video_path", "file_path", "filepath", "filename", "file_name", "file", "video", "video_name", "clip",
         "name")  # fmt: skip
LABELS = ("label", "label_id", "class_id", "target", "class", "class_name", "label_name", "category", "action")


@dataclass(frozen=True, slots=True)
class Dialect:
    """How to split a line into a path and a label. Either may be in double quotes, with doubled quotes inside."""

    separator: str | None  # None: white space
    header: bool = False  # the first line names the columns
    columns: tuple[int, int] | None = None  # of path and label; None: the label is the last field
    stretch: Columns | None = None  # of the part of the video that a row is
    remark: str = ""  # what was recognized beyond `path label`

    def fields(self, line: str) -> list[str]:
        """All fields of a line."""
        return _cells(line, self.separator or " ")

    def split(self, line: str) -> tuple[str, str]:
        """The path and the label of a line; empty if the line has no such field."""
        if self.columns:
            named = dict(enumerate(self.fields(line)))
            path, label = (named.get(column, "").strip() for column in self.columns)
            return path, label
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
        path, label = (next((name for name in known if name in names), None) for known in (PATHS, LABELS))
        stretch = named_columns(names)
        if path and label and (separator or len(names) == 2 or stretch):
            columns = (names.index(path), names.index(label)) if separator or stretch else None
            dialect = Dialect(separator, True, columns, remark=f"path from column {path!r}, label from {label!r}")
            if stretch is None or (stretch.unit == "n" and is_video(dialect.split("".join(lines[1:2]))[0])):
                return dialect
            used = " and ".join(repr(names[n]) for n in stretch[1:] if n is not None)
            return replace(dialect, stretch=stretch, remark=f"{dialect.remark}, the part of the video from {used}")

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


def _unquoted(text: str) -> str:
    return text[1:-1].replace('""', '"') if len(text) > 1 and text[0] == text[-1] == '"' else text


def _cells(line: str, separator: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=separator, skipinitialspace=True, strict=True), [])
    except csv.Error:
        return [line]
