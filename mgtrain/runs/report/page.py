"""Render HTML pages from templates and write them atomically."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from mgtrain.errors import CheckpointError
from mgtrain.runs.folder import replacing


def render_page(template: str, **context: Any) -> str:
    """The page of a template; values are escaped."""
    environment = Environment(
        loader=PackageLoader("mgtrain.runs.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(template).render(context)


def write_text(path: Path, page: str) -> None:
    """Write a file atomically.

    Raises:
        CheckpointError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error}") from None
