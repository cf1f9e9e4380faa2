"""The commands about prepared sets: data prepare, data verify."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from mgtrain.cli.data import data_app
from mgtrain.cli.options import Json, Overrides, RecipeArgument, check_finite, opened_splits, parse_levels, parse_size
from mgtrain.console import duration, note, out, progress, show, size
from mgtrain.errors import DataError, UsageError
from mgtrain.processes.cores import usable_cores
from mgtrain.recipe import load_recipe

# Defaults of a prepared set: they suit the grids of Kinetics-400, with about 3 times the bytes.
LEVELS, QUALITY = "256,160", 25
LEAST_SHARD = 1_000_000  # bytes


@data_app.command()
def prepare(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    to: Annotated[Path | None, Option(help="Folder to write to. Default: data.root with -prepared added.")] = None,
    levels: Annotated[str, Option(help="Short sides to store, in pixels.")] = LEVELS,
    quality: Annotated[int, Option(min=0, max=51, help="H.264's rate factor; smaller is better.")] = QUALITY,
    fps: Annotated[
        float | None, Option(min=1, help="Drop frames of videos above this frame rate. Default: keep all.")
    ] = None,
    shards: Annotated[
        str | None,
        Option(
            metavar="SIZE",
            help="Write tar files of at most this size, such as 2GiB, instead of a file for each video and level.",
        ),
    ] = None,
    workers: Annotated[int | None, Option(min=1, help="Processes. Default: one for each core.")] = None,
    forecast: Annotated[
        bool, Option("--forecast", help="Prepare a few videos, estimate time and disk space for the others, and stop.")
    ] = False,
    json_: Json = False,
) -> None:
    """Re-encode the videos of a recipe for fast loading. Decoding a clip then costs only its own frames and pixels.

    The originals are not changed. Run the same command again to resume. Then train with data.prepared=FOLDER.

    Example:  mgtrain data prepare k400_slowfast_8x8_r50_multigrid data.root=/data/k400 --to /scratch/k400
    """
    check_finite(fps=fps)
    shard_bytes = parse_size("shards", shards) if shards else None
    if shard_bytes is not None and shard_bytes < LEAST_SHARD:
        raise UsageError(f"--shards {shards}: must be at least {size(LEAST_SHARD)}, such as 2GiB")
    data = load_recipe(recipe, overrides or ()).data
    folder = to or Path(f"{data.root.rstrip(os.sep)}-prepared")
    paths = [name for videos in opened_splits(data).values() for name in videos.names()]

    from mgtrain.clips.prepared import Settings
    from mgtrain.preflight.prepare import Forecast
    from mgtrain.preflight.prepare import prepare as make

    settings = Settings(parse_levels(levels), quality, fps, shard_bytes)
    count = workers or usable_cores()

    def by_level(sizes: tuple[int, ...], originals: int) -> str:
        """The size of all levels and of each, in bytes and relative to the originals."""
        parts = (
            f"{size(n)} or {n / max(1, originals):.2f}x at {level}"
            for level, n in zip(settings.levels, sizes, strict=True)
        )
        return f"{size(sum(sizes))} ({', '.join(parts)})"

    def show_forecast(expected: Forecast) -> bool:
        note(
            f"{expected.videos:,} videos: about {by_level(expected.bytes, expected.originals)}, the originals have "
            f"{size(expected.originals)}; {duration(expected.seconds)} from now on with {count} processes"
        )
        return not forecast

    with progress() as shown:
        done = make(
            Path(data.root), paths, folder, settings, count, fps=data.fps, forecast=show_forecast, progress=shown
        )
    for cause in done.broken.values():
        note(f"skipped: {cause}")
    show(
        json_,
        {"schema": "mgtrain.prepare/1", "folder": str(folder), **asdict(done)},
        f"{folder}: {done.videos:,} of {len(set(paths)):,} videos prepared, {len(done.broken)} of them broken; "
        f"{by_level(done.bytes, done.originals)}, {sum(done.bytes) / max(1, done.originals):.2f}x the originals; "
        f"{f'{done.shards:,} shards; ' if settings.shards else ''}{duration(done.seconds)}",
    )


@data_app.command()
def verify(
    folder: Annotated[Path, Argument(help="A folder written by `mgtrain data prepare`.")], json_: Json = False
) -> None:
    """Verify a prepared set against its manifest. Exits with 3 if a file is damaged.

    Example:  mgtrain data verify /scratch/k400
    """
    from mgtrain.preflight.prepare import verify as verify_set

    with progress() as shown:
        wrong = verify_set(folder, usable_cores(), shown)
    result = {"schema": "mgtrain.verify/1", "folder": str(folder), "wrong": wrong}
    show(json_, result, *(f"{file}: {problem}" for file, problem in wrong.items()))
    if wrong:
        raise DataError(f"{folder}: {len(wrong)} files are damaged; delete them and prepare the set again")
    if not json_:
        out.print(f"{folder}: every file is intact")
