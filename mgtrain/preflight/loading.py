"""Measure how fast this machine loads clips of one shape: on one core, split into stages, and with all workers."""

import math
import time
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch

from mgtrain.clips.loader import UNITS_PER_WORKER, batches_of, worker_count
from mgtrain.clips.order import Order
from mgtrain.clips.stages import Stages
from mgtrain.clips.units import RandomClips
from mgtrain.data.videos import Videos
from mgtrain.errors import DataError
from mgtrain.grid import Grid, Shape
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe

STAGES = ("open", "demux", "decode", "convert", "resample", "collate", "transfer")
IN_TRAINING_PROCESS = ("collate", "transfer")  # copies from pinned memory to a GPU do not block


@dataclass(frozen=True, slots=True)
class OneCore:
    """Clips loaded by one process with one thread."""

    clips: int
    seconds: float  # wall-clock time
    cpu_seconds: float
    stages: Stages
    bad: frozenset[str]  # paths of videos that cannot be decoded
    given_up: bool  # no video can be decoded


def cut_on_one_core(recipe: Recipe, videos: Videos, grid: Grid, seconds: float) -> OneCore:
    """Load at least 4 clips, for about `seconds`, after one warm-up clip."""
    dataset, requests = RandomClips(videos, recipe), Order.of(videos, recipe).requests(count(), grid)
    dataset[[next(requests)]]
    clips, bad, given_up, threads = 0, set[str](), False, torch.get_num_threads()
    start, cpu_start = time.perf_counter(), time.process_time()
    torch.set_num_threads(1)  # as loader processes do: idle threads keep their cores busy
    try:
        with Stages() as stages:
            while not given_up and (clips < 4 or time.perf_counter() - start < seconds):
                loaded = dataset[[next(requests)]]
                clips, given_up = clips + 1, loaded.given_up
                bad |= {path for path, _ in loaded.bad}
    finally:
        torch.set_num_threads(threads)
    return OneCore(
        clips, time.perf_counter() - start, time.process_time() - cpu_start, stages, frozenset(bad), given_up
    )


def measure_loading(
    recipe: Recipe, videos: Videos, world: World, shape: Shape, grid: Grid, seconds: float
) -> dict[str, Any]:
    """Clips of one shape: per second and core, milliseconds of each stage, and per second from the loader.

    Raises `DataError` if no video can be read.
    """
    core = cut_on_one_core(recipe, videos, grid, seconds)
    if core.given_up:
        raise DataError(
            f"{videos.root}: {len(core.bad)} videos in a row cannot be decoded, such as {min(core.bad)}; find all with "
            "`mgtrain data check`"
        )
    milliseconds = {stage: 1000 * core.stages.seconds[stage] / core.clips for stage in STAGES}
    milliseconds["rest"] = 1000 * core.seconds / core.clips - sum(milliseconds.values())  # cutting, copying, Python

    dataset, requests = RandomClips(videos, recipe), Order.of(videos, recipe).requests(count(core.clips + 1), grid)
    # Batches are small enough that several arrive within the time; the first three start the workers.
    pieces = UNITS_PER_WORKER * max(1, worker_count(recipe, world))
    batch = min(shape.clips, pieces * math.ceil(core.clips / core.seconds * seconds / 8))
    steps = ([next(requests) for _ in range(batch)] for _ in count())
    batches = batches_of(dataset, steps, recipe, world)
    for _ in range(3):
        next(batches)
    start, delivered = time.perf_counter(), 0
    with Stages() as joining:
        while delivered < 2 * batch or time.perf_counter() - start < seconds:
            next(batches)
            delivered += batch
    rate = delivered / (time.perf_counter() - start)
    milliseconds |= {stage: 1000 * joining.seconds[stage] / delivered for stage in IN_TRAINING_PROCESS}
    return {
        "clips": shape.clips, "frames": shape.frames, "crop": shape.crop,
        "clips_per_second_per_core": core.clips / core.seconds, "milliseconds": milliseconds,
        "core_seconds_per_step": shape.clips * core.cpu_seconds / core.clips,
        "loader_clips_per_second": rate,
    }  # fmt: skip
