"""A run's times: training without evaluations and checkpoints, its part spent waiting for data, and wall-clock time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

Batch = TypeVar("Batch")


class Clock:
    """Measures a run's times; a resumed run passes the seconds that it had when it stopped.

    Wall-clock time is all that a user waits for since `began` (`time.perf_counter()` when the process started):
    start-up, training, evaluations and checkpoints.

    A GPU still computes a step when its call returns, but logged steps wait for the GPU, so the times of logged steps
    are right.
    """

    def __init__(
        self,
        train_seconds: float = 0.0,
        data_seconds: float = 0.0,
        clock_seconds: float = 0.0,
        began: float | None = None,
    ) -> None:
        self.train_seconds, self.data_seconds, self.other_seconds = train_seconds, data_seconds, 0.0
        self._last = time.perf_counter()
        self._clock_start = (self._last if began is None else began) - clock_seconds

    def seconds(self) -> dict[str, Any]:
        """Seconds of training, of waiting for data and of wall-clock time, with the names of logs and checkpoints."""
        return {
            "train_seconds": self.train_seconds + time.perf_counter() - self._last,
            "data_seconds": self.data_seconds,
            "clock_seconds": time.perf_counter() - self._clock_start,
        }

    def wait_for(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; the time until it arrives is time spent waiting for data."""
        start = time.perf_counter()
        batch = next(batches)
        self.data_seconds += time.perf_counter() - start
        return batch

    def lap(self) -> float:
        """Add the seconds since the last call to the training time; returns them."""
        last, self._last = self._last, time.perf_counter()
        self.train_seconds += self._last - last
        return self._last - last

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time within the block as training; `other_seconds` is its length."""
        self.lap()
        yield
        self.other_seconds = time.perf_counter() - self._last
        self._last = time.perf_counter()
