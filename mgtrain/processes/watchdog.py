"""A watchdog that ends a rank if it hangs or its launcher is gone, and reports what the rank was doing."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

CHECKS_PER_SECOND = 2
WAITS_LONGER = 1.5  # a rank without a video in work likely waits for one that hangs in a video, which reports first


class Watchdog:
    """Ends the process `seconds` after the last `beat`, and prints all stacks and the videos being decoded.

    It also ends the process if its parent is not `launcher` (a process id): a killed launcher cannot stop its ranks.
    """

    def __init__(self, seconds: float, rank: int = 0, launcher: int | None = None) -> None:
        self.seconds, self.rank, self._launcher = seconds, rank, launcher
        self._decoding: list[Callable[[], list[str]]] = []
        self._last, self._over = float("inf"), threading.Event()

    def beat(self) -> None:
        """Report progress: a step is done, or clips have arrived."""
        self._last = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not watch for hangs within the block, whose duration is unknown, as that of compiling is."""
        self._last = float("inf")
        try:
            yield
        finally:
            self.beat()

    @contextmanager
    def looking_at(self, decoding: Callable[[], list[str]]) -> Iterator[None]:
        """Report the videos that `decoding` returns if this rank hangs within the block."""
        self._decoding.append(decoding)
        try:
            yield
        finally:
            self._decoding.remove(decoding)

    @contextmanager
    def on_watch(self) -> Iterator[None]:
        """Watch within the block: the launcher from its start, for hangs from the first `beat`."""
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        try:
            yield
        finally:
            self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(1 / CHECKS_PER_SECOND):
            if self._launcher is not None and os.getppid() != self._launcher:
                self._end("its launcher is gone")
            idle = time.monotonic() - self._last
            if idle <= self.seconds:
                continue
            videos = [path for decoding in self._decoding for path in decoding()]
            if videos or idle > WAITS_LONGER * self.seconds:
                with suppress(OSError, ValueError):  # stderr may be closed
                    faulthandler.dump_traceback(sys.stderr)
                what = f"while decoding {', '.join(videos)}" if videos else "with no video being decoded"
                self._end(
                    f"no progress for {idle:.0f} s (faults.timeout_seconds), {what}; the stacks are above; "
                    "run again with --resume"
                )

    def _end(self, why: str) -> NoReturn:
        try:
            sys.stderr.write(f"mgtrain: rank {self.rank} ends: {why}\n")
            sys.stderr.flush()
        finally:
            os._exit(1)
