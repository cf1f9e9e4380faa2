"""The command that shows what a recipe will do: plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mgtrain.cli.options import Device, Json, Overrides, RecipeArgument, Videos, check_finite, connected
from mgtrain.console import out, progress
from mgtrain.recipe import load_recipe


def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    videos: Videos = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Check that this many GPUs can share every step.")] = None,
    measure: Annotated[
        float | None,
        typer.Option(
            min=0.01, metavar="SECONDS", help="Time steps and loading here, loading this long for each shape."
        ),
    ] = None,
    costs: Annotated[
        bool, typer.Option(help="Estimate multiply-adds and memory of each shape, which takes a few seconds.")
    ] = True,
    memory: Annotated[
        float | None, typer.Option(min=0.01, metavar="GIB", help="Choose micro-batches that fit a GPU of this memory.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the schedule to this SVG, PNG or PDF file.")] = None,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Show the phases and costs of a recipe. Lists shapes, steps, learning rates, and totals relative to its baseline.

    Examples:  mgtrain plan k400_slowfast_8x8_r50_multigrid --gpus 8 --memory 40  |  mgtrain plan mine.yaml --measure 2
    """
    from mgtrain.data import count_training_videos
    from mgtrain.schedule import check_world
    from mgtrain.schedule.drawing import plan_table, schedule_drawing
    from mgtrain.schedule.totals import compare_totals, make_plans, render_totals

    check_finite(measure=measure, memory=memory)
    loaded = load_recipe(recipe, overrides or ())
    made, baseline = make_plans(loaded, videos or count_training_videos(loaded)).values()
    if gpus:
        check_world(made, gpus)
    spent, here, more = None, None, {}
    if costs or memory:
        from mgtrain.preflight.costs import costs as estimate
        from mgtrain.preflight.costs import render as render_costs

        spent = estimate(loaded, made, baseline, gpus or 1, memory)
        more = {"multiply_adds": (spent["multiply_adds"], spent["baseline_multiply_adds"])}
    totals = compare_totals(made, baseline, **more)
    if measure:
        from mgtrain.engine.fit import open_data
        from mgtrain.preflight.forecast import forecast
        from mgtrain.preflight.forecast import render as render_forecast

        train, _ = open_data(loaded)
        with connected(device) as world, progress() as show:
            here = forecast(loaded, train, world, measure, show)
    if picture:
        from mgtrain.runs.report.figures import save_schedule

        save_schedule(made.describe()["phases"], picture)
    if json_:
        result = {"schema": "mgtrain.plan/1", **made.describe(), **totals}
        out.print_json(data=result | ({"costs": spent} if spent else {}) | ({"forecast": here} if here else {}))
        return
    out.print(plan_table(made, gpus))
    out.print(schedule_drawing(made))
    if spent:
        out.print(render_costs(spent, memory))
    out.print(render_totals(totals))
    if here:
        out.print(render_forecast(here))
