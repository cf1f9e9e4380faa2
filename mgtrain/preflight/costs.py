"""What the steps of a plan cost, estimated without running them: multiply-adds, memory, clips and frames to decode."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Group

from mgtrain.console import table
from mgtrain.engine.checks import check_shapes, pass_clips
from mgtrain.engine.machine.memory import Memory
from mgtrain.grid import Shape
from mgtrain.recipe import Recipe
from mgtrain.schedule import Plan
from mgtrain.schedule.totals import render_total, steps_of_shapes


def costs(recipe: Recipe, plan: Plan, baseline: Plan, ranks: int, gib: float | None) -> dict[str, Any]:
    """The costs of every shape, of the run and of its baseline: plain values of the schema mgtrain.costs/1.

    With `gib`, micro-batches are chosen to fit so much memory of a device. Raises `PlanError` if none fits, or the
    network does not accept a shape.
    """
    shapes = plan.shapes()
    flops = check_shapes(recipe, [*shapes, recipe.base])
    memory = Memory(recipe, shapes)
    if gib is not None:
        recipe = memory.limit(plan, ranks, gib)
    counts = steps_of_shapes(plan)
    groups = plan.fewest_groups()
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
    return {
        "schema": "mgtrain.costs/1",
        "gpus": ranks,
        "micro_clips": recipe.hardware.micro_clips,
        "recompute": recipe.hardware.recompute,
        "shapes": rows,
        "multiply_adds": multiply_adds(plan, flops),
        "baseline_multiply_adds": multiply_adds(baseline, flops),
    }


def multiply_adds(plan: Plan, flops: Mapping[Shape, int]) -> int:
    """The multiply-adds of all forward passes of a run, from those of one clip of each shape, `flops`."""
    return sum(steps * shape.clips * flops[shape] for shape, steps in steps_of_shapes(plan).items())


def render(found: dict[str, Any], gib: float | None) -> Group:
    """A table of the costs of each shape, and, with `gib`, the keys of the chosen micro-batches."""
    per = f"per GPU of {found['gpus']}" if found["gpus"] > 1 else "on one device"
    names = ("shape", "steps", "multiply-adds", "frames to decode", f"memory {per}", "clips per pass")
    rows = (
        (
            str(Shape(**row["shape"])),
            f"{row['steps']:,}",
            f"{row['multiply_adds'] / 1e9:,.0f} G",
            f"{row['frames']:,}",
            f"{row['memory_bytes'] / 2**30:.1f} GiB",
            f"{row['pass_clips']:,}",
        )
        for row in found["shapes"]
    )
    shapes = table(names, rows)
    total = render_total("multiply_adds", found["multiply_adds"], found["baseline_multiply_adds"])
    if gib is None:
        return Group(shapes, total)
    keys = f"hardware.micro_clips={found['micro_clips'] or 'null'} hardware.recompute={found['recompute']}".lower()
    return Group(shapes, total, f"this needs {keys}, which `mgtrain fit` chooses with hardware.memory_gib={gib:g}")
