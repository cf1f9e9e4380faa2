"""The run: from a recipe, a folder to write to and a place among the ranks, to scores.

The only things that change during a run are the model, the optimizer, the scaler and the number of finished steps.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from mgtrain.checkpoint import CheckpointInfo, load_model, load_optimizer, read_info, save_checkpoint
from mgtrain.clips.loader import BadVideos, recalibration_batches, train_batches, view_batches
from mgtrain.console import TrainProgress
from mgtrain.datasets import open_splits
from mgtrain.datasets.videos import Videos, mirrored_labels
from mgtrain.distributed import World, replicate
from mgtrain.engine.checks import check_micro_batches, check_precision, check_shapes, make_model
from mgtrain.engine.clock import Clock
from mgtrain.engine.evaluate import Scores, evaluate
from mgtrain.engine.optim import make_optimizer
from mgtrain.engine.recalibrate import recalibrate_bn
from mgtrain.engine.record import describe_run, log_evaluation, log_step
from mgtrain.engine.step import to_device, train_step
from mgtrain.errors import CheckpointError, DataError
from mgtrain.models.norm import merge_group_stats
from mgtrain.recipe import Recipe
from mgtrain.rng import Draw, seed_of
from mgtrain.rundir import RunDir
from mgtrain.schedule import check_world, make_plan
from mgtrain.weights.load import start_from

log = logging.getLogger(__name__)


def fit(recipe: Recipe, run: RunDir, world: World, resume: bool = False, baseline: RunDir | None = None) -> Scores:
    """Train a recipe from its first step, or from the run's newest checkpoint, to its last; returns the final scores.

    Raises:
        MgtrainError: of the kind that says what the user can do about it; what was saved stays.
    """
    train, val = open_data(recipe)
    plan = make_plan(recipe, len(train))
    flops = check_shapes(recipe, [*plan.shapes(), recipe.base, recipe.evaluation_shape])
    check_world(plan, world.size)
    check_micro_batches(recipe, plan, world.size)
    check_precision(recipe, world.device)

    torch.manual_seed(seed_of(recipe.seed, Draw.INIT))
    model = to_device(make_model(recipe), recipe, world)
    start_from(model, recipe.init, fresh=not (resume and run.checkpoints()))
    optimizer = make_optimizer(model, recipe.optim)
    scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.hardware.precision == "fp16")
    state = CheckpointInfo(0, recipe.to_yaml(), train.classes, plan.fingerprint(), train.fingerprint)
    if resume and run.checkpoints():
        state = restore(run.checkpoints()[-1], state, model, optimizer, scaler)
    describe_run(run, recipe, plan, flops, train, val, world)
    run.rewind(state.step)

    replica = replicate(model, world)
    recalibrates = recipe.evaluation.recalibration_batches > 0
    milestones = set(plan.milestones(recipe.evaluation.per_phase))
    bad = BadVideos(len(train), recipe.data.max_bad_fraction)
    batches = train_batches(train, recipe, plan, state.step, world, bad)
    clock, scores = Clock(state.train_seconds, state.data_seconds), None
    with TrainProgress(plan, state.step, shown=world.main) as progress:
        for step in plan.steps(state.step):
            clips, labels = clock.wait_for(batches)  # uint8 (b, 3, T, S, S), int64 (b,)
            result = train_step(replica, optimizer, scaler, clips, labels, step, recipe, world)
            done = step.index + 1
            if done % recipe.logging.steps == 0 or done in milestones:
                log_step(run, step, result, clock, progress, world)
            progress.time(step, clock.lap())

            if done in milestones:
                with clock.paused():
                    scores = recalibrate_and_evaluate(model, train, val, recipe, world)
                log_evaluation(run, step, plan, scores, clock, baseline)
            if done in milestones or done % recipe.logging.checkpoint_steps == 0:
                with clock.paused():
                    merge_group_stats(model, world.gather)
                    state = replace(state, step=done, recalibrated=done in milestones and recalibrates)
                    state = replace(state, train_seconds=clock.train_seconds, data_seconds=clock.data_seconds)
                    save(run, state, model, optimizer, scaler, recipe)
                    world.barrier()
    run.close()
    return scores or recalibrate_and_evaluate(model, train, val, recipe, world)


def open_data(recipe: Recipe) -> tuple[Videos, Videos]:
    """The training and validation videos, with the same classes in both and one label each."""
    splits = open_splits(recipe.data)
    for name, videos in splits.items():
        if videos.multi_label:
            raise DataError(
                f"{recipe.data.root}: the {name} videos have several labels each, which cannot be trained yet; "
                "use lists with one label per video"
            )
    mirrored_labels(splits["train"].classes, recipe.data.mirrored)  # refuses what is no class
    return splits["train"], splits["val"]


def recalibrate_and_evaluate(
    model: nn.Module,
    train: Videos,
    val: Videos,
    recipe: Recipe,
    world: World,
    views: tuple[int, int] = (1, 1),
    recalibrated: bool = False,
) -> Scores:
    """Accuracy of the weights as they are, over `views` (times, crops) of each validation video.

    BatchNorm is recalibrated first unless it is `recalibrated` already, or the recipe says not to.
    """
    merge_group_stats(model, world.gather)
    if recipe.evaluation.recalibration_batches and not recalibrated:
        bad = BadVideos(len(train), recipe.data.max_bad_fraction)
        recalibrate_bn(model, recalibration_batches(train, recipe, world, bad), recipe, world)
    bad = BadVideos(len(val), recipe.data.max_bad_fraction)
    times, crops = views
    return evaluate(model, view_batches(val, recipe, times, crops, world, bad), times * crops, recipe, world)


def restore(
    path: Path, fresh: CheckpointInfo, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> CheckpointInfo:
    """Put a checkpoint's state back; returns what it belongs to.

    Raises:
        CheckpointError: it was made from another recipe or other videos than `fresh` describes.
    """
    info = read_info(path)
    if info.plan != fresh.plan or info.data != fresh.data:
        what = "training videos" if info.data != fresh.data else "schedule"
        raise CheckpointError(
            f"{path}: was saved by a run with another {what} than now; "
            "resume with the recipe and the data of its recipe.yaml and data.json, or start a new run with --name"
        )
    load_model(path, model)
    load_optimizer(path, model, optimizer)
    scaler.load_state_dict(info.scaler)
    log.info("resumed after step %d from %s", info.step, path)
    return replace(info, recipe=fresh.recipe)


def save(
    run: RunDir,
    state: CheckpointInfo,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    recipe: Recipe,
) -> None:
    """Write a checkpoint, and delete those that are neither new nor the best evaluated."""
    if run.writes:
        save_checkpoint(run.checkpoint_path(state.step), model, optimizer, replace(state, scaler=scaler.state_dict()))
        best = max(run.rows("evals.jsonl"), key=lambda row: row["top1"], default={"step": 0})
        run.prune(recipe.logging.keep_checkpoints, also=[run.checkpoint_path(best["step"])])
