"""How fast this machine delivers the clips of a recipe's plan, where the time goes, and what training needs.

1. Each distinct shape of the plan is cut and decoded in this process, on one core, for a few seconds, with the time
   split into stages. What a step of the shape costs follows in core-seconds, of CPU time.
2. The loader delivers the same shapes with its worker processes.
3. One step of the base shape is timed. Volume is constant, so every step is taken to last as long: what a phase needs
   is its clips per step over that time, and it waits where the loader delivers less.
4. Where the data is not prepared, a few of its videos are, in a temporary folder, to tell what that would give.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from mgtrain.clips import decode, loader, prepared
from mgtrain.clips.loader import UNITS_PER_WORKER, BadVideos, batches_of, worker_count
from mgtrain.clips.order import ClipRequest, video_at
from mgtrain.clips.prepared import Settings
from mgtrain.clips.units import RandomClips
from mgtrain.console import duration
from mgtrain.data.videos import Videos
from mgtrain.engine.checks import check_shapes, make_model
from mgtrain.engine.step import to_device
from mgtrain.errors import DataError
from mgtrain.grid import Grid, Shape
from mgtrain.preflight.bench_step import step_seconds as seconds_of_step
from mgtrain.preflight.costs import ShapeRate, hours, steps_of_shapes
from mgtrain.preflight.prepare import prepare
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe
from mgtrain.rng import Draw, generator
from mgtrain.schedule import Plan, baseline_recipe, make_plan

SAMPLE = 16  # videos that are prepared to see what it gives
STEPS = 2  # that are timed, after one that is not

# stage -> the functions whose time it is, without that of others among them
STAGES: dict[str, tuple[tuple[Any, str], ...]] = {
    "open": ((decode.VideoFile, "_open"), (decode.VideoFile, "_probe"), (prepared.PreparedSet, "open")),
    "demux": ((decode.VideoFile, "_span"), (prepared, "read_bytes")),
    "decode": ((decode, "decoded"), (prepared, "decoded")),
    "convert": ((decode, "rgb"),),
    "resample": ((decode, "resample"),),
    "collate": ((loader, "_collate"),),
    "transfer": ((loader, "_transfer"),),  # to the device; what a copy of pinned memory takes is not waited for
}
IN_TRAINING_PROCESS = ("collate", "transfer")


class Stages:
    """Splits time between named functions of the package, for as long as `measure` lasts."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._inner = 0.0  # seconds of stages within the one that is running

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Within, calls of the functions in `STAGES` are timed."""
        with ExitStack() as stack:
            for stage, functions in STAGES.items():
                for owner, name in functions:
                    stack.enter_context(mock.patch.object(owner, name, self._timed(stage, getattr(owner, name))))
            yield

    def _timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            outer, self._inner = self._inner, 0.0
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                whole = time.perf_counter() - start
                self.seconds[stage] += whole - self._inner
                self._inner = outer + whole

        return timed


def bench_data(
    recipe: Recipe,
    videos: Videos,
    world: World,
    levels: tuple[int, ...],
    quality: int,
    *,
    seconds: float = 2.0,
    step_seconds: float | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Rates of every shape, for about `seconds` each, and what they mean for the plan; as plain values.

    `step_seconds` is how long a training step takes, measured here unless told. Where the recipe names no prepared set,
    a second one is made of a few videos.

    Raises:
        DataError: there is no video that can be read.
    """
    plan, baseline = make_plan(recipe, len(videos)), make_plan(baseline_recipe(recipe), len(videos))
    phases = [*plan.phases, *baseline.phases]
    grids = {shape: grid for p in phases for shape, grid in list(zip(p.shapes, p.grids, strict=True))[: p.steps]}
    step = step_seconds or base_step_seconds(recipe, baseline, world)
    kinds = 1 if recipe.data.prepared else 2

    def bench(name: str, recipe: Recipe, videos: Videos, done: int) -> dict[str, Any]:
        rows = []
        for n, (shape, grid) in enumerate(grids.items(), start=1):
            rows.append(bench_shape(recipe, videos, world, shape, grid, seconds, shape.clips / step))
            progress("measuring", done + n, kinds * len(grids))
        costs = {shape: row["core_seconds_per_step"] for shape, row in zip(grids, rows, strict=True)}
        rates = {
            shape: ShapeRate(step, shape.clips / row["loader_clips_per_second"], costs[shape])
            for shape, row in zip(grids, rows, strict=True)
        }
        totals = {key: hours(of, rates, None) for key, of in (("plan", plan), ("baseline", baseline))}
        return {"name": name, "shapes": rows, "cost": cost(plan, recipe.base, costs), **totals}

    first = bench("prepared" if recipe.data.prepared else "originals", recipe, videos, 0)
    sets = [first]
    if not recipe.data.prepared:
        with tempfile.TemporaryDirectory() as folder:
            few = sample(videos)
            paths = [few.name(n) for n in range(len(few))]
            settings = Settings(levels, quality, None)
            prepare(Path(few.root), paths, Path(folder) / "set", settings, max(1, worker_count(recipe, world)))
            data = recipe.data.model_copy(update={"prepared": str(Path(folder) / "set")})
            sets.append(bench("prepared", recipe.model_copy(update={"data": data}), few, len(grids)))
    return {"workers": worker_count(recipe, world), "step_seconds": step, "sets": sets}


def sample(videos: Videos) -> Videos:
    """Some of the videos, drawn at random."""
    chosen = generator(0, Draw.PREPARE).permutation(len(videos))[:SAMPLE]
    mask = np.zeros(len(videos), bool)
    mask[chosen] = True
    return videos.only(mask, ())


def bench_shape(
    recipe: Recipe, videos: Videos, world: World, shape: Shape, grid: Grid, seconds: float, needed: float
) -> dict[str, Any]:
    """Clips of one shape: per second and core, where the milliseconds go, and per second out of the loader."""
    dataset = RandomClips(videos, recipe)
    requests = (ClipRequest(video_at(c, len(videos), recipe.seed), c, grid) for c in count())
    dataset[[next(requests)]]  # what happens once only is no part of the rate
    stages, clips, start, start_of_core = Stages(), 0, time.perf_counter(), time.process_time()
    with stages.measure(), one_thread():
        while clips < 4 or time.perf_counter() - start < seconds:
            if dataset[[next(requests)]].given_up:
                raise DataError(f"{videos.root}: none of the videos can be read; mend data.root or the annotations")
            clips += 1
    spent, of_core = time.perf_counter() - start, time.process_time() - start_of_core
    milliseconds = {stage: 1000 * total / clips for stage, total in stages.seconds.items()}
    milliseconds["rest"] = 1000 * spent / clips - sum(milliseconds.values())  # cutting, copying, Python

    # Batches small enough that several come within the time; the first ones only start the workers.
    pieces = UNITS_PER_WORKER * max(1, worker_count(recipe, world))
    batch = min(shape.clips, pieces * math.ceil(clips / spent * seconds / 8))
    steps = ([next(requests) for _ in range(batch)] for _ in count())
    batches = batches_of(dataset, steps, recipe, world, BadVideos(len(videos), recipe.data.max_bad_fraction))
    for _ in range(3):
        next(batches)
    joining, start, delivered = Stages(), time.perf_counter(), 0
    with joining.measure():
        while delivered < 2 * batch or time.perf_counter() - start < seconds:
            next(batches)
            delivered += batch
    rate = delivered / (time.perf_counter() - start)
    milliseconds |= {stage: 1000 * joining.seconds[stage] / delivered for stage in IN_TRAINING_PROCESS}
    return {
        "clips": shape.clips, "frames": shape.frames, "crop": shape.crop,
        "clips_per_second_per_core": clips / spent, "milliseconds": milliseconds,
        "core_seconds_per_step": shape.clips * of_core / clips,
        "loader_clips_per_second": rate, "needed_clips_per_second": needed,
    }  # fmt: skip


@contextmanager
def one_thread() -> Iterator[None]:
    """Within, torch works as in a worker of the loader: threads that wait for each other burn a core each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def base_step_seconds(recipe: Recipe, baseline: Plan, world: World) -> float:
    """How long a step of the base shape takes to compute here."""
    flops = check_shapes(recipe, [recipe.base])[recipe.base]
    return seconds_of_step(to_device(make_model(recipe), recipe, world), recipe, baseline[0], flops, world, STEPS)


def cost(plan: Plan, finest: Shape, core_seconds: dict[Shape, float]) -> dict[str, Any]:
    """The loader's core-seconds for a step of the finest shape, and of that the coarsest's and the average step's."""
    steps = steps_of_shapes(plan)
    coarsest = max(steps, key=lambda shape: shape.clips)
    average = sum(core_seconds[shape] * n for shape, n in steps.items()) / sum(steps.values())
    unit = core_seconds[finest]
    return {"finest_core_seconds": unit, "coarsest": core_seconds[coarsest] / unit, "average": average / unit}


def render(result: dict[str, Any]) -> str:
    """The result as a person reads it."""
    lines = []
    for found in result["sets"]:
        stages = list(found["shapes"][0]["milliseconds"])
        head = "".join(f"{stage:>9}" for stage in stages)
        lines.append(
            f"{found['name']:15}  clips/s/core{head}  core-s/step  of finest   "
            f"{result['workers']} workers  needed clips/s"
        )
        finest = found["cost"]["finest_core_seconds"]
        for row in found["shapes"]:
            shape = Shape(row["clips"], row["frames"], row["crop"])
            spent = "".join(f"{row['milliseconds'][stage]:6.2f} ms" for stage in stages)
            rate, needed = row["loader_clips_per_second"], row["needed_clips_per_second"]
            cores = f"{row['core_seconds_per_step']:11.2f}  {row['core_seconds_per_step'] / finest:8.2f}x"
            verdict = "" if rate >= needed else "  waits"
            lines.append(
                f"{shape!s:15}  {row['clips_per_second_per_core']:12.1f}{spent}  {cores}   "
                f"{rate:9.1f}  {needed:14.1f}{verdict}"
            )
        lines.append(
            f"a step costs the loader {found['cost']['coarsest']:.2f}x the core-seconds of the finest shape at its "
            f"coarsest, {found['cost']['average']:.2f}x on average over the plan"
        )
        waiting = [str(phase["index"] + 1) for phase in found["plan"]["phases"] if phase["waits"]]
        plan, rival = found["plan"], found["baseline"]
        lines.append(
            f"phases that wait for data: {', '.join(waiting) or 'none'}; training takes about "
            f"{duration(plan['seconds'])}, {duration(plan['compute'])} if it never waited; "
            f"{rival['seconds'] / plan['seconds']:.2f}x less than the baseline's {duration(rival['seconds'])}"
        )
        lines.append("")
    return "\n".join(lines[:-1])
