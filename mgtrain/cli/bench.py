"""The commands that measure and check this machine: bench, doctor."""

from dataclasses import asdict
from typing import Annotated

import typer
from typer import Argument, Option

from mgtrain.cli.data import LEVELS, QUALITY, parse_levels
from mgtrain.cli.options import Device, Json, Overrides, RecipeArgument, VideoCount, check_finite, connected
from mgtrain.console import out, progress, show
from mgtrain.data import count_training_videos
from mgtrain.recipe import load_recipe
from mgtrain.schedule import make_plan

bench_app = typer.Typer(name="bench", help="Measure how fast this machine loads and trains.", no_args_is_help=True)


@bench_app.command("data")
def bench_data(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    seconds: Annotated[float, Option(min=0.01, help="Time to measure each shape, twice.")] = 2.0,
    step_seconds: Annotated[float | None, Option(min=0.001, help="Time of a training step. Default: measured.")] = None,
    levels: Annotated[str, Option(help="Short sides of the prepared set to try.")] = LEVELS,
    quality: Annotated[int, Option(min=0, max=51, help="Quality of the prepared set to try.")] = QUALITY,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Measure how fast clips of every shape load, and whether training will wait for data.

    Example:  mgtrain bench data k400_slowfast_8x8_r50_multigrid data.root=/data/k400 --step-seconds 0.9
    """
    check_finite(seconds=seconds, step_seconds=step_seconds)
    loaded = load_recipe(recipe, overrides)

    from mgtrain.clips.prepared import Settings
    from mgtrain.engine.start import open_data
    from mgtrain.preflight.bench_data import bench_data as bench
    from mgtrain.preflight.bench_data import render

    videos, _ = open_data(loaded)
    settings = Settings(parse_levels(levels), quality, None)
    with connected(device) as world, progress() as shown:
        result = bench(loaded, videos, world, settings, seconds=seconds, step_seconds=step_seconds, progress=shown)
    show(json_, {"schema": "mgtrain.bench_data/1", **result}, render(result))


@bench_app.command("step")
def bench_step(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    videos: VideoCount = None,
    repeats: Annotated[int, Option(min=1, help="Steps of each shape to time.")] = 3,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Time a training step at every shape of the plan, and compare it with its convolutions and a matrix product.

    Example:  mgtrain bench step k400_slowfast_8x8_r50_multigrid
    """
    loaded = load_recipe(recipe, overrides)
    plan = make_plan(loaded, videos or loaded.data.videos or count_training_videos(loaded))

    from mgtrain.engine.checks import check_precision
    from mgtrain.preflight import bench_step as bench

    with connected(device) as world, progress() as shown:
        check_precision(loaded, world.device)
        result = bench.bench_step(loaded, plan, world, repeats, shown)
    show(json_, {"schema": "mgtrain.bench_step/1", **result}, bench.render(result))


def doctor(
    recipe: Annotated[str | None, Argument(help="A recipe, to check its data too.")] = None,
    overrides: Overrides = None,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Check whether this machine can train, and what would improve it. Exits with 69 if something needed is missing.

    Examples:  mgtrain doctor  |  mgtrain doctor mine.yaml data.root=/data/mine
    """
    loaded = load_recipe(recipe, overrides) if recipe else None

    from mgtrain.preflight.doctor import examine, refuse_missing
    from mgtrain.processes.distributed import connect

    found = []
    with connect(device) as world:
        for finding in examine(world.device, loaded):
            found.append(finding)
            if not json_:
                out.print(str(finding))
    show(json_, {"schema": "mgtrain.doctor/1", "findings": [asdict(finding) for finding in found]})
    refuse_missing(found)
