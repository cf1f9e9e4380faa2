"""The loader: worker processes decode clips in the order of the plan.

A step's clips are split into units, several per worker, so that no worker decodes a large batch alone. The units return
in order and are joined to this rank's share of the batch.

Workers live as long as the run. All steps have about the same volume, so memory does not depend on the shape: about
`STEPS_AHEAD + 1` steps of uint8 pixels per rank. Workers are forked from a server process without threads, because a
fork of the training process may hang.

A video that cannot be decoded is replaced. A video that crashes its worker, by a bug in FFmpeg or a lack of memory,
ends the run with an error that names it, because a step without the worker's clips would not be reproducible.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from multiprocessing import forkserver, get_context, parent_process
from multiprocessing.context import BaseContext
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from mgtrain.clips.order import Order, step_requests
from mgtrain.clips.stages import stage
from mgtrain.clips.units import Loaded, RandomClips, Source, ViewClips, evaluation_grid
from mgtrain.data.videos import Videos
from mgtrain.errors import DataError, lack_of
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe
from mgtrain.rng import Draw
from mgtrain.schedule import Step

log = logging.getLogger(__name__)

Batches = Iterator[tuple[Tensor, Tensor]]  # on the device: uint8 (b, 3, T, S, S), and labels as in `Loaded`
UNITS_PER_WORKER = 2  # units of a step per worker
STEPS_AHEAD = 2  # steps that the workers may be ahead of training


class BadVideos:
    """Counts the videos that cannot be decoded, logs each once, and stops the run if there are too many."""

    def __init__(self, videos: int, max_fraction: float) -> None:
        self.videos, self.max_fraction = videos, max_fraction
        self.causes: dict[str, str] = {}

    def add(self, loaded: Loaded) -> None:
        """Add a unit's bad videos. Raises `DataError` if there are too many, or one has no usable replacement."""
        for path, cause in loaded.bad:
            if path not in self.causes:
                self.causes[path] = cause
                log.warning("video left out: %s", cause)
        if loaded.given_up or len(self.causes) > self.max_fraction * self.videos:
            raise DataError(
                f"{len(self.causes)} of {self.videos} videos cannot be decoded, more than data.max_bad_fraction "
                f"{self.max_fraction:g} allows; fix the paths or files named in the log (the last: "
                f"{next(reversed(self.causes.values()))}), skip them (`mgtrain data check`, data.checked), or raise it"
            )


def train_batches(
    videos: Videos, recipe: Recipe, steps: Iterable[Step], world: World, bad: BadVideos | None = None
) -> Batches:
    """This rank's share of each step, on its device: uint8 (b, 3, T, S, S), and labels as in `Loaded`."""
    order = Order.of(videos, recipe)
    requests = (step_requests(step, order, world.rank, world.size) for step in steps)
    return batches_of(RandomClips(videos, recipe), requests, recipe, world, bad)


def recalibration_batches(
    videos: Videos, count: int, recipe: Recipe, world: World, bad: BadVideos | None = None
) -> Batches:
    """`count` batches of random training clips on the evaluation grid, the same in every call; as `train_batches`."""
    grid, share, order = evaluation_grid(recipe), recipe.batch.clips // world.size, Order.of(videos, recipe)
    firsts = (batch * recipe.batch.clips + world.rank * share for batch in range(count))
    steps = (list(order.requests(range(first, first + share), grid)) for first in firsts)
    return batches_of(RandomClips(videos, recipe, Draw.RECALIBRATION), steps, recipe, world, bad)


def view_batches(
    videos: Videos,
    numbers: Sequence[int],
    recipe: Recipe,
    times: int,
    crops: int,
    world: World,
    bad: BadVideos | None = None,
) -> Batches:
    """All views of this rank's videos: uint8 (v * times * crops, 3, T, S, S), and the videos' numbers, int64 (v,)."""
    dataset = ViewClips(videos, recipe, times, crops)
    per_batch = max(1, recipe.batch.clips // world.size // (times * crops))
    batches = (numbers[first : first + per_batch] for first in range(0, len(numbers), per_batch))
    return batches_of(dataset, batches, recipe, world, bad)


def worker_count(recipe: Recipe, world: World) -> int:
    """Loader processes of this rank: `hardware.workers`, or if None its share of the cores, of which half on a CPU."""
    if recipe.hardware.workers is not None:
        return recipe.hardware.workers
    return max(1, min(16, world.cores // 2 if world.device.type == "cpu" else world.cores))


def batches_of(
    dataset: RandomClips | ViewClips,
    steps: Iterable[Sequence[Any]],
    recipe: Recipe,
    world: World,
    bad: BadVideos | None = None,
) -> Batches:
    """Load each step's items in units, joined on the device; `bad` by default allows `data.max_bad_fraction`."""
    workers = worker_count(recipe, world)
    bad = bad or BadVideos(len(dataset.source.videos), recipe.data.max_bad_fraction)
    dataset.source.share(workers)
    pieces = UNITS_PER_WORKER * max(1, workers)
    lengths: list[int] = []  # units of the steps in progress; `units` adds to them as the workers ask for more

    def units() -> Iterator[Sequence[Any]]:
        for items in steps:
            size = -(-len(items) // pieces)
            cut = [items[first : first + size] for first in range(0, len(items), size)]
            lengths.append(len(cut))
            yield from cut

    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=units(),
        num_workers=workers,
        prefetch_factor=UNITS_PER_WORKER * STEPS_AHEAD if workers else None,
        worker_init_fn=_start_worker,
        multiprocessing_context=_server() if workers else None,
    )
    joined: list[Loaded] = []
    with world.watchdog.looking_at(dataset.source.under_way):
        for loaded in _units_of(loader, dataset.source):
            world.watchdog.beat()
            bad.add(loaded)
            joined.append(loaded)
            if len(joined) == lengths[0]:
                del lengths[0]
                yield _join(joined, world)  # which nothing here refers to, so that its memory is freed after the step
                joined = []


def _units_of(loader: DataLoader[Loaded], source: Source) -> Iterator[Loaded]:
    """The loader's items. Raises `DataError` if a worker died, `LackError` if the machine lacks something."""
    of_child = signal.getsignal(signal.SIGCHLD)
    units = iter(loader)
    if threading.current_thread() is threading.main_thread():
        # torch's handler would raise its error anywhere in the main thread; without it, the loader raises it here.
        signal.signal(signal.SIGCHLD, of_child)
    try:
        yield from units
    except (RuntimeError, EOFError, ConnectionError) as error:
        cause: Exception = error
        if not isinstance(error, RuntimeError):  # a worker that has no file descriptor left closes its connection
            cause = RuntimeError(f"Too many open files, or a loader process was killed: {str(error) or 'no answer'}")
        lost = lack_of(cause) or source.lost(cause)
        if lost is None:
            raise
        raise lost from None


def _join(units: list[Loaded], world: World) -> tuple[Tensor, Tensor]:
    """Join units to a batch on the device."""
    clips, labels = _transfer(*_collate(units, pin=world.device.type == "cuda"), world.device)
    return clips.permute(0, 4, 1, 2, 3), labels  # (b, 3, T, S, S) in channels_last_3d


@stage("collate")
def _collate(units: list[Loaded], pin: bool) -> tuple[Tensor, Tensor]:
    """Join units to a batch on the host: uint8 (b, T, S, S, 3) and the labels."""
    clips = torch.empty(sum(len(u.clips) for u in units), *units[0].clips.shape[1:], dtype=torch.uint8, pin_memory=pin)
    torch.cat([unit.clips for unit in units], out=clips)
    labels = torch.cat([unit.labels for unit in units])
    return clips, labels.pin_memory() if pin else labels


@stage("transfer")
def _transfer(clips: Tensor, labels: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Copy a batch to the device: on a GPU, in a separate stream, during the current step."""
    if device.type != "cuda":
        return clips.to(device), labels.to(device)
    copying, working = _copy_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(copying):
        there = clips.to(device, non_blocking=True), labels.to(device, non_blocking=True)
    working.wait_stream(copying)
    for tensor in there:
        tensor.record_stream(working)  # so that its memory is not reused before the step ends
    return there


@lru_cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _server() -> BaseContext:
    """A context that forks workers from a process that has only imported this module."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["mgtrain.processes.server", __name__])
    if sys.version_info < (3, 11):  # which lacks PYTHONSAFEPATH: the server must not import from the current folder
        here = os.getcwd()
        os.chdir(os.sep)
        try:
            forkserver.ensure_running()
        finally:
            os.chdir(here)
    return context


def _end_with_the_run() -> None:
    """End this worker when the run ends: a killed run cannot end its workers, and their server outlives it."""
    run = parent_process()
    assert run is not None, "a worker has a parent"
    run.join()
    os._exit(1)


def _end_when_told() -> None:
    """End this worker when the run tells it to. Others signal all processes of a job, and the run still needs clips."""
    run = parent_process()
    assert run is not None, "a worker has a parent"
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != run.pid:
        pass
    os._exit(1)


def _start_worker(_: int) -> None:
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "sigwaitinfo"):  # which macOS lacks
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # in all threads: `_end_when_told` takes it
        threading.Thread(target=_end_when_told, daemon=True).start()
    threading.Thread(target=_end_with_the_run, daemon=True).start()
    torch.set_num_threads(1)
