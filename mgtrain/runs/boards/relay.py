"""A service's board in a process of its own, which may hang, fail or crash: the run neither waits nor stops.

    the run -> queue -> thread -> pipe -> process -> service

Nothing of the service runs in the training process. The output of the service's process goes to the terminal.
"""

import json
import logging
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from mgtrain.errors import one_line
from mgtrain.processes.signals import STOP_SIGNALS
from mgtrain.runs.boards.services import SERVICES

log = logging.getLogger(__name__)

WAITING = 10_000  # messages that may wait for a slow service; later ones are dropped
SECONDS_TO_END = 60.0  # that a service has at the end of a run to upload what is left


class Relay:
    """A `Board` that passes everything to a service's process. Only `close` waits, and no method raises."""

    def __init__(self, service: str, facts: dict[str, str]) -> None:
        self._service, self._lost = service, False
        self._queue: queue.Queue[tuple[str, tuple[Any, ...]]] = queue.Queue(WAITING)
        # In a session of its own: the terminal's Ctrl-C is for the run, which then closes its boards.
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, service, json.dumps(facts), str(SECONDS_TO_END)],
            stdin=subprocess.PIPE,
            stdout=2,  # what a command prints is its result
            env={**os.environ, "PYTHONSAFEPATH": "1"},
            start_new_session=True,
        )
        self._thread = threading.Thread(target=self._send, daemon=True)
        self._thread.start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._put("scalars", step, dict(values))

    def parameters(self, values: Mapping[str, Any], metrics: Sequence[str]) -> None:
        self._put("parameters", dict(values), list(metrics))

    def image(self, step: int, tag: str, pixels: np.ndarray) -> None:
        self._put("image", step, tag, pixels)

    def close(self, failed: bool) -> None:
        end = time.monotonic() + SECONDS_TO_END
        self._put("close", failed)
        self._thread.join(SECONDS_TO_END)
        try:
            self._process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            log.warning(
                "%s: has not finished in %.0f s and is ended; the run is complete", self._service, SECONDS_TO_END
            )
            self._lost = True  # the thread is about to notice that, too
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _put(self, name: str, *args: Any) -> None:
        try:
            self._queue.put_nowait((name, args))
        except queue.Full:
            self._lose("is too slow: some of what the run logs is missing there")

    def _send(self) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        name = ""
        try:
            while name != "close":
                name, args = self._queue.get()
                pipe.write(pickle.dumps((name, args)))
                pipe.flush()
        except OSError:  # the process is gone
            self._lose("has ended and logs nothing more (see its messages); the run continues")
        finally:
            with suppress(OSError):
                pipe.close()

    def _lose(self, what: str) -> None:
        if not self._lost:
            self._lost = True
            log.warning("%s: %s", self._service, what)


def main(service: str, facts: str, seconds: str) -> int:
    """The service's process: carry out the messages from stdin until it closes, also because the run was killed."""
    for number in STOP_SIGNALS:  # the run decides when it is over
        signal.signal(number, signal.SIG_IGN)
    pipe = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # a service that asks for a key must not read the pipe
    said = False

    def say(error: Exception, what: str) -> None:
        sys.stderr.write(f"mgtrain: {service}: {type(error).__name__}: {one_line(error, 300)}; {what}\n")

    try:
        board = SERVICES[service](**json.loads(facts))
    except Exception as error:
        say(error, "nothing is logged there, the run continues")
        return 1
    while True:
        try:
            name, args = pickle.load(pipe)
        except EOFError:
            name, args = "close", (True,)
        if name == "close":
            end = threading.Timer(float(seconds), os._exit, (1,))
            end.daemon = True
            end.start()
        try:
            getattr(board, name)(*args)
        except Exception as error:
            if not said:
                said = True
                say(error, "some of what the run logs is missing there")
        if name == "close":
            return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
