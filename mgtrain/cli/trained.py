"""The commands that use trained networks: eval, predict, export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from mgtrain.cli.options import Device, Json, Overrides, Procs, check_finite, connected, start_ranks
from mgtrain.console import out, show, warn
from mgtrain.errors import CheckpointError, DataError, UsageError
from mgtrain.runs.folder import find_run

if TYPE_CHECKING:
    from mgtrain.engine.trained import Trained


FEW_VIDEOS = 16  # so few videos are decoded before loader processes have started
CheckpointArgument = Annotated[
    str, Argument(metavar="CHECKPOINT", help="A checkpoint file, or a run, which means its newest checkpoint.")
]
Changes = Annotated[
    list[str] | None, Option("--set", metavar="SECTION.KEY=VALUE", help="A change to the recipe; repeatable.")
]
Views = Annotated[str, Option(help="Clips in time x crops, such as 1x1 or 10x3.")]
RecipeOption = Annotated[str | None, Option(help="The recipe that says how to cut clips, for other projects' weights.")]
Trust = Annotated[
    list[str] | None, Option(metavar="MODULE", help="A Python module that the checkpoint's recipe may run; repeatable.")
]


def evaluate(
    checkpoint: CheckpointArgument,
    overrides: Overrides = None,
    views: Views = "10x3",
    recipe: RecipeOption = None,
    table: Annotated[
        Path | None,
        Option(
            "--csv", help="Write class probabilities of every video to this file. An interrupted evaluation resumes."
        ),
    ] = None,
    trust: Trust = None,
    procs: Procs = None,
    device: Device = None,
    per_class: Annotated[bool, Option("--per-class", help="Print the accuracy of every class.")] = False,
    json_: Json = False,
) -> None:
    """Evaluate a checkpoint on the validation videos; evaluation.views says how a video's views are combined.

    Examples:  mgtrain eval demo_multigrid --views 10x3  |  mgtrain eval runs/mine data.val=test.csv --csv scores.csv
    |  mgtrain eval k400.safetensors --recipe k400_slowfast_8x8_r50_baseline data.root=/data/k400
    """
    times, crops = parse_views(views)
    path = checkpoint_path(checkpoint)
    if table is not None and not table.parent.is_dir():
        raise UsageError(f"--csv {table}: no such folder {table.parent}; create it")
    if table is not None and table.is_dir():
        raise UsageError(f"--csv {table}: is a folder; name a file in it")
    if start_ranks(procs, device):
        return

    from mgtrain.engine.evaluate import evaluate as evaluate_videos
    from mgtrain.engine.recalibrate import recalibrate
    from mgtrain.engine.start import open_data
    from mgtrain.engine.trained import evaluation_videos, load_trained
    from mgtrain.runs.journal import Journal

    with connected(device) as world:
        path = Path(world.from_main(str(path)))  # a run that still trains may have a newer checkpoint on another rank
        trained = load_trained(path, recipe, overrides, world, trust)
        videos = evaluation_videos(trained)
        identity = f"{trained.identity} {views} {videos.identity}"
        if identity != world.from_main(identity):
            raise DataError(
                f"rank {world.rank} has another {path}, or other videos, than rank 0; all machines need the same files"
            )
        journal = None if table is None else Journal(table, identity, len(trained.classes))
        if not trained.recalibrated:
            count = trained.recipe.evaluation.recalibration_batches
            recalibrate(trained.model, open_data(trained.recipe)[0], count, trained.recipe, world)
        predictions = evaluate_videos(trained.model, videos, trained.recipe, world, (times, crops), journal)
        if world.main:
            if table is not None and journal is not None:
                predictions.write_csv(table, videos)
                journal.remove()
            if json_:
                facts = {"schema": "mgtrain.eval/2", "checkpoint": str(path), "step": trained.step, "views": views}
                facts |= {"weights": "ema" if trained.averaged else "model", **predictions.describe(videos.classes)}
                show(json_, facts)
            else:
                out.print(predictions.render(videos.classes, times * crops, per_class))
                if trained.averaged:
                    out.print("of the averaged weights (optim.ema)")
        world.barrier()


def predict(
    checkpoint: CheckpointArgument,
    videos: Annotated[
        list[Path],
        Argument(metavar="VIDEO...", help="Video files, folders of frames, or stretches such as long.mp4#t=60,90."),
    ],
    views: Views = "10x3",
    every: Annotated[
        float | None, Option(min=0.01, help="Seconds between the clips to predict in a long video, instead of views.")
    ] = None,
    top: Annotated[int, Option(min=1, help="Number of classes to print.")] = 5,
    recipe: RecipeOption = None,
    changes: Changes = None,
    trust: Trust = None,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Predict the classes of video files. Exits with 3 if one of them cannot be decoded.

    Examples:  mgtrain predict demo_multigrid clip.mp4 other.mp4  |  mgtrain predict runs/mine long.mp4 --every 2
    """
    check_finite(every=every)
    times, crops = parse_views(views)
    path = checkpoint_path(checkpoint)

    from mgtrain.engine.trained import load_trained, predict_videos

    with connected(device) as world:
        alone = ["hardware.workers=0"] if len(videos) < FEW_VIDEOS else []
        trained = load_trained(path, recipe, [*alone, *(changes or ()), "data.prepared=null"], world, trust)
        _caution(trained, path)
        found, failed = [], {}
        answers = predict_videos(trained, [str(video) for video in videos], world, (times, crops), every)
        try:
            for video, answer in answers:
                if isinstance(answer, str):
                    failed[video] = answer
                    continue
                found.append(answer.describe(trained.classes, top))
                if not json_:
                    out.print(answer.render(trained.classes, top))
        finally:  # Ctrl-C keeps the answers so far
            if found or failed:
                facts = {"schema": "mgtrain.predict/1", "checkpoint": str(path), "views": None if every else views}
                show(json_, {**facts, "videos": found, "failed": failed})
    if failed:
        raise DataError(f"{len(failed)} of {len(videos)} videos cannot be used; see the lines above")


def export(
    checkpoint: CheckpointArgument,
    to: Annotated[
        str, Option(metavar="FILE", help="The format onnx, pt2 or safetensors, or a file to write with such a suffix.")
    ],
    recipe: RecipeOption = None,
    changes: Changes = None,
    trust: Trust = None,
    json_: Json = False,
) -> None:
    """Export a trained network for other programs. Exits with 6 if the file's logits differ from the network's.

    The input is clips (B, 3, T, S, S), normalized as the file's metadata says; the output is logits (B, classes).

    Examples:  mgtrain export demo_multigrid --to motions.onnx  |  mgtrain export runs/mine --to pt2
    """
    path = checkpoint_path(checkpoint)
    name = path.absolute().parent.parent.name if path.parent.name == "checkpoints" else path.stem  # the run's name
    file = Path(to if "." in to else f"{name}.{to}")
    if file.exists() and file.samefile(path):
        raise UsageError(f"{file}: is the checkpoint itself; give another file with --to")

    from mgtrain.engine.trained import load_trained
    from mgtrain.engine.trained.export import export as export_network
    from mgtrain.processes.distributed import World

    trained = load_trained(path, recipe, changes, World(), trust)
    _caution(trained, path)
    done = export_network(trained, file)
    weights, of = ("ema", ", the averaged weights (optim.ema)") if trained.averaged else ("model", "")
    sizes = f"any number of {', '.join(done.free)}" if done.free else "clips of the evaluation size only"
    show(
        json_,
        {"schema": "mgtrain.export/1", "checkpoint": str(path), "weights": weights, **done.describe()},
        *(f"clips {parity.shape}: logits agree to {parity.error:.1e} of the largest" for parity in done.parity),
        f"wrote {done.path}{of}, {done.path.stat().st_size / 1e6:.1f} MB, for {sizes}",
    )


def parse_views(views: str) -> tuple[int, int]:
    """`10x3` as clips in time and crops."""
    times, _, crops = views.partition("x")
    if not (times.isdecimal() and crops in ("1", "3") and int(times) > 0):
        raise UsageError(f"--views {views}: write clips in time x crops, with 1 or 3 crops, such as 1x1 or 10x3")
    return int(times), int(crops)


def checkpoint_path(checkpoint: str) -> Path:
    """The file of a checkpoint argument."""
    if Path(checkpoint).is_file():
        return Path(checkpoint)
    run = find_run(checkpoint)

    from mgtrain.runs.checkpoint import newest_whole

    if newest := newest_whole(run.checkpoints()):
        return newest
    raise CheckpointError(f"{run.path}: no checkpoint yet; train it with `mgtrain fit`")


def _caution(trained: Trained, path: Path) -> None:
    """Warn of a checkpoint between evaluations, whose BatchNorm statistics may be those of coarse shapes."""
    from mgtrain.models.norm import group_slots

    if not trained.recalibrated and group_slots(trained.model):
        warn(
            f"{path}: was saved between two evaluations, so its BatchNorm statistics may be those of coarse shapes; "
            "resume the run until it evaluates, or name an evaluated checkpoint (see `mgtrain ckpt inspect`)"
        )
