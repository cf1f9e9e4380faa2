"""Shards: the files of a prepared set as members of plain tar files, read in place."""

import os
import resource
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np

from mgtrain.errors import DataError

BLOCK = 512  # bytes; members start at multiples of it


class Shard:
    """A shard, open for reading by `os.pread`, which processes that are forked later may share."""

    def __init__(self, path: Path) -> None:
        self.file = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "file"):
            os.close(self.file)


def opened_shards(folder: Path) -> Callable[[int], Shard]:
    """A function that opens a set's shards. The last ones stay open, up to a quarter of what `ulimit -n` allows."""
    most = max(1, min(1 << 16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
    return lru_cache(most)(lambda number: Shard(shard_path(folder, number)))


def shard_path(folder: Path, number: int) -> Path:
    """The tar file of a shard."""
    return folder / "shards" / f"{number:05d}.tar"


def padded(size: int) -> int:
    """The size of a member in a tar file, without its header, in bytes.

    >>> padded(1), padded(512)
    (512, 512)
    """
    return -(-size // BLOCK) * BLOCK


def check_shards(folder: Path, levels: np.ndarray) -> None:
    """Raise `DataError` if a shard of an index is missing or truncated; `levels` are those of all its rows."""
    there = levels[levels["width"] > 0]
    for number in np.unique(there["shard"]).tolist():
        members, path = there[there["shard"] == number], shard_path(folder, number)
        end = int((members["offset"] + members["size"]).max())
        size = path.stat().st_size if path.is_file() else None
        if size is None or size < end:
            problem = "is missing" if size is None else f"has {size:,} bytes instead of {end:,} or more"
            raise DataError(
                f"{path}: {problem}; copy this shard again, or delete it and run `mgtrain data prepare`, which writes "
                f"its {len(members):,} files again"
            )
