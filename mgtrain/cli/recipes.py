"""The commands that list, show, copy and make recipes: recipes, init."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

from mgtrain.cli.options import Device, GroupBy, Json, Seed, check_finite, check_share
from mgtrain.console import harmless, note, progress, show, warn
from mgtrain.data.found import find_videos
from mgtrain.errors import UsageError
from mgtrain.recipe import find_recipe, shipped_recipes
from mgtrain.recipe.keys import reference

recipes_app = typer.Typer(name="recipes", help="List, show and copy the shipped recipes.", no_args_is_help=True)
Name = Annotated[str, Argument(help="The name of a shipped recipe.")]


@recipes_app.command("list")
def list_recipes(json_: Json = False) -> None:
    """List the shipped recipes with what each reproduces.

    Example:  mgtrain recipes list
    """
    first_lines = {
        name: file.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for name, file in shipped_recipes().items()
    }
    shown = (f"{name:36} {line}" for name, line in first_lines.items())
    show(json_, {"schema": "mgtrain.recipes/1", "recipes": first_lines}, *shown)


@recipes_app.command("show")
def show_recipe(name: Name) -> None:
    """Print a shipped recipe as a start for your own.

    Example:  mgtrain recipes show k400_slowfast_8x8_r50_multigrid > my.yaml
    """
    sys.stdout.write(harmless(find_recipe(name).read_text(encoding="utf-8")))


@recipes_app.command("copy")
def copy_recipe(
    name: Name,
    target: Annotated[
        Path | None, Argument(help="A file or an existing folder. Default: NAME.yaml in the current folder.")
    ] = None,
) -> None:
    """Copy a shipped recipe to a file of your own.

    Example:  mgtrain recipes copy k400_slowfast_8x8_r50_multigrid my.yaml
    """
    source = find_recipe(name)
    file = (target or Path()) / source.name if target is None or target.is_dir() else target
    try:
        with file.open("x", encoding="utf-8") as opened:
            opened.write(source.read_text(encoding="utf-8"))
    except FileExistsError:
        raise UsageError(f"{file}: exists already; give another file, or delete this one") from None
    note(f"{file}: train it with `mgtrain fit {shlex.quote(str(file))}`")


@recipes_app.command("keys")
def recipe_keys() -> None:
    """Print all keys of recipes as Markdown, with type, range, default and meaning.

    Example:  mgtrain recipes keys | less
    """
    sys.stdout.write(reference())


def init(
    data: Annotated[Path, Option(help="A folder of videos, or a list of them.")],
    to: Annotated[Path, Option(help="Folder to write the recipes, the lists and classes.txt to.")] = Path(),
    name: Annotated[str | None, Option(help="Name of the recipes. Default: the folder's name.")] = None,
    val: Annotated[float, Option(help="Share of the videos for validation, unless the data is already split.")] = 0.2,
    group_by: GroupBy = None,
    hours: Annotated[
        float | None, Option(min=0.01, help="Time for training the baseline. Default: 1 on a CPU, 12 on GPUs.")
    ] = None,
    network: Annotated[
        Literal["swin3d_t", "mvit_v2_s"] | None,
        Option(help="Fine-tune this transformer from Kinetics weights. Default: train a network of fitting size."),
    ] = None,
    root: Annotated[Path | None, Option(help="The folder that a list's paths are relative to.")] = None,
    fps: Annotated[float | None, Option(min=0.01, help="Frame rate of videos that are folders of frames.")] = None,
    seed: Seed = 0,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Write recipes for your own videos. They are split without leakage, and the recipes fit this machine.

    Examples:  mgtrain init --data clips --to work  |  mgtrain init --data clips --group-by 'person\\d+' --hours 8
    """
    check_finite(hours=hours, fps=fps)
    check_share(val)
    videos = find_videos(data, root)

    from mgtrain.preflight.init import make_project

    name = name or os.path.basename(os.path.abspath(data)).partition(".")[0]
    with progress() as shown:
        made = make_project(
            data, videos, to, name, val=val, group_by=group_by, hours=hours, fps=fps, seed=seed, device=device,
            network=network, report=lambda text, warns: warn(text) if warns else note(text), progress=shown,
        )  # fmt: skip
    show(json_, made.describe(), made.render())
