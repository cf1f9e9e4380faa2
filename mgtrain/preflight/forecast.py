"""What a run will take on this machine, out of a few seconds of measuring: `mgtrain plan --measure`.

A step takes as long as the slower of computing it and loading its clips; where both share a CPU, no less than their
work together takes its cores. Within a short cycle the loader catches up, so phases are reckoned cycle by cycle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from mgtrain.clips.loader import worker_count
from mgtrain.console import duration
from mgtrain.data.videos import Videos
from mgtrain.engine.checks import check_shapes, make_model
from mgtrain.engine.step import to_device
from mgtrain.grid import Shape
from mgtrain.preflight.bench_data import bench_shape
from mgtrain.preflight.bench_step import step_seconds
from mgtrain.preflight.costs import ShapeRate, hours, multiply_adds
from mgtrain.processes.cores import busy_cores, crowded, usable_cores
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe
from mgtrain.schedule import baseline_recipe, make_plan

STEPS = 2  # that are timed of each shape, after one that is not


def forecast(
    recipe: Recipe, videos: Videos, world: World, seconds: float, progress: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Hours of the plan and of its baseline on this machine, `seconds` being how long each shape's loading is measured.

    Plain values, of the schema mgtrain.forecast/1.
    """
    busy = busy_cores() or 0.0
    plans = {"plan": make_plan(recipe, len(videos)), "baseline": make_plan(baseline_recipe(recipe), len(videos))}
    steps = plans["plan"].first_steps() | plans["baseline"].first_steps()
    flops = check_shapes(recipe, steps)
    model = to_device(make_model(recipe), recipe, world)
    rates = {}
    for n, (shape, step) in enumerate(steps.items(), start=1):
        compute = step_seconds(model, recipe, step, flops[shape], world, STEPS)
        loading = bench_shape(recipe, videos, world, shape, step.grid, seconds, needed=0.0)
        load = shape.clips / world.size / loading["loader_clips_per_second"]
        rates[shape] = ShapeRate(compute, load, loading["core_seconds_per_step"] / world.size)
        progress("measuring", n, len(steps))
    cores = _cores(world)
    runs = {
        name: {**hours(plan, rates, cores), "multiply_adds": multiply_adds(plan, flops)} for name, plan in plans.items()
    }
    return {
        "schema": "mgtrain.forecast/1",
        "workers": worker_count(recipe, world),
        "busy_cores": busy,
        "prepared": recipe.data.prepared is not None,
        "shapes": [{"shape": asdict(shape), "multiply_adds": flops[shape], **asdict(rates[shape])} for shape in rates],
        **runs,
        "speedup": runs["baseline"]["seconds"] / runs["plan"]["seconds"],
        "speedup_without_waiting": runs["baseline"]["compute"] / runs["plan"]["compute"],
    }


def render(result: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{'a step of':>16}{'computing':>12}{'loading':>10}{'clips/s':>10}{'needed':>10}"]
    for row in result["shapes"]:
        shape, slow = Shape(**row["shape"]), row["load"] > row["compute"]
        rate, needed = shape.clips / row["load"], shape.clips / row["compute"]
        lines.append(
            f"{shape!s:>16}{row['compute']:>10.2f} s{row['load']:>8.2f} s{rate:>10.1f}{needed:>10.1f}"
            f"{'  waits' if slow else ''}"
        )
    plan, baseline = result["plan"], result["baseline"]
    waiting = [str(phase["index"] + 1) for phase in plan["phases"] if phase["waits"]]
    took, rival = duration(plan["seconds"]), duration(baseline["seconds"])
    work = baseline["multiply_adds"] / plan["multiply_adds"]
    lines.append(
        f"training, evaluations apart: {took} against the baseline's {rival} ({result['speedup']:.2f}x less), with "
        f"1/{work:.2f} of its multiply-adds"
    )
    if crowded(result["busy_cores"]):
        lines.append(
            f"other processes are at work on {result['busy_cores']:.1f} of {usable_cores()} cores, which makes all of "
            "this slower than it is: measure again when they are through"
        )
    if waiting:
        remedy = "more loader processes (hardware.workers)" if result["prepared"] else "`mgtrain data prepare`"
        lines.append(
            f"phases {', '.join(waiting)} wait for the {result['workers']} loader processes; without that it would be "
            f"{result['speedup_without_waiting']:.2f}x. What helps: {remedy}"
        )
    return "\n".join(lines)


def _cores(world: World) -> int | None:
    """The cores that a rank's computing and loading share; None on a GPU."""
    if world.device.type != "cpu":
        return None
    return max(1, usable_cores() // world.local_size)
