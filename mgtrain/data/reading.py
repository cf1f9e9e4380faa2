"""What the annotation formats share: reading text and CSV files, and finding the video files that they name."""

from __future__ import annotations

import csv
import difflib
import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mgtrain.data.videos import Videos
from mgtrain.errors import DataError

MOST_BYTES = 1 << 32  # of an annotation file


class Row(NamedTuple):
    """A video that an annotation file lists."""

    where: str  # file and line, for messages
    video: str  # the name of its file, without suffix
    label: str | Sequence[int]  # the name of its class, or the numbers of its classes
    folders: Iterable[str]  # where to look for it, relative to the root, in this order
    spans: Sequence[tuple[float, float]] = ()  # seconds from and to which each label holds; empty: always


def locate(root: str, listing: Path, rows: Sequence[Row], classes: Sequence[str]) -> Videos:
    """The videos whose file exists, `<folder>/<video>.*`; the others count as `missing`. Hidden files are ignored.

    Raises:
        DataError: no rows, a label that is not a class, or not one video is there.
    """
    if not rows:
        raise DataError(f"{listing}: lists no video; use the file as it was published")
    numbers = {name: number for number, name in enumerate(classes)}
    files_in: dict[str, dict[str, str]] = {}  # folder -> its files by name without suffix
    found: list[tuple[str, int | Sequence[int]]] = []
    spans: list[tuple[float, float]] = []
    missing: list[str] = []
    for row in rows:
        label = numbers.get(row.label) if isinstance(row.label, str) else row.label
        if label is None:
            raise DataError(
                f"{row.where}: {row.label!r} is not one of the {len(classes)} classes; fix the label or the classes"
            )
        for folder in row.folders:
            if folder not in files_in:
                files_in[folder] = _files(os.path.join(root, folder))
            if row.video in files_in[folder]:
                found.append((os.path.join(folder, files_in[folder][row.video]), label))
                spans += row.spans
                break
        else:
            missing.append(row.video)
    if not found:
        places = ", ".join(str(Path(root, folder)) for folder in rows[0].folders)
        raise DataError(
            f"{listing}: none of its {len(missing)} videos is there; looked for {missing[0]}.* and so on in {places}"
        )
    return Videos.of(root, found, classes, len(missing), missing, spans or None)


def _files(folder: str) -> dict[str, str]:
    """The files of a folder by their names without suffix; none if there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return {os.path.splitext(entry.name)[0]: entry.name for entry in entries if not entry.name.startswith(".")}
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            return {}
        raise


def check_exists(path: Path, kind: str) -> None:
    """`DataError` that names what is there instead, if there is no such file or folder; `kind` says which in words."""
    if path.exists():
        return
    parent = next(folder for folder in path.parents if folder.exists())
    name = path.relative_to(parent).parts[0]
    names = sorted(entry for entry in os.listdir(parent) if not entry.startswith(".")) if parent.is_dir() else []
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or names[:5]
    there = f"{parent} has {', '.join(map(repr, near))}" if near else f"{parent} is empty"
    raise DataError(f"{path}: no such {kind}; {there}")


def read_file(path: Path) -> bytes:
    """The bytes of a regular file. Folders, pipes and devices are refused."""
    check_exists(path, "file")
    if not path.is_file():
        raise DataError(f"{path}: not a file; give a file")
    if path.stat().st_size > MOST_BYTES:
        raise DataError(f"{path}: larger than {MOST_BYTES >> 30} GiB, so not an annotation file; give another file")
    return path.read_bytes()


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file, with or without a byte order mark."""
    lines = []
    content = read_file(path).removeprefix(b"\xef\xbb\xbf")
    if b"\0" in content:
        raise DataError(f"{path}:{content[: content.index(0)].count(10) + 1}: has a zero byte; it must be a text file")
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            lines.append(line.decode())
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
    return lines


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file that are not blank, stripped, each with its number."""
    return ((number, text) for number, line in enumerate(read_lines(path), start=1) if (text := line.strip()))


def read_table(path: Path, columns: Iterable[str], advice: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and cells of each row of a CSV whose first line names at least `columns`; else `advice` is given."""
    rows = csv.DictReader(read_lines(path), restval="")
    try:
        there = rows.fieldnames or ()
        absent = next((column for column in columns if column not in there), None)
        if absent is not None:
            raise DataError(f"{path}:1: no column {absent!r} among {', '.join(map(repr, there)) or 'none'}; {advice}")
        for row in rows:
            yield rows.line_num, row
    except csv.Error as error:
        raise DataError(f"{path}:{rows.line_num}: not valid CSV: {error}; fix this line") from None
