"""Run a study's runs as separate processes, several at a time, each on its own cores."""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mgtrain.console import note
from mgtrain.errors import StoppedError, UsageError
from mgtrain.processes.cores import which_cores
from mgtrain.processes.files import write_whole
from mgtrain.processes.signals import StopRequest
from mgtrain.runs.study.definition import Run

POLL_SECONDS = 0.2
STOPPED = (75, 130, -15)  # exit codes of runs that a signal stopped
PR_SET_PDEATHSIG = 1  # of Linux's prctl
LIBC = ctypes.CDLL(None)


def shares_of_cores(jobs: int) -> list[list[int]]:
    """The usable cores in equal shares, one per job. Raises `UsageError` if there are more jobs than cores."""
    cores = sorted(which_cores())
    if jobs > len(cores):
        raise UsageError(
            f"--jobs {jobs}: this machine has {len(cores)} usable cores, and runs that share a core cannot be compared "
            f"in time; use --jobs {len(cores)} or fewer"
        )
    each = len(cores) // jobs
    return [cores[slot * each : (slot + 1) * each] for slot in range(jobs)]


def train_all(
    runs: Sequence[Run],
    folder: Path,
    command: Sequence[str],
    jobs: int,
    options: Sequence[str],
    finished: Callable[[Run], None],
) -> list[tuple[Run, int]]:
    """Train runs in order with `command`, `jobs` at a time; returns those that failed, with their exit codes.

    `options` are for `mgtrain fit`; a run's output is in output.txt in its folder. `finished` is called after each
    finished run. `StoppedError`: a signal stopped the study, and the runs have saved a checkpoint.
    """
    shares, left, failed, told = shares_of_cores(jobs), list(runs), list[tuple[Run, int]](), False
    for run in runs:  # so that they train what the study says now, though somebody edits the files meanwhile
        write_whole(_recipe(folder, run), run.recipe.to_yaml().encode())
    active: dict[int, tuple[Run, subprocess.Popen[bytes]]] = {}  # by the index of its share of cores
    with StopRequest() as asked:
        try:
            while left or active:
                if asked.signal and not told:
                    left.clear()
                    told = True
                    for _, process in active.values():
                        process.terminate()
                while left and len(active) < jobs:
                    slot, run = min(set(range(jobs)) - set(active)), left.pop(0)
                    active[slot] = run, _start(run, folder, command, options, shares[slot], jobs)
                    note(f"{run.name}: started, {len(left)} waiting")
                for slot, (run, process) in [*active.items()]:
                    code = process.poll()
                    if code is None:
                        continue
                    del active[slot]
                    if code == 0:
                        finished(run)
                        note(f"{run.name}: finished")
                    elif not (asked.signal and code in STOPPED):
                        failed.append((run, code))
                        note(f"{run.name}: failed with exit code {code}, see {folder / run.name}/output.txt")
                time.sleep(POLL_SECONDS if active else 0)
        finally:
            for _, process in active.values():  # after an exception; they save a checkpoint
                process.terminate()
            for _, process in active.values():
                process.wait()
    if asked.signal:
        raise StoppedError("stopped by a signal, the runs are saved; run the same command again to resume the study")
    return failed


def _start(
    run: Run, folder: Path, command: Sequence[str], options: Sequence[str], cores: Sequence[int], jobs: int
) -> subprocess.Popen[bytes]:
    """Start a run, pinned to its cores if it shares the machine with others."""
    here = folder / run.name
    here.mkdir(parents=True, exist_ok=True)
    words = [*command, "fit", str(_recipe(folder, run)), "--name", f"{here.absolute()}", "--resume", *options]
    threads = {"OMP_NUM_THREADS": str(len(cores))} if jobs > 1 else {}
    with (here / "output.txt").open("ab") as output, pinned(cores if jobs > 1 else ()):
        return subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=os.environ | threads,
            start_new_session=True, preexec_fn=_stop_with_parent,
        )  # fmt: skip


def _recipe(folder: Path, run: Run) -> Path:
    return folder / ".recipes" / f"{run.name}.yaml"


def _stop_with_parent() -> None:
    """Let the run save and stop if its study is killed."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def pinned(cores: Sequence[int]) -> Iterator[None]:
    """Restrict this process and those that it starts to `cores` within the block; no restriction if empty."""
    if not cores or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
