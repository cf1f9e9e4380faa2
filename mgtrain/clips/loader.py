"""The loader: clips decoded in worker processes, in the order of the plan.

1. A step's clips are cut into units, several per worker and step, so that no worker holds a large batch alone.
2. A worker opens each video, cuts and decodes the clip: uint8 (clips, T, S, S, 3).
3. The units come back in order and are joined to this rank's share of the batch, pinned when it goes to a GPU.

Workers live as long as the run: a change of shape is just another request. Since every step has about the same volume,
memory does not depend on the shape: about `STEPS_AHEAD + 1` steps of uint8 pixels per rank. They are forked from a
server process that has no threads, since a fork of a process that trains may hang; what they know of the videos is in
shared memory.

A video that cannot be decoded is replaced. One that kills its worker, as a fault of FFmpeg's or a lack of memory may,
ends the run with an error that names it: what a killed process had in hand is lost, and a step without it would not be
the same step on another machine. `mgtrain data check` finds such videos beforehand.
"""

from __future__ import annotations

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

from mgtrain.clips.order import ClipRequest, step_requests, video_at
from mgtrain.clips.stages import stage
from mgtrain.clips.units import Loaded, RandomClips, Source, ViewClips, evaluation_grid
from mgtrain.data.videos import Videos
from mgtrain.errors import DataError
from mgtrain.processes.cores import usable_cores
from mgtrain.processes.distributed import World
from mgtrain.processes.signals import leave_signals_to_the_parent
from mgtrain.recipe import Recipe
from mgtrain.rng import Draw
from mgtrain.schedule import Plan

log = logging.getLogger(__name__)

UNITS_PER_WORKER = 2  # units that a step is cut into, for each worker
STEPS_AHEAD = 2  # steps that the workers may run ahead of training


class BadVideos:
    """Counts the videos that cannot be decoded, names each once in the log, stops the run when they are too many."""

    def __init__(self, videos: int, max_fraction: float) -> None:
        self.videos, self.max_fraction = videos, max_fraction
        self.causes: dict[str, str] = {}

    def add(self, loaded: Loaded) -> None:
        """Take in what a worker reported."""
        for path, cause in loaded.bad:
            if path not in self.causes:
                self.causes[path] = cause
                log.warning("video left out: %s", cause)
        if loaded.given_up or len(self.causes) > self.max_fraction * self.videos:
            raise DataError(
                f"{len(self.causes)} of {self.videos} videos cannot be decoded, more than data.max_bad_fraction "
                f"{self.max_fraction:g} allows; fix the paths or files named in the log (the last: "
                f"{next(reversed(self.causes.values()))}), leave them out with `mgtrain data check`, or raise it"
            )


def train_batches(
    videos: Videos, recipe: Recipe, plan: Plan, start: int, world: World, bad: BadVideos
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of each step from `start` on: uint8 (b, 3, T, S, S) and the labels on the rank's device: int64
    (b,), or with `data.multi_label` uint8 (b, classes)."""
    steps = (step_requests(step, len(videos), recipe.seed, world.rank, world.size) for step in plan.steps(start))
    return batches_of(RandomClips(videos, recipe), steps, recipe, world, bad)


def recalibration_batches(
    videos: Videos, recipe: Recipe, world: World, bad: BadVideos
) -> Iterator[tuple[Tensor, Tensor]]:
    """Training clips cut at random on the evaluation grid, the same ones each time; as `train_batches`."""
    grid, share = evaluation_grid(recipe), recipe.batch.clips // world.size
    steps = (
        [
            ClipRequest(video_at(position, len(videos), recipe.seed), position, grid)
            for position in range(
                batch * recipe.batch.clips + world.rank * share, batch * recipe.batch.clips + (world.rank + 1) * share
            )
        ]
        for batch in range(recipe.evaluation.recalibration_batches)
    )
    return batches_of(RandomClips(videos, recipe, Draw.RECALIBRATION), steps, recipe, world, bad)


def view_batches(
    videos: Videos, numbers: Sequence[int], recipe: Recipe, times: int, crops: int, world: World, bad: BadVideos
) -> Iterator[tuple[Tensor, Tensor]]:
    """All views of this rank's videos, which are opened once: uint8 (v * times * crops, 3, T, S, S), and their numbers,
    int64 (v,)."""
    dataset = ViewClips(videos, recipe, times, crops)
    per_batch = max(1, recipe.batch.clips // world.size // (times * crops))
    batches = (numbers[first : first + per_batch] for first in range(0, len(numbers), per_batch))
    return batches_of(dataset, batches, recipe, world, bad)


def worker_count(recipe: Recipe, world: World) -> int:
    """Loader processes of this rank: as the recipe says, or its share of the cores; half of them if it trains there."""
    if recipe.hardware.workers is not None:
        return recipe.hardware.workers
    share = usable_cores() // world.local_size
    return max(1, min(16, share // 2 if world.device.type == "cpu" else share))


def batches_of(
    dataset: RandomClips | ViewClips, steps: Iterable[Sequence[Any]], recipe: Recipe, world: World, bad: BadVideos
) -> Iterator[tuple[Tensor, Tensor]]:
    """Load each step's items in units, and join the units again."""
    workers = worker_count(recipe, world)
    dataset.source.share(workers)
    pieces = UNITS_PER_WORKER * max(1, workers)
    lengths: list[int] = []  # units of the steps that are under way, filled by `units` as the workers ask for more

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
        collate_fn=_as_is,
        prefetch_factor=UNITS_PER_WORKER * STEPS_AHEAD if workers else None,
        worker_init_fn=_start_worker if workers else None,
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
                yield _join(joined, world)
                joined = []


def _units_of(loader: DataLoader[Loaded], source: Source) -> Iterator[Loaded]:
    """What the loader gives. Raises `DataError`, which names the video, if a worker dies."""
    of_child = signal.getsignal(signal.SIGCHLD)
    units = iter(loader)
    if threading.current_thread() is threading.main_thread():
        # torch's handler would raise its error wherever the main thread happens to be; without it, it raises it here.
        signal.signal(signal.SIGCHLD, of_child)
    try:
        yield from units
    except RuntimeError as error:
        lost = source.lost(error)
        if lost is None:
            raise
        raise lost from None


def _join(units: list[Loaded], world: World) -> tuple[Tensor, Tensor]:
    """One batch on the device, out of units."""
    clips, labels = _transfer(*_collate(units, pin=world.device.type == "cuda"), world.device)
    return clips.permute(0, 4, 1, 2, 3), labels  # (b, 3, T, S, S), in memory as channels_last_3d has it


@stage("collate")
def _collate(units: list[Loaded], pin: bool) -> tuple[Tensor, Tensor]:
    """One batch out of units: uint8 (b, T, S, S, 3) and the labels."""
    clips = torch.empty(sum(len(u.clips) for u in units), *units[0].clips.shape[1:], dtype=torch.uint8, pin_memory=pin)
    torch.cat([unit.clips for unit in units], out=clips)
    labels = torch.cat([unit.labels for unit in units])
    return clips, labels.pin_memory() if pin else labels


@stage("transfer")
def _transfer(clips: Tensor, labels: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """A batch on the device; on a GPU it is copied on a stream of its own, beside the step that is at work there."""
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
    """Forks workers from a process that has done nothing but import this module."""
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    if sys.version_info < (3, 11):  # which has no PYTHONSAFEPATH: the server must not import from the current folder
        here = os.getcwd()
        os.chdir(os.sep)
        try:
            forkserver.ensure_running()
        finally:
            os.chdir(here)
    return context


def _end_with_the_run() -> None:
    """A killed run cannot end its workers, and the server that has forked them lives as long as they do."""
    run = parent_process()
    assert run is not None, "a worker has a parent"
    run.join()
    os._exit(1)


def _as_is(loaded: Any) -> Any:
    return loaded


def _start_worker(_: int) -> None:
    leave_signals_to_the_parent()
    threading.Thread(target=_end_with_the_run, daemon=True).start()
    torch.set_num_threads(1)
