"""The command plan."""

from pathlib import Path
from typing import Annotated

from rich.console import RenderableType
from typer import Option

from mgtrain.cli.options import Device, Json, Overrides, RecipeArgument, VideoCount, check_finite, connected
from mgtrain.console import note, out, progress
from mgtrain.data import count_training_videos
from mgtrain.errors import UsageError
from mgtrain.recipe import load_recipe
from mgtrain.schedule import check_world
from mgtrain.schedule.totals import compare_totals, make_plans, plan_table, render_total, schedule_drawing

PICTURES = (".svg", ".png", ".pdf")


def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    videos: VideoCount = None,
    gpus: Annotated[int | None, Option(min=1, help="Check that this many GPUs can share every step.")] = None,
    measure: Annotated[
        float | None,
        Option(min=0.01, metavar="SECONDS", help="Measure steps and loading on this machine, each shape for so long."),
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
    if picture and picture.suffix.lower() not in PICTURES:
        raise UsageError(f"{picture}: the file's name must end in .svg, .png or .pdf")
    loaded = load_recipe(recipe, overrides)
    plans = make_plans(loaded, videos or count_training_videos(loaded))
    made, baseline = plans["plan"], plans["baseline"]
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

        gib = memory or loaded.hardware.memory_gib
        found["costs"] = estimates.costs(loaded, made, baseline, gpus or 1, gib)
        show(estimates.render(found["costs"], gib))
    if measure:
        from mgtrain.engine.start import open_data
        from mgtrain.preflight import forecast
        from mgtrain.processes.distributed import default_procs

        train, val = open_data(loaded)
        if (procs := default_procs(device)) > 1:
            note(f"measured for one process; `mgtrain fit` starts {procs} here, which share each step")
        with connected(device) as world, progress() as shown:
            found["forecast"] = forecast.forecast(loaded, plans, train, val, world, measure, shown)
        show(forecast.render(found["forecast"]))
    if picture:
        from mgtrain.runs.report.figures import save_schedule

        save_schedule(made, picture)
    if json_:
        out.print_json(data=found)
