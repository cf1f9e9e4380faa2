"""What several commands have in common: their arguments, and how they are read."""

from __future__ import annotations

import json
import math
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from mgtrain.console import out
from mgtrain.errors import CheckpointError, UsageError


class Device(str, Enum):
    """Where to compute."""

    cpu = "cpu"
    cuda = "cuda"


RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped recipe.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Changes to the recipe, such as optim.lr=0.05."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
DeviceOption = Annotated[Device | None, typer.Option(help="Where to compute. Default: a GPU if there is one.")]
Procs = Annotated[
    int | None, typer.Option(min=1, help="Processes to start on this machine. Default: one for each visible GPU.")
]
CheckpointArgument = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint file, or a run (its newest checkpoint).")
]


def check_finite(option: str, value: float | None) -> None:
    if value is not None and not math.isfinite(value):
        raise UsageError(f"{option} {value}: has to be a finite number")


def checkpoint_path(checkpoint: str) -> Path:
    from mgtrain.runs.checkpoint import newest_whole
    from mgtrain.runs.folder import find_run

    path = Path(checkpoint)
    if path.is_file():
        return path
    run = find_run(checkpoint)
    newest = newest_whole(run.checkpoints())
    if newest is None:
        raise CheckpointError(f"{run.path}: no checkpoint yet; train it with `mgtrain fit`")
    return newest


def start_ranks(procs: int | None, device: Device | None) -> bool:
    """Start this command once per rank, unless this process is one of them or the only one."""
    from mgtrain.processes.distributed import default_procs, is_launched, launch

    if is_launched():
        return False
    wanted = procs or default_procs(device.value if device else None)
    if wanted == 1:
        return False
    code = launch([sys.executable, "-m", "mgtrain", *sys.argv[1:]], wanted)
    if code:
        sys.exit(code)
    return True


def print_scores(facts: dict[str, Any], scores: Any, as_json: bool) -> None:
    if as_json:
        keys = ("mean_ap", "top1", "top5", "loss", "videos")
        row = {key: value for key, value in scores.row().items() if key in keys}
        out.print_json(json.dumps({**facts, **row}))
    else:
        out.print(scores.line(1))
