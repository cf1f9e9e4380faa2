"""Write the pages of docs/reference that are generated: the recipe's keys and the command line.

    python scripts/reference.py

The pages are checked in: they can be read without building the site, and a change shows in a diff. A test compares them
with the program.
"""

from __future__ import annotations

import argparse
import re
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from mgtrain.cli import app
from mgtrain.recipe.keys import reference as recipe_page

PAGES = Path(__file__).parent.parent / "docs/reference"
HEAD = """\
# Command line

All commands take `--help`. Results go to stdout and messages to stderr; [exit codes](exit-codes.md) has the codes.
RECIPE is a YAML file or the name of a shipped recipe, CHECKPOINT a file or a run, which means its newest checkpoint.
`scripts/reference.py` generates this page.
"""
KINDS = {int: "NUMBER", float: "NUMBER", str: "TEXT", Path: "PATH"}


def command_page() -> str:
    """Every command with its examples, arguments and options, as Markdown."""
    root: Any = typer.main.get_command(app)
    rows, sections = [], []
    for words, command in leaves(root):
        name = " ".join(("mgtrain", *words))
        summary, _, examples = (command.help or "").partition("Example")
        first, _, more = " ".join(summary.split()).partition(". ")
        rows.append(f"| [`{name}`](#{'-'.join(name.split())}) | {first.rstrip('.')} |")
        lines = examples.partition(":")[2]
        shown = [" ".join(line.split()) for line in re.split(r"\s\|\s+(?=mgtrain |torchrun )", lines) if line.strip()]
        parts = [f"## {name}", textwrap.fill(f"{first.rstrip('.')}. {more}".strip(), 120)]
        parts += ["```sh\n" + "\n".join(shown) + "\n```"] if shown else []
        parts += ["\n".join(table(command))] if command.params else []
        sections.append("\n\n".join(parts))
    return "\n".join([HEAD, "| command | what it does |", "|---|---|", *rows, "", "\n\n".join(sections), ""])


def leaves(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The commands that do something, with the words that name them."""
    if not hasattr(command, "commands"):
        yield words, command
    for name, one in getattr(command, "commands", {}).items():
        yield from leaves(one, (*words, name))


def table(command: Any) -> Iterator[str]:
    """Arguments, then options, with what they mean and their defaults."""
    hints = typing.get_type_hints(command.callback)
    yield "| argument or option | default | meaning |"
    yield "|---|---|---|"
    for param in sorted(command.params, key=lambda param: param.param_type_name):
        written = param.metavar or param.name.upper()
        if param.param_type_name == "option":
            flag = bool in (hints[param.name], *typing.get_args(hints[param.name]))
            written = "/".join((*param.opts, *param.secondary_opts))
            written += "" if flag else f" {param.metavar or kind(hints[param.name])}"
        given = param.default is not None and not isinstance(param.default, bool)
        default = "required" if param.required else f"`{param.default}`" if given else ""
        yield f"| `{escaped(written)}` | {default} | {escaped(param.help or '')} |"


def kind(hint: Any) -> str:
    """What to write for an option of a type: choices, or its kind."""
    parts = [part for part in typing.get_args(hint) or (hint,) if part is not type(None)]
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(map(str, parts))
    return KINDS.get(parts[0]) or kind(parts[0])


def escaped(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    for name, page in (("recipe.md", recipe_page()), ("cli.md", command_page())):
        (PAGES / name).write_text(page, encoding="utf-8")
