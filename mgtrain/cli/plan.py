"""The commands that tell what a recipe costs, and what this machine can: plan, bench, doctor."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import RenderableType
from typer import Argument, Option

from mgtrain.cli.data import LEVELS, QUALITY, parse_levels
from mgtrain.cli.options import Device, Json, Overrides, RecipeArgument, check_finite, connected
from mgtrain.console import note, out, progress, show
from mgtrain.data import count_training_videos
from mgtrain.recipe import load_recipe
from mgtrain.schedule import check_world, make_plan
from mgtrain.schedule.totals import compare_totals, make_plans, plan_table, render_total, schedule_drawing

bench_app = typer.Typer(name="bench", help="Measure how fast this machine loads and trains.", no_args_is_help=True)

Videos = Annotated[
    int | None, Option(min=1, max=10**9, help="Number of training videos. Default: as the data or recipe says.")
]


def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    videos: Videos = None,
    gpus: Annotated[int | None, Option(min=1, help="Check that this many GPUs can share every step.")] = None,
    measure: Annotated[
        float | None,
        Option(min=0.01, metavar="SECONDS", help="Time steps and loading on this machine, for so long per shape."),
    ] = None,
    costs: Annotated[
        bool | None,
        Option(
            help=(
                "Estimate multiply-adds and memory of each shape, which takes a few seconds. Default: not with --json."
            )
        ),
    ] = None,
    memory: Annotated[
        float | None, Option(min=0.01, metavar="GIB", help="Choose micro-batches that fit a GPU of this memory.")
    ] = None,
    picture: Annotated[Path | None, Option(help="Draw the schedule to this SVG, PNG or PDF file.")] = None,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Show the phases and costs of a recipe. Lists shapes, steps, learning rates, and totals relative to its baseline.

    Examples:  mgtrain plan k400_slowfast_8x8_r50_multigrid --gpus 8 --memory 40  |  mgtrain plan mine.yaml --measure 2
    """
    check_finite(measure=measure, memory=memory)
    loaded = load_recipe(recipe, overrides)
    made, baseline = make_plans(loaded, videos or count_training_videos(loaded)).values()
    if gpus:
        check_world(made, gpus)
    totals = compare_totals(made, baseline)
    found = {"schema": "mgtrain.plan/1", **made.describe(), **totals}

    def show(*parts: RenderableType) -> None:
        if not json_:
            for part in parts:
                out.print(part)

    lines = (render_total(name, value, totals["baseline"][name]) for name, value in totals["totals"].items())
    show(plan_table(made, gpus), schedule_drawing(made), *lines)
    if costs or memory or (costs is None and not json_):
        from mgtrain.preflight import costs as estimates

        found["costs"] = estimates.costs(loaded, made, baseline, gpus or 1, memory)
        show(estimates.render(found["costs"], memory))
    if measure:
        from mgtrain.engine.start import open_data
        from mgtrain.preflight import forecast
        from mgtrain.processes.distributed import default_procs

        train, val = open_data(loaded)
        if (procs := default_procs(device)) > 1:
            note(f"measured for one process; `mgtrain fit` starts {procs} here, which share each step")
        with connected(device) as world, progress() as shown:
            found["forecast"] = forecast.forecast(loaded, train, val, world, measure, shown)
        show(forecast.render(found["forecast"]))
    if picture:
        from mgtrain.runs.report.figures import save_schedule

        save_schedule(made.describe()["phases"], picture)
    if json_:
        out.print_json(data=found)


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
    videos: Videos = None,
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
