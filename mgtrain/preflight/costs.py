"""What the steps of a plan cost, reckoned without running them: multiply-adds, memory, clips and frames to decode.

And how long they take, once a step of each shape has been measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table

from mgtrain.console import size
from mgtrain.engine.checks import check_shapes, pass_clips
from mgtrain.engine.memory import Memory
from mgtrain.grid import Shape
from mgtrain.recipe import Recipe
from mgtrain.schedule import Plan


@dataclass(frozen=True, slots=True)
class ShapeRate:
    """What a step of one shape takes here."""

    compute: float  # seconds
    load: float  # seconds of the loader
    load_cores: float  # core-seconds of the loader


def costs(recipe: Recipe, plan: Plan, baseline: Plan, ranks: int, gib: float | None) -> dict[str, Any]:
    """Of every shape and of the whole run against its baseline: plain values, of the schema mgtrain.costs/1.

    With `gib`, the memory of a device, micro-batches are made to fit it.

    Raises:
        PlanError: the network cannot take a shape, or nothing fits the limit.
    """
    shapes = plan.shapes()
    flops = check_shapes(recipe, [*shapes, recipe.base])
    memory = Memory(recipe, shapes)
    if gib is not None:
        recipe = memory.limit(plan, ranks, gib)
    counts = steps_of_shapes(plan)
    groups = {shape: phase.bn_groups for phase in plan.phases for shape in phase.shapes}
    rows = [
        {
            "shape": asdict(shape),
            "steps": counts[shape],
            "multiply_adds": flops[shape] * shape.clips,
            "memory_bytes": memory.step(shape, groups[shape], ranks),
            "pass_clips": pass_clips(recipe, shape, groups[shape], ranks),
            "frames": shape.clips * shape.frames,
        }
        for shape in shapes
    ]
    total, rival = multiply_adds(plan, flops), multiply_adds(baseline, flops)
    return {
        "schema": "mgtrain.costs/1",
        "gpus": ranks,
        "micro_clips": recipe.hardware.micro_clips,
        "recompute": recipe.hardware.recompute,
        "shapes": rows,
        "multiply_adds": total,
        "baseline_multiply_adds": rival,
    }


def steps_of_shapes(plan: Plan) -> Counter[Shape]:
    """How many steps have each shape."""
    counts: Counter[Shape] = Counter()
    for phase in plan.phases:
        for turn, shape in enumerate(phase.shapes):
            counts[shape] += len(range(turn, phase.steps, len(phase.shapes)))
    return +counts


def multiply_adds(plan: Plan, flops: Mapping[Shape, int]) -> int:
    """Of the forward passes of a whole run; `flops` are a clip's."""
    return sum(steps * shape.clips * flops[shape] for shape, steps in steps_of_shapes(plan).items())


def hours(plan: Plan, rates: Mapping[Shape, ShapeRate], cores: int | None) -> dict[str, Any]:
    """Seconds of a plan's training; `cores` are those that computing and loading share, None where they do not."""
    phases, total, compute = [], 0.0, 0.0
    for phase in plan.phases:
        shapes = phase.shapes[: phase.steps]
        cycle = [rates[shape] for shape in shapes]
        computing = sum(rate.compute for rate in cycle) / len(cycle)
        loading = sum(rate.load for rate in cycle) / len(cycle)
        work = computing * torch.get_num_threads() + sum(rate.load_cores for rate in cycle) / len(cycle)
        step = max(computing, loading, work / cores if cores else 0.0)
        waits = loading > computing
        phases.append({"index": phase.index, "step": step, "compute": computing, "load": loading, "waits": waits})
        total += phase.steps * step
        compute += phase.steps * computing
    return {"seconds": total, "compute": compute, "phases": phases}


def cost_table(found: dict[str, Any]) -> Table:
    """A row for each shape."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    per = f"per GPU of {found['gpus']}" if found["gpus"] > 1 else "on one device"
    names = ("a step of", "steps", "multiply-adds", "frames to decode", f"memory {per}", "clips of a pass")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for row in found["shapes"]:
        table.add_row(
            str(Shape(**row["shape"])),
            f"{row['steps']:,}",
            f"{row['multiply_adds'] / 1e9:,.0f} G",
            f"{row['frames']:,}",
            size(row["memory_bytes"]),
            f"{row['pass_clips']:,}",
        )
    return table
