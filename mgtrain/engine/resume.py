"""Save and restore the state of a run."""

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from mgtrain.engine.update.average import Average
from mgtrain.errors import CheckpointError
from mgtrain.models.norm import group_stats, merge_group_stats
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe, changed_keys, parse_recipe
from mgtrain.runs.checkpoint import (
    CheckpointInfo,
    load_average,
    load_model,
    load_optimizer,
    newest_whole,
    read_info,
    save_checkpoint,
)
from mgtrain.runs.folder import RunDir
from mgtrain.runs.history import accuracy
from mgtrain.runs.scores import Scores

log = logging.getLogger(__name__)

# Keys that may change when a run is resumed: fingerprints tell whether the videos are the same.
PLACES = ("data.root", "data.train", "data.val", "data.format", "data.videos", "data.max_bad_fraction")


@dataclass(frozen=True, slots=True)
class Learner:
    """The state that a step changes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: Average | None = None  # of the weights

    def averaged(self) -> AbstractContextManager[None]:
        """The context in which the model has the average's weights, if there is one."""
        return self.average.in_place() if self.average is not None else nullcontext()


def save(run: RunDir, state: CheckpointInfo, learner: Learner, keep: int, world: World) -> None:
    """Write a checkpoint and delete all others except the newest `keep` and the best; all ranks must call this."""
    merge_group_stats(learner.model, world.gather)
    groups = group_stats(learner.model, world.gather)
    if run.writes:
        path, state = run.checkpoint_path(state.step), replace(state, scaler=learner.scaler.state_dict())
        average = learner.average.weights if learner.average is not None else {}
        save_checkpoint(path, learner.model, learner.optimizer, state, groups, average)
        best = max(run.rows("evals.jsonl"), key=accuracy, default={"step": 0})
        run.prune(keep, also=[run.checkpoint_path(best["step"])])
    world.barrier()


def restore(path: Path, learner: Learner) -> None:
    """Load a checkpoint's model, optimizer, average and scaler."""
    load_model(path, learner.model)
    load_optimizer(path, learner.model, learner.optimizer)
    if learner.average is not None:
        learner.average.restart()  # from the model's weights, if the checkpoint has no average
        load_average(path, learner.average.weights)
    if scaler := read_info(path).scaler:  # empty unless the run was in fp16
        learner.scaler.load_state_dict(scaler)


def newest_checkpoint(run: RunDir, world: World) -> Path | None:
    """The newest undamaged checkpoint, the same on all ranks; None if the run has none."""
    return world.from_main(newest_whole(run.checkpoints()) if world.main else None)


def resume_run(
    run: RunDir, fresh: CheckpointInfo, learner: Learner, recipe: Recipe, world: World, allow_changes: bool
) -> tuple[CheckpointInfo, list[str]]:
    """Restore the newest checkpoint: its description, or `fresh`, that of a new run, and what has changed since.

    Raises `CheckpointError` if the recipe or the videos have changed, unless `allow_changes`.
    """
    path = newest_checkpoint(run, world)
    if path is None:
        return fresh, []
    saved = read_info(path)
    changes = _changes(saved, path, recipe)
    videos = {"training": (saved.data, fresh.data), "validation": (saved.val_data, fresh.val_data)}
    changes += [f"{name} videos {before} -> {now}" for name, (before, now) in videos.items() if before != now]
    if saved.plan != fresh.plan and not changes:
        changes.append("this version of mgtrain makes another schedule from the recipe")
    if changes and not allow_changes:
        raise CheckpointError(
            f"{path}: the recipe or the data has changed since: {'; '.join(changes)}; "
            "undo the changes, resume with --allow-changes, or start a new run with --name"
        )
    for change in changes:
        log.warning("changed since the checkpoint: %s", change)
    restore(path, learner)
    log.info("resumed after step %d from %s", saved.step, path)
    return replace(saved, recipe=fresh.recipe, plan=fresh.plan, data=fresh.data, val_data=fresh.val_data), changes


def finished(run: RunDir, recipe: Recipe) -> Scores | None:
    """The final scores of a finished run of this recipe, read without its data; None if it is not finished."""
    rows = run.rows("evals.jsonl")
    if not rows or not (path := newest_whole(run.checkpoints())):
        return None
    info, last = read_info(path), rows[-1]
    if not info.step == last["step"] == run.read("plan.json").get("steps") or not info.evaluated:
        return None
    return None if _changes(info, path, recipe) else Scores.of(last)


def _changes(saved: CheckpointInfo, path: Path, recipe: Recipe) -> list[str]:
    return changed_keys(parse_recipe(saved.recipe, str(path), saved=True).flat(), recipe.flat(), PLACES)
