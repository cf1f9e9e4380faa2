"""The commands that list, show and copy recipes."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument

from mgtrain.cli.options import Json
from mgtrain.console import harmless, note, show
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
        str,
        Argument(help="A file or an existing folder. Default: NAME.yaml in the current folder.", show_default=False),
    ] = ".",
) -> None:
    """Copy a shipped recipe to a file of your own.

    Example:  mgtrain recipes copy k400_slowfast_8x8_r50_multigrid my.yaml
    """
    source = find_recipe(name)
    file = Path(target, source.name) if target.endswith(("/", os.sep)) or Path(target).is_dir() else Path(target)
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
