"""Call a function for many items in worker processes, so that a crash or a hang loses only one item.

If a worker dies or must be killed, a new one replaces it.
"""

import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

GRACE_SECONDS = 2.0  # for a worker to clean up after SIGTERM
ORPHAN_SECONDS = 5.0  # between an idle worker's checks that its parent is alive


@dataclass(frozen=True, slots=True)
class Lost:
    """Why an item has no result: `kind` is crash or timeout."""

    kind: str
    cause: str


class _Worker(Generic[Item]):
    """A process and its current item."""

    item: Item
    since: float  # seconds of the monotonic clock

    def __init__(self, function: Callable[[Item], object], memory: int | None) -> None:
        # Any file may crash a worker, and a forked one starts in milliseconds.
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(function, theirs, os.getpid(), memory), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, item: Item) -> None:
        self.item, self.since = item, time.monotonic()
        with suppress(OSError):  # if it is dead, reading its answer fails
            self.pipe.send(item)

    def end(self, grace: float = 0.0) -> None:
        """Kill the process after `grace` seconds."""
        self.process.join(grace)
        self.process.kill()
        self.process.join()
        self.pipe.close()


def isolated(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    *,
    seconds: float = float("inf"),
    memory: int | None = None,
) -> Iterator[tuple[Item, Result | Lost]]:
    """Each item with its result, in the order in which `workers` processes finish them.

    A call may take `seconds`. On Linux a worker may allocate `memory` bytes more than at its start. Exceptions of the
    function are raised here.

    >>> list(isolated(len, ["a", "bc"], workers=1))
    [('a', 1), ('bc', 2)]
    """
    waiting = iter(items)
    team: list[_Worker[Item]] = []
    idle: list[_Worker[Item]] = []
    try:
        while True:
            for item in islice(waiting, workers - len(team)):
                worker = idle.pop() if idle else _Worker(function, memory)
                worker.give(item)
                team.append(worker)
            if not team:
                return
            limit = min(worker.since for worker in team) + seconds - time.monotonic()
            ready = wait([worker.pipe for worker in team], None if limit == float("inf") else max(0.0, limit))
            for worker in list(team):
                if worker.pipe in ready:
                    try:
                        raised, outcome = worker.pipe.recv()
                        idle.append(worker)
                    except (EOFError, OSError):
                        worker.end()
                        code = worker.process.exitcode or 0
                        by = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                        raised, outcome = False, Lost("crash", by)
                elif time.monotonic() - worker.since > seconds:
                    worker.end()
                    raised, outcome = False, Lost("timeout", f"takes more than {seconds:g} s")
                else:
                    continue
                team.remove(worker)
                if raised:
                    raise outcome
                yield worker.item, outcome
    finally:
        for worker in team + idle:
            worker.process.terminate()
        for worker in team + idle:
            worker.end(GRACE_SECONDS)


def _serve(function: Callable[[Item], object], pipe: Connection, parent: int, memory: int | None) -> None:
    """Send (False, result) or (True, exception) for each item."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the main process ends its workers
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory is not None:
        with suppress(OSError):  # only Linux has the file
            limit = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize() + memory  # data pages
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    while True:
        while not pipe.poll(ORPHAN_SECONDS):
            if os.getppid() != parent:
                return
        try:
            item = pipe.recv()
        except EOFError:
            return
        answer: tuple[bool, object]
        try:
            answer = False, function(item)
        except Exception as error:
            answer = True, error
        pipe.send(answer)
