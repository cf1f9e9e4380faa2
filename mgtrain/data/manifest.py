"""A file of JSON lines, one for each video, that is written as the work goes on and survives whatever stops it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mgtrain.errors import DataError

START = b'{"path": '  # of each line
Record = dict[str, Any]  # a line: `path` is the video's, relative to the data's root


class Manifest:
    """Lines are only ever added, and the last one for a video counts; a line cut short by a crash does not.

    Use it as a context manager to add lines, in one process at a time.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.records: dict[str, Record] = {}
        self._whole = 0  # bytes up to the last whole line
        for record, end in read_records(file):
            self.records[record["path"]] = record
            self._whole = end

    def __enter__(self) -> Manifest:
        """Raises `DataError` if another process is adding lines."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._lines = self.file.open("ab")
        except OSError as error:
            raise DataError(f"{self.file}: cannot be written: {error.strerror}; choose another place") from None
        try:
            fcntl.flock(self._lines, fcntl.LOCK_EX | fcntl.LOCK_NB)  # freed by the system when the process ends
        except OSError:
            self._lines.close()
            raise DataError(
                f"{self.file}: another process is writing to it; wait for it, or choose another place"
            ) from None
        self._lines.truncate(self._whole)
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()

    def add(self, record: Record) -> None:
        """Add a line."""
        self._lines.write(json.dumps(record).encode() + b"\n")
        self._lines.flush()
        self.records[record["path"]] = record

    def of(self, paths: Iterable[str]) -> list[Record]:
        """The records of those of the videos that have one."""
        return [self.records[path] for path in paths if path in self.records]


def read_records(file: Path) -> Iterator[tuple[Record, int]]:
    """The whole lines of a manifest, if it is there, and the byte where each ends.

    Raises:
        DataError: it is another file, or cannot be read.
    """
    end = 0
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n") and (line.startswith(START[: len(line)]) or not line.strip(b"\0")):
                    return  # cut short by a crash
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    record = None
                if not isinstance(record, dict) or not isinstance(record.get("path"), str):
                    raise DataError(f"{file}:{number}: is no line of a manifest; choose another file")
                end += len(line)
                yield record, end
    except FileNotFoundError:
        return
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}; choose another file") from None


def key_of(relative: str) -> int:
    """64 bits that stand for a path, relative to the data's root: a million paths are a small array."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(relative), digest_size=8).digest(), "little")


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
