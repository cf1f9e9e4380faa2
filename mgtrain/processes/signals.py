"""Requests to stop: the first signal stops the run after the next step, a second SIGINT ends the process at once.

Where all that a run needs to resume is saved, as during an evaluation, the first signal stops a run of one process.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from mgtrain.errors import StoppedError

STOPPED = "stopped by a signal; continue with --resume"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Within the block, SIGTERM, SIGUSR1 and SIGINT do not end the process; `signal` names the first one received."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self._interrupted = self._at_once = False

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within the block, which saves nothing, a request raises `StoppedError` where the run is."""
        self._at_once = True
        try:
            self._stop_if_asked()
            yield
            self._stop_if_asked()  # somebody's `except Exception` may have caught it
        finally:
            self._at_once = False

    def _stop_if_asked(self) -> None:
        if self.signal:
            raise StoppedError(STOPPED)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted:
            _say("interrupted twice, exiting without saving; --resume uses the newest checkpoint")
            os._exit(130)
        self._interrupted = self._interrupted or number == signal.SIGINT
        self.signal = self.signal or signal.Signals(number).name
        if self._at_once:
            _say(f"{self.signal}: stopping")
            self._stop_if_asked()
        _say(f"{self.signal}: stopping after the next step, saving")


def _say(message: str) -> None:
    with suppress(OSError):  # the reader of stderr may have ended, as `tee` does on Ctrl-C
        os.write(2, f"mgtrain: {message}\n".encode())
