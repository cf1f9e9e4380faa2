"""The command that shows the steps and costs of a recipe: plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.console import RenderableType
from typer import Option

from mgtrain.cli.options import Device, Json, Overrides, RecipeArgument, Videos, check_finite, connected
from mgtrain.console import note, out, progress
from mgtrain.data import count_training_videos
from mgtrain.recipe import load_recipe
from mgtrain.schedule import check_world
from mgtrain.schedule.drawing import plan_table, schedule_drawing
from mgtrain.schedule.totals import compare_totals, make_plans, render_totals


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
            help="Estimate multiply-adds and memory of each shape, which takes a few seconds. Default: not with --json."
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
    loaded = load_recipe(recipe, overrides or ())
    made, baseline = make_plans(loaded, videos or count_training_videos(loaded)).values()
    if gpus:
        check_world(made, gpus)
    totals = compare_totals(made, baseline)
    found = {"schema": "mgtrain.plan/1", **made.describe(), **totals}

    def show(*parts: RenderableType) -> None:
        if not json_:
            for part in parts:
                out.print(part)

    show(plan_table(made, gpus), schedule_drawing(made), render_totals(totals))
    if costs or memory or (costs is None and not json_):
        from mgtrain.preflight.costs import costs as estimate
        from mgtrain.preflight.costs import render as render_costs

        found["costs"] = estimate(loaded, made, baseline, gpus or 1, memory)
        show(render_costs(found["costs"], memory))
    if measure:
        from mgtrain.engine.start import open_data
        from mgtrain.preflight.forecast import forecast
        from mgtrain.preflight.forecast import render as render_forecast
        from mgtrain.processes.distributed import default_procs

        train, val = open_data(loaded)
        if (procs := default_procs(device)) > 1:
            note(f"measured for one process; `mgtrain fit` starts {procs} here, which share each step")
        with connected(device) as world, progress() as shown:
            found["forecast"] = forecast(loaded, train, val, world, measure, shown)
        show(render_forecast(found["forecast"]))
    if picture:
        from mgtrain.runs.report.figures import save_schedule

        save_schedule(made.describe()["phases"], picture)
    if json_:
        out.print_json(data=found)
