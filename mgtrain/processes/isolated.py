"""A function called for many items in processes, so that a call that crashes or hangs costs its own item only.

A process serves one item after the other, and is replaced when it dies or has to be killed.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

GRACE_SECONDS = 2.0  # in which a process may tidy up when it is told to end
ORPHAN_SECONDS = 5.0  # after which an idle process sees that the one that started it is gone
PAGE = resource.getpagesize()


@dataclass(frozen=True, slots=True)
class Lost:
    """Why an item has no result: `kind` is crash or timeout."""

    kind: str
    cause: str


@dataclass(slots=True)
class _Worker(Generic[Item]):
    """A process and what it is at."""

    process: BaseProcess
    pipe: Connection
    item: Item
    since: float  # seconds of the monotonic clock

    def give(self, item: Item) -> None:
        self.item, self.since = item, time.monotonic()
        with suppress(OSError):  # it is dead: that is noticed when its answer is waited for
            self.pipe.send(item)

    def end(self, grace: float = 0.0) -> None:
        """End the process, which may take `grace` seconds more."""
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
    """Each item with its result as they come, from `workers` processes.

    A call may take `seconds`; a process may allocate `memory` bytes more than it starts with (on Linux). What the
    function raises is raised here.

    >>> list(isolated(len, ["a", "bc"], workers=1))
    [('a', 1), ('bc', 2)]
    """
    waiting = iter(items)
    team: list[_Worker[Item]] = []
    idle: list[_Worker[Item]] = []
    try:
        while True:
            while len(team) < workers:
                try:
                    item = next(waiting)
                except StopIteration:
                    break
                worker = idle.pop() if idle else _start(function, item, memory)
                worker.give(item)
                team.append(worker)
            if not team:
                return
            limit = min(worker.since for worker in team) + seconds - time.monotonic()
            ready = wait([worker.pipe for worker in team], None if limit == float("inf") else max(0.0, limit))
            for worker in list(team):
                outcome: Result | Lost
                if worker.pipe in ready:
                    try:
                        raised, outcome = worker.pipe.recv()
                        idle.append(worker)
                    except (EOFError, OSError):
                        worker.end()
                        raised, outcome = False, Lost("crash", _last_words(worker.process.exitcode))
                elif time.monotonic() - worker.since > seconds:
                    worker.end()
                    raised, outcome = False, Lost("timeout", f"takes more than {seconds:g} s")
                else:
                    continue
                team.remove(worker)
                if raised:
                    assert isinstance(outcome, BaseException)
                    raise outcome
                yield worker.item, outcome
    finally:
        for worker in team + idle:
            worker.process.terminate()
        for worker in team + idle:
            worker.end(GRACE_SECONDS)


def limit_memory(more: int) -> None:
    """Let this process allocate so many bytes more, on Linux; then allocations fail."""
    try:
        has = int(Path("/proc/self/statm").read_text().split()[5]) * PAGE
    except OSError:
        return
    resource.setrlimit(resource.RLIMIT_DATA, (has + more, has + more))


def _start(function: Callable[[Item], Result], item: Item, memory: int | None) -> _Worker[Item]:
    # Forked, a process starts in milliseconds: there may be a crash for every file.
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(function, theirs, os.getpid(), memory), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours, item, time.monotonic())


def _serve(function: Callable[[Item], Result], pipe: Connection, parent: int, memory: int | None) -> None:
    """Answer each item with (whether it is an exception, result or exception)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to every process of a terminal: the main one ends us
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory is not None:
        limit_memory(memory)
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


def _last_words(exitcode: int | None) -> str:
    """What a process died of."""
    if exitcode is not None and exitcode < 0:
        return f"killed by {signal.Signals(-exitcode).name}"
    return f"ended with exit code {exitcode}"
