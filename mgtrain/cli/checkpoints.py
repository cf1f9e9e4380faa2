"""The commands about checkpoints."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument

from mgtrain.cli.options import Json
from mgtrain.cli.trained import CheckpointArgument, checkpoint_path
from mgtrain.console import show
from mgtrain.errors import CheckpointError
from mgtrain.recipe import parse_recipe
from mgtrain.runs.folder import find_run

ckpt_app = typer.Typer(name="ckpt", help="Inspect and verify checkpoints.", no_args_is_help=True)


@ckpt_app.command("inspect")
def inspect_checkpoint(checkpoint: CheckpointArgument, json_: Json = False) -> None:
    """Show the contents of a checkpoint.

    Example:  mgtrain ckpt inspect demo_multigrid
    """
    from mgtrain.runs.checkpoint import read_info, tensor_shapes

    path = checkpoint_path(checkpoint)
    info, shapes = read_info(path), tensor_shapes(path)
    numbers = {
        part: sum(prod(shape) for name, shape in shapes.items() if name.startswith(part))
        for part in ("model", "ema", "optimizer", "groups")
    }
    facts = {
        "checkpoint": str(path),
        "bytes": path.stat().st_size,
        "step": info.step,
        "evaluated": info.evaluated,
        "recalibrated": info.recalibrated,
        "training_seconds": info.train_seconds,
        "model": parse_recipe(info.recipe, str(path), saved=True).model.name,
        "classes": len(info.classes),
        "tensors": len(shapes),
        "numbers": numbers,
        "training_videos": info.data,
        "validation_videos": info.val_data,
        "steps_left_out": info.left_out,
    }
    shown = {**facts, "numbers": ", ".join(f"{part} {count:,}" for part, count in numbers.items())}
    lines = (f"{key.replace('_', ' '):18} {value}" for key, value in shown.items())
    show(json_, {"schema": "mgtrain.ckpt_inspect/1", **facts, "recipe": info.recipe}, *lines)


@ckpt_app.command("verify")
def verify_checkpoints(
    path: Annotated[str, Argument(metavar="PATH", help="A checkpoint file, or a run: all of its checkpoints.")],
    json_: Json = False,
) -> None:
    """Verify checkpoints against their checksums. Exits with 4 if one is damaged.

    Example:  mgtrain ckpt verify demo_multigrid
    """
    files = [Path(path)] if Path(path).is_file() else find_run(path).checkpoints()
    if not files:
        raise CheckpointError(f"{path}: no checkpoint yet; train it with `mgtrain fit`")

    from mgtrain.runs.checkpoint import verify

    damaged: dict[str, str] = {}
    for file in files:
        try:
            verify(file)
        except CheckpointError as error:
            damaged[str(file)] = str(error)
    names = [str(file) for file in files]
    result = {"schema": "mgtrain.ckpt_verify/1", "checkpoints": names, "damaged": damaged}
    show(json_, result, *(damaged.get(name, f"{name}: whole") for name in names))
    if damaged:
        raise CheckpointError(f"{len(damaged)} of {len(files)} checkpoints are damaged; --resume skips them")
