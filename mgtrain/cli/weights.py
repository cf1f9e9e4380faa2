"""The command about weights of other projects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mgtrain.cli.options import Json
from mgtrain.console import err, out
from mgtrain.errors import UsageError

weights_app = typer.Typer(name="weights", help="Weights from elsewhere.", no_args_is_help=True)


@weights_app.command("import")
def import_weights(
    file: Annotated[
        Path | None,
        typer.Argument(
            help="PySlowFast's .pyth or Caffe2 .pkl, PyTorchVideo's, MMAction2's, torchvision's or our own."
        ),
    ] = None,
    *,
    from_: Annotated[
        str | None,
        typer.Option("--from", help="Download instead: torchvision:resnet50, torchvision:r3d_18 ..."),
    ] = None,
    to: Annotated[Path | None, typer.Option(help="The .safetensors file to write. Default: only report.")] = None,
    model: Annotated[
        str | None, typer.Option(help="The model they are for, such as i3d_r50. Default: the one they are of.")
    ] = None,
    classes: Annotated[
        Path | None, typer.Option(help="Names of the classes, one per line, to be stored. Default: those of the file.")
    ] = None,
    at_least: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the model's tensors to demand; below it, exit with 6.")
    ] = 1.0,
    json_: Json = False,
) -> None:
    """Bring another project's weights into our names, and 2-D ones into three dimensions. Runs nothing of the file.

    A recipe starts from the result, or from the file itself, with init.weights=FILE.

    Examples:  mgtrain weights import SLOWFAST_8x8_R50.pyth --to k400.safetensors
    |  mgtrain weights import --from torchvision:resnet50 --model i3d_r50 --to in1k.safetensors
    """
    if (file is None) == (from_ is None):
        raise UsageError("give a FILE or --from torchvision:NAME, one of them")

    import torch

    from mgtrain.models import TORCHVISION, build_model
    from mgtrain.models.weights.load import load_weights, model_options, read_classes, read_weights, save_weights
    from mgtrain.models.weights.torchvision import download

    path, names = (file, read_classes(file)) if file else download(str(from_))
    named = (from_ or "").partition(":")[2]
    model = model or (named if named in TORCHVISION else None)
    weights = read_weights(path, common=model not in TORCHVISION)
    options = model_options(weights, model)
    names = _read_names(classes) if classes else names
    if classes and len(names) != options["classes"]:
        raise UsageError(f"{classes}: names {len(names)} classes, the weights have {options['classes']}")
    with torch.device("meta"):
        target = build_model(**options)
    target.to_empty(device="cpu")
    report = load_weights(target, weights)
    kept = {key: value for key, value in options.items() if key != "classes"}
    if json_:
        result = {"schema": "mgtrain.weights_import/1", "file": str(path), "to": to and str(to), "share": report.share}
        out.print_json(json.dumps({**result, "model": kept, "classes": options["classes"], **report.describe()}))
    else:
        for line in report.lines():
            out.print(line, markup=False)
        section = ", ".join(f"{key}: {list(v) if isinstance(v, tuple) else v}" for key, v in kept.items())
        out.print(f"model: {{{section}}}, of {options['classes']} classes", markup=False)
    report.demand(at_least, path)
    if to:
        save_weights(to, target, options, names, report.matched, report.project)
        err.print(f"wrote {to}; a recipe starts from it with init.weights={to}", markup=False, soft_wrap=True)


def _read_names(file: Path) -> tuple[str, ...]:
    from mgtrain.data.reading import numbered_lines

    return tuple(text for _, text in numbered_lines(file))
