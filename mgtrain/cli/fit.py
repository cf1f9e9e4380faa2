"""The commands about runs: plan, fit, eval, compare, and their recipes and checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from mgtrain.cli.options import (
    DeviceOption,
    Json,
    Overrides,
    Procs,
    RecipeArgument,
    print_scores,
    start_ranks,
)
from mgtrain.console import start_logging
from mgtrain.errors import UsageError
from mgtrain.recipe import find_recipe, load_recipe


def fit(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="Name under runs/, or a folder. Default: the recipe's name.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run from its newest checkpoint, if it has one.")
    ] = False,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Resume although the recipe or the videos have changed since.")
    ] = False,
    baseline: Annotated[
        str | None, typer.Option(help="A run to measure the speedup against, by name or folder, as training goes.")
    ] = None,
    procs: Procs = None,
    device: DeviceOption = None,
    json_: Json = False,
) -> None:
    """Train a recipe.

    Examples:  mgtrain fit demo_multigrid  |  torchrun --nproc-per-node 8 -m mgtrain fit my.yaml data.root=/data/k400
    """
    from mgtrain.processes.distributed import connect, is_restarted, rank_of_environment
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

    with run.locked(), connect(device.value if device else None, loaded.faults.timeout_seconds) as world:
        start_logging(folder / "log.txt", world.main, world.rank)
        scores = train(loaded, run, world, resume, rival, allow_changes)
        if world.main:
            print_scores({"schema": "mgtrain.fit/1", "run": str(folder)}, scores, json_)
