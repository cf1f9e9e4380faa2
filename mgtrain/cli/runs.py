"""The commands about runs: plan, fit, eval, compare, and their recipes and checkpoints."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mgtrain.cli.options import (
    CheckpointArgument,
    Device,
    DeviceOption,
    Json,
    Overrides,
    Procs,
    RecipeArgument,
    check_finite,
    checkpoint_path,
)
from mgtrain.console import err, harmless, out, start_logging
from mgtrain.errors import CheckpointError, UsageError
from mgtrain.recipe import Recipe, find_recipe, load_recipe, shipped_recipes

recipes_app = typer.Typer(name="recipes", help="The recipes that come with mgtrain.", no_args_is_help=True)
ckpt_app = typer.Typer(name="ckpt", help="Look at checkpoints.", no_args_is_help=True)


FEW_VIDEOS = 16  # are decoded sooner than loader processes start

ViewsOption = Annotated[str, typer.Option(help="Clips in time x crops, such as 1x1 or 10x3.")]
RecipeOption = Annotated[
    str | None, typer.Option(help="For weights from elsewhere: the recipe that says how clips are cut.")
]


def fit(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="Name under runs/, or a folder. Default: the recipe's name.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run from its newest checkpoint, if it has one.")
    ] = False,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Resume although the recipe or the videos have changed since.")
    ] = False,
    baseline: Annotated[
        str | None, typer.Option(help="A run to measure the speedup against, by name or folder, as training goes.")
    ] = None,
    procs: Procs = None,
    device: DeviceOption = None,
    json_: Json = False,
) -> None:
    """Train a recipe.

    Examples:  mgtrain fit demo_multigrid  |  torchrun --nproc-per-node 8 -m mgtrain fit my.yaml data.root=/data/k400
    """
    from mgtrain.distributed import connect, is_restarted, rank_of_environment
    from mgtrain.rundir import RUNS, RunDir, find_run

    loaded = load_recipe(recipe, overrides or ())
    if name in (os.curdir, os.pardir):
        raise UsageError(f"--name {name}: give the run a name, or a folder such as ./{name}/my_run")
    folder = Path(name) if name and os.sep in name else RUNS / (name or find_recipe(recipe).stem)
    run = RunDir(folder, writes=rank_of_environment() == 0)
    resume = resume or is_restarted()
    if run.rows("steps.jsonl") and not resume:
        raise UsageError(f"{folder}: holds a run already; add --resume to continue it, or --name to start another")
    rival = find_run(baseline) if baseline else None
    if _started_ranks(procs, device):
        return

    from mgtrain.engine.fit import fit as train

    with run.locked(), connect(device.value if device else None, loaded.faults.timeout_seconds) as world:
        start_logging(folder / "log.txt", world.main, world.rank)
        scores = train(loaded, run, world, resume, rival, allow_changes)
        if world.main:
            _print_scores({"schema": "mgtrain.fit/1", "run": str(folder)}, scores, json_)


def evaluate(
    checkpoint: CheckpointArgument,
    overrides: Overrides = None,
    views: ViewsOption = "10x3",
    recipe: RecipeOption = None,
    table: Annotated[
        Path | None,
        typer.Option("--csv", help="Write every video's probabilities to this file. What was interrupted goes on."),
    ] = None,
    procs: Procs = None,
    device: DeviceOption = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="Print every class's accuracy.")] = False,
    json_: Json = False,
) -> None:
    """Give the accuracy of a checkpoint, averaged over views, each video counted once and decoded once.

    Examples:  mgtrain eval demo_multigrid --views 10x3  |  mgtrain eval runs/mine data.val=test.csv --csv scores.csv
    |  mgtrain eval k400.safetensors --recipe k400_slowfast_8x8_r50_baseline data.root=/data/k400
    """
    times, crops = _parse_views(views)
    path = checkpoint_path(checkpoint)
    if table is not None and not table.parent.is_dir():
        raise UsageError(f"--csv {table}: there is no folder {table.parent}; make it")
    if _started_ranks(procs, device):
        return

    from mgtrain.distributed import connect
    from mgtrain.engine.evaluate import evaluate as evaluate_videos
    from mgtrain.engine.fit import open_data
    from mgtrain.engine.recalibrate import recalibrate
    from mgtrain.engine.trained import evaluation_videos, load_trained
    from mgtrain.predictions import Journal

    with connect(device.value if device else None) as world:
        start_logging(None, world.main, world.rank)
        trained = load_trained(path, recipe, overrides or (), world)
        videos = evaluation_videos(trained)
        journal = None
        if table is not None:
            journal = Journal(table, f"{trained.identity} {views} {videos.identity}", len(trained.classes))
        if not trained.recalibrated:
            recalibrate(trained.model, open_data(trained.recipe)[0], trained.recipe, world)
        predictions = evaluate_videos(trained.model, videos, trained.recipe, world, (times, crops), journal)
        if world.main:
            if table is not None and journal is not None:
                predictions.write_csv(table, videos)
                journal.remove()
            if json_:
                facts = {"schema": "mgtrain.eval/2", "checkpoint": str(path), "step": trained.step, "views": views}
                out.print_json(json.dumps({**facts, **predictions.describe(videos.classes)}))
            else:
                out.print(predictions.render(videos.classes, times * crops, per_class), markup=False, soft_wrap=True)
        world.barrier()


def predict(
    checkpoint: CheckpointArgument,
    videos: Annotated[list[Path], typer.Argument(metavar="VIDEO...", help="Video files.")],
    views: ViewsOption = "10x3",
    every: Annotated[
        float | None,
        typer.Option(min=0.01, help="Instead of views: a clip every so many seconds, for long videos, each told."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Most probable classes to tell.")] = 5,
    recipe: RecipeOption = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="A change to the recipe.")
    ] = None,
    device: DeviceOption = None,
    json_: Json = False,
) -> None:
    """Say what is in videos, with the accuracy that `mgtrain eval` measures. Exits with 3 if one cannot be decoded.

    Examples:  mgtrain predict demo_multigrid clip.mp4 other.mp4  |  mgtrain predict runs/mine long.mp4 --every 2
    """
    check_finite("--every", every)
    times, crops = _parse_views(views)
    path = checkpoint_path(checkpoint)

    from mgtrain.distributed import connect
    from mgtrain.engine.predict import predict_videos
    from mgtrain.engine.trained import load_trained
    from mgtrain.errors import DataError

    with connect(device.value if device else None) as world:
        start_logging(None, world.main, world.rank)
        alone = ["hardware.workers=0"] if len(videos) < FEW_VIDEOS else []
        trained = load_trained(path, recipe, [*alone, *(changes or ()), "data.prepared=null"], world)
        answers, failed = predict_videos(trained, [str(video) for video in videos], world, (times, crops), every)
    if json_:
        found = [answer.describe(trained.classes, top) for answer in answers]
        facts = {"schema": "mgtrain.predict/1", "checkpoint": str(path), "views": None if every else views}
        out.print_json(json.dumps({**facts, "videos": found, "failed": failed}))
    else:
        for answer in answers:
            out.print(answer.render(trained.classes, top), markup=False, soft_wrap=True)
    if failed:
        raise DataError(f"{len(failed)} of {len(videos)} videos cannot be used: {'; '.join(failed.values())}")


def export(
    checkpoint: CheckpointArgument,
    to: Annotated[
        str, typer.Option(metavar="FILE", help="onnx, pt2 or safetensors, or a file whose name ends in one of these.")
    ],
    recipe: RecipeOption = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="A change to the recipe.")
    ] = None,
    json_: Json = False,
) -> None:
    """Write a trained network for other programs, and check that the file computes the same. Exits with 6 if not.

    Its input is clips (B, 3, T, S, S), normalized as its notes say; its output the logits (B, classes).

    Examples:  mgtrain export demo_multigrid --to motions.onnx  |  mgtrain export runs/mine --to pt2
    """
    path = checkpoint_path(checkpoint)
    file = Path(to if "." in to else f"{path.parent.parent.name or path.stem}.{to}")

    from mgtrain.distributed import World
    from mgtrain.engine.trained import load_trained
    from mgtrain.export import export as export_network

    trained = load_trained(path, recipe, changes or (), World())
    done = export_network(trained, file)
    if json_:
        out.print_json(json.dumps({"schema": "mgtrain.export/1", "checkpoint": str(path), **done.describe()}))
        return
    for parity in done.parity:
        out.print(f"clips {parity.shape}: logits agree to {parity.error:.1e} of the largest", markup=False)
    sizes = f"any number of {', '.join(done.free)}" if done.free else "clips of the evaluation's size only"
    out.print(f"wrote {done.path}, {done.path.stat().st_size / 1e6:.1f} MB, for {sizes}", markup=False, soft_wrap=True)


def compare(
    baseline: Annotated[
        str, typer.Argument(metavar="BASELINE", help="The run to compare with: a folder, or a name under runs/.")
    ],
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="The run that should be better; or several, seeds of recipes.")
    ],
    html: Annotated[Path | None, typer.Option(help="Write the report as well (see `mgtrain report`).")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write a line for each run.")] = None,
    fail_under: Annotated[
        str | None,
        typer.Option(
            metavar="KEY=LEAST,...", help="Exit with 6 if less was gained: speedup=3,steps=3,accuracy=-0.5 (points)."
        ),
    ] = None,
    json_: Json = False,
) -> None:
    """Say what a run gained over its baseline, and at what cost; of more runs, by recipe, means over their seeds.

    Examples:  mgtrain compare demo_baseline demo_multigrid --fail-under speedup=2.5,accuracy=-2
    |  mgtrain compare b_0 b_1 b_2 m_0 m_1 m_2
    """
    from mgtrain.compare import compare as compare_runs
    from mgtrain.compare import compare_groups, demand, render, render_groups, write_csv
    from mgtrain.rundir import find_run

    wanted = _parse_thresholds(fail_under)
    found = [find_run(name) for name in (baseline, *runs)]
    if len(found) == 2:
        result, shown = compare_runs(*found), render
    elif wanted:
        raise UsageError("--fail-under: is for a baseline and one run")
    else:
        result, shown = compare_groups(found), render_groups
    out.print_json(json.dumps(result)) if json_ else out.print(shown(result))
    if csv:
        write_csv(found, csv)
    if html:
        from mgtrain.report import write_report

        write_report(found, html)
    if wanted:
        demand(result, wanted)


def report(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Runs: folders, or names under runs/; the baseline first.")
    ],
    to: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
    frames: Annotated[bool, typer.Option(help="With pictures of the clips, if the data are there.")] = True,
) -> None:
    """Write one HTML file that shows what runs cost and what came out, to read, print and pass on.

    Example:  mgtrain report demo_baseline demo_multigrid --to demo.html
    """
    from mgtrain.report import write_report
    from mgtrain.rundir import find_run

    write_report([find_run(run) for run in runs], to, frames)
    err.print(f"wrote {to}", markup=False, soft_wrap=True)


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
        from mgtrain.costs import cost_table
        from mgtrain.costs import costs as reckon

        spent = reckon(loaded, made, baseline, gpus or 1, memory)
        totals["multiply_adds"], rival["multiply_adds"] = spent["multiply_adds"], spent["baseline_multiply_adds"]
    ratios = {key: totals[key] / rival[key] for key in totals}
    here = _measured(loaded, device, measure) if measure else None
    if picture:
        from mgtrain.report.figures import save_schedule

        save_schedule(made.describe()["phases"], picture)
    if json_:
        result = {"schema": "mgtrain.plan/1", **made.describe(), "totals": totals, "baseline": rival, "ratios": ratios}
        result |= ({"costs": spent} if spent else {}) | ({"forecast": here} if here else {})
        out.print_json(json.dumps(result))
    else:
        from mgtrain.console import plan_table, schedule_drawing

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
            from mgtrain.forecast import render

            out.print(render(here), markup=False, soft_wrap=True)


@recipes_app.command("list")
def list_recipes(json_: Json = False) -> None:
    """List the shipped recipes with what they are for."""
    first_lines = {name: file.read_text().splitlines()[0].lstrip("# ") for name, file in shipped_recipes().items()}
    if json_:
        out.print_json(json.dumps({"schema": "mgtrain.recipes/1", "recipes": first_lines}))
    else:
        for name, line in first_lines.items():
            out.print(f"{name:36} {line}")


@recipes_app.command("show")
def show_recipe(name: str) -> None:
    """Print a shipped recipe, to be the start of your own.

    Example:  mgtrain recipes show k400_slowfast_8x8_r50_multigrid > my.yaml
    """
    sys.stdout.write(harmless(find_recipe(name).read_text(encoding="utf-8")))


@recipes_app.command("keys")
def recipe_keys() -> None:
    """Print every key of a recipe with its type, range, default and meaning, as Markdown.

    Example:  mgtrain recipes keys | less
    """
    from mgtrain.reference import reference

    sys.stdout.write(reference())


@ckpt_app.command("inspect")
def inspect_checkpoint(checkpoint: CheckpointArgument, json_: Json = False) -> None:
    """Say what a checkpoint holds and belongs to.

    Example:  mgtrain ckpt inspect demo_multigrid
    """
    from math import prod

    from mgtrain.checkpoint import read_info, tensor_shapes
    from mgtrain.recipe import parse_recipe

    path = checkpoint_path(checkpoint)
    info, shapes = read_info(path), tensor_shapes(path)
    recipe = parse_recipe(info.recipe, str(path))
    numbers = {
        part: sum(prod(shape) for name, shape in shapes.items() if name.startswith(part))
        for part in ("model", "optimizer", "groups")
    }
    facts = {
        "checkpoint": str(path),
        "bytes": path.stat().st_size,
        "step": info.step,
        "evaluated": info.evaluated,
        "recalibrated": info.recalibrated,
        "training_seconds": info.train_seconds,
        "model": recipe.model.name,
        "classes": len(info.classes),
        "tensors": len(shapes),
        "numbers": numbers,
        "training_videos": info.data,
        "validation_videos": info.val_data,
        "steps_left_out": info.left_out,
    }
    if json_:
        out.print_json(json.dumps({"schema": "mgtrain.ckpt_inspect/1", **facts, "recipe": info.recipe}))
        return
    for key, value in facts.items():
        shown = ", ".join(f"{part} {n:,}" for part, n in value.items()) if isinstance(value, dict) else value
        out.print(f"{key.replace('_', ' '):18} {shown}")


@ckpt_app.command("verify")
def verify_checkpoints(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A checkpoint file, or a run: all of its checkpoints.")],
    json_: Json = False,
) -> None:
    """Read checkpoints whole and compare them with their checksums; exits with 4 if one is damaged.

    Example:  mgtrain ckpt verify demo_multigrid
    """
    from mgtrain.checkpoint import verify as verify_file
    from mgtrain.rundir import find_run

    files = [Path(path)] if Path(path).is_file() else find_run(path).checkpoints()
    if not files:
        raise CheckpointError(f"{path}: no checkpoint yet; train it with `mgtrain fit`")
    damaged: dict[str, str] = {}
    for file in files:
        try:
            verify_file(file)
        except CheckpointError as error:
            damaged[str(file)] = str(error)
    if json_:
        result = {"schema": "mgtrain.ckpt_verify/1", "checkpoints": [str(file) for file in files], "damaged": damaged}
        out.print_json(json.dumps(result))
    else:
        for file in files:
            out.print(damaged.get(str(file), f"{file}: whole"))
    if damaged:
        raise CheckpointError(f"{len(damaged)} of {len(files)} checkpoints are damaged; --resume passes them over")


def _started_ranks(procs: int | None, device: Device | None) -> bool:
    """Start this command once per rank, unless this process is one of them or the only one."""
    from mgtrain.distributed import default_procs, is_launched, launch

    if is_launched():
        return False
    wanted = procs or default_procs(device.value if device else None)
    if wanted == 1:
        return False
    code = launch([sys.executable, "-m", "mgtrain", *sys.argv[1:]], wanted)
    if code:
        sys.exit(code)
    return True


def training_videos(recipe: Recipe) -> int:
    """How many training videos the data have; what the recipe expects where they are not on this machine."""
    from mgtrain.datasets import open_videos, usable
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


def _parse_views(views: str) -> tuple[int, int]:
    times, _, crops = views.partition("x")
    if not (times.isdecimal() and crops in ("1", "3") and int(times) > 0):
        raise UsageError(f"--views {views}: write clips in time x crops, with 1 or 3 crops, such as 1x1 or 10x3")
    return int(times), int(crops)


def _measured(recipe: Recipe, device: Device | None, seconds: float) -> dict[str, Any]:
    """What the run will take here; the data have to be here, too."""
    from mgtrain.console import progress
    from mgtrain.distributed import connect
    from mgtrain.engine.fit import open_data
    from mgtrain.forecast import forecast

    videos, _ = open_data(recipe)
    with connect(device.value if device else None) as world, progress() as show:
        start_logging(None, world.main, world.rank)
        return forecast(recipe, videos, world, seconds, show)


def watch(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run that is under way or finished.")],
    baseline: Annotated[str | None, typer.Option(metavar="RUN", help="A finished run to compare with.")] = None,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between looks.")] = 5.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, as when the output is no terminal.")] = False,
    json_: Json = False,
) -> None:
    """Show what a run is doing, from another terminal: phase, pace, accuracy, what is left. Ends with the run.

    Example:  mgtrain watch demo_multigrid --baseline demo_baseline
    """
    import time
    from dataclasses import asdict

    from rich.live import Live

    from mgtrain.rundir import find_run
    from mgtrain.watch import look, render

    check_finite("--every", every)
    watched, rival = find_run(run), find_run(baseline) if baseline else None
    view = look(watched, rival)
    if json_:
        out.print_json(json.dumps({"schema": "mgtrain.watch/1", **asdict(view), "finished": view.finished}))
    elif once or not out.is_terminal:
        out.print(render(view))
    else:
        with Live(render(view), console=out, auto_refresh=False) as live:
            while not view.finished:
                time.sleep(every)
                view = look(watched, rival)
                live.update(render(view), refresh=True)


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

    from mgtrain.distributed import connect
    from mgtrain.doctor import examine
    from mgtrain.errors import MissingCapabilityError

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


def _parse_thresholds(text: str | None) -> dict[str, float]:
    """`speedup=3,top1=-0.5` as numbers by name."""
    wanted = {}
    for part in text.split(",") if text else ():
        key, _, value = part.partition("=")
        try:
            wanted[key.strip()] = float(value)
        except ValueError:
            raise UsageError(f"--fail-under {part}: write KEY=NUMBER, such as speedup=3") from None
        check_finite("--fail-under", wanted[key.strip()])
    return wanted


def _print_scores(facts: dict[str, Any], scores: Any, as_json: bool) -> None:
    if as_json:
        keys = ("mean_ap", "top1", "top5", "loss", "videos")
        row = {key: value for key, value in scores.row().items() if key in keys}
        out.print_json(json.dumps({**facts, **row}))
    else:
        out.print(scores.line(1))
