"""Manifests: files of JSON lines, one per video, that are written during long work and survive crashes.

`mgtrain data check` writes the status of each video, which `Checked` reads. `mgtrain data prepare` writes the prepared
files of each video.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from mgtrain.data.videos import Videos
from mgtrain.errors import DataError

START = b'{"path": '  # of each line
STATUSES = ("ok", "short", "corrupt", "crash", "timeout", "missing")  # of a checked video
USABLE = ("ok", "short")
Record = dict[str, Any]  # a line: `path` is the video's, relative to the data's root


class Manifest:
    """The records of a manifest, the last one of each video. Incomplete lines, from a crash, are ignored.

    Use it as a context manager to add records, in one process at a time.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.records: dict[str, Record] = {}
        self._size = file.stat().st_size if file.is_file() else 0
        self._end = 0  # of the last complete line, bytes
        for record, end in read_records(file):
            self.records[record["path"]] = record
            self._end = end

    def __enter__(self) -> Manifest:
        """Raises `DataError` if another process adds lines or has added some, or the file cannot be written."""
        with ExitStack() as stack:
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                self._lines = stack.enter_context(self.file.open("ab"))
                fcntl.flock(self._lines, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees it when the process ends
            except BlockingIOError:
                wait = "wait for it, or choose another place"
                raise DataError(f"{self.file}: another process is writing to it; {wait}") from None
            except OSError as error:  # also where there are no locks, as on some network file systems
                raise DataError(f"{self.file}: cannot be written: {error.strerror}; choose another place") from None
            if os.fstat(self._lines.fileno()).st_size != self._size:
                raise DataError(f"{self.file}: another process has written to it just now; run the same command again")
            self._lines.truncate(self._end)
            stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()

    def add(self, record: Record) -> None:
        self._lines.write(json.dumps(record).encode() + b"\n")
        self._lines.flush()
        self.records[record["path"]] = record

    def of(self, paths: Iterable[str]) -> list[Record]:
        return [self.records[path] for path in paths if path in self.records]


class Checked:
    """The videos that `mgtrain data check` found usable."""

    def __init__(self, file: str) -> None:
        """Raises `DataError` if `file` is not a manifest of `mgtrain data check`."""
        self.file = file
        self._statuses: dict[str, str] = {}  # by path; the last line of a video counts
        for number, (record, _) in enumerate(read_records(Path(file)), start=1):
            if record.get("status") not in STATUSES:
                raise self._error(f"line {number} does not describe a checked video")
            self._statuses[record["path"]] = sys.intern(record["status"])
        if not self._statuses:
            raise self._error("has no checked video")

    def usable(self, videos: Videos) -> Videos:
        """The usable ones; `left_out` counts the others. Raises `DataError` if there is none, or one is unchecked."""
        names = videos.names()
        unknown = [name for name in names if name not in self._statuses]
        if unknown:
            raise self._error(f"lacks {len(unknown)} of {len(names)} videos, the first is {unknown[0]}")
        statuses = [self._statuses[name] for name in names]
        rows = [row for row, status in enumerate(statuses) if status in USABLE]
        if not rows:
            raise self._error(f"none of its {len(names)} videos can be used")
        left_out = tuple((status, n) for status in STATUSES if (n := statuses.count(status)) and status not in USABLE)
        return videos.only(np.array(rows), left_out)

    def _error(self, problem: str) -> DataError:
        return DataError(f"{self.file}: {problem}; run `mgtrain data check` with this recipe, or drop data.checked")


def read_records(file: Path) -> Iterator[tuple[Record, int]]:
    """Read the complete lines of a manifest: records, and the byte offsets of their ends. Nothing if there is no file.

    Raises `DataError` if it is not a manifest, or cannot be read.
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
                    raise DataError(f"{file}:{number}: not a line of a manifest; choose another file")
                end += len(line)
                yield record, end
    except FileNotFoundError:
        return
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}; choose another file") from None


def key_of(text: str) -> int:
    """A 64-bit hash of a path or another text. The probability of a collision among a million is 1 in 37 million."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(text), digest_size=8).digest(), "little")


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
