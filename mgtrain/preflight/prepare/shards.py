"""Write the files of a prepared set into tar files, and verify these.

A video's files are appended together, and its line in the manifest follows. What lies behind the last member that the
manifest knows is of an interrupted video and is cut off before more is appended.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgtrain.clips.prepared import level_path
from mgtrain.clips.prepared.shards import BLOCK, padded, shard_path
from mgtrain.data.manifest import Record
from mgtrain.errors import DataError

END = bytes(2 * BLOCK)  # of a tar file


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a shard, as the manifest has it."""

    shard: int
    name: str
    offset: int  # of its first byte in the shard
    bytes: int
    sha256: str

    @property
    def end(self) -> int:
        return self.offset + padded(self.bytes)


def members_of(records: Iterable[Record]) -> list[Member]:
    return [
        Member(level["shard"], member_name(level, record), level["offset"], level["bytes"], level["sha256"])
        for record in records
        for level in record.get("levels", ())
    ]


def member_name(level: dict[str, Any], record: Record) -> str:
    """The name of a video's file of a level within a shard: as it is within the folder of a set without shards."""
    return str(level_path(Path(), level["level"], record["path"]))


class ShardWriter:
    """Appends the files of videos to shards of at most so many bytes, or of one video. Use it as a context manager."""

    def __init__(self, folder: Path, most: int, records: Iterable[Record]) -> None:
        self._folder, self._most = folder, most
        self._number, self._end = max(((member.shard, member.end) for member in members_of(records)), default=(0, 0))

    def __enter__(self) -> ShardWriter:
        path = shard_path(self._folder, self._number)
        if self._end and not (path.is_file() and path.stat().st_size >= self._end):
            self._number, self._end = self._number + 1, 0  # damaged: what the manifest has of it stays as it is
        self._open()
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if failure is None:
            self._close()
        else:
            with suppress(OSError):  # what the manifest does not know is cut off later
                self._file.close()

    def add(self, record: Record, loose: Path) -> None:
        """Append a video's files, in the folder `loose`, and tell its record where. Raises `DataError` if it cannot."""
        levels = record.get("levels", ())
        heads = [_head(member_name(level, record), level["bytes"]) for level in levels]
        size = sum(len(head) + padded(level["bytes"]) for head, level in zip(heads, levels, strict=True))
        try:
            if self._end and self._end + size + len(END) > self._most:
                self._close()
                self._number, self._end = self._number + 1, 0
                self._open()
            for level, head in zip(levels, heads, strict=True):
                level["shard"], level["offset"] = self._number, self._end + len(head)
                self._file.write(head)
                with level_path(loose, level["level"], record["path"]).open("rb") as source:
                    shutil.copyfileobj(source, self._file, 1 << 20)
                self._file.write(bytes(padded(level["bytes"]) - level["bytes"]))
                self._end += len(head) + padded(level["bytes"])
            self._file.flush()
        except OSError as error:
            raise DataError(
                f"{shard_path(self._folder, self._number)}: cannot be written: {error.strerror}; run the same command "
                "again to resume"
            ) from error

    def _open(self) -> None:
        path = shard_path(self._folder, self._number)
        path.parent.mkdir(exist_ok=True)
        self._file = path.open("ab")
        self._file.truncate(self._end)

    def _close(self) -> None:
        with self._file:
            if self._end:
                self._file.write(END)
                self._file.flush()
                os.fsync(self._file.fileno())
        if not self._end:
            shard_path(self._folder, self._number).unlink()


def _head(name: str, size: int) -> bytes:
    """The header of a tar member, with nothing of the machine or the time it was written on."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def is_there(folder: Path, member: Member) -> bool:
    """Whether a member's shard is there and long enough for it."""
    path = shard_path(folder, member.shard)
    return path.is_file() and path.stat().st_size >= member.offset + member.bytes


def shard_problem(path: Path, members: Sequence[Member]) -> str | None:
    """What is wrong with a shard; None if every byte of its members is as it was written and `tar` can list them."""
    if not path.is_file():
        return f"is missing, with {len(members)} members"
    least, size = max(member.end for member in members) + len(END), path.stat().st_size
    if size < least:
        cut = sum(member.offset + member.bytes > size for member in members)
        return f"has {size} bytes instead of {least} or more, which cuts off {cut} of {len(members)} members"
    with path.open("rb") as file:
        members = sorted(members, key=lambda member: member.offset)
        changed = [member.name for member in members if _checksum(file, member) != member.sha256]
        if changed:
            what = f"{len(changed)} of {len(members)} members have another checksum than when they were written"
            return f"{what}, the first is {changed[0]}"
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
                listed = {(info.name, info.offset_data, info.size) for info in tar}
        except tarfile.TarError:
            listed = set()
    lost = sum((member.name, member.offset, member.bytes) not in listed for member in members)
    return f"tar cannot list {lost} of {len(members)} members: their headers have changed" if lost else None


def _checksum(file: Any, member: Member) -> str:
    digest = hashlib.sha256()
    for begin in range(member.offset, member.offset + member.bytes, 1 << 20):
        digest.update(os.pread(file.fileno(), min(1 << 20, member.offset + member.bytes - begin), begin))
    return digest.hexdigest()
