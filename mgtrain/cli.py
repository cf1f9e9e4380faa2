"""The command line. torch is imported inside the commands that need it, so that the others answer at once."""

from __future__ import annotations

import io
import json
import math
import os
import sys
import traceback
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from mgtrain import __version__
from mgtrain.console import err, harmless, out, start_logging
from mgtrain.errors import CheckpointError, MgtrainError, UsageError
from mgtrain.recipe import Recipe, find_recipe, load_recipe, shipped_recipes

app = typer.Typer(
    name="mgtrain",
    help="Train video classifiers several times faster with the multigrid method (Wu et al., CVPR 2020).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(help="The recipes that come with mgtrain.", no_args_is_help=True)
data_app = typer.Typer(help="Make and look at data sets.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")
app.add_typer(data_app, name="data")
bench_app = typer.Typer(help="Measure this machine.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
ckpt_app = typer.Typer(help="Look at checkpoints.", no_args_is_help=True)
app.add_typer(ckpt_app, name="ckpt")
weights_app = typer.Typer(help="Weights from elsewhere.", no_args_is_help=True)
app.add_typer(weights_app, name="weights")


INTERRUPTED = 130  # exit code
# Of a prepared set: what K400's grids read (short sides of 128 to 320 pixels), at about 3 times the bytes.
LEVELS, QUALITY = "256,160", 25

MOST_NAMED = 20  # videos that a command names one by one


class Device(str, Enum):
    """Where to compute."""

    cpu = "cpu"
    cuda = "cuda"


class Split(str, Enum):
    """A part of a data set."""

    train = "train"
    val = "val"


RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped recipe.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Changes to the recipe, such as optim.lr=0.05."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
DeviceOption = Annotated[Device | None, typer.Option(help="Where to compute. Default: a GPU if there is one.")]
Procs = Annotated[
    int | None, typer.Option(min=1, help="Processes to start on this machine. Default: one for each visible GPU.")
]

ToFolder = Annotated[Path, typer.Option("--to", help="Folder to write the lists to.")]
CheckpointArgument = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint file, or a run (its newest checkpoint).")
]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Another seed draws other videos.")]


@app.command()
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
            _print_scores({"schema": "mgtrain.fit/1", "run": str(folder)}, scores, 1, json_)


@app.command(name="eval")
def evaluate(
    checkpoint: CheckpointArgument,
    overrides: Overrides = None,
    views: Annotated[str, typer.Option(help="Clips in time x crops, such as 1x1 or 10x3.")] = "10x3",
    procs: Procs = None,
    device: DeviceOption = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="Print every class's accuracy.")] = False,
    json_: Json = False,
) -> None:
    """Give the accuracy of a checkpoint, averaged over views, each video counted once.

    Examples:  mgtrain eval demo_multigrid --views 10x3  |  mgtrain eval model.safetensors data.val=test.csv
    """
    times, crops = _parse_views(views)
    path = _checkpoint_path(checkpoint)
    if _started_ranks(procs, device):
        return

    from mgtrain.checkpoint import load_model, read_info
    from mgtrain.distributed import connect
    from mgtrain.engine.checks import make_model
    from mgtrain.engine.fit import open_data, recalibrate_and_evaluate
    from mgtrain.engine.step import to_device
    from mgtrain.recipe import parse_recipe
    from mgtrain.weights.load import freeze

    info = read_info(path)
    recipe = parse_recipe(info.recipe, str(path), overrides or ())
    with connect(device.value if device else None) as world:
        start_logging(None, world.main, world.rank)
        train, val = open_data(recipe)
        model = to_device(make_model(recipe), recipe, world)
        load_model(path, model)
        freeze(model, recipe.init)
        scores = recalibrate_and_evaluate(model, train, val, recipe, world, (times, crops), info.recalibrated)
        if world.main:
            facts = {"schema": "mgtrain.eval/1", "checkpoint": str(path), "step": info.step, "views": views}
            _print_scores(facts, scores, times * crops, json_, info.classes if per_class or json_ else ())


@app.command()
def compare(
    baseline: Annotated[
        str, typer.Argument(metavar="BASELINE", help="The run to compare with: a folder, or a name under runs/.")
    ],
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run that should be better.")],
    json_: Json = False,
) -> None:
    """Say what a run gained over its baseline, and at what cost.

    Example:  mgtrain compare demo_baseline demo_multigrid
    """
    from mgtrain.compare import compare as compare_runs
    from mgtrain.compare import render
    from mgtrain.rundir import find_run

    result = compare_runs(find_run(baseline), find_run(run))
    out.print_json(json.dumps(result)) if json_ else out.print(render(result))


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    videos: Annotated[
        int | None, typer.Option(min=1, max=10**9, help="Training videos. Default: those of the data, or data.videos.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Check that so many GPUs can share every step.")] = None,
    json_: Json = False,
) -> None:
    """Print the phases of a recipe: shapes, steps, learning rates, and totals against the baseline's.

    Example:  mgtrain plan k400_slowfast_8x8_r50_multigrid --gpus 8
    """
    from dataclasses import asdict

    from mgtrain.schedule import baseline_recipe, check_world, make_plan

    loaded = load_recipe(recipe, overrides or ())
    count = videos or _training_videos(loaded)
    made = make_plan(loaded, count)
    if gpus:
        check_world(made, gpus)
    totals, rival = asdict(made.totals()), asdict(make_plan(baseline_recipe(loaded), count).totals())
    ratios = {key: totals[key] / rival[key] for key in totals}
    if json_:
        result = {"schema": "mgtrain.plan/1", **made.describe(), "totals": totals, "baseline": rival, "ratios": ratios}
        out.print_json(json.dumps(result))
    else:
        from mgtrain.console import plan_table

        out.print(plan_table(made, gpus))
        for key, value in totals.items():
            times = f"1/{1 / ratios[key]:.3f} of" if ratios[key] < 1 else f"{ratios[key]:.3f}x"
            digits = 1 if key == "epochs" else 0
            out.print(f"{key:7} {value:>22,.{digits}f}   {times} the baseline's {rival[key]:,.{digits}f}")


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


@ckpt_app.command("inspect")
def inspect_checkpoint(checkpoint: CheckpointArgument, json_: Json = False) -> None:
    """Say what a checkpoint holds and belongs to.

    Example:  mgtrain ckpt inspect demo_multigrid
    """
    from math import prod

    from mgtrain.checkpoint import read_info, tensor_shapes
    from mgtrain.recipe import parse_recipe

    path = _checkpoint_path(checkpoint)
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


@data_app.command()
def synthesize(
    root: Annotated[Path, typer.Argument(help="Folder to make.")],
    train: Annotated[int, typer.Option(min=1, help="Training videos of each class.")] = 60,
    val: Annotated[int, typer.Option(min=1, help="Validation videos of each class.")] = 20,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
) -> None:
    """Make a small set of real encoded videos whose classes differ only by motion.

    Example:  mgtrain data synthesize data/motions
    """
    from mgtrain.datasets.synthetic import synthesize as make

    make(root, videos_per_class={"train": train, "val": val}, seed=seed)
    out.print(f"{root}: ready")


@data_app.command()
def index(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    *,
    to: ToFolder,
    contents: Annotated[
        bool, typer.Option("--hash/--no-hash", help="Find duplicates and leakage by content, which reads files.")
    ] = True,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 3 if there is any warning.")] = False,
    json_: Json = False,
) -> None:
    """Make one list for each split out of any annotations, and say what is missing, doubled or leaked.

    Read the lists with data.format=list data.train=FOLDER/train.csv data.val=FOLDER/val.csv (full paths), data.root as
    it was.

    Example:  mgtrain data index k400_slowfast_8x8_r50_multigrid --to lists/k400 data.root=/data/k400
    """
    from mgtrain.console import counts_table, progress
    from mgtrain.datasets import open_splits
    from mgtrain.datasets.index import make_index
    from mgtrain.datasets.listfile import write_lists
    from mgtrain.errors import DataError

    splits = open_splits(load_recipe(recipe, overrides or ()).data)
    with progress() as show:
        made = make_index(splits, contents=contents, progress=show)
    unusable = [name for name, rows in made.usable.items() if not len(rows)]
    warnings = [str(finding) for finding in made.findings if finding.warns]
    for warning in warnings:
        err.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    if unusable:
        raise DataError(f"{splits[unusable[0]].root}: the {unusable[0]} split has no video that can be used; see above")
    files = write_lists(to, {name: (videos, made.usable[name]) for name, videos in splits.items()})
    if json_:
        result = {
            "schema": "mgtrain.data_index/1",
            "root": splits["train"].root,
            "files": [str(file) for file in files],
        }
        out.print_json(json.dumps({**result, **made.describe()}))
    else:
        out.print(counts_table("split", made.counts()))
        for finding in made.findings:
            if not finding.warns:
                out.print(str(finding))
        out.print(f"wrote {', '.join(map(str, files))}")
    if strict and warnings:
        raise DataError(f"warnings: {len(warnings)}, and --strict allows none; mend what they name")


@data_app.command()
def split(
    source: Annotated[
        str, typer.Argument(metavar="RECIPE|FOLDER", help="A recipe, or a folder with one folder per class.")
    ],
    overrides: Overrides = None,
    *,
    to: ToFolder,
    val: Annotated[float | None, typer.Option(help="Share of the videos for validation, such as 0.2.")] = None,
    folds: Annotated[
        int | None, typer.Option(min=2, max=1000, help="Make so many folds instead, each validating once.")
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="Split training and validation videos taken together.")] = False,
    groups: Annotated[
        Path | None, typer.Option(help="CSV with a column `path`: videos of one group stay together.")
    ] = None,
    by: Annotated[str, typer.Option(help="The column of the CSV that names the group.")] = "group",
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Split labelled videos into training and validation lists, every class alike.

    Examples:  mgtrain data split videos --to lists --val 0.2
    |  mgtrain data split my.yaml --all --to folds --folds 5 --groups groups.csv --by sequence
    """
    from mgtrain.console import counts_table
    from mgtrain.datasets import open_splits, open_videos
    from mgtrain.datasets.listfile import write_lists
    from mgtrain.datasets.split import count_classes, joined, make_split, read_groups

    if (val is None) == (folds is None):
        raise UsageError("give --val SHARE or --folds NUMBER, one of them")
    if val is not None and not 0 < val < 1:
        raise UsageError(f"--val {val:g}: has to be above 0 and below 1, such as 0.2")
    if Path(source).is_dir():
        if overrides or all_:
            raise UsageError(f"{source}: a folder takes neither overrides nor --all; it is split as a whole")
        videos = joined([open_videos("folder", source, ".")])
    else:
        splits = open_splits(load_recipe(source, overrides or ()).data)
        videos = joined(splits.values() if all_ else [splits["train"]])
    grouping = read_groups(groups, by, videos) if groups else None
    lists = make_split(videos, val=val, folds=folds, seed=seed, groups=grouping)
    files = write_lists(to, {name: (videos, rows) for name, rows in lists.items()})
    counts = {name: count_classes(videos, rows) for name, rows in lists.items()}
    table = {name: {key: int(of[label]) for key, of in counts.items()} for label, name in enumerate(videos.classes)}
    total = {name: len(rows) for name, rows in lists.items()}
    if json_:
        result = {"schema": "mgtrain.data_split/1", "root": videos.root, "files": [str(file) for file in files]}
        out.print_json(json.dumps({**result, "videos": total, "videos_per_class": table}))
    else:
        out.print(counts_table("class", {**table, "in all": total}))
        out.print(f"wrote {', '.join(map(str, files))}; their data.root is {videos.root}")


@data_app.command()
def stats(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    split: Annotated[Split, typer.Option(help="Which videos.")] = Split.train,
    sample: Annotated[int, typer.Option(min=1, help="Videos to look at.")] = 500,
    seed: Seed = 0,
    picture: Annotated[Path | None, typer.Option(help="Draw it, too: a PNG file to write.")] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes. Default: one for each core, up to 16.")] = None,
    json_: Json = False,
) -> None:
    """Say what the videos are like: lengths, sizes, rates, classes, and what that means for the recipe.

    Example:  mgtrain data stats demo_multigrid --picture stats.png
    """
    if picture and picture.suffix.lower() != ".png":
        raise UsageError(f"--picture {picture}: has to end in .png")

    from mgtrain.console import progress
    from mgtrain.datasets import open_splits
    from mgtrain.stats import draw_picture, make_stats, render

    loaded = load_recipe(recipe, overrides or ())
    videos = open_splits(loaded.data)[split.value]
    count = workers if workers is not None else min(16, _cores())
    with progress() as show:
        made = make_stats(videos, loaded.clip, sample=sample, seed=seed, workers=count, progress=show)
    for cause in made.broken:
        err.print(f"warning: {cause}", style="yellow", soft_wrap=True)
    if json_:
        result = {"schema": "mgtrain.data_stats/1", "root": videos.root, "split": split.value, **made.describe()}
        out.print_json(json.dumps(result))
    else:
        out.print(render(made))
    if picture:
        draw_picture(made, picture)


@data_app.command()
def check(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    to: Annotated[
        Path | None, typer.Option(help="Manifest to write. Default: data.checked, or data.root with -checked.jsonl.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Longest time for a video.")] = 300.0,
    memory: Annotated[float, typer.Option(min=0.1, help="Most memory of a process, in GB.")] = 4.0,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes. Default: one for each core.")] = None,
    json_: Json = False,
) -> None:
    """Decode every video in a process that it may crash, and write down which can be used.

    Run it again to go on where it was stopped. Then train with data.checked=MANIFEST. Exits with 3 if more than
    data.max_bad_fraction of the videos cannot be used.

    Example:  mgtrain data check k400_slowfast_8x8_r50_multigrid data.root=/data/k400 --to k400.jsonl
    """
    from collections import Counter

    from mgtrain.check import check as look
    from mgtrain.console import counts_table, progress
    from mgtrain.datasets import open_splits
    from mgtrain.datasets.checked import STATUSES, USABLE
    from mgtrain.datasets.videos import printable
    from mgtrain.errors import DataError

    loaded = load_recipe(recipe, overrides or ())
    data = loaded.data
    file = to or Path(data.checked or f"{data.root.rstrip(os.sep)}-checked.jsonl")
    splits = open_splits(data.model_copy(update={"checked": None}))
    names = {split: [videos.name(n) for n in range(len(videos))] for split, videos in splits.items()}
    with progress() as show:
        records = look(
            data.root, [name for split in names.values() for name in split], file, loaded.clip, workers or _cores(),
            seconds=seconds, memory=round(memory * 1e9), progress=show,
        )  # fmt: skip
    status = {record["path"]: record["status"] for record in records}
    counted = {split: Counter(status[name] for name in within) for split, within in names.items()}
    counts = {split: {one: of[one] for one in STATUSES} for split, of in counted.items()}
    unusable = [record for record in records if record["status"] not in USABLE]
    if json_:
        found = {record["path"]: {"status": record["status"], "message": record["message"]} for record in unusable}
        result = {"schema": "mgtrain.data_check/1", "root": data.root, "file": str(file), "splits": counts}
        out.print_json(json.dumps({**result, "unusable": found}))
    else:
        for record in unusable[:MOST_NAMED]:
            name = printable(record["path"])
            err.print(f"{record['status']}: {name}: {record['message']}", soft_wrap=True)
        if len(unusable) > MOST_NAMED:
            err.print(f"and {len(unusable) - MOST_NAMED:,} more, see {file}", soft_wrap=True)
        out.print(counts_table("split", counts))
        out.print(f"wrote {file}; to leave out what cannot be used: data.checked={file}")
    if len(unusable) > data.max_bad_fraction * len(records):
        raise DataError(
            f"{len(unusable)} of {len(records)} videos cannot be used, more than data.max_bad_fraction "
            f"{data.max_bad_fraction:g} allows; replace them, or leave them out with data.checked={file}"
        )


@data_app.command()
def prepare(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    to: Annotated[Path | None, typer.Option(help="Folder to make. Default: data.root with -prepared added.")] = None,
    levels: Annotated[str, typer.Option(help="Short sides in pixels.")] = LEVELS,
    quality: Annotated[int, typer.Option(min=0, max=51, help="H.264's rate factor; smaller is better.")] = QUALITY,
    fps: Annotated[
        float | None, typer.Option(min=1, help="Thin out videos of more frames per second. Default: keep all frames.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes. Default: one for each core.")] = None,
    forecast: Annotated[
        bool, typer.Option("--forecast", help="Prepare a few videos, say what the rest would take, and stop.")
    ] = False,
    json_: Json = False,
) -> None:
    """Re-encode the videos of a recipe once, so that every clip costs no more than its own frames and size.

    The originals stay as they are. Run it again to go on where it was stopped. Then train with data.prepared=FOLDER.

    Example:  mgtrain data prepare k400_slowfast_8x8_r50_multigrid data.root=/data/k400 --to /scratch/k400
    """
    from dataclasses import asdict

    from mgtrain.clips.prepared import Settings
    from mgtrain.console import duration, progress, size
    from mgtrain.datasets import open_splits
    from mgtrain.prepare import Forecast
    from mgtrain.prepare import prepare as make

    _check_finite("--fps", fps)
    data = load_recipe(recipe, overrides or ()).data
    folder = to or Path(f"{data.root.rstrip(os.sep)}-prepared")
    settings = Settings(_parse_levels(levels), quality, fps)
    count = workers or _cores()
    paths = [videos.name(n) for videos in open_splits(data).values() for n in range(len(videos))]

    def by_level(sizes: tuple[int, ...], originals: int) -> str:
        """What each level adds, in bytes and of the originals."""
        parts = (
            f"{size(n)} or {n / max(1, originals):.2f}x at {level}"
            for level, n in zip(settings.levels, sizes, strict=True)
        )
        return f"{size(sum(sizes))} ({', '.join(parts)})"

    def told(expected: Forecast) -> bool:
        err.print(
            f"{expected.videos:,} videos: about {by_level(expected.bytes, expected.originals)}, the originals have "
            f"{size(expected.originals)}; {duration(expected.seconds)} from now on with {count} processes",
            soft_wrap=True,
        )
        return not forecast

    with progress() as show:
        done = make(Path(data.root), paths, folder, settings, count, forecast=told, progress=show)
    for cause in done.broken.values():
        err.print(f"left out: {cause}", soft_wrap=True)
    if json_:
        out.print_json(json.dumps({"schema": "mgtrain.prepare/1", "folder": str(folder), **asdict(done)}))
    else:
        out.print(
            f"{folder}: {done.videos:,} of {len(set(paths)):,} videos prepared, {len(done.broken)} of them broken; "
            f"{by_level(done.bytes, done.originals)}, {sum(done.bytes) / max(1, done.originals):.2f}x the originals; "
            f"{duration(done.seconds)}",
        )


@data_app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A folder made by `mgtrain data prepare`.")], json_: Json = False
) -> None:
    """Read every byte of a prepared set and compare it with the manifest. Exits with 3 if anything is wrong.

    Example:  mgtrain data verify /scratch/k400
    """
    from mgtrain.console import progress
    from mgtrain.errors import DataError
    from mgtrain.prepare import verify as look

    with progress() as show:
        wrong = look(folder, _cores(), show)
    if json_:
        out.print_json(json.dumps({"schema": "mgtrain.verify/1", "folder": str(folder), "wrong": wrong}))
    for file, problem in [] if json_ else wrong.items():
        out.print(f"{file}: {problem}")
    if wrong:
        raise DataError(f"{folder}: {len(wrong)} files are not as they were written; delete them and prepare again")
    if not json_:
        out.print(f"{folder}: every file is as it was written")


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
    from mgtrain.bench import bench_data as bench
    from mgtrain.bench import render
    from mgtrain.console import progress
    from mgtrain.distributed import connect
    from mgtrain.engine.fit import open_data

    _check_finite("--seconds", seconds)
    _check_finite("--step-seconds", step_seconds)
    loaded = load_recipe(recipe, overrides or ())
    videos, _ = open_data(loaded)
    with connect(device.value if device else None) as world, progress() as show:
        start_logging(None, world.main, world.rank)
        result = bench(
            loaded, videos, world, _parse_levels(levels), quality,
            seconds=seconds, step_seconds=step_seconds, progress=show,
        )  # fmt: skip
    if json_:
        out.print_json(json.dumps({"schema": "mgtrain.bench_data/1", **result}))
    else:
        out.print(render(result))


@weights_app.command("import")
def import_weights(
    file: Annotated[
        Path | None,
        typer.Argument(
            help="PySlowFast's .pyth or Caffe2 .pkl, PyTorchVideo's, MMAction2's, torchvision's or our own."
        ),
    ] = None,
    *,
    from_: Annotated[
        str | None, typer.Option("--from", help="Download instead: torchvision:resnet50 or torchvision:resnet101.")
    ] = None,
    to: Annotated[Path | None, typer.Option(help="The .safetensors file to write. Default: only report.")] = None,
    model: Annotated[
        str | None, typer.Option(help="The model they are for, such as i3d_r50. Default: the one they are of.")
    ] = None,
    at_least: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the model's tensors to demand; below it, exit with 6.")
    ] = 1.0,
    json_: Json = False,
) -> None:
    """Bring another project's weights into our names, and 2-D ones into three dimensions. Runs nothing of the file.

    A recipe starts from the result, or from the file itself, with init.weights=FILE.

    Examples:  mgtrain weights import SLOWFAST_8x8_R50.pyth --to k400.safetensors
    |  mgtrain weights import --from torchvision:resnet50 --model i3d_r50 --to in1k.safetensors
    """
    if (file is None) == (from_ is None):
        raise UsageError("give a FILE or --from torchvision:NAME, one of them")

    import torch

    from mgtrain.models import build_model
    from mgtrain.weights.load import load_weights, model_options, read_weights, save_weights
    from mgtrain.weights.torchvision import download

    path = file or download(str(from_))
    weights = read_weights(path)
    options = model_options(weights, model)
    with torch.device("meta"):
        target = build_model(**options)
    target.to_empty(device="cpu")
    report = load_weights(target, weights)
    kept = {key: value for key, value in options.items() if key != "classes"}
    if json_:
        result = {"schema": "mgtrain.weights_import/1", "file": str(path), "to": to and str(to), "share": report.share}
        out.print_json(json.dumps({**result, "model": kept, "classes": options["classes"], **report.describe()}))
    else:
        for line in report.lines():
            out.print(line, markup=False)
        section = ", ".join(f"{key}: {list(v) if isinstance(v, tuple) else v}" for key, v in kept.items())
        out.print(f"model: {{{section}}}, of {options['classes']} classes", markup=False)
    report.demand(at_least, path)
    if to:
        save_weights(to, target, report, options)
        err.print(f"wrote {to}; a recipe starts from it with init.weights={to}", markup=False, soft_wrap=True)


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        out.print(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line; a user's mistake is one line and the documented exit code, never a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: names may be beyond the terminal's encoding
    try:
        code = typer.main.get_command(app).main(standalone_mode=False)
        if code == INTERRUPTED:  # Ctrl-C, which typer has taken
            raise KeyboardInterrupt
        sys.stdout.flush()
    except MgtrainError as error:
        _say(str(error))
        code = error.exit_code
    except typer.TyperException as error:
        _say(f"{error.format_message().rstrip('.')}; see `{' '.join(_command_words())} --help`")
        code = 2
    except (typer.Abort, KeyboardInterrupt):
        _say("interrupted; `mgtrain fit ... --resume` goes on from the newest checkpoint")
        code = INTERRUPTED
    except (BrokenPipeError, SystemExit) as error:
        if isinstance(error, SystemExit) and not isinstance(
            error.__context__, BrokenPipeError
        ):  # or typer has taken it
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that Python does not try once more as it ends
        code = 141
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:  # the world is not as it has to be
            _say(f"{error.filename}: {error.strerror}; give another path, mend its permissions or make room")
            code = 2
        else:
            err.print(traceback.format_exc().rstrip(), soft_wrap=True)
            _say(f"unexpected {type(error).__name__}, a mistake of mgtrain's; please report it, with the lines above")
            code = 1
    sys.exit(code if isinstance(code, int) else 0)


def _say(message: str) -> None:
    """The one line with which a command ends that does not do what it was asked to."""
    if "WORLD_SIZE" in os.environ:  # one of several ranks
        from mgtrain.distributed import says_first

        if not says_first(message):
            return
    line = message.replace("\n", r"\n")
    err.print(f"mgtrain: {line}", style="red", soft_wrap=True)


def _command_words() -> list[str]:
    """The program and its subcommands, as far as they were named."""
    words = []
    group: Any = typer.main.get_command(app)
    for word in sys.argv[1:]:
        group = getattr(group, "commands", {}).get(word)
        if group is None:
            break
        words.append(word)
    return ["mgtrain", *words]


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


def _training_videos(recipe: Recipe) -> int:
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


def _check_finite(option: str, value: float | None) -> None:
    if value is not None and not math.isfinite(value):
        raise UsageError(f"{option} {value}: has to be a finite number")


def _parse_levels(levels: str) -> tuple[int, ...]:
    try:
        sides = sorted({int(level) for level in levels.split(",")}, reverse=True)
    except ValueError:
        sides = []
    if not sides or not 16 <= sides[-1] <= sides[0] <= 10_000:
        raise UsageError(f"--levels {levels}: write short sides of 16 to 10000 pixels, such as 256,160")
    return tuple(sides)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _parse_views(views: str) -> tuple[int, int]:
    times, _, crops = views.partition("x")
    if not (times.isdecimal() and crops in ("1", "3") and int(times) > 0):
        raise UsageError(f"--views {views}: write clips in time x crops, with 1 or 3 crops, such as 1x1 or 10x3")
    return int(times), int(crops)


def _checkpoint_path(checkpoint: str) -> Path:
    from mgtrain.checkpoint import newest_whole
    from mgtrain.rundir import find_run

    path = Path(checkpoint)
    if path.is_file():
        return path
    run = find_run(checkpoint)
    newest = newest_whole(run.checkpoints())
    if newest is None:
        raise CheckpointError(f"{run.path}: no checkpoint yet; train it with `mgtrain fit`")
    return newest


def _print_scores(facts: dict[str, Any], scores: Any, views: int, as_json: bool, classes: Any = ()) -> None:
    if as_json:
        result = {**facts, "top1": scores.top1, "top5": scores.top5, "loss": scores.loss, "videos": scores.videos}
        if classes:
            result["per_class"] = dict(zip(classes, scores.per_class(), strict=True))
        out.print_json(json.dumps(result))
        return
    for name, accuracy, count in zip(classes, scores.per_class(), scores.counts, strict=False):
        out.print(f"{name:30} {'no videos' if accuracy is None else f'{100 * accuracy:6.1f} %'}  of {count}")
    out.print(
        f"top-1 {100 * scores.top1:.2f} %  top-5 {100 * scores.top5:.2f} %  loss {scores.loss:.3f}  "
        f"on {scores.videos} videos, {views} {'view' if views == 1 else 'views'} each"
    )
