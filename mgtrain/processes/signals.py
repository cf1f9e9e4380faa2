"""Asked to stop: the first signal asks, a second SIGINT leaves at once."""

from __future__ import annotations

import os
import signal
from types import FrameType

ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Within its block, SIGTERM, SIGUSR1 or SIGINT do not end the process: `signal` then tells which one came."""

    def __init__(self) -> None:
        self.signal: str | None = None

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._ask) for number in ASKING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == "SIGINT":
            os.write(2, b"mgtrain: interrupted again, exiting at once; --resume resumes from the newest checkpoint\n")
            os._exit(130)
        self.signal = self.signal or signal.Signals(number).name
        os.write(2, f"mgtrain: {self.signal}: stopping after the next step, saving\n".encode())


def leave_signals_to_the_parent() -> None:
    """For loader processes: what asks a run to stop asks its main process, which ends them with SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
