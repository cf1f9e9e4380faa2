"""The commands that use a trained network: eval, predict, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mgtrain.cli.options import (
    CheckpointArgument,
    DeviceOption,
    Json,
    Overrides,
    Procs,
    check_finite,
    checkpoint_path,
    start_ranks,
)
from mgtrain.console import out, start_logging
from mgtrain.errors import UsageError

FEW_VIDEOS = 16  # are decoded sooner than loader processes start


ViewsOption = Annotated[str, typer.Option(help="Clips in time x crops, such as 1x1 or 10x3.")]


RecipeOption = Annotated[
    str | None, typer.Option(help="For weights from elsewhere: the recipe that says how clips are cut.")
]


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
    if start_ranks(procs, device):
        return

    from mgtrain.engine.evaluate import evaluate as evaluate_videos
    from mgtrain.engine.fit import open_data
    from mgtrain.engine.recalibrate import recalibrate
    from mgtrain.engine.trained import evaluation_videos, load_trained
    from mgtrain.processes.distributed import connect
    from mgtrain.runs.journal import Journal

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

    from mgtrain.engine.predict import predict_videos
    from mgtrain.engine.trained import load_trained
    from mgtrain.errors import DataError
    from mgtrain.processes.distributed import connect

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

    from mgtrain.engine.export import export as export_network
    from mgtrain.engine.trained import load_trained
    from mgtrain.processes.distributed import World

    trained = load_trained(path, recipe, changes or (), World())
    done = export_network(trained, file)
    if json_:
        out.print_json(json.dumps({"schema": "mgtrain.export/1", "checkpoint": str(path), **done.describe()}))
        return
    for parity in done.parity:
        out.print(f"clips {parity.shape}: logits agree to {parity.error:.1e} of the largest", markup=False)
    sizes = f"any number of {', '.join(done.free)}" if done.free else "clips of the evaluation's size only"
    out.print(f"wrote {done.path}, {done.path.stat().st_size / 1e6:.1f} MB, for {sizes}", markup=False, soft_wrap=True)


def _parse_views(views: str) -> tuple[int, int]:
    times, _, crops = views.partition("x")
    if not (times.isdecimal() and crops in ("1", "3") and int(times) > 0):
        raise UsageError(f"--views {views}: write clips in time x crops, with 1 or 3 crops, such as 1x1 or 10x3")
    return int(times), int(crops)
