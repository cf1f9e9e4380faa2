"""How long a run will take on this machine, from a few seconds of measuring: `mgtrain plan --measure`.

A step takes as long as the slower of computing it and loading its clips; where both share a CPU, at least as long as
the cores need for the two together. Within a short cycle the loader catches up, so each phase is estimated by its
mean step over a cycle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mgtrain.clips.loader import worker_count
from mgtrain.console import ShowProgress, duration
from mgtrain.data.videos import Videos
from mgtrain.engine.checks import check_shapes
from mgtrain.grid import Shape
from mgtrain.preflight.bench_step import step_seconds
from mgtrain.preflight.costs import multiply_adds
from mgtrain.preflight.loading import measure_loading
from mgtrain.processes.cores import busy_cores, crowded, usable_cores
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe
from mgtrain.schedule import Plan
from mgtrain.schedule.totals import make_plans


@dataclass(frozen=True, slots=True)
class ShapeRate:
    """What a step of one shape takes on this machine, per rank."""

    compute: float  # seconds
    load: float  # seconds of the loader
    load_cores: float  # core-seconds of the loader

    @classmethod
    def of(cls, compute: float, loading: Mapping[str, Any], world: World) -> ShapeRate:
        """From the seconds of a step and what `measure_loading` found."""
        load = loading["clips"] / world.size / loading["loader_clips_per_second"]
        return cls(compute, load, loading["core_seconds_per_step"] / world.size)


def hours(plan: Plan, rates: Mapping[Shape, ShapeRate], cores: int | None) -> dict[str, Any]:
    """Seconds of a plan's training. `cores` is how many computing and loading share; None if they share none."""
    phases, total, compute = [], 0.0, 0.0
    for phase in plan.phases:
        cycle = [rates[shape] for shape in phase.shapes[: phase.steps]]
        computing = sum(rate.compute for rate in cycle) / len(cycle)
        loading = sum(rate.load for rate in cycle) / len(cycle)
        work = computing * torch.get_num_threads() + sum(rate.load_cores for rate in cycle) / len(cycle)
        step = max(computing, loading, work / cores if cores else 0.0)
        waits = loading > computing
        phases.append({"index": phase.index, "step": step, "compute": computing, "load": loading, "waits": waits})
        total += phase.steps * step
        compute += phase.steps * computing
    return {"seconds": total, "compute": compute, "phases": phases}


def waiting_phases(estimate: dict[str, Any]) -> str:
    """The numbers of the phases of `hours` that wait for data."""
    return ", ".join(str(phase["index"] + 1) for phase in estimate["phases"] if phase["waits"])


def forecast(recipe: Recipe, videos: Videos, world: World, seconds: float, progress: ShowProgress) -> dict[str, Any]:
    """Estimate the time of the plan and of its baseline; the loading of each shape is measured for `seconds`.

    Returns plain values of the schema mgtrain.forecast/1.
    """
    busy = busy_cores() or 0.0
    plans = make_plans(recipe, len(videos))
    steps = plans["plan"].first_steps() | plans["baseline"].first_steps()
    flops = check_shapes(recipe, steps)
    rates: dict[Shape, ShapeRate] = {}
    for shape, compute in step_seconds(recipe, steps.values(), world):
        loading = measure_loading(recipe, videos, world, shape, steps[shape].grid, seconds)
        rates[shape] = ShapeRate.of(compute, loading, world)
        progress("measuring", len(rates), len(steps))
    # A rank's computing and loading share its cores, unless a GPU computes.
    cores = max(1, usable_cores() // world.local_size) if world.device.type == "cpu" else None
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
    """The forecast as a person reads it."""
    lines = [f"{'a step of':>16}{'computing':>12}{'loading':>10}{'clips/s':>10}{'needed':>10}"]
    for row in result["shapes"]:
        shape, slow = Shape(**row["shape"]), row["load"] > row["compute"]
        rate, needed = shape.clips / row["load"], shape.clips / row["compute"]
        lines.append(
            f"{shape!s:>16}{row['compute']:>10.2f} s{row['load']:>8.2f} s{rate:>10.1f}{needed:>10.1f}"
            f"{'  waits' if slow else ''}"
        )
    plan, baseline = result["plan"], result["baseline"]
    work = baseline["multiply_adds"] / plan["multiply_adds"]
    lines.append(
        f"training without evaluations: {duration(plan['seconds'])} against the baseline's "
        f"{duration(baseline['seconds'])} ({result['speedup']:.2f}x less), with 1/{work:.2f} of its multiply-adds"
    )
    if crowded(result["busy_cores"]):
        lines.append(
            f"other processes use {result['busy_cores']:.1f} of {usable_cores()} cores, so these times are too long; "
            "measure again when they have ended"
        )
    if waiting := waiting_phases(plan):
        remedy = "more loader processes (hardware.workers)" if result["prepared"] else "`mgtrain data prepare`"
        lines.append(
            f"phases {waiting} wait for the {result['workers']} loader processes; without waiting it would be "
            f"{result['speedup_without_waiting']:.2f}x. What helps: {remedy}"
        )
    return "\n".join(lines)
