"""The command that trains: fit."""

from __future__ import annotations

import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

from typer import Option

from mgtrain.cli.options import Device, Json, Overrides, Procs, RecipeArgument, connected, start_ranks
from mgtrain.console import note, show, start_logging
from mgtrain.data import count_training_videos
from mgtrain.errors import UsageError
from mgtrain.processes.environment import is_launched, may_restart, rank_of_environment, restarts
from mgtrain.recipe import Recipe, find_recipe, load_recipe
from mgtrain.runs.folder import RUNS, RunDir, find_run
from mgtrain.schedule import check_world, make_plan

if TYPE_CHECKING:
    from mgtrain.processes.distributed import World
    from mgtrain.runs.scores import Scores

SECONDS_TO_UNLOCK = 120.0  # a server of NFS keeps the lock of a machine that has failed for about 90 s
SECONDS_TO_APPEAR = 90.0  # NFS remembers for up to 60 s that a folder was not there
SCORES = ("mean_ap", "top1", "mean_class", "top5", "loss", "videos")  # to print


def fit(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    name: Annotated[str | None, Option(help="Name under runs/, or a folder. Default: the recipe's name.")] = None,
    resume: Annotated[bool, Option("--resume", help="Continue from the newest checkpoint, if there is one.")] = False,
    allow_changes: Annotated[
        bool, Option("--allow-changes", help="Resume even if the recipe or the videos have changed.")
    ] = False,
    baseline: Annotated[str | None, Option(help="The run, by name or folder, to measure the speedup against.")] = None,
    dry_run: Annotated[
        bool,
        Option(
            "--dry-run", help="Do all that a run does up to one step of each shape, show time and memory, keep nothing."
        ),
    ] = False,
    procs: Procs = None,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Train a recipe.

    Examples:  mgtrain fit demo_multigrid --dry-run  |  mgtrain fit demo_multigrid  |
    torchrun --nproc-per-node 8 -m mgtrain fit my.yaml data.root=/data/k400
    """
    began = time.perf_counter()
    loaded = load_recipe(recipe, overrides)
    if name in (os.curdir, os.pardir):
        raise UsageError(f"--name {name}: give the run a name, or a folder such as ./{name}/my_run")
    if dry_run and resume:
        raise UsageError("--dry-run --resume: a dry run starts from the first step; leave one of them out")
    folder = Path(name) if name and os.sep in name else RUNS / (name or find_recipe(recipe).stem)
    run = RunDir(folder, writes=rank_of_environment() == 0)
    resume = not dry_run and (resume or restarts() > 0)
    held = UsageError(f"{folder}: holds a run already; add --resume to continue it, or --name to start another")
    if not (dry_run or resume or may_restart()) and run.started:
        raise held
    rival = find_run(baseline) if baseline else None
    if resume and not is_launched() and run.rows("evals.jsonl") and _is_finished(run, loaded, json_):
        return
    if not is_launched():  # report mistakes in the data, the plan or the processes before importing torch
        check_world(make_plan(loaded, count_training_videos(loaded, expected=False)), procs or 1)
    if start_ranks(procs, device):
        return

    from mgtrain.engine.fit import fit as train
    from mgtrain.engine.rehearsal import rehearse, render

    if dry_run:
        with TemporaryDirectory() as kept_nowhere, connected(device, loaded.faults.timeout_seconds) as world:
            found = rehearse(loaded, RunDir(Path(kept_nowhere), writes=world.main), world)
            if world.main:
                show(json_, found, render(found))
        return
    patience = min(SECONDS_TO_UNLOCK, loaded.faults.timeout_seconds / 2) if resume and is_launched() else None
    with connected(device, loaded.faults.timeout_seconds) as world, run.locked(patience):
        start_logging(folder / "log.txt", world.rank)
        _check_shared(run, world)
        resume = world.any(resume)  # torchrun counts restarts on each machine by itself
        if not resume and world.from_main(run.started):
            raise held
        if world.from_main(world.main and resume and is_launched() and _is_finished(run, loaded, json_)):
            return
        scores = train(loaded, run, world, resume, rival, allow_changes, began)
        if world.main:
            _show(folder, scores, json_)


def _check_shared(run: RunDir, world: World) -> None:
    """Raise `UsageError` if a rank does not see the run's folder, from which all of them resume."""
    world.barrier()  # rank 0 has made it
    deadline = time.monotonic() + SECONDS_TO_APPEAR
    while not (seen := run.path.is_dir()) and time.monotonic() < deadline:
        time.sleep(0.2)
    if world.any(not seen):
        raise UsageError(
            f"{run.path.absolute()}: rank 0 has made this folder, and other ranks do not see it; with --name, choose "
            "one on a file system that all machines share, because all ranks read its checkpoints to resume"
        )


def _is_finished(run: RunDir, recipe: Recipe, json_: bool) -> bool:
    """Whether nothing of the run is left to train; then print its scores."""
    from mgtrain.engine.resume import finished  # imports torch

    scores = finished(run, recipe)
    if scores:
        note(f"{run.path}: this run is finished; nothing is left to train")
        _show(run.path, scores, json_)
    return scores is not None


def _show(folder: Path, scores: Scores, json_: bool) -> None:
    """Print a run's final scores."""
    row = scores.row()
    shown = {key: row[key] for key in SCORES if key in row}
    show(json_, {"schema": "mgtrain.fit/1", "run": str(folder), **shown}, scores.line(1))
