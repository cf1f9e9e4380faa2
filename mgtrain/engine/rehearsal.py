"""A dry run: all that a run does up to one step of each shape, to show before a long run whether it works."""

import time
from dataclasses import asdict
from typing import Any

import torch
from rich.filesize import decimal
from rich.table import Table

from mgtrain.clips.loader import train_batches
from mgtrain.console import table
from mgtrain.engine.finite import report_skipped
from mgtrain.engine.machine.memory import Memory, peak, reset_peak
from mgtrain.engine.start import start
from mgtrain.engine.step import train_step
from mgtrain.grid import Shape
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe
from mgtrain.runs.boards.services import check_boards
from mgtrain.runs.folder import RunDir
from mgtrain.schedule.totals import steps_of_shapes


def rehearse(recipe: Recipe, run: RunDir, world: World) -> dict[str, Any]:
    """Start as `fit` does, then train the first step of each shape; plain values of the schema mgtrain.dry_run/1."""
    check_boards(recipe.logging)
    local = recipe.changed("logging", wandb=None, mlflow=None)
    training = start(local, run, world, resume=False, allow_changes=False)
    recipe, plan, learner = training.recipe, training.plan, training.learner
    firsts, counts = plan.first_steps(), steps_of_shapes(plan)
    estimated = Memory(recipe, firsts)
    batches = train_batches(training.train, recipe, firsts.values(), world)
    rows = []
    for shape, step in firsts.items():
        reset_peak(world.device)
        begun = time.perf_counter()
        clips, labels = next(batches)
        loaded = time.perf_counter()
        with training.step(step):
            result = train_step(training.replica, learner.optimizer, learner.scaler, clips, labels, step, recipe, world)
        report_skipped([(step, result.bad)], 0, recipe, training.train, run)  # waits for the device
        seconds = time.perf_counter() - loaded
        mine = torch.tensor([loaded - begun, seconds, peak(world.device)], dtype=torch.float64)
        data_seconds, step_seconds, peak_bytes = world.gather(mine.to(world.device)).amax(0).tolist()
        rows.append(
            {
                "shape": asdict(shape),
                "steps": counts[shape],
                "data_seconds": data_seconds,
                "step_seconds": step_seconds,
                "estimated_bytes": estimated.step(shape, step.bn_groups, world.size),
                "peak_bytes": int(peak_bytes),
            }
        )
        world.watchdog.beat()
    run.close()
    return {"schema": "mgtrain.dry_run/1", "device": world.device.type, "ranks": world.size, "shapes": rows}


def render(found: dict[str, Any]) -> Table:
    """What `rehearse` found as a table for the terminal."""
    measured = "peak of the GPU" if found["device"] == "cuda" else "peak of the process"
    names = ("shape", "steps", "waited for data", "first step", "estimated memory", measured)
    rows = (
        (
            str(Shape(**row["shape"])),
            f"{row['steps']:,}",
            f"{row['data_seconds']:.2f} s",
            f"{row['step_seconds']:.2f} s",
            decimal(row["estimated_bytes"]),
            decimal(row["peak_bytes"]),
        )
        for row in found["shapes"]
    )
    return table(names, rows)
