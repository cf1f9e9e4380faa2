"""Estimate the time of a run on this machine from short measurements: `mgtrain plan --measure`.

The time of a step is the maximum of computing it and loading its clips, or without loader processes their sum; if both
share a CPU, at least the time that its cores need for both. The loader catches up within a short cycle, so a phase is
estimated from the mean step of a cycle.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from mgtrain.clips.loader import view_batches, worker_count
from mgtrain.console import ShowProgress, duration
from mgtrain.data.videos import Videos
from mgtrain.engine.checks import check_shapes
from mgtrain.engine.evaluate import predict
from mgtrain.engine.machine.memory import fit_memory
from mgtrain.engine.machine.warmup import wait_for_gpu
from mgtrain.engine.recalibrate import batches_needed, remembered
from mgtrain.errors import DataError
from mgtrain.grid import Shape
from mgtrain.models.norm import group_slots
from mgtrain.preflight.bench_step import HALF_PAYS, half_precision_gain, step_seconds, tuned_model
from mgtrain.preflight.costs import multiply_adds
from mgtrain.preflight.loading import measure_loading
from mgtrain.processes.cores import busy_cores, crowded, usable_cores
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe
from mgtrain.runs.compare import times
from mgtrain.schedule import Plan


@dataclass(frozen=True, slots=True)
class ShapeRate:
    """The time of a step of one shape on this machine, per rank."""

    compute: float  # seconds
    load: float  # seconds of the loader
    load_cores: float  # core-seconds of the loader

    @classmethod
    def of(cls, compute: float, loading: Mapping[str, Any], world: World) -> ShapeRate:
        """Combine the seconds of a step with the results of `measure_loading`."""
        load = loading["clips"] / world.size / loading["loader_clips_per_second"]
        return cls(compute, load, loading["core_seconds_per_step"] / world.size)


def training_time(plan: Plan, rates: Mapping[Shape, ShapeRate], world: World, workers: int) -> dict[str, Any]:
    """Estimate a plan's training time in seconds with so many loader processes per rank."""
    phases, total, compute = [], 0.0, 0.0
    for phase in plan.phases:
        cycle = [rates[shape] for shape in phase.shapes[: phase.steps]]
        computing = sum(rate.compute for rate in cycle) / len(cycle)
        loading = sum(rate.load for rate in cycle) / len(cycle)
        step = max(computing, loading) if workers else computing + loading
        if world.device.type == "cpu":  # computing and loading share the rank's cores
            work = computing * torch.get_num_threads() + sum(rate.load_cores for rate in cycle) / len(cycle)
            step = max(step, work / world.cores)
        waits = loading > (computing if workers else 0)
        phases.append({"index": phase.index, "step": step, "compute": computing, "load": loading, "waits": waits})
        total += phase.steps * step
        compute += phase.steps * computing
    return {"seconds": total, "compute": compute, "phases": phases}


def waiting_phases(estimate: dict[str, Any]) -> str:
    """The numbers of the phases that wait for data, in an estimate of `training_time`."""
    return ", ".join(str(phase["index"] + 1) for phase in estimate["phases"] if phase["waits"])


def evaluated_per_second(model: nn.Module, recipe: Recipe, val: Videos, world: World, seconds: float) -> float:
    """Videos per second of an evaluation, including loading, measured for about `seconds` after the first batch."""
    done, marks = 0, [(0, time.perf_counter())]  # videos evaluated so far, and the time
    for numbers, _ in predict(model, view_batches(val, range(len(val)), recipe, 1, 1, world), 1, recipe, world):
        wait_for_gpu(world.device)
        done += len(numbers)
        marks.append((done, time.perf_counter()))
        if marks[-1][1] - marks[1][1] > seconds:
            break
    if not done:
        raise DataError(f"{val.root}: no validation video can be decoded; `mgtrain data check` says why")
    # The first batch includes starting the workers, so it counts only if it has all videos.
    before, start = marks[1] if done > marks[1][0] else marks[0]
    return (done - before) / (marks[-1][1] - start)


def evaluation_seconds(model: nn.Module, recipe: Recipe, plan: Plan, val_videos: int, rate: float) -> float:
    """Seconds of a run's evaluations; recalibrating on a clip is assumed to take the time of evaluating a video."""
    ends = plan.milestones(recipe.evaluation.times)
    batches = sum(batches_needed(recipe, plan, step, remembered(model)) for step in ends) if group_slots(model) else 0
    return (len(ends) * val_videos + batches * recipe.batch.clips) / rate


def forecast(
    recipe: Recipe,
    plans: Mapping[str, Plan],
    videos: Videos,
    val: Videos,
    world: World,
    seconds: float,
    progress: ShowProgress,
) -> dict[str, Any]:
    """Estimate the time of the `plan` and of its `baseline`; the loading of each shape is measured for `seconds`.

    Returns plain values of the schema mgtrain.forecast/2.
    """
    busy = busy_cores() or 0.0
    steps = plans["plan"].first_steps() | plans["baseline"].first_steps()
    flops = check_shapes(recipe, steps)
    rates: dict[Shape, ShapeRate] = {}
    fitting = fit_memory(recipe, plans["plan"], world)
    model = tuned_model(fitting, plans["plan"], world)
    for shape, compute in step_seconds(model, fitting, steps.values(), world):
        loading = measure_loading(recipe, videos, world, shape, steps[shape].grid, seconds)
        rates[shape] = ShapeRate.of(compute, loading, world)
        progress("measuring", len(rates), len(steps))
    rate, workers = evaluated_per_second(model, recipe, val, world, seconds), worker_count(recipe, world)
    runs: dict[str, dict[str, Any]] = {}
    for name, plan in plans.items():
        training = training_time(plan, rates, world, workers)
        evaluating = evaluation_seconds(model, recipe, plan, len(val), rate)
        clock = {"evaluation_seconds": evaluating, "clock_seconds": training["seconds"] + evaluating}
        runs[name] = {**training, **clock, "multiply_adds": multiply_adds(plan, flops)}
    return {
        "schema": "mgtrain.forecast/2",
        "workers": workers,
        "busy_cores": busy,
        "prepared": recipe.data.prepared is not None,
        "shapes": [{"shape": asdict(shape), "multiply_adds": flops[shape], **asdict(rates[shape])} for shape in rates],
        **runs,
        "bf16_gain": half_precision_gain(recipe, len(videos), world) if recipe.hardware.precision == "fp32" else None,
        "speedup": runs["baseline"]["seconds"] / runs["plan"]["seconds"],
        "clock_speedup": runs["baseline"]["clock_seconds"] / runs["plan"]["clock_seconds"],
        "speedup_without_waiting": runs["baseline"]["compute"] / runs["plan"]["compute"],
    }


def render(result: dict[str, Any]) -> str:
    lines = [f"{'shape':>16}{'computing':>12}{'loading':>10}{'clips/s':>10}{'needed':>10}"]
    for row in result["shapes"]:
        shape, slow = Shape(**row["shape"]), row["load"] > row["compute"]
        rate, needed = shape.clips / row["load"], shape.clips / row["compute"]
        lines.append(
            f"{shape!s:>16}{row['compute']:>10.2f} s{row['load']:>8.2f} s{rate:>10.1f}{needed:>10.1f}"
            f"{'  waits' if slow else ''}"
        )
    plan, baseline = result["plan"], result["baseline"]
    work = baseline["multiply_adds"] / plan["multiply_adds"]
    lines += [
        f"training: {duration(plan['seconds'])} against the baseline's {duration(baseline['seconds'])} "
        f"({times(result['speedup'])}), with 1/{work:.2f} of its multiply-adds",
        f"wall-clock time, with evaluations of {duration(plan['evaluation_seconds'])} and "
        f"{duration(baseline['evaluation_seconds'])} but without start-up and checkpoints: "
        f"{duration(plan['clock_seconds'])} against "
        f"{duration(baseline['clock_seconds'])} ({times(result['clock_speedup'])})",
    ]
    if crowded(result["busy_cores"]):
        lines.append(
            f"other processes use {result['busy_cores']:.1f} of {usable_cores()} cores, so these times are too long; "
            "measure again later"
        )
    if (gain := result["bf16_gain"] or 0) >= HALF_PAYS:
        lines.append(f"a step is {gain:.2f}x as fast in hardware.precision=bf16 on this CPU")
    if waiting := waiting_phases(plan):
        more = result["prepared"] or not result["workers"]
        remedy = "use more loader processes (hardware.workers)" if more else "use `mgtrain data prepare`"
        lines.append(
            f"phases {waiting} wait for the {result['workers']} loader processes; without waiting training would take "
            f"{times(result['speedup_without_waiting'])}: {remedy}"
        )
    return "\n".join(lines)
