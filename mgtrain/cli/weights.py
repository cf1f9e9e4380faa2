"""The commands about other projects' weights."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from mgtrain.cli.options import Json
from mgtrain.console import note, show
from mgtrain.data.formats.reading import numbered_lines
from mgtrain.errors import UsageError

weights_app = typer.Typer(name="weights", help="Convert weights of other projects.", no_args_is_help=True)


@weights_app.command("import")
def import_weights(
    file: Annotated[
        Path | None,
        Argument(help="Weights of PySlowFast (.pyth or Caffe2 .pkl), PyTorchVideo, MMAction2, torchvision or mgtrain."),
    ] = None,
    *,
    from_: Annotated[
        str | None, Option("--from", help="Download torchvision:resnet50, torchvision:r3d_18 ... instead of a file.")
    ] = None,
    to: Annotated[
        Path | None, Option(help="The .safetensors file to write. Default: only report what matches.")
    ] = None,
    model: Annotated[
        str | None, Option(help="The model to load them into, such as i3d_r50. Default: the model they are from.")
    ] = None,
    classes: Annotated[
        Path | None, Option(help="A file of class names to store, one per line. Default: those of the weights.")
    ] = None,
    at_least: Annotated[
        float, Option(min=0, max=1, help="Least share of the model's tensors to load; exit with 6 below it.")
    ] = 1.0,
    json_: Json = False,
) -> None:
    """Convert weights of another project. 2-D weights become 3-D. Nothing in the file is executed.

    A recipe starts from the result, or from the original file, with init.weights=FILE.

    Examples:  mgtrain weights import SLOWFAST_8x8_R50.pyth --to k400.safetensors
    |  mgtrain weights import --from torchvision:resnet50 --model i3d_r50 --to in1k.safetensors
    """
    if (file is None) == (from_ is None):
        raise UsageError("give either a FILE or --from torchvision:NAME")
    if to and to.is_dir():
        raise UsageError(f"--to {to}: is a folder; name a .safetensors file in it")
    if to and file and to.exists() and file.exists() and to.samefile(file):
        raise UsageError(f"--to {to}: is the file to convert; give another one")

    import torch

    from mgtrain.models import TORCHVISION, build_model
    from mgtrain.models.weights.load import (
        download,
        load_weights,
        model_options,
        read_classes,
        read_weights,
        save_weights,
    )

    path, names = (file, read_classes(file)) if file else download(str(from_))
    named = (from_ or "").partition(":")[2]
    model = model or (named if named in TORCHVISION else None)
    weights = read_weights(path, common=model not in TORCHVISION)
    options = model_options(weights, model)
    names = tuple(text for _, text in numbered_lines(classes)) if classes else names
    if classes and len(names) != options["classes"]:
        raise UsageError(f"{classes}: names {len(names)} classes, the weights have {options['classes']}")
    with torch.device("meta"):
        target = build_model(**options)
    target.to_empty(device="cpu")
    report = load_weights(target, weights)
    kept = {key: value for key, value in options.items() if key != "classes"}
    result = {"schema": "mgtrain.weights_import/1", "file": str(path), "to": str(to) if to else None}
    facts = {"share": report.share, "model": kept, "classes": options["classes"], **asdict(report)}
    section = ", ".join(f"{key}: {list(v) if isinstance(v, tuple) else v}" for key, v in kept.items())
    show(json_, {**result, **facts}, *report.lines(), f"model: {{{section}}}, of {options['classes']} classes")
    report.demand(at_least, path)
    if to:
        save_weights(to, target, options, names, report.matched, report.project)
        note(f"wrote {to}; a recipe starts from it with init.weights={to}")
