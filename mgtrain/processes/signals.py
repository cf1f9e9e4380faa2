"""Requests to stop: the first signal stops the run after the next step, a second SIGINT ends the process at once."""

from __future__ import annotations

import os
import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Within the block, SIGTERM, SIGUSR1 and SIGINT do not end the process; `signal` names the first one received."""

    def __init__(self) -> None:
        self.signal: str | None = None

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == "SIGINT":
            os.write(2, b"mgtrain: interrupted twice, exiting without saving; --resume uses the newest checkpoint\n")
            os._exit(130)
        self.signal = self.signal or signal.Signals(number).name
        os.write(2, f"mgtrain: {self.signal}: stopping after the next step, saving\n".encode())


def leave_signals_to_the_parent() -> None:
    """For loader processes: ignore requests to stop; the main process ends its loaders with SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
