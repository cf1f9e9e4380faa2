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
import re
import signal
import threading
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context, parent_process
from multiprocessing.context import BaseContext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from mgtrain.clips.augment import rand_augment
from mgtrain.clips.cut import Cut, cut_random, cut_views
from mgtrain.clips.decode import VideoFile
from mgtrain.clips.order import ClipRequest, step_requests, video_at
from mgtrain.clips.prepared import PreparedSet, PreparedVideo
from mgtrain.datasets.videos import Videos, mirrored_labels
from mgtrain.distributed import World
from mgtrain.errors import DataError, VideoError
from mgtrain.grid import Grid
from mgtrain.machine import usable_cores
from mgtrain.recipe import Augment, Data, Recipe
from mgtrain.rng import Draw, generator
from mgtrain.schedule import Plan
from mgtrain.signals import leave_signals_to_the_parent

log = logging.getLogger(__name__)

UNITS_PER_WORKER = 2  # units that a step is cut into, for each worker
STEPS_AHEAD = 2  # steps that the workers may run ahead of training
REPLACEMENTS = 16  # videos to try in place of a broken one, before the data set is given up


@dataclass(frozen=True, slots=True)
class Loaded:
    """What comes back for one unit of work."""

    clips: Tensor  # uint8 (clips, T, S, S, 3)
    labels: Tensor  # int64 (clips,), or uint8 (clips, classes); in an evaluation the numbers of the videos, (videos,)
    bad: tuple[tuple[str, str], ...] = ()  # path and cause of each video that could not be decoded
    given_up: bool = False


class Source:
    """Where the videos are read: their own files, or a prepared set. It tells which ones are being decoded."""

    def __init__(self, videos: Videos, data: Data) -> None:
        self.videos, self._skip_loop_filter = videos, data.skip_loop_filter
        self._reading = torch.zeros(1, 2, dtype=torch.int64)  # of each process, its pid, and 1 + the video or 0
        self._shared: list[Tensor] | None = None
        self._rows = np.empty(0, np.int32)  # of the videos, in the prepared set
        self._prepared = PreparedSet(data.prepared, data.enlarge) if data.prepared else None
        if self._prepared:
            self._rows = self._prepared.find(videos.name(n) for n in range(len(videos)))
            missing = np.flatnonzero(self._rows < 0)
            if len(missing):
                raise DataError(
                    f"{data.prepared}: lacks {len(missing)} of {len(videos)} videos, the first is "
                    f"{videos.name(int(missing[0]))}; run `mgtrain data prepare` with this recipe"
                )

    def share(self, workers: int) -> None:
        """Make ready to be used by so many processes, before they start."""
        self._reading = torch.zeros(max(1, workers), 2, dtype=torch.int64)
        self._reading.share_memory_()  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        """What a worker is given: the arrays, which may tell of millions of videos, as shared memory."""
        if self._shared is None:
            self._shared = [torch.from_numpy(array.copy()) for array in (*self.videos.arrays(), self._rows)]
            for tensor in self._shared:
                tensor.share_memory_()  # type: ignore[no-untyped-call]
        return {**self.__dict__, "videos": self.videos.without_arrays(), "_rows": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        *arrays, self._rows = (tensor.numpy() for tensor in state["_shared"])
        self.videos = self.videos.with_arrays(arrays)

    @contextmanager
    def open(self, video: int) -> Iterator[VideoFile | PreparedVideo]:
        """A video to read. Raises `VideoError` if it cannot be read."""
        worker = get_worker_info()
        mine = self._reading[worker.id if worker else 0]
        mine[0], mine[1] = os.getpid(), video + 1
        try:
            with self._reader(video) as file:
                yield file
        finally:
            mine[1] = 0

    def _reader(self, video: int) -> VideoFile | PreparedVideo:
        if self._prepared:
            return self._prepared.open(int(self._rows[video]), self.videos.name(video))
        return VideoFile(self.videos.path(video), self._skip_loop_filter)

    def under_way(self, pids: Container[int] | None = None) -> list[str]:
        """The paths of the videos that are being decoded: by all processes, or by some of them."""
        reading = [(pid, video - 1) for pid, video in self._reading.tolist() if video]
        return [self.videos.path(video) for pid, video in reading if pids is None or pid in pids]

    def lost(self, error: RuntimeError) -> DataError | None:
        """What to say if the error is torch's word of workers that died."""
        dead = re.search(r"DataLoader worker \(pid\S* ([\d, ]+)\)", str(error))
        if dead is None:
            return None
        paths = sorted(set(self.under_way([int(pid) for pid in dead[1].split(",")])))
        return DataError(
            f"a loader process died while it read {' or '.join(paths) or 'a video'}; find all such videos with "
            "`mgtrain data check` and leave them out with data.checked, or mend the lack of memory if there was any"
        )


class RandomClips(Dataset[Loaded]):
    """Clips cut at random; an item is a unit, a list of requests. A clip depends on its request and the seed alone."""

    def __init__(self, videos: Videos, recipe: Recipe, draw: Draw = Draw.CUT) -> None:
        self.source = Source(videos, recipe.data)
        self.clip, self.seed, self.draw = recipe.clip, recipe.seed, draw
        self.multi_label = recipe.data.multi_label
        self.mirrored = np.array(mirrored_labels(videos.classes, recipe.data.mirrored))
        # BatchNorm's statistics are to be those of clips as evaluations see them.
        self.augment = recipe.augment if draw is Draw.CUT else Augment()

    def __getitem__(self, unit: Sequence[ClipRequest]) -> Loaded:
        grid = unit[0].grid
        clips = torch.zeros(len(unit), grid.frames, grid.crop, grid.crop, 3, dtype=torch.uint8)  # (clips, T, S, S, 3)
        labels = []
        bad: list[tuple[str, str]] = []
        for i, request in enumerate(unit):
            for video in self._candidates(request):
                try:
                    clip, label = self._cut(video, request)
                except VideoError as error:
                    bad.append((self.source.videos.path(video), str(error)))
                else:
                    clips[i] = torch.from_numpy(rand_augment(clip, self.augment, self.seed, request.position))
                    labels.append(label)
                    break
            else:
                return Loaded(clips, torch.empty(0), tuple(bad), given_up=True)
        return Loaded(clips, torch.from_numpy(np.stack(labels)), tuple(bad))

    def _candidates(self, request: ClipRequest) -> Iterator[int]:
        """The video asked for, then those that stand in for it, the same ones wherever the clip is made."""
        yield request.video
        for attempt in range(REPLACEMENTS):
            rng = generator(self.seed, Draw.REPLACEMENT, request.position, attempt)
            yield int(rng.integers(len(self.source.videos)))

    def _cut(self, video: int, request: ClipRequest) -> tuple[np.ndarray, np.ndarray]:
        """The clip, uint8 (T, S, S, 3), and its class, int64 (), or its classes, uint8 (classes,)."""
        rng = generator(self.seed, self.draw, request.position)
        with self.source.open(video) as file:
            cut = cut_random(
                request.grid,
                file.info,
                rng,
                fps=self.clip.fps,
                flip=self.clip.flip,
                inverse_uniform=self.clip.inverse_uniform,
                segments=self.clip.sampling == "segments",
            )
            return file.read([cut])[0], self._label(video, cut, file.info.fps)

    def _label(self, video: int, cut: Cut, fps: float) -> np.ndarray:
        videos = self.source.videos
        if not self.multi_label:
            label = videos.label(video)
            return np.array(self.mirrored[label] if cut.flip else label)
        row = videos.targets(video, cut.frames[0] / fps, (cut.frames[-1] + 1) / fps)
        return row[self.mirrored] if cut.flip else row


class ViewClips(Dataset[Loaded]):
    """All views of each video, for evaluation; an item is a unit, a list of video numbers. Broken ones are left out."""

    def __init__(self, videos: Videos, recipe: Recipe, times: int, crops: int) -> None:
        self.source = Source(videos, recipe.data)
        self.grid, self.times, self.crops, self.clip = evaluation_grid(recipe), times, crops, recipe.clip

    def __getitem__(self, unit: Sequence[int]) -> Loaded:
        views: list[np.ndarray] = []
        numbers: list[int] = []
        bad: list[tuple[str, str]] = []
        for video in unit:
            try:
                with self.source.open(video) as file:
                    segments = self.clip.sampling == "segments"
                    cuts = cut_views(self.grid, file.info, self.times, self.crops, fps=self.clip.fps, segments=segments)
                    views.extend(file.read(cuts))
                numbers.append(video)
            except VideoError as error:
                bad.append((self.source.videos.path(video), str(error)))
        shape = (self.grid.frames, self.grid.crop, self.grid.crop, 3)
        clips = np.stack(views) if views else np.zeros((0, *shape), np.uint8)  # (videos * times * crops, T, S, S, 3)
        return Loaded(torch.from_numpy(clips), torch.tensor(numbers, dtype=torch.int64), tuple(bad))


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
                f"{self.max_fraction:g} allows; mend the paths or files named in the log (the last: "
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


def evaluation_grid(recipe: Recipe) -> Grid:
    """The one grid of every evaluation."""
    clip, evaluation = recipe.clip, recipe.evaluation
    return Grid(
        clip.frames, evaluation.crop, (clip.stride, clip.stride), (evaluation.short_side, evaluation.short_side)
    )


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


def _collate(units: list[Loaded], pin: bool) -> tuple[Tensor, Tensor]:
    """One batch out of units: uint8 (b, T, S, S, 3) and the labels."""
    clips = torch.empty(sum(len(u.clips) for u in units), *units[0].clips.shape[1:], dtype=torch.uint8, pin_memory=pin)
    torch.cat([unit.clips for unit in units], out=clips)
    labels = torch.cat([unit.labels for unit in units])
    return clips, labels.pin_memory() if pin else labels


def _transfer(clips: Tensor, labels: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """A batch on the device; on a GPU it is copied on a stream of its own, beside the step that is at work there."""
    if device.type != "cuda":
        return clips.to(device), labels.to(device)
    copying, working = _copy_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(copying):
        there = clips.to(device, non_blocking=True), labels.to(device, non_blocking=True)
    working.wait_stream(copying)
    for tensor in there:
        tensor.record_stream(working)  # so that its memory is not used anew before the step is through
    return there


@lru_cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _server() -> BaseContext:
    """Forks workers from a process that has done nothing but import this module."""
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
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
