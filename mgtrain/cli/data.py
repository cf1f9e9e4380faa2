"""The commands about data sets: synthesize, index, split, stats, check, prepare, verify."""

import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.filesize import decimal
from typer import Argument, Option

from mgtrain.cli.options import GroupBy, Json, Overrides, RecipeArgument, Seed, check_finite, check_share
from mgtrain.console import counts_table, duration, note, out, progress, show, warn
from mgtrain.data import open_splits, open_videos
from mgtrain.data.formats.listfile import write_lists
from mgtrain.data.index import make_index
from mgtrain.data.manifest import STATUSES, USABLE
from mgtrain.data.split import NO_GROUPS, find_groups, joined, make_split, read_groups
from mgtrain.data.videos import Videos, printable
from mgtrain.errors import DataError, UsageError
from mgtrain.processes.cores import usable_cores
from mgtrain.recipe import Data, load_recipe

data_app = typer.Typer(name="data", help="Make, inspect, check and prepare data sets.", no_args_is_help=True)

MOST_NAMED = 20  # videos to name one by one
LEVELS, QUALITY = "256,160", 25  # of a prepared set: for the grids of Kinetics-400, with about 3 times the bytes
LEAST_SHARD = 1_000_000  # bytes
ToFolder = Annotated[Path, Option("--to", help="Folder to write the lists to.")]


@data_app.command()
def synthesize(
    root: Annotated[Path, Argument(help="Folder to create.")],
    train: Annotated[int, Option(min=1, help="Training videos of each class.")] = 20,
    val: Annotated[int, Option(min=1, help="Validation videos of each class.")] = 40,
    classes: Annotated[int, Option(min=2, max=18, help="Motions: 8 simple, 4 diagonal, 6 that return.")] = 8,
    distractors: Annotated[int, Option(min=0, max=100, help="Distracting discs in each video.")] = 3,
    noise: Annotated[
        float, Option(min=0, max=255, help="Noise of each pixel: standard deviation (of 0 to 255).")
    ] = 14.0,
    camera: Annotated[float, Option(min=0, max=100, help="Shaking of the camera: standard deviation, px.")] = 1.1,
    pace: Annotated[float, Option(min=0, max=1, help="Variation of a video's speed, relative to its mean.")] = 0.35,
    frames: Annotated[int, Option(min=8, max=10_000, help="Frames of each video.")] = 48,
    size: Annotated[str, Option(metavar="WxH", help="Width and height, even numbers of pixels.")] = "112x84",
    seed: Seed = 0,
) -> None:
    """Make a small data set of videos whose classes differ only by motion, which options make harder to see.

    Examples:  mgtrain data synthesize data/motions
    |  mgtrain data synthesize data/easy --distractors 1 --noise 2 --camera 0.3 --pace 0.1
    """
    from mgtrain.data.synthetic import ALL_MOTIONS, Difficulty
    from mgtrain.data.synthetic import synthesize as make

    check_finite(noise=noise, camera=camera, pace=pace)
    width, _, height = size.partition("x")
    if not (width.isdecimal() and height.isdecimal() and all(16 <= int(n) <= 4096 for n in (width, height))):
        raise UsageError(f"--size {size}: write width and height of 16 to 4096 pixels, such as 112x84")
    if int(width) % 2 or int(height) % 2:
        raise UsageError(f"--size {size}: both must be even for the encoder")
    with progress() as shown:
        make(
            root, videos_per_class={"train": train, "val": val}, classes=ALL_MOTIONS[:classes], seed=seed,
            frames=frames, size=(int(width), int(height)), progress=shown,
            difficulty=Difficulty(distractors, noise, camera, pace),
        )  # fmt: skip
    out.print(f"{root}: ready")


@data_app.command()
def index(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    *,
    to: ToFolder,
    contents: Annotated[bool, Option("--hash/--no-hash", help="Find duplicates and leakage by file contents.")] = True,
    strict: Annotated[bool, Option("--strict", help="Exit with 3 on any warning.")] = False,
    json_: Json = False,
) -> None:
    """Convert annotations to lists. Reports missing videos, duplicates and leakage between the splits.

    Train on the lists with data.format=list data.train=FOLDER/train.csv data.val=FOLDER/val.csv (full paths) and the
    same data.root.

    Example:  mgtrain data index k400_slowfast_8x8_r50_multigrid --to lists/k400 data.root=/data/k400
    """
    splits = opened_splits(load_recipe(recipe, overrides).data)
    with progress() as shown:
        made = make_index(splits, contents=contents, progress=shown)
    warnings = [str(finding) for finding in made.findings if finding.warns]
    for warning in warnings:
        warn(warning)
    for name, rows in made.usable.items():
        if not len(rows):
            raise DataError(f"{splits[name].root}: the {name} split has no video that can be used; see above")
    files = [*map(str, write_lists(to, {name: (videos, made.usable[name]) for name, videos in splits.items()}))]
    show(
        json_,
        {"schema": "mgtrain.data_index/1", "root": splits["train"].root, "files": files, **made.describe()},
        counts_table("split", made.counts()),
        *(str(finding) for finding in made.findings if not finding.warns),
        f"wrote {', '.join(files)}",
    )
    if strict and warnings:
        raise DataError(f"warnings: {len(warnings)}, and --strict allows none; fix what they name")


@data_app.command()
def split(
    source: Annotated[str, Argument(metavar="RECIPE|FOLDER", help="A recipe, or a folder with one folder per class.")],
    overrides: Overrides = None,
    *,
    to: ToFolder,
    val: Annotated[float | None, Option(help="Share of the videos for validation, such as 0.2.")] = None,
    folds: Annotated[
        int | None, Option(min=2, max=1000, help="Make this many folds instead; each validates on a part of its own.")
    ] = None,
    all_: Annotated[bool, Option("--all", help="Split the training and validation videos together.")] = False,
    groups: Annotated[Path | None, Option(help="CSV with a column `path`; videos of one group stay together.")] = None,
    by: Annotated[str | None, Option(help="Column of the CSV that names the group. Default: group.")] = None,
    group_by: GroupBy = None,
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Split labelled videos for training and validation. Every class is split in the same proportion.

    Videos of one source stay together: those of a group in the CSV, or else those whose names show the same source.

    Examples:  mgtrain data split videos --to lists --val 0.2
    |  mgtrain data split my.yaml --all --to folds --folds 5 --groups groups.csv --by sequence
    """
    if (val is None) == (folds is None):
        raise UsageError("give either --val SHARE or --folds NUMBER")
    check_share(val)
    if Path(source).is_dir():
        if overrides or all_:
            raise UsageError(f"{source}: a folder takes neither overrides nor --all; all of it is split")
        videos = joined([open_videos("folder", source, ".")])
    else:
        splits = opened_splits(load_recipe(source, overrides).data)
        videos = joined(splits.values() if all_ else [splits["train"]])
    if groups and group_by:
        raise UsageError("--groups and --group-by: give one of them")
    if by and not groups:
        raise UsageError(f"--by {by}: names a column of a CSV; give the CSV with --groups")
    found = read_groups(groups, by or "group", videos) if groups else find_groups(videos, group_by)
    if found or not group_by:
        note(f"split by {found or NO_GROUPS}")
    lists = make_split(videos, val=val, folds=folds, seed=seed, groups=found.ids if found else None)
    files = [*map(str, write_lists(to, {name: (videos, rows) for name, rows in lists.items()}))]
    counts = {name: videos.only(rows).videos_per_class for name, rows in lists.items()}
    table = {name: {key: int(of[label]) for key, of in counts.items()} for label, name in enumerate(videos.classes)}
    total = {name: len(rows) for name, rows in lists.items()}
    result = {"schema": "mgtrain.data_split/1", "root": videos.root, "files": files}
    shown = counts_table("class", {**table, "total": total})
    end = f"wrote {', '.join(files)}; their data.root is {videos.root}"
    show(json_, {**result, "videos": total, "videos_per_class": table}, shown, end)


@data_app.command()
def stats(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    split: Annotated[Literal["train", "val"], Option(help="Which videos to describe.")] = "train",
    sample: Annotated[int, Option(min=1, help="How many videos to open.")] = 500,
    seed: Seed = 0,
    picture: Annotated[Path | None, Option(help="Also draw the statistics to this PNG file.")] = None,
    workers: Annotated[int | None, Option(min=0, help="Processes. Default: one for each core, up to 16.")] = None,
    json_: Json = False,
) -> None:
    """Describe lengths, sizes, frame rates and classes of the videos.

    Example:  mgtrain data stats demo_multigrid --picture stats.png
    """
    if picture and picture.suffix.lower() != ".png":
        raise UsageError(f"--picture {picture}: must end in .png")
    loaded = load_recipe(recipe, overrides)
    videos = opened_splits(loaded.data)[split]

    from mgtrain.preflight.stats import draw_picture, make_stats, render

    count, fps = workers if workers is not None else min(16, usable_cores()), loaded.data.fps
    with progress() as shown:
        made = make_stats(videos, loaded.clip, sample=sample, seed=seed, workers=count, fps=fps, progress=shown)
    for cause in made.broken:
        warn(cause)
    result = {"schema": "mgtrain.data_stats/1", "root": videos.root, "split": split}
    show(json_, {**result, **made.describe()}, render(made))
    if picture:
        draw_picture(made, picture)


@data_app.command()
def check(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    to: Annotated[
        Path | None, Option(help="Manifest to write. Default: data.checked, or data.root with -checked.jsonl.")
    ] = None,
    seconds: Annotated[float, Option(min=0.1, help="Time limit for each video.")] = 300.0,
    memory: Annotated[float, Option(min=0.1, help="Memory limit of each process in GB.")] = 4.0,
    workers: Annotated[int | None, Option(min=1, help="Processes. Default: one for each core.")] = None,
    json_: Json = False,
) -> None:
    """Check that every video can be decoded. Writes a manifest of the videos and their status.

    Run the same command again to resume. Then train with data.checked=MANIFEST. Exits with 3 if more than
    data.max_bad_fraction of the videos cannot be used.

    Example:  mgtrain data check k400_slowfast_8x8_r50_multigrid data.root=/data/k400 --to k400.jsonl
    """
    check_finite(seconds=seconds, memory=memory)
    loaded = load_recipe(recipe, overrides)
    data = loaded.data
    file = to or Path(data.checked or f"{data.root.rstrip(os.sep)}-checked.jsonl")
    splits = opened_splits(data.model_copy(update={"checked": None}))
    names = {split: videos.names() for split, videos in splits.items()}

    from mgtrain.preflight.check import check as check_videos

    with progress() as shown:
        records = check_videos(
            data.root, [name for split in names.values() for name in split], file, loaded.clip,
            workers or usable_cores(), seconds=seconds, memory=round(memory * 1e9), fps=data.fps, progress=shown,
        )  # fmt: skip
    status = {record["path"]: record["status"] for record in records}
    counted = {split: Counter(status[name] for name in within) for split, within in names.items()}
    counts = {split: {one: of[one] for one in STATUSES} for split, of in counted.items()}
    unusable = [record for record in records if record["status"] not in USABLE]
    found = {record["path"]: {"status": record["status"], "message": record["message"]} for record in unusable}
    if not json_:
        for record in unusable[:MOST_NAMED]:
            note(f"{record['status']}: {printable(record['path'])}: {record['message']}")
        if len(unusable) > MOST_NAMED:
            note(f"and {len(unusable) - MOST_NAMED:,} more; see {file}")
    result = {"schema": "mgtrain.data_check/1", "root": data.root, "file": str(file), "splits": counts}
    end = f"wrote {file}; to skip unusable videos: data.checked={file}"
    show(json_, {**result, "unusable": found}, counts_table("split", counts), end)
    if len(unusable) > data.max_bad_fraction * len(records):
        raise DataError(
            f"{len(unusable)} of {len(records)} videos cannot be used, more than data.max_bad_fraction "
            f"{data.max_bad_fraction:g} allows; replace them, or skip them with data.checked={file}"
        )


@data_app.command()
def prepare(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    to: Annotated[Path | None, Option(help="Folder to write to. Default: data.root with -prepared added.")] = None,
    levels: Annotated[str, Option(help="Short sides to store, in pixels.")] = LEVELS,
    quality: Annotated[int, Option(min=0, max=51, help="H.264's rate factor; smaller is better.")] = QUALITY,
    fps: Annotated[
        float | None, Option(min=1, help="Drop frames of videos above this frame rate. Default: keep all.")
    ] = None,
    shards: Annotated[
        str | None,
        Option(
            metavar="SIZE",
            help=("Write tar files of at most this size, such as 2GiB, instead of a file for each video and level."),
        ),
    ] = None,
    seconds: Annotated[float, Option(min=0.1, help="Time limit for each video.")] = 3600.0,
    workers: Annotated[int | None, Option(min=1, help="Processes. Default: one for each core.")] = None,
    forecast: Annotated[
        bool, Option("--forecast", help="Prepare a few videos, estimate time and disk space for the others, and stop.")
    ] = False,
    json_: Json = False,
) -> None:
    """Re-encode the videos of a recipe for fast loading. Decoding a clip then costs only its own frames and pixels.

    The originals are not changed. Run the same command again to resume. Then train with data.prepared=FOLDER.

    Example:  mgtrain data prepare k400_slowfast_8x8_r50_multigrid data.root=/data/k400 --to /scratch/k400
    """
    check_finite(fps=fps, seconds=seconds)
    shard_bytes = parse_shards(shards) if shards else None
    data = load_recipe(recipe, overrides).data
    folder = to or Path(f"{data.root.rstrip(os.sep)}-prepared")
    paths = [name for videos in opened_splits(data).values() for name in videos.names()]

    from mgtrain.clips.prepared import Settings
    from mgtrain.preflight.prepare import Forecast
    from mgtrain.preflight.prepare import prepare as make

    settings = Settings(parse_levels(levels), quality, fps, shard_bytes)
    count = workers or usable_cores()

    def by_level(sizes: tuple[int, ...], originals: int) -> str:
        """The size of all levels and of each, in bytes and relative to the originals."""
        levels = zip(settings.levels, sizes, strict=True)
        parts = (f"{decimal(n)} or {n / max(1, originals):.2f}x at {level}" for level, n in levels)
        return f"{decimal(sum(sizes))} ({', '.join(parts)})"

    def announce(expected: Forecast) -> bool:
        note(
            f"{expected.videos:,} videos: about {by_level(expected.bytes, expected.originals)} (the originals: "
            f"{decimal(expected.originals)}); takes about {duration(expected.seconds)} with {count} processes"
        )
        return not forecast

    with progress() as shown:
        done = make(
            Path(data.root), paths, folder, settings, count,
            seconds=seconds, fps=data.fps, forecast=announce, progress=shown,
        )  # fmt: skip
    for cause in done.broken.values():
        note(f"skipped: {cause}")
    show(
        json_,
        {"schema": "mgtrain.prepare/1", "folder": str(folder), **asdict(done)},
        f"{folder}: {done.videos:,} of {len(set(paths)):,} videos done, {len(done.broken)} of them left out as broken; "
        f"{by_level(done.bytes, done.originals)}, {sum(done.bytes) / max(1, done.originals):.2f}x the originals; "
        f"{f'{done.shards:,} shards; ' if settings.shards else ''}{duration(done.seconds)}",
    )


@data_app.command()
def verify(
    folder: Annotated[Path, Argument(help="A folder written by `mgtrain data prepare`.")], json_: Json = False
) -> None:
    """Verify a prepared set against its manifest. Exits with 3 if a file is damaged.

    Example:  mgtrain data verify /scratch/k400
    """
    from mgtrain.preflight.prepare import verify as verify_set

    with progress() as shown:
        wrong = verify_set(folder, usable_cores(), shown)
    result = {"schema": "mgtrain.verify/1", "folder": str(folder), "wrong": wrong}
    show(json_, result, *(f"{file}: {problem}" for file, problem in wrong.items()))
    if wrong:
        raise DataError(f"{folder}: {len(wrong)} files are damaged; delete them and prepare the set again")
    if not json_:
        out.print(f"{folder}: every file is intact")


def opened_splits(data: Data) -> dict[str, Videos]:
    """The training and validation videos of a recipe, with remarks on how their lists were read."""
    splits = open_splits(data)
    for videos in splits.values():
        for remark in videos.remarks:
            note(remark)
    return splits


def parse_levels(levels: str) -> tuple[int, ...]:
    """`256,160` as short sides, largest first."""
    try:
        sides = sorted({int(level) for level in levels.split(",")}, reverse=True)
    except ValueError:
        sides = []
    if not sides or not 16 <= sides[-1] <= sides[0] <= 10_000:
        raise UsageError(f"--levels {levels}: write short sides of 16 to 10000 pixels, such as 256,160")
    return tuple(sides)


def parse_shards(text: str) -> int:
    """A size such as `2GiB` as bytes; units are of 1000 (`GB`) or 1024 (`GiB`).

    >>> parse_shards("1.5 GiB"), parse_shards("200MB")
    (1610612736, 200000000)
    """
    try:
        count = TypeAdapter(ByteSize).validate_python(text.strip())
    except ValidationError:
        raise UsageError(f"--shards {text}: write a size with its unit, such as 2GiB or 500MB") from None
    if count < LEAST_SHARD:
        raise UsageError(f"--shards {text}: must be at least {decimal(LEAST_SHARD)}, such as 2GiB")
    return count
