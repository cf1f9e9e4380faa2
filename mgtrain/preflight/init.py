"""Propose the first recipes for your own videos, as large as the data, the machine and the given time allow.

The baseline's training time is estimated from the network's multiply-adds, the speed of a matrix product on this
machine and that of loading a few clips, with an error of up to a factor of two; `mgtrain plan --measure` times real
steps. The size depends on the time for computing only, because `mgtrain data prepare` makes loading fast.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch

from mgtrain.clips.loader import worker_count
from mgtrain.console import ShowProgress, duration
from mgtrain.data.formats.listfile import write_lists
from mgtrain.data.formats.reading import is_video
from mgtrain.data.found import Parts, make_parts
from mgtrain.data.index import make_index
from mgtrain.data.videos import Videos, few, mirrored_pairs
from mgtrain.engine.checks import check_shapes
from mgtrain.errors import DataError, UsageError
from mgtrain.preflight.bench_step import FORWARD_AND_BACKWARD, HALF_PAYS, half_precision_gain, matrix_product
from mgtrain.preflight.forecast import ShapeRate, training_time
from mgtrain.preflight.loading import cut_on_one_core
from mgtrain.preflight.stats import Stats, make_stats
from mgtrain.processes.cores import busy_cores, crowded, usable_cores
from mgtrain.processes.distributed import World, connect, default_procs
from mgtrain.processes.files import write_whole
from mgtrain.recipe import Clip, Recipe, parse_recipe
from mgtrain.schedule import check_world, make_plan

SAMPLE = 200  # videos to open
SHARE_OF_PEAK = {"cpu": 0.45, "cuda": 0.35}  # speed of a step relative to a matrix product
HOURS = {"cpu": 1.0, "cuda": 12.0}  # default training time of the baseline
STAGE_ENDS = (0, 0.67, 0.89, 1)  # shares of the epochs between which a learning rate holds
CLIPS = 8  # of a step on one device
LEAST_EPOCHS = 15
WARMUP_STEPS = 360  # of the baseline; of multigrid they are about 34
MOST_EPOCHS = 200  # warn about too few videos if there are more
MEASURE_SECONDS = 2.0  # of loading
WAITS = 1.25  # training time with loading relative to that without, from which on `mgtrain data prepare` is advised
NO_VIDEOS = (".csv", ".jpeg", ".jpg", ".json", ".md", ".png", ".safetensors", ".txt", ".xml", ".yaml")  # suffixes
SLOW = 24  # frames per second below which clips are cut at the videos' own rate


@dataclass(frozen=True, slots=True)
class Size:
    """The size of a baseline: network, clips and steps."""

    model: str  # lines of the recipe's `model:`
    frames: int
    stride: int
    crop: int
    steps: int  # at least


SMALL = "  name: i3d_r50\n  width: {}\n  depth: [1, 1, 1, 1]\n  dropout: 0.0"
STEPS = (500, 1000, 2000, 4000, 8000)  # of fine-tuning
# In ascending order: the largest that trains in the given time is chosen, or the first one.
SIZES = {
    "cpu": tuple(
        Size(SMALL.format(width), 16, 4, crop, steps)
        for width, crop, steps in (
            (16, 64, 1000), (16, 80, 1500), (16, 80, 3000), (24, 80, 4000), (24, 112, 6000), (32, 112, 8000),
        )
    ),
    "cuda": tuple(
        Size("  name: slowfast_r50", 32, 2, crop, steps)
        for crop, steps in ((112, 4000), (112, 8000), (160, 10000), (224, 10000), (224, 20000), (224, 40000))
    ),
}  # fmt: skip
# Transformers are fine-tuned from Kinetics weights at the size that these are of.
NETWORKS = {
    name: tuple(Size(f"  name: {name}\n  drop_path: 0.2", frames, stride, 224, steps) for steps in STEPS)
    for name, frames, stride in (("swin3d_t", 32, 2), ("mvit_v2_s", 16, 4))
}


@dataclass(frozen=True, slots=True)
class Found:
    """The videos to train on."""

    train: Videos
    val: Videos
    files: Mapping[str, str]  # split -> list of its videos
    seconds: np.ndarray  # float64 (n,), durations of a sample of the training videos
    short_sides: np.ndarray  # float64 (n,), pixels, of the same videos
    fps: float | None = None  # of folders of frames
    rate: float = 30.0  # the median frame rate of the videos


@dataclass(frozen=True, slots=True)
class Proposal:
    """Two recipes that differ in `schedule:` only, and the estimated training time of the baseline."""

    texts: dict[str, str]  # YAML of `baseline` and `multigrid`
    recipe: Recipe  # the baseline
    seconds: float  # of computing


@dataclass(frozen=True, slots=True)
class Project:
    """The result of `mgtrain init`: the files that it has written, and what it found."""

    parts: Parts
    stats: Stats  # of a sample of the training videos
    proposal: Proposal
    seconds: float  # estimated training time of the baseline, with loading
    recipes: dict[str, Path]  # `baseline` and `multigrid`
    written: list[Path]  # lists, classes.txt and recipes

    def describe(self) -> dict[str, Any]:
        """Plain values of the schema mgtrain.init/1."""
        train = self.parts.splits["train"]
        return {
            "schema": "mgtrain.init/1", "root": train.root, "files": [str(file) for file in self.written],
            "videos": {part: len(of) for part, of in self.parts.splits.items()},
            "classes": len(train.classes), "split_by": self.parts.rule, "groups": self.parts.groups,
            "baseline_seconds": self.seconds, "computing_seconds": self.proposal.seconds,
        }  # fmt: skip

    def render(self) -> str:
        """The files and the commands to run next."""
        recipe, (baseline, multigrid) = self.proposal.recipe, self.recipes.values()
        train, val = (self.parts.splits[part] for part in ("train", "val"))
        broken, check = len(self.stats.broken), quote(f"{multigrid}")
        weights = f"torchvision:{recipe.model.name} --to {quote(recipe.init.weights or '')}"
        return "\n".join([
            f"videos    {len(train):,} to train, {len(val):,} to validate, of {len(train.classes)} classes",
            f"split by  {self.parts.rule}",
            f"baseline  {recipe.model.name}, clips of {recipe.clip.frames} frames of {recipe.clip.crop}², "
            f"{sum(recipe.optim.stages):g} epochs: about {self.seconds / 3600:.1f} h of training here",
            f"wrote     {', '.join(map(str, self.written))}",
            *([f"before    mgtrain data prepare {check} --to prepared, because loading clips of these videos takes "
               f"{100 * (1 - self.proposal.seconds / self.seconds):.0f} % of that time; then train with "
               "data.prepared=prepared"] if self.seconds > WAITS * self.proposal.seconds else []),
            *([f"before    mgtrain weights import --from {weights}"] if recipe.init.weights else []),
            *([f"before    mgtrain data check {check} --to checked.jsonl, because {broken} videos of a sample cannot "
               "be opened; then train with data.checked=checked.jsonl"] if broken else []),
            f"next      mgtrain plan {quote(f'{multigrid}')} --measure 2",
            f"          mgtrain fit {quote(f'{baseline}')}",
            f"          mgtrain fit {quote(f'{multigrid}')} --baseline {quote(baseline.stem)}",
            f"          mgtrain compare {quote(baseline.stem)} {quote(multigrid.stem)} --html report.html",
        ])  # fmt: skip


def make_project(
    data: Path,
    videos: Mapping[str, Videos],
    to: Path,
    name: str,
    *,
    val: float,
    group_by: str | None,
    hours: float | None,
    fps: float | None,
    seed: int,
    device: str | None,
    network: str | None,
    report: Callable[[str, bool], None],
    progress: ShowProgress,
) -> Project:
    """Inspect the `videos` found at `data`, split them, and write lists and two recipes to the folder `to`.

    `fps` is the rate of folders of frames. `report(text, warns)` receives each finding about the videos. Raises
    `DataError` if there are no usable labelled videos, `UsageError` if a recipe with this name exists.
    """
    recipes = {kind: to / f"{name}_{kind}.yaml" for kind in ("baseline", "multigrid")}
    for file in recipes.values():
        if file.exists():
            raise UsageError(f"{file}: exists already; choose another --name or --to")
    for folder in map(os.path.abspath, (data, to)):
        if re.search(r"[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", folder):  # a recipe is a text file
            raise UsageError(f"{folder}: has characters that a recipe cannot hold; rename the folder")
    if wrong := next((folder for folder in (to, *to.parents) if folder.exists() and not folder.is_dir()), None):
        raise UsageError(f"--to {to}: {wrong} is not a folder; choose another one")
    index = make_index(videos, progress=progress)
    for finding in index.findings:
        report(str(finding), finding.warns)
    parts = make_parts(videos, index, val=val, group_by=group_by, seed=seed)
    train = parts.splits["train"]
    if len(train.classes) < 2:
        raise DataError(f"{data}: all videos are of the class {train.classes[0]!r}; add videos of another one")
    for text in remarks(data, videos, parts):
        report(text, True)
    if os.path.isdir(train.file(0)) is not (fps is not None):
        if fps is None:
            raise UsageError(f"{train.file(0)}: is a folder of frames; give --fps, their rate per second")
        raise UsageError(
            f"--fps {fps:g}: is the rate of folders of frames, but {train.file(0)} is a file; leave it out"
        )
    workers = min(16, usable_cores())
    any_clip = Clip(frames=1, stride=1, crop=8, short_side=(8, 8))
    stats = make_stats(train, any_clip, sample=SAMPLE, seed=seed, workers=workers, fps=fps, progress=progress)
    for cause in stats.broken:
        report(cause, True)
    files = {part: os.path.abspath(to / f"{part}.csv") for part in parts.splits}
    columns, busy = stats.columns, busy_cores() or 0.0
    found = Found(
        train, parts.splits["val"], files, columns["seconds"], columns["short_side"], fps,
        float(np.median(columns["fps"])),
    )  # fmt: skip
    with connect(device) as world:
        proposal = propose(found, world, default_procs(device), hours, network)
        seconds = with_loading(proposal, train, world, default_procs(device))
    if crowded(busy):
        report(
            f"other processes use {busy:.1f} of {usable_cores()} cores, so the recipes may be too small and their "
            "times too long; run init again later",
            True,
        )
    epochs = sum(proposal.recipe.optim.stages)
    kind = world.device.type
    if epochs > MOST_EPOCHS:
        tune = ", or fine-tune with --network swin3d_t" if network is None and kind == "cuda" else ""
        report(
            f"only {len(train)} training videos, so the recipes need {epochs:,g} epochs; add videos{tune}",
            True,
        )
    limit = 3600 * (hours or HOURS[kind])
    if proposal.seconds > limit:
        machine = "a GPU" if kind == "cpu" else "more GPUs"
        fewer = f"use fewer videos or {machine}" if epochs <= LEAST_EPOCHS else f"lower optim.stages, use {machine}"
        report(
            f"even the smallest recipe takes about {duration(proposal.seconds)}, more than {duration(limit)}; {fewer} "
            "or give more --hours",
            True,
        )
    written = write_lists(to, {part: (of, range(len(of))) for part, of in parts.splits.items()})
    for kind, file in recipes.items():
        write_whole(file, proposal.texts[kind].encode())
    return Project(parts, stats, proposal, seconds, recipes, [*written, *recipes.values()])


def with_loading(proposal: Proposal, train: Videos, world: World, gpus: int) -> float:
    """Estimated seconds of the baseline's training, with loading, of which a few clips are measured on one core."""
    recipe = proposal.recipe
    plan = make_plan(recipe, len(train))
    core = cut_on_one_core(recipe, train, plan[0].grid, MEASURE_SECONDS)
    loading = plan.totals().clips / gpus * core.seconds / core.clips / len(plan)  # core-seconds of a step and device
    workers = worker_count(recipe, world)
    rate = ShapeRate(proposal.seconds / len(plan), loading / max(1, workers), loading)
    return float(training_time(plan, dict.fromkeys(plan.shapes(), rate), world, workers)["seconds"])


def remarks(data: Path, videos: Mapping[str, Videos], parts: Parts) -> Iterator[str]:
    """Findings about the lists, classes without videos and files that do not end as videos do."""
    for listed in videos.values():
        yield from listed.remarks
    for part, of in parts.splits.items():
        if empty := [name for name, count in zip(of.classes, of.videos_per_class, strict=True) if not count]:
            yield f"{part}: no video of {_some(empty)}; add videos, or remove the class's folder or label"
    others = [
        os.path.join(within, file)
        for within, _, files in os.walk(data)
        for file in files
        if not is_video(file) and not file.startswith(".") and os.path.splitext(file)[1].lower() not in NO_VIDEOS
    ]
    if others:
        yield f"ignored files: {_some(others)}; if they are videos, give them a suffix such as .mp4"


def _some(names: Sequence[str]) -> str:
    """The number of names, and the first ones."""
    return f"{len(names):,} ({few(names)})"


def propose(found: Found, world: World, gpus: int, hours: float | None, network: str | None = None) -> Proposal:
    """The recipes of the largest size whose baseline trains within `hours` on `gpus` devices like this one."""
    kind = world.device.type
    limit = 3600 * (hours or HOURS[kind])
    best: Proposal | None = None
    peak = 0.0
    for size in SIZES[kind] if network is None else NETWORKS[network]:
        texts = {name: _write(name, size, found, kind, gpus, network) for name in ("baseline", "multigrid")}
        recipe = parse_recipe(texts["baseline"], "proposal")
        plan = make_plan(recipe, len(found.train))
        peak = peak or matrix_product(recipe, world)
        flops = check_shapes(recipe, [recipe.base])[recipe.base]
        work = 2 * FORWARD_AND_BACKWARD * flops * plan.totals().clips
        made = Proposal(texts, recipe, work / (peak * SHARE_OF_PEAK[kind] * gpus))
        if best is None or made.seconds <= limit:
            best = made
    assert best is not None
    if network is None and (gain := half_precision_gain(best.recipe, len(found.train), world) or 1.0) >= HALF_PAYS:
        texts = {name: text.replace("precision: fp32", "precision: bf16") for name, text in best.texts.items()}
        best = Proposal(texts, parse_recipe(texts["baseline"], "proposal"), best.seconds / gain)
    multigrid = parse_recipe(best.texts["multigrid"], "proposal")
    plan = make_plan(multigrid, len(found.train))
    check_world(plan, gpus)
    check_shapes(multigrid, plan.shapes())
    return best


def _write(name: str, size: Size, found: Found, kind: str, gpus: int, network: str | None) -> str:
    train, clips = found.train, CLIPS * gpus
    epochs = max(LEAST_EPOCHS, math.ceil(size.steps * clips / len(train)))
    stages = [round(epochs * end) - round(epochs * start) for start, end in pairwise(STAGE_ENDS)]
    rate = round(found.rate, 3) if found.rate < SLOW else 30
    # A clip is not longer than the first quartile of the videos.
    stride = max(1, min(size.stride, int(np.quantile(found.seconds, 0.25) * rate / size.frames)))
    crop = max(48, min(size.crop, int(np.quantile(found.short_sides, 0.25)) // 16 * 16))
    low, high = (crop, crop * 5 / 4) if kind == "cpu" else (crop * 8 / 7, crop * 10 / 7)
    # A sixth of the epochs, and in a short run, up to a third.
    warmup = round(min(max(epochs / 6, WARMUP_STEPS * clips / len(train)), epochs / 3))
    lr, multigrid = 0.1 * clips / 64, "multigrid                  # with the paper's cycles"
    pairs, breaks = mirrored_pairs(train.classes)
    flip = "0.0                        # a class name contains left or right" if breaks else "0.5"
    precision = "bf16" if kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    of_frames = f"\n  fps: {found.fps:g}" if found.fps else ""
    slow = "" if rate == 30 else f"\n  fps: {rate:g}                        # as the videos have"
    same = f"\n  mirrored: {json.dumps(pairs, ensure_ascii=False)}" if pairs else ""
    optim = f"""\
  lr: {lr:.4g}
  stages: {stages}            # epochs of each learning rate
  warmup_epochs: {warmup}
  warmup_lr: {lr / 10:.4g}"""
    init = ""
    if network is not None:
        weights = os.path.join(os.path.dirname(found.files["train"]), f"k400_{network}.safetensors")  # beside the lists
        init = f"\ninit:\n  weights: {json.dumps(weights, ensure_ascii=False)}\n"
        optim = f"""\
  name: adamw
  lr: {2e-4 * math.sqrt(clips / 32):.2g}
  scaling: sqrt                    # how it grows with the long cycle's batch
  curve: cosine
  stages: {stages}            # epochs of each stage
  warmup_epochs: {max(1, round(epochs / 30))}
  weight_decay: 0.05
  layer_decay: 0.8
  clip_norm: 1.0
  ema: 0.99                        # decay per `batch.clips` clips; the average is evaluated"""
    root, lists = os.path.abspath(train.root), {k: json.dumps(v, ensure_ascii=False) for k, v in found.files.items()}
    return f"""\
# {os.path.basename(root)}: {len(train.classes)} classes, {len(train):,} training and {len(found.val):,} validation \
videos; made by `mgtrain init`.
#
# The baseline and the multigrid recipe differ in `schedule:` only; diff them to see the experiment.

seed: 0

data:
  format: list
  root: {json.dumps(root, ensure_ascii=False)}
  train: {lists["train"]}
  val: {lists["val"]}
  classes: {len(train.classes)}
  videos: {len(train)}{of_frames}{same}

clip:                            # the median video is {np.median(found.seconds):.1f} s long
  frames: {size.frames}
  stride: {stride}                      # a clip spans {size.frames * stride / rate:.1f} s{slow}
  crop: {crop}
  short_side: [{round(low)}, {round(high)}]
  flip: {flip}

evaluation:
  crop: {crop}
  short_side: {crop}
  recalibration_batches: {max(5, min(200, len(train) // clips))}

model:
{size.model}
{init}
batch:
  clips: {clips}
  bn_clips: 8

optim:
{optim}

hardware:
  precision: {precision}

schedule:
  name: {"baseline" if name == "baseline" else multigrid}
"""
