"""The training loop.

Only the `Learner` and the number of finished steps change during a run.
"""

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from torch import Tensor

from mgtrain.clips.loader import train_batches
from mgtrain.engine.evaluate import evaluate
from mgtrain.engine.finite import check_scale, report_skipped
from mgtrain.engine.recalibrate import batches_needed, recalibrate, remembered
from mgtrain.engine.record import Clock, Record
from mgtrain.engine.resume import newest_checkpoint, restore, save
from mgtrain.engine.start import start
from mgtrain.engine.step import train_step
from mgtrain.errors import StoppedError
from mgtrain.processes.distributed import Agreement, World
from mgtrain.processes.signals import StopRequest
from mgtrain.recipe import Recipe
from mgtrain.runs.checkpoint import CheckpointInfo
from mgtrain.runs.folder import RunDir
from mgtrain.runs.scores import Scores
from mgtrain.schedule import Step


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
                learner.average.update(step, result.skipped)
            done = step.index + 1
            logs = done % recipe.logging.steps == 0 or done in milestones
            saves = done % recipe.logging.checkpoint_steps == 0 or done in milestones or stops
            flags.append((step, result.bad))
            if logs:
                record.step(step, result)
            if logs or saves:
                check_scale(learner.scaler, step)
            if (logs or saves) and (left_out := report_skipped(flags, state.left_out, recipe, train, run)):
                state = replace(state, left_out=state.left_out + left_out)
                if recipe.faults.non_finite == "rollback" and (path := newest_checkpoint(run, world)):
                    restore(path, learner)
            record.lap(step)
            if saves:
                state = saved(replace(state, step=done, evaluated=False, recalibrated=False))
            if stops and done < len(plan):
                raise StoppedError(
                    f"stopped by a signal after step {done} of {len(plan)}; all is saved; continue with --resume"
                )
            if done in milestones:
                scores, state = evaluated(step)
    with learner.averaged():
        return scores or evaluate(model, val, recipe, world).scores()
