"""The commands about prepared sets."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from mgtrain.cli.data import data_app
from mgtrain.cli.options import Json, Overrides, RecipeArgument, check_finite
from mgtrain.console import err, out
from mgtrain.errors import UsageError
from mgtrain.processes.cores import usable_cores
from mgtrain.recipe import load_recipe

# Of a prepared set: what K400's grids read (short sides of 128 to 320 pixels), at about 3 times the bytes.
LEVELS, QUALITY = "256,160", 25


@data_app.command()
def prepare(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    to: Annotated[Path | None, typer.Option(help="Folder to make. Default: data.root with -prepared added.")] = None,
    levels: Annotated[str, typer.Option(help="Short sides in pixels.")] = LEVELS,
    quality: Annotated[int, typer.Option(min=0, max=51, help="H.264's rate factor; smaller is better.")] = QUALITY,
    fps: Annotated[
        float | None, typer.Option(min=1, help="Thin out videos of more frames per second. Default: keep all frames.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes. Default: one for each core.")] = None,
    forecast: Annotated[
        bool, typer.Option("--forecast", help="Prepare a few videos, say what the rest would take, and stop.")
    ] = False,
    json_: Json = False,
) -> None:
    """Re-encode the videos of a recipe once, so that every clip costs no more than its own frames and size.

    The originals stay as they are. Run it again to go on where it was stopped. Then train with data.prepared=FOLDER.

    Example:  mgtrain data prepare k400_slowfast_8x8_r50_multigrid data.root=/data/k400 --to /scratch/k400
    """
    from dataclasses import asdict

    from mgtrain.clips.prepared import Settings
    from mgtrain.console import duration, progress, size
    from mgtrain.data import open_splits
    from mgtrain.preflight.prepare import Forecast
    from mgtrain.preflight.prepare import prepare as make

    check_finite("--fps", fps)
    data = load_recipe(recipe, overrides or ()).data
    folder = to or Path(f"{data.root.rstrip(os.sep)}-prepared")
    settings = Settings(parse_levels(levels), quality, fps)
    count = workers or usable_cores()
    paths = [videos.name(n) for videos in open_splits(data).values() for n in range(len(videos))]

    def by_level(sizes: tuple[int, ...], originals: int) -> str:
        """What each level adds, in bytes and of the originals."""
        parts = (
            f"{size(n)} or {n / max(1, originals):.2f}x at {level}"
            for level, n in zip(settings.levels, sizes, strict=True)
        )
        return f"{size(sum(sizes))} ({', '.join(parts)})"

    def told(expected: Forecast) -> bool:
        err.print(
            f"{expected.videos:,} videos: about {by_level(expected.bytes, expected.originals)}, the originals have "
            f"{size(expected.originals)}; {duration(expected.seconds)} from now on with {count} processes",
            soft_wrap=True,
        )
        return not forecast

    with progress() as show:
        done = make(Path(data.root), paths, folder, settings, count, forecast=told, progress=show)
    for cause in done.broken.values():
        err.print(f"left out: {cause}", soft_wrap=True)
    if json_:
        out.print_json(json.dumps({"schema": "mgtrain.prepare/1", "folder": str(folder), **asdict(done)}))
    else:
        out.print(
            f"{folder}: {done.videos:,} of {len(set(paths)):,} videos prepared, {len(done.broken)} of them broken; "
            f"{by_level(done.bytes, done.originals)}, {sum(done.bytes) / max(1, done.originals):.2f}x the originals; "
            f"{duration(done.seconds)}",
        )


@data_app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A folder made by `mgtrain data prepare`.")], json_: Json = False
) -> None:
    """Read every byte of a prepared set and compare it with the manifest. Exits with 3 if anything is wrong.

    Example:  mgtrain data verify /scratch/k400
    """
    from mgtrain.console import progress
    from mgtrain.errors import DataError
    from mgtrain.preflight.prepare import verify as look

    with progress() as show:
        wrong = look(folder, usable_cores(), show)
    if json_:
        out.print_json(json.dumps({"schema": "mgtrain.verify/1", "folder": str(folder), "wrong": wrong}))
    for file, problem in [] if json_ else wrong.items():
        out.print(f"{file}: {problem}")
    if wrong:
        raise DataError(f"{folder}: {len(wrong)} files are not as they were written; delete them and prepare again")
    if not json_:
        out.print(f"{folder}: every file is as it was written")


def parse_levels(levels: str) -> tuple[int, ...]:
    try:
        sides = sorted({int(level) for level in levels.split(",")}, reverse=True)
    except ValueError:
        sides = []
    if not sides or not 16 <= sides[-1] <= sides[0] <= 10_000:
        raise UsageError(f"--levels {levels}: write short sides of 16 to 10000 pixels, such as 256,160")
    return tuple(sides)
