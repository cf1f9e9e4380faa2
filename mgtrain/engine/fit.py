"""The run: from a recipe, a folder to write to and a place among the ranks, to scores.

The only things that change during a run are the model, the optimizer, the scaler and the number of finished steps.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from mgtrain.clips.loader import BadVideos, train_batches
from mgtrain.clips.prepared import PreparedSet
from mgtrain.data import check_labels, open_splits
from mgtrain.data.videos import Videos, mirrored_labels
from mgtrain.engine.checks import check_micro_batches, check_precision, check_shapes, make_model
from mgtrain.engine.clock import Clock
from mgtrain.engine.evaluate import evaluate
from mgtrain.engine.finite import NonFiniteSteps, refuse_or_report
from mgtrain.engine.memory import fit_memory
from mgtrain.engine.optim import make_optimizer
from mgtrain.engine.progress import TrainProgress
from mgtrain.engine.recalibrate import recalibrate
from mgtrain.engine.record import describe_run, log_evaluation, log_step, show_run, show_step
from mgtrain.engine.resume import Learner, newest_checkpoint, put_back, save
from mgtrain.engine.resume import resume as resume_run
from mgtrain.engine.step import to_device, train_step
from mgtrain.engine.warmup import warm_up
from mgtrain.errors import StoppedError
from mgtrain.models.weights.load import start_from
from mgtrain.processes.distributed import Agreement, World, replicate
from mgtrain.processes.signals import StopRequest
from mgtrain.recipe import Recipe
from mgtrain.rng import Draw, seed_of
from mgtrain.runs.checkpoint import CheckpointInfo
from mgtrain.runs.folder import RunDir
from mgtrain.runs.scores import Scores
from mgtrain.schedule import Step, check_world, make_plan


def fit(
    recipe: Recipe,
    run: RunDir,
    world: World,
    resume: bool = False,
    baseline: RunDir | None = None,
    allow_changes: bool = False,
) -> Scores:
    """Train a recipe from its first step, or from the run's newest checkpoint, to its last; returns the final scores.

    Raises:
        MgtrainError: of the kind that says what the user can do about it; what was saved stays.
    """
    train, val = open_data(recipe)
    plan = make_plan(recipe, len(train))
    recipe = fit_memory(recipe, plan, world)
    flops = check_shapes(recipe, [*plan.shapes(), recipe.base, recipe.evaluation_shape])
    check_world(plan, world.size)
    check_micro_batches(recipe, plan, world.size)
    check_precision(recipe, world.device)

    torch.manual_seed(seed_of(recipe.seed, Draw.INIT))
    model = to_device(make_model(recipe), recipe, world)
    start_from(model, recipe.init, fresh=not (resume and run.checkpoints()))
    scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.hardware.precision == "fp16")
    learner = Learner(model, make_optimizer(model, recipe.optim), scaler)
    state = CheckpointInfo(0, recipe.to_yaml(), train.classes, plan.fingerprint(), train.identity, val.identity)
    if resume:
        state = resume_run(run, state, learner, recipe, world, allow_changes)
    describe_run(run, recipe, plan, flops, train, val, world)
    milestones = set(plan.milestones(recipe.evaluation.per_phase))
    due = state.step in milestones and not state.evaluated  # it was stopped before or in an evaluation
    run.rewind(state.step, evaluated=not due)
    if state.step == 0:
        show_run(run, recipe, plan, train)
    for row in run.rows("steps.jsonl")[-1:] if due else ():
        show_step(run, row)  # TensorBoard forgets a step as a whole

    mode = warm_up(model, recipe, plan, state.step, world)
    replica = replicate(model, world)
    batches = train_batches(train, recipe, plan, state.step, world, BadVideos(len(train), recipe.data.max_bad_fraction))
    clock, scores, bad = Clock(state.train_seconds, state.data_seconds), None, NonFiniteSteps()
    any_rank = Agreement(world)

    def saved(now: CheckpointInfo) -> CheckpointInfo:
        with clock.paused():
            now = replace(now, train_seconds=clock.train_seconds, data_seconds=clock.data_seconds)
            save(run, now, learner, recipe, world)
        return now

    def evaluated(step: Step) -> tuple[Scores, CheckpointInfo]:
        with clock.paused():
            recalibrated = recalibrate(model, train, recipe, world)
            predictions = evaluate(model, val, recipe, world)
        log_evaluation(run, step, plan, predictions, clock, baseline, progress)
        return predictions.scores(), saved(replace(state, evaluated=True, recalibrated=recalibrated))

    with StopRequest() as asked, TrainProgress(plan, state.step, shown=world.main) as progress:
        if due:
            scores, state = evaluated(plan[state.step - 1])
        for step in plan.steps(state.step):
            stops = any_rank(asked.signal is not None)
            clips, labels = clock.wait_for(batches)  # uint8 (b, 3, T, S, S), int64 (b,)
            with mode(step.shape):
                result = train_step(replica, learner.optimizer, scaler, clips, labels, step, recipe, world)
            done = step.index + 1
            logs = done % recipe.logging.steps == 0 or done in milestones
            saves = done % recipe.logging.checkpoint_steps == 0 or done in milestones or stops
            bad.add(step, result.bad)
            if logs:
                log_step(run, step, result, clock, progress, world)
            if (logs or saves) and (left_out := bad.take()):
                refuse_or_report(left_out, state.left_out, run, recipe, plan, train)
                state = replace(state, left_out=state.left_out + len(left_out))
                if recipe.faults.non_finite == "rollback" and (good := newest_checkpoint(run, world)):
                    put_back(good, learner)
            progress.time(step, clock.lap())
            world.watchdog.beat()
            if saves:
                state = saved(replace(state, step=done, evaluated=False, recalibrated=False))
            if stops and done < len(plan):
                raise StoppedError(f"stopped as asked after step {done} of {len(plan)}, saved; resume with --resume")
            if done in milestones:
                scores, state = evaluated(step)
    run.close()
    return scores or evaluate(model, val, recipe, world).scores()


def open_data(recipe: Recipe) -> tuple[Videos, Videos]:
    """The training and validation videos, with the same classes in both."""
    splits = open_splits(recipe.data)
    for name, videos in splits.items():
        check_labels(recipe.data, name, videos)
    mirrored_labels(splits["train"].classes, recipe.data.mirrored)  # refuses what is no class
    if recipe.data.prepared:
        PreparedSet(recipe.data.prepared)  # refuses what is no prepared set
    return splits["train"], splits["val"]
