"""Read the text and CSV files of annotations."""

import codecs
import csv
import difflib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from mgtrain.errors import DataError

MOST_BYTES = 1 << 32  # of an annotation file
SUFFIXES = (
    ".3gp", ".asf", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv",
    ".ts", ".vob", ".webm", ".wmv",
)  # fmt: skip


def is_video(name: str) -> bool:
    """Whether a file's name has the suffix of a video."""
    return name.lower().endswith(SUFFIXES)


def check_exists(path: Path, kind: str) -> None:
    """Raise `DataError`, with similar names, if the path does not exist; `kind` describes it, such as "file"."""
    if path.exists():
        return
    parent = next(folder for folder in path.parents if folder.exists())
    name = path.relative_to(parent).parts[0]
    names = sorted(entry for entry in os.listdir(parent) if not entry.startswith(".")) if parent.is_dir() else []
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or names[:5]
    contents = f"{parent} has {', '.join(map(repr, near))}" if near else f"{parent} is empty"
    raise DataError(f"{path}: no such {kind}; {contents}")


def classes_file(root: str | os.PathLike[str], source: str) -> Path | None:
    """The `classes.txt` beside a file `source`, or in a folder `source`, or else in the root; None if there is none."""
    place = Path(root, source)
    folders = (place if place.is_dir() else place.parent, Path(root))
    return next((folder / "classes.txt" for folder in folders if (folder / "classes.txt").is_file()), None)


def read_file(path: Path) -> bytes:
    """Read a regular file. Raises `DataError` for a folder, pipe or device."""
    check_exists(path, "file")
    if not path.is_file():
        raise DataError(f"{path}: not a file; give a file")
    if path.stat().st_size > MOST_BYTES:
        raise DataError(f"{path}: larger than {MOST_BYTES >> 30} GiB, so not an annotation file; give another file")
    return path.read_bytes()


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text file in UTF-8, with or without a byte order mark, or UTF-16 with one."""
    content = read_file(path)
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        content = content.decode("utf-16", "replace").encode()
    content = content.removeprefix(codecs.BOM_UTF8)
    if b"\0" in content:
        raise DataError(f"{path}:{content[: content.index(0)].count(10) + 1}: has a zero byte; give a text file")
    lines = content.splitlines()
    try:
        return [line.decode() for line in lines]
    except UnicodeDecodeError as error:
        number = lines.index(error.object) + 1
        raise DataError(f"{path}:{number}: not UTF-8 ({error.reason}); save the file as UTF-8") from error


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Read the stripped lines of a text file that are not empty, each with its number."""
    return ((number, text) for number, line in enumerate(read_lines(path), start=1) if (text := line.strip()))


def read_table(path: Path, columns: Iterable[str], advice: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Read a CSV whose first line names `columns`: the line number and cells of each row.

    Raises `DataError` if a column is missing (the message gives `advice`) or the CSV is not valid.
    """
    rows = csv.DictReader(read_lines(path), restval="")
    try:
        names = rows.fieldnames or ()
        absent = next((column for column in columns if column not in names), None)
        if absent is not None:
            raise DataError(f"{path}:1: no column {absent!r} among {', '.join(map(repr, names)) or 'none'}; {advice}")
        for row in rows:
            yield rows.line_num, row
    except csv.Error as error:
        raise DataError(f"{path}:{rows.line_num}: not valid CSV: {error}; fix this line") from None
