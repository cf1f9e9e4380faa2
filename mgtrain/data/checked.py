"""Which videos of a data set can be used, as `mgtrain data check` has found."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mgtrain.data.manifest import key_of, read_records
from mgtrain.data.videos import Videos
from mgtrain.errors import DataError

STATUSES = ("ok", "short", "corrupt", "crash", "timeout", "missing")
USABLE = ("ok", "short")


class Checked:
    """A manifest made by `mgtrain data check`, in 9 bytes per video."""

    def __init__(self, file: str) -> None:
        """Raises `DataError` if it is none."""
        self.file = file
        keys: list[int] = []
        statuses = bytearray()
        try:
            for record, _ in read_records(Path(file)):
                keys.append(key_of(record["path"]))
                statuses.append(STATUSES.index(record["status"]))
        except (KeyError, ValueError):
            raise self._error(f"line {len(keys)} is not of a checked video") from None
        if not keys:
            raise self._error("holds no checked video")
        latest = np.array(keys[::-1], np.uint64)  # the last line of a video counts
        self._keys, places = np.unique(latest, return_index=True)
        self._statuses = np.frombuffer(statuses, np.uint8)[::-1][places]

    def usable(self, videos: Videos) -> Videos:
        """Those of the videos that can be used; they say how many of the others there were, and why.

        Raises:
            DataError: some have not been checked, or none can be used.
        """
        keys = np.fromiter((key_of(videos.name(n)) for n in range(len(videos))), np.uint64)
        places = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        unknown = np.flatnonzero(self._keys[places] != keys)
        if len(unknown):
            raise self._error(
                f"lacks {len(unknown)} of {len(videos)} videos, the first is {videos.name(int(unknown[0]))}"
            )
        statuses = self._statuses[places]
        counts = np.bincount(statuses, minlength=len(STATUSES))
        left_out = tuple((name, int(n)) for name, n in zip(STATUSES, counts, strict=True) if n and name not in USABLE)
        usable = statuses < len(USABLE)
        if not usable.any():
            raise self._error(f"leaves none of {len(videos)} videos")
        return videos.only(usable, left_out) if left_out else videos

    def _error(self, problem: str) -> DataError:
        return DataError(f"{self.file}: {problem}; run `mgtrain data check` with this recipe, or drop data.checked")
