"""Requests to stop: the first signal stops the run after the next step, a second SIGINT ends the process at once.

Where all that a run needs to resume is saved, as during an evaluation, the first signal stops a run of one process.
"""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from mgtrain.errors import StoppedError

STOPPED = "stopped by a signal; continue with --resume"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


def stop_signals() -> list[int]:
    """The signals that ask a run to stop; not SIGHUP under `nohup`, which ignores it."""
    return [n for n in STOP_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]


class StopRequest:
    """Within the block, the `stop_signals` do not end the process; `signal` names the first one received."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self._interrupted = self._at_once = False

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._receive) for number in stop_signals()}
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
        if number == signal.SIGHUP:
            leave_terminal()
        self._interrupted = self._interrupted or number == signal.SIGINT
        self.signal = self.signal or signal.Signals(number).name
        if self._at_once:
            _say(f"{self.signal}: stopping")
            self._stop_if_asked()
        _say(f"{self.signal}: will save and stop after the next step")


@contextmanager
def ended_if_failed(seconds: float) -> Iterator[None]:
    """After an error in the block, give the process so long to end: at its exit, NCCL may wait for other ranks."""
    try:
        yield
    except StoppedError:
        raise
    except (Exception, KeyboardInterrupt):
        with suppress(ValueError):  # outside of the main thread
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # also ends a call of a library that does not return
            signal.setitimer(signal.ITIMER_REAL, seconds)
        raise


def leave_terminal() -> None:
    """Discard what is printed from now on: the terminal is closed, so printing would fail before the run is saved."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(number).st_mode):
                os.dup2(nowhere, number)
    os.close(nowhere)


def _say(message: str) -> None:
    with suppress(OSError):  # the reader of stderr may have ended, as `tee` does on Ctrl-C
        os.write(2, f"mgtrain: {message}\n".encode())
