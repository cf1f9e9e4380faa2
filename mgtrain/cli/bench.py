"""The commands that measure this machine: bench, doctor."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from mgtrain.cli.options import DeviceOption, Json, Overrides, RecipeArgument, check_finite
from mgtrain.cli.prepare import LEVELS, QUALITY, parse_levels
from mgtrain.console import out, start_logging
from mgtrain.recipe import load_recipe

bench_app = typer.Typer(name="bench", help="Measure this machine.", no_args_is_help=True)


@bench_app.command("data")
def bench_data(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="How long to measure each shape, twice.")] = 2.0,
    step_seconds: Annotated[
        float | None, typer.Option(min=0.001, help="How long a step takes. Default: it is measured here.")
    ] = None,
    levels: Annotated[str, typer.Option(help="Levels of the prepared set that is tried.")] = LEVELS,
    quality: Annotated[int, typer.Option(min=0, max=51, help="Its quality.")] = QUALITY,
    device: DeviceOption = None,
    json_: Json = False,
) -> None:
    """Measure how fast clips of every shape of the plan can be loaded, and whether training will wait for them.

    Example:  mgtrain bench data k400_slowfast_8x8_r50_multigrid data.root=/data/k400 --step-seconds 0.9
    """
    from mgtrain.console import progress
    from mgtrain.engine.fit import open_data
    from mgtrain.preflight.bench_data import bench_data as bench
    from mgtrain.preflight.bench_data import render
    from mgtrain.processes.distributed import connect

    check_finite("--seconds", seconds)
    check_finite("--step-seconds", step_seconds)
    loaded = load_recipe(recipe, overrides or ())
    videos, _ = open_data(loaded)
    with connect(device.value if device else None) as world, progress() as show:
        start_logging(None, world.main, world.rank)
        result = bench(
            loaded, videos, world, parse_levels(levels), quality,
            seconds=seconds, step_seconds=step_seconds, progress=show,
        )  # fmt: skip
    if json_:
        out.print_json(json.dumps({"schema": "mgtrain.bench_data/1", **result}))
    else:
        out.print(render(result))


@bench_app.command("step")
def bench_step(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    videos: Annotated[
        int | None, typer.Option(min=1, max=10**9, help="Training videos. Default: data.videos, or those of the data.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Steps of each shape that are timed.")] = 3,
    device: DeviceOption = None,
    json_: Json = False,
) -> None:
    """Time a training step at every shape of the plan, against its convolutions alone and the machine's best.

    Example:  mgtrain bench step k400_slowfast_8x8_r50_multigrid
    """
    from mgtrain.cli.plan import training_videos
    from mgtrain.console import progress
    from mgtrain.engine.checks import check_precision
    from mgtrain.preflight.bench_step import bench_step as bench
    from mgtrain.preflight.bench_step import render
    from mgtrain.processes.distributed import connect
    from mgtrain.schedule import make_plan

    loaded = load_recipe(recipe, overrides or ())
    plan = make_plan(loaded, videos or loaded.data.videos or training_videos(loaded))
    with connect(device.value if device else None) as world, progress() as show:
        start_logging(None, world.main, world.rank)
        check_precision(loaded, world.device)
        result = bench(loaded, plan, world, repeats, show)
    if json_:
        out.print_json(json.dumps({"schema": "mgtrain.bench_step/1", **result}))
    else:
        out.print(render(result))


def doctor(
    recipe: Annotated[str | None, typer.Argument(help="A recipe, to look at its data, too.")] = None,
    overrides: Overrides = None,
    device: DeviceOption = None,
    json_: Json = False,
) -> None:
    """Look whether this machine can train, and what would make it better. Exits with 69 if something needed is missing.

    Examples:  mgtrain doctor  |  mgtrain doctor mine.yaml data.root=/data/mine
    """
    from dataclasses import asdict

    from mgtrain.errors import MissingCapabilityError
    from mgtrain.preflight.doctor import examine
    from mgtrain.processes.distributed import connect

    loaded = load_recipe(recipe, overrides or ()) if recipe else None
    found = []
    with connect(device.value if device else None) as world:
        for finding in examine(world.device, loaded):
            found.append(finding)
            if not json_:
                mark = {"good": "ok ", "could be better": "-> ", "missing": "!! "}[finding.level]
                line = f"{mark} {finding.what:28} {finding.found}"
                out.print(line + (f"; {finding.advice}" if finding.advice else ""), markup=False, soft_wrap=True)
    if json_:
        out.print_json(json.dumps({"schema": "mgtrain.doctor/1", "findings": [asdict(finding) for finding in found]}))
    missing = [finding for finding in found if finding.level == "missing"]
    if missing:
        raise MissingCapabilityError("; ".join(f"{finding.what}: {finding.advice}" for finding in missing))
