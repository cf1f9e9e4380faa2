"""The command that trains: fit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from mgtrain.cli.options import Device, Json, Overrides, Procs, RecipeArgument, connected, start_ranks
from mgtrain.console import out
from mgtrain.errors import UsageError
from mgtrain.recipe import find_recipe, load_recipe

SCORES = ("mean_ap", "top1", "top5", "loss", "videos")  # to print


def fit(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="Name under runs/, or a folder. Default: the recipe's name.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run from its newest checkpoint, if it has one.")
    ] = False,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Resume even if the recipe or the videos have changed.")
    ] = False,
    baseline: Annotated[
        str | None, typer.Option(help="A run, by name or folder, to measure the speedup against during training.")
    ] = None,
    procs: Procs = None,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Train a recipe.

    Examples:  mgtrain fit demo_multigrid  |  torchrun --nproc-per-node 8 -m mgtrain fit my.yaml data.root=/data/k400
    """
    from mgtrain.processes.distributed import is_restarted, rank_of_environment
    from mgtrain.runs.folder import RUNS, RunDir, find_run

    loaded = load_recipe(recipe, overrides or ())
    if name in (os.curdir, os.pardir):
        raise UsageError(f"--name {name}: give the run a name, or a folder such as ./{name}/my_run")
    folder = Path(name) if name and os.sep in name else RUNS / (name or find_recipe(recipe).stem)
    run = RunDir(folder, writes=rank_of_environment() == 0)
    resume = resume or is_restarted()
    if run.rows("steps.jsonl") and not resume:
        raise UsageError(f"{folder}: holds a run already; add --resume to continue it, or --name to start another")
    rival = find_run(baseline) if baseline else None
    if start_ranks(procs, device):
        return

    from mgtrain.engine.fit import fit as train

    with run.locked(), connected(device, folder / "log.txt", loaded.faults.timeout_seconds) as world:
        scores = train(loaded, run, world, resume, rival, allow_changes)
        if world.main and json_:
            row = scores.row()
            shown = {key: row[key] for key in row if key in SCORES}
            out.print_json(data={"schema": "mgtrain.fit/1", "run": str(folder), **shown})
        elif world.main:
            out.print(scores.line(1))
