"""A run's state, written down and put back."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from mgtrain.errors import CheckpointError
from mgtrain.models.norm import group_stats, merge_group_stats
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe, parse_recipe, recipe_differences
from mgtrain.runs.checkpoint import (
    CheckpointInfo,
    load_model,
    load_optimizer,
    newest_whole,
    read_info,
    save_checkpoint,
)
from mgtrain.runs.folder import RunDir, accuracy

log = logging.getLogger(__name__)

# What may change on resuming, as it decides neither which clips a step sees nor what becomes of them.
FREE_SECTIONS = ("hardware", "logging", "faults")
FREE_KEYS = ("data.root", "data.train", "data.val", "data.format", "data.videos", "data.max_bad_fraction")
BOUND_KEYS = ("hardware.precision",)


@dataclass(frozen=True, slots=True)
class Learner:
    """What a step changes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler


def save(run: RunDir, state: CheckpointInfo, learner: Learner, recipe: Recipe, world: World) -> None:
    """Write a checkpoint, by all ranks together, and delete those that are neither new nor the best evaluated."""
    merge_group_stats(learner.model, world.gather)
    groups = group_stats(learner.model, world.gather)
    if run.writes:
        state = replace(state, scaler=learner.scaler.state_dict())
        save_checkpoint(run.checkpoint_path(state.step), learner.model, learner.optimizer, state, groups)
        best = max(run.rows("evals.jsonl"), key=accuracy, default={"step": 0})
        run.prune(recipe.logging.keep_checkpoints, also=[run.checkpoint_path(best["step"])])
    world.barrier()


def put_back(path: Path, learner: Learner) -> CheckpointInfo:
    """Load a checkpoint's model, optimizer and scaler; returns what it belongs to."""
    info = read_info(path)
    load_model(path, learner.model)
    load_optimizer(path, learner.model, learner.optimizer)
    learner.scaler.load_state_dict(info.scaler)
    return info


def newest_checkpoint(run: RunDir, world: World) -> Path | None:
    """The newest checkpoint that is whole, the same on all ranks; None if the run has none."""
    return world.from_main(newest_whole(run.checkpoints()) if world.main else None)


def resume(
    run: RunDir, fresh: CheckpointInfo, learner: Learner, recipe: Recipe, world: World, allow_changes: bool
) -> CheckpointInfo:
    """Put the newest checkpoint's state back; `fresh` is where a run without one starts.

    Raises:
        CheckpointError: it was made from another recipe or other videos, and that is not allowed.
    """
    path = newest_checkpoint(run, world)
    if path is None:
        return fresh
    saved = read_info(path)
    changes = changes_since(saved, fresh, parse_recipe(saved.recipe, str(path)), recipe)
    if changes and not allow_changes:
        raise CheckpointError(
            f"{path}: what it was trained with has changed since: {'; '.join(changes)}; "
            "resume as it was, or with --allow-changes, or start a new run with --name"
        )
    for change in changes:
        log.warning("changed since the checkpoint: %s", change)
    put_back(path, learner)
    log.info("resumed after step %d from %s", saved.step, path)
    return replace(saved, recipe=fresh.recipe, plan=fresh.plan, data=fresh.data, val_data=fresh.val_data)


def changes_since(saved: CheckpointInfo, fresh: CheckpointInfo, before: Recipe, now: Recipe) -> list[str]:
    """What a resumed run would do differently, each as `what: before -> now`."""
    changes = [
        f"{key} {a} -> {b}"
        for key, (a, b) in recipe_differences(before, now).items()
        if key in BOUND_KEYS or not (key in FREE_KEYS or key.split(".")[0] in FREE_SECTIONS)
    ]
    if saved.data != fresh.data:
        changes.append(f"training videos {saved.data} -> {fresh.data}")
    if saved.val_data != fresh.val_data:
        changes.append(f"validation videos {saved.val_data} -> {fresh.val_data}")
    if saved.plan != fresh.plan and not changes:
        changes.append("the schedule that mgtrain makes of the recipe")
    return changes
