"""The commands about shipped recipes."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from mgtrain.cli.options import Json
from mgtrain.console import harmless, out
from mgtrain.recipe import find_recipe, shipped_recipes

recipes_app = typer.Typer(name="recipes", help="List and show the shipped recipes.", no_args_is_help=True)


@recipes_app.command("list")
def list_recipes(json_: Json = False) -> None:
    """List the shipped recipes with what each reproduces.

    Example:  mgtrain recipes list
    """
    first_lines = {name: file.read_text().splitlines()[0].lstrip("# ") for name, file in shipped_recipes().items()}
    if json_:
        out.print_json(data={"schema": "mgtrain.recipes/1", "recipes": first_lines})
    else:
        for name, line in first_lines.items():
            out.print(f"{name:36} {line}")


@recipes_app.command("show")
def show_recipe(name: Annotated[str, typer.Argument(help="The name of a shipped recipe.")]) -> None:
    """Print a shipped recipe as a start for your own.

    Example:  mgtrain recipes show k400_slowfast_8x8_r50_multigrid > my.yaml
    """
    sys.stdout.write(harmless(find_recipe(name).read_text(encoding="utf-8")))


@recipes_app.command("keys")
def recipe_keys() -> None:
    """Print all keys of recipes as Markdown, with type, range, default and meaning.

    Example:  mgtrain recipes keys | less
    """
    from mgtrain.recipe.keys import reference

    sys.stdout.write(reference())
