"""Measure how fast this machine loads clips of each shape of a plan, and whether training waits for them.

One base step is timed. All shapes have about the same volume, so every step is assumed to take the same time. If the
recipe has no prepared set, a few videos are prepared in a temporary folder and measured, too.
"""

import tempfile
from pathlib import Path
from typing import Any

from mgtrain.clips.loader import worker_count
from mgtrain.clips.prepared import Settings
from mgtrain.console import ShowProgress, duration
from mgtrain.data.videos import Videos
from mgtrain.engine.checks import check_shapes
from mgtrain.engine.machine.memory import fit_memory
from mgtrain.grid import Shape
from mgtrain.preflight.bench_step import step_seconds as measure_steps
from mgtrain.preflight.bench_step import tuned_model
from mgtrain.preflight.forecast import ShapeRate, training_time, waiting_phases
from mgtrain.preflight.loading import measure_loading
from mgtrain.preflight.prepare import prepare
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe
from mgtrain.rng import Draw, generator
from mgtrain.runs.compare import times
from mgtrain.schedule import Plan
from mgtrain.schedule.totals import make_plans, steps_of_shapes

SAMPLE = 16  # videos to prepare and measure


def bench_data(
    recipe: Recipe,
    videos: Videos,
    world: World,
    settings: Settings,
    *,
    seconds: float,
    step_seconds: float | None,
    progress: ShowProgress,
) -> dict[str, Any]:
    """Measure every shape for about `seconds`, and estimate the training time; returns plain values.

    `step_seconds` is the time of a training step; None: measure it. `settings` are those of the prepared set to try.
    Raises `DataError` if no video can be read.
    """
    plans = make_plans(recipe, len(videos))
    steps = plans["plan"].first_steps() | plans["baseline"].first_steps()
    if step_seconds is None:
        check_shapes(recipe, [recipe.base])
        baseline = plans["baseline"]
        fitting = fit_memory(recipe, baseline, world)
        model = tuned_model(fitting, baseline, world)
        ((_, step_seconds),) = measure_steps(model, fitting, [baseline[0]], world)
    workers = worker_count(recipe, world)
    step, total = step_seconds, len(steps) * (1 if recipe.data.prepared else 2)

    def bench(name: str, recipe: Recipe, videos: Videos, done: int) -> dict[str, Any]:
        rows: dict[Shape, dict[str, Any]] = {}
        for shape, first in steps.items():
            row = measure_loading(recipe, videos, world, shape, first.grid, seconds)
            rows[shape] = {**row, "needed_clips_per_second": shape.clips / step}
            progress("measuring", done + len(rows), total)
        rates = {shape: ShapeRate.of(step, row, world) for shape, row in rows.items()}
        times = {key: training_time(plan, rates, world, workers) for key, plan in plans.items()}
        spent = cost(plans["plan"], recipe.base, {shape: row["core_seconds_per_step"] for shape, row in rows.items()})
        return {"name": name, "shapes": [*rows.values()], "cost": spent, **times}

    sets = [bench("prepared" if recipe.data.prepared else "originals", recipe, videos, 0)]
    if not recipe.data.prepared:
        few = videos.only(generator(0, Draw.PREPARE).permutation(len(videos))[:SAMPLE])
        with tempfile.TemporaryDirectory() as folder:
            there = Path(folder) / "set"
            prepare(Path(few.root), few.names(), there, settings, max(1, workers), fps=recipe.data.fps)
            sets.append(bench("prepared", recipe.changed("data", prepared=str(there)), few, len(steps)))
    return {"workers": workers, "step_seconds": step, "sets": sets}


def cost(plan: Plan, finest: Shape, core_seconds: dict[Shape, float]) -> dict[str, Any]:
    """Core-seconds to load a step of the finest shape, and the ratios of the coarsest and the average step to it."""
    steps = steps_of_shapes(plan)
    coarsest = max(steps, key=lambda shape: shape.clips)
    average = sum(core_seconds[shape] * n for shape, n in steps.items()) / sum(steps.values())
    unit = core_seconds[finest]
    return {"finest_core_seconds": unit, "coarsest": core_seconds[coarsest] / unit, "average": average / unit}


def render(result: dict[str, Any]) -> str:
    blocks = []
    for found in result["sets"]:
        stages = list(found["shapes"][0]["milliseconds"])
        head = "".join(f"{stage:>9}" for stage in stages)
        lines = [
            f"{found['name']:15}  clips/s/core{head}  core-s/step  of finest   "
            f"{result['workers']} workers  needed clips/s"
        ]
        finest, plan, rival = found["cost"]["finest_core_seconds"], found["plan"], found["baseline"]
        for row in found["shapes"]:
            shape = Shape(row["clips"], row["frames"], row["crop"])
            spent = "".join(f"{row['milliseconds'][stage]:6.2f} ms" for stage in stages)
            rate, needed = row["loader_clips_per_second"], row["needed_clips_per_second"]
            cores = f"{row['core_seconds_per_step']:11.2f}  {row['core_seconds_per_step'] / finest:8.2f}x"
            lines.append(
                f"{shape!s:15}  {row['clips_per_second_per_core']:12.1f}{spent}  {cores}   "
                f"{rate:9.1f}  {needed:14.1f}{'' if rate >= needed else '  waits'}"
            )
        lines += [
            f"loading a step of the coarsest shape takes {found['cost']['coarsest']:.2f}x the core-seconds of the "
            f"finest shape, an average step of the plan {found['cost']['average']:.2f}x",
            f"phases that wait for data: {waiting_phases(plan) or 'none'}; training takes about "
            f"{duration(plan['seconds'])}, or {duration(plan['compute'])} without waiting; "
            f"{times(rival['seconds'] / plan['seconds'])} than the baseline's {duration(rival['seconds'])}",
        ]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)
