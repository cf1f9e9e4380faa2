"""Training time, with evaluations and checkpoints apart, and the part of it spent waiting for data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

Batch = TypeVar("Batch")


class Clock:
    """Counts on from the seconds that a run has had before it was stopped.

    On a GPU a step's work goes on after its call returns; over the steps between two logged ones, which wait for the
    GPU, the sums are right.
    """

    def __init__(self, train_seconds: float = 0.0, data_seconds: float = 0.0) -> None:
        self.train_seconds, self.data_seconds, self.other_seconds = train_seconds, data_seconds, 0.0
        self._last = time.perf_counter()

    def wait_for(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; the time until it is there counts as waiting."""
        start = time.perf_counter()
        batch = next(batches)
        self.data_seconds += time.perf_counter() - start
        return batch

    def lap(self) -> float:
        """Count the seconds since the last call as training; returns them."""
        last, self._last = self._last, time.perf_counter()
        self.train_seconds += self._last - last
        return self._last - last

    def since_lap(self) -> float:
        """Seconds since the last `lap`."""
        return time.perf_counter() - self._last

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here is not training; `other_seconds` says how long it was."""
        self.lap()
        yield
        self.other_seconds = time.perf_counter() - self._last
        self._last = time.perf_counter()
