"""`mgtrain plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mgtrain.cli.options import (
    Device,
    DeviceOption,
    Json,
    Overrides,
    RecipeArgument,
    check_finite,
)
from mgtrain.console import err, out, start_logging
from mgtrain.recipe import Recipe, load_recipe


def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    videos: Annotated[
        int | None, typer.Option(min=1, max=10**9, help="Training videos. Default: those of the data, or data.videos.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Check that so many GPUs can share every step.")] = None,
    measure: Annotated[
        float | None,
        typer.Option(min=0.01, metavar="SECONDS", help="Time steps and loading here, the latter for so long a shape."),
    ] = None,
    costs: Annotated[
        bool, typer.Option(help="Reckon each shape's multiply-adds and memory, which takes some seconds.")
    ] = True,
    memory: Annotated[
        float | None, typer.Option(min=0.01, metavar="GIB", help="Of a GPU: say what micro-batches fit into it.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the schedule: an SVG, PNG or PDF file to write.")] = None,
    device: DeviceOption = None,
    json_: Json = False,
) -> None:
    """Print the phases of a recipe: shapes, steps, learning rates, what they cost, and totals against the baseline's.

    Examples:  mgtrain plan k400_slowfast_8x8_r50_multigrid --gpus 8 --memory 40  |  mgtrain plan mine.yaml --measure 2
    """
    from dataclasses import asdict

    from mgtrain.schedule import baseline_recipe, check_world, make_plan

    loaded = load_recipe(recipe, overrides or ())
    count = videos or training_videos(loaded)
    made = make_plan(loaded, count)
    if gpus:
        check_world(made, gpus)
    baseline = make_plan(baseline_recipe(loaded), count)
    totals: dict[str, float] = asdict(made.totals())
    rival: dict[str, float] = asdict(baseline.totals())
    check_finite("--measure", measure)
    check_finite("--memory", memory)
    spent = None
    if costs or memory:
        from mgtrain.preflight.costs import cost_table
        from mgtrain.preflight.costs import costs as reckon

        spent = reckon(loaded, made, baseline, gpus or 1, memory)
        totals["multiply_adds"], rival["multiply_adds"] = spent["multiply_adds"], spent["baseline_multiply_adds"]
    ratios = {key: totals[key] / rival[key] for key in totals}
    here = _measured(loaded, device, measure) if measure else None
    if picture:
        from mgtrain.runs.report.figures import save_schedule

        save_schedule(made.describe()["phases"], picture)
    if json_:
        result = {"schema": "mgtrain.plan/1", **made.describe(), "totals": totals, "baseline": rival, "ratios": ratios}
        result |= ({"costs": spent} if spent else {}) | ({"forecast": here} if here else {})
        out.print_json(json.dumps(result))
    else:
        from mgtrain.schedule.drawing import plan_table, schedule_drawing

        out.print(plan_table(made, gpus))
        out.print(schedule_drawing(made), markup=False, soft_wrap=True)
        if spent:
            out.print(cost_table(spent))
            if memory:
                wanted = (
                    f"hardware.micro_clips={spent['micro_clips'] or 'null'} hardware.recompute={spent['recompute']}"
                )
                out.print(f"that is {wanted.lower()}, as `mgtrain fit` sets it with hardware.memory_gib={memory:g}")
        for key, value in totals.items():
            times = f"1/{1 / ratios[key]:.3f} of" if ratios[key] < 1 else f"{ratios[key]:.3f}x"
            digits = 1 if key == "epochs" else 0
            name, shown = key.replace("_", "-"), f"{value:,.{digits}f}" if value < 1e15 else f"{value:.4g}"
            of = f"{rival[key]:,.{digits}f}" if value < 1e15 else f"{rival[key]:.4g}"
            out.print(f"{name:13} {shown:>22}   {times} the baseline's {of}")
        if here:
            from mgtrain.preflight.forecast import render

            out.print(render(here), markup=False, soft_wrap=True)


def training_videos(recipe: Recipe) -> int:
    """How many training videos the data have; what the recipe expects where they are not on this machine."""
    from mgtrain.data import open_videos, usable
    from mgtrain.errors import DataError

    data = recipe.data
    try:
        videos = open_videos(data.format, data.root, data.train, None, data.outside_root)
    except DataError as error:
        if data.videos is None:
            raise DataError(f"{error}; give --videos to plan without the data") from None
        return data.videos
    (videos,) = usable(data, videos)
    if videos.left_out:
        err.print(f"training videos: {videos.left_out_words}, as {data.checked} says", soft_wrap=True)
    return len(videos)


def _measured(recipe: Recipe, device: Device | None, seconds: float) -> dict[str, Any]:
    """What the run will take here; the data have to be here, too."""
    from mgtrain.console import progress
    from mgtrain.engine.fit import open_data
    from mgtrain.preflight.forecast import forecast
    from mgtrain.processes.distributed import connect

    videos, _ = open_data(recipe)
    with connect(device.value if device else None) as world, progress() as show:
        start_logging(None, world.main, world.rank)
        return forecast(recipe, videos, world, seconds, show)
