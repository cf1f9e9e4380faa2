"""A file of JSON lines, one per video, that is written while the work runs and survives crashes.

`mgtrain data check` writes one that says which videos can be used, and `Checked` reads it; `mgtrain data prepare` keeps
another.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
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
            fcntl.flock(self._lines, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees it when the process ends
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


class Checked:
    """Which videos can be used, as `mgtrain data check` found: its manifest in 9 bytes per video."""

    def __init__(self, file: str) -> None:
        """Raises `DataError` if it is not such a manifest."""
        self.file = file
        keys: list[int] = []
        statuses = bytearray()
        try:
            for record, _ in read_records(Path(file)):
                keys.append(key_of(record["path"]))
                statuses.append(STATUSES.index(record["status"]))
        except (KeyError, ValueError):
            raise self._error(f"line {len(keys)} does not describe a checked video") from None
        if not keys:
            raise self._error("has no checked video")
        latest = np.array(keys[::-1], np.uint64)  # the last line of a video counts
        self._keys, places = np.unique(latest, return_index=True)
        self._statuses = np.frombuffer(statuses, np.uint8)[::-1][places]

    def usable(self, videos: Videos) -> Videos:
        """The videos that can be used; their `left_out` counts the others by status.

        Raises:
            DataError: some have not been checked, or none can be used.
        """
        keys = np.fromiter((key_of(videos.name(n)) for n in range(len(videos))), np.uint64)
        places = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        unknown = np.flatnonzero(self._keys[places] != keys)
        if len(unknown):
            first = videos.name(int(unknown[0]))
            raise self._error(f"lacks {len(unknown)} of {len(videos)} videos, the first is {first}")
        statuses = self._statuses[places]
        counts = np.bincount(statuses, minlength=len(STATUSES))
        left_out = tuple((name, int(n)) for name, n in zip(STATUSES, counts, strict=True) if n and name not in USABLE)
        usable = statuses < len(USABLE)
        if not usable.any():
            raise self._error(f"none of its {len(videos)} videos can be used")
        return videos.only(usable, left_out) if left_out else videos

    def _error(self, problem: str) -> DataError:
        return DataError(f"{self.file}: {problem}; run `mgtrain data check` with this recipe, or drop data.checked")


def read_records(file: Path) -> Iterator[tuple[Record, int]]:
    """The whole lines of a manifest, if it exists, and the byte where each ends.

    Raises:
        DataError: it is another kind of file, or cannot be read.
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
    """64 bits that stand for a path or another text; of a million, two collide once in 37 million sets."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(text), digest_size=8).digest(), "little")


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
