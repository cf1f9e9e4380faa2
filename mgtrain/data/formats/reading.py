"""Shared by the annotation formats: read text and CSV files, and find the listed video files."""

from __future__ import annotations

import codecs
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


SUFFIXES = (
    ".3gp", ".asf", ".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm",
    ".wmv",
)  # fmt: skip


class Row(NamedTuple):
    """A video that an annotation file lists."""

    where: str  # file and line, for messages
    video: str  # name of the file, without suffix
    label: str | Sequence[int]  # name of the class, or numbers of the classes
    folders: Iterable[str]  # to search in this order, relative to the root
    spans: Sequence[tuple[float, float]] = ()  # start and end of each label, seconds; empty: the whole video


def locate(root: str, listing: Path, rows: Sequence[Row], classes: Sequence[str]) -> Videos:
    """Find the rows' files or folders of frames, `<folder>/<video>.*` or `<folder>/<video>`; the others are `missing`.

    Raises:
        DataError: there are no rows, a label is not a class, or no video exists.
    """
    if not rows:
        raise DataError(f"{listing}: lists no video; use the published file")
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
            f"{listing}: none of its {len(missing)} videos exists; looked for {missing[0]}.* and the others in {places}"
        )
    return Videos.of(root, found, classes, len(missing), missing, spans or None)


def is_video(name: str) -> bool:
    """Whether a file's name has the suffix of a video."""
    return name.lower().endswith(SUFFIXES)


def _files(folder: str) -> dict[str, str]:
    """What a folder holds, by name without suffix: videos before other files before folders; empty if there is none."""
    try:
        with os.scandir(folder) as entries:
            found = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
        folders = {name: name for name, is_folder in found if is_folder}
        files = sorted((name for name, is_folder in found if not is_folder), key=is_video)
        return folders | {os.path.splitext(name)[0]: name for name in files}
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            return {}
        raise


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
    lines = []
    content = read_file(path)
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        content = content.decode("utf-16", "replace").encode()
    content = content.removeprefix(codecs.BOM_UTF8)
    if b"\0" in content:
        raise DataError(f"{path}:{content[: content.index(0)].count(10) + 1}: has a zero byte; give a text file")
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            lines.append(line.decode())
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
    return lines


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Read the stripped lines of a text file that are not empty, each with its number."""
    return ((number, text) for number, line in enumerate(read_lines(path), start=1) if (text := line.strip()))


def read_table(path: Path, columns: Iterable[str], advice: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Read a CSV whose first line names `columns`: the line number and cells of each row.

    Raises:
        DataError: a column is missing (the message gives `advice`), or the CSV is not valid.
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
