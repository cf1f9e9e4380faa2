"""The training loop, and a dry run that shows before a long run whether it works.

Only the `Learner` and the number of finished steps change during a run.
"""

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from mgtrain.clips.loader import train_batches
from mgtrain.console import size, table
from mgtrain.engine.evaluate import evaluate
from mgtrain.engine.finite import report_skipped
from mgtrain.engine.machine.memory import Memory, peak, reset_peak
from mgtrain.engine.recalibrate import batches_needed, recalibrate, remembered
from mgtrain.engine.record import Clock, Record
from mgtrain.engine.resume import newest_checkpoint, restore, save
from mgtrain.engine.start import start
from mgtrain.engine.step import train_step
from mgtrain.errors import StoppedError
from mgtrain.grid import Shape
from mgtrain.processes.distributed import Agreement, World
from mgtrain.processes.signals import StopRequest
from mgtrain.recipe import Recipe
from mgtrain.runs.boards.services import check_boards
from mgtrain.runs.checkpoint import CheckpointInfo
from mgtrain.runs.folder import RunDir
from mgtrain.runs.scores import Scores
from mgtrain.schedule import Step
from mgtrain.schedule.totals import steps_of_shapes


def fit(
    recipe: Recipe,
    run: RunDir,
    world: World,
    resume: bool = False,
    baseline: RunDir | None = None,
    allow_changes: bool = False,
    began: float | None = None,
) -> Scores:
    """Train a recipe from the first step, or from the run's newest checkpoint, to the last; returns the final scores.

    Wall-clock time counts from `began`, a value of `time.perf_counter()`; by default from this call. Raises
    `MgtrainError` if the run cannot continue; its checkpoints are kept.
    """
    began = time.perf_counter() if began is None else began
    asked = StopRequest()

    def at_once() -> AbstractContextManager[None]:
        """Stop where the run is; with several ranks, after the next step, because others may wait for this one."""
        return asked.at_once() if world.size == 1 else nullcontext()

    with asked, at_once():
        training = start(recipe, run, world, resume, allow_changes)
    recipe, plan, learner, state = training.recipe, training.plan, training.learner, training.state
    train, val, milestones, model = training.train, training.val, training.milestones, training.learner.model
    batches = train_batches(train, recipe, plan.steps(state.step), world)
    clock = Clock(state, began)
    record = Record(run, plan, state.step, clock, len(val), world, baseline)
    scores, any_rank = None, Agreement(world)
    flags: list[tuple[Step, Tensor]] = []  # whether the update of a step was skipped, since the last report

    def saved(now: CheckpointInfo) -> CheckpointInfo:
        with clock.paused():
            now = replace(now, **clock.seconds())
            save(run, now, learner, recipe.logging.keep_checkpoints, world)
        return now

    def evaluated(step: Step) -> tuple[Scores, CheckpointInfo]:
        with at_once(), clock.paused(), learner.averaged():
            recalibrate(model, train, batches_needed(recipe, plan, step.index + 1, remembered(model)), recipe, world)
            predictions = evaluate(model, val, recipe, world)
            scores = predictions.scores()
        with clock.paused():
            record.evaluation(step, predictions, scores, "model" if learner.average is None else "ema")
        return scores, saved(replace(state, evaluated=True, recalibrated=recipe.evaluation.recalibration_batches > 0))

    with asked, record:
        if training.due:
            scores, state = evaluated(plan[state.step - 1])
        for step in plan.steps(state.step):
            stops = any_rank(asked.signal is not None)
            clips, labels = clock.wait_for(batches)  # uint8 (b, 3, T, S, S), int64 (b,)
            with training.step(step):
                result = train_step(
                    training.replica, learner.optimizer, learner.scaler, clips, labels, step, recipe, world
                )
            if learner.average is not None:
                learner.average.update(step, result.bad)
            done = step.index + 1
            logs = done % recipe.logging.steps == 0 or done in milestones
            saves = done % recipe.logging.checkpoint_steps == 0 or done in milestones or stops
            flags.append((step, result.bad))
            if logs:
                record.step(step, result)
            if (logs or saves) and (left_out := report_skipped(flags, state.left_out, recipe, train, run)):
                state = replace(state, left_out=state.left_out + left_out)
                if recipe.faults.non_finite == "rollback" and (path := newest_checkpoint(run, world)):
                    restore(path, learner)
            record.lap(step)
            if saves:
                state = saved(replace(state, step=done, evaluated=False, recalibrated=False))
            if stops and done < len(plan):
                raise StoppedError(
                    f"stopped by a signal after step {done} of {len(plan)}, saved; continue with --resume"
                )
            if done in milestones:
                scores, state = evaluated(step)
    with learner.averaged():
        return scores or evaluate(model, val, recipe, world).scores()


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
            size(row["estimated_bytes"]),
            size(row["peak_bytes"]),
        )
        for row in found["shapes"]
    )
    return table(names, rows)
