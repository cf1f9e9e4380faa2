"""A watch over one rank: a run that hangs, or whose launcher is gone, ends and says what it was doing."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

CHECKS_PER_SECOND = 2


class Watchdog:
    """Ends the process when `seconds` have passed since `beat`, with all threads' stacks and the videos being decoded.

    Of a rank it also ends the process when its launcher is gone, as a killed one cannot stop its ranks. It may be gone
    already; then `launcher`, its process id, tells.
    """

    def __init__(self, seconds: float, rank: int = 0, launcher: int | None = None) -> None:
        self.seconds, self.rank = seconds, rank
        self._launcher = launcher
        self._decoding: list[Callable[[], list[str]]] = []
        self._last, self._over = float("inf"), threading.Event()

    def beat(self) -> None:
        """Something was done: a step, or clips arrived."""
        self._last = time.monotonic()

    @contextmanager
    def looking_at(self, decoding: Callable[[], list[str]]) -> Iterator[None]:
        """Name what `decoding` says if this rank hangs in here: the videos that are being decoded."""
        self._decoding.append(decoding)
        try:
            yield
        finally:
            self._decoding.remove(decoding)

    @contextmanager
    def on_watch(self) -> Iterator[Watchdog]:
        """Watch until the end of the block: the launcher at once, for hangs from the first beat on."""
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        try:
            yield self
        finally:
            self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(1 / CHECKS_PER_SECOND):
            if self._launcher is not None and os.getppid() != self._launcher:
                self._leave("its launcher is gone")
            idle = time.monotonic() - self._last
            if idle > self.seconds:
                faulthandler.dump_traceback(sys.stderr)
                videos = [path for decoding in self._decoding for path in decoding()]
                what = f"while decoding {', '.join(videos)}" if videos else "with no video being decoded"
                self._leave(
                    f"nothing has happened for {idle:.0f} s (faults.timeout_seconds), {what}; the stacks are above; "
                    "run again with --resume"
                )

    def _leave(self, why: str) -> NoReturn:
        sys.stderr.write(f"mgtrain: rank {self.rank} ends: {why}\n")
        sys.stderr.flush()
        os._exit(1)
