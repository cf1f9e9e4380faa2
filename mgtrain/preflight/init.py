"""The first recipes for your own videos: as large as the data, the machine and the given time allow.

The baseline's training time is estimated from the network's multiply-adds and the speed of a matrix product on this
machine, which is right to a factor of about two; `mgtrain plan --measure` times real steps.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mgtrain.console import ShowProgress, no_progress
from mgtrain.data.found import Parts, find_videos, make_parts
from mgtrain.data.index import make_index
from mgtrain.data.listfile import write_lists
from mgtrain.data.videos import Videos
from mgtrain.engine.checks import check_shapes
from mgtrain.errors import UsageError
from mgtrain.preflight.bench_step import FORWARD_AND_BACKWARD, matrix_product
from mgtrain.preflight.stats import Stats, make_stats
from mgtrain.processes.cores import usable_cores
from mgtrain.processes.distributed import World, connect, default_procs
from mgtrain.recipe import Clip, Recipe, parse_recipe
from mgtrain.schedule import check_world, make_plan

SAMPLE = 200  # videos to open
SHARE_OF_PEAK = {"cpu": 0.45, "cuda": 0.35}  # of the matrix product's speed that a step reaches
HOURS = {"cpu": 1.0, "cuda": 12.0}  # of the baseline's training, by default
STAGES = (0.67, 0.22, 0.11)  # of the epochs, at each learning rate
LEAST_EPOCHS = 15
MIRRORED = (("left", "right"), ("leftward", "rightward"), ("clockwise", "anticlockwise"),
            ("clockwise", "counterclockwise"))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Size:
    """How large a baseline is: network, pixels and steps."""

    model: str  # lines of the recipe's `model:`
    frames: int
    stride: int
    crop: int
    clips: int  # of a step on one device
    steps: int  # at least


SMALL = "  name: i3d_r50\n  width: {}\n  depth: [1, 1, 1, 1]\n  dropout: 0.0"
FULL = "  name: slowfast_r50"
# From small to large: the largest that trains in time is chosen; if none does, the first.
SIZES = {
    "cpu": (
        Size(SMALL.format(16), 16, 4, 64, 8, 1000),
        Size(SMALL.format(16), 16, 4, 80, 8, 1500),
        Size(SMALL.format(16), 16, 4, 80, 8, 3000),
        Size(SMALL.format(24), 16, 4, 80, 8, 4000),
        Size(SMALL.format(24), 16, 4, 112, 8, 6000),
        Size(SMALL.format(32), 16, 4, 112, 8, 8000),
    ),
    "cuda": (
        Size(FULL, 32, 2, 112, 8, 4000),
        Size(FULL, 32, 2, 112, 8, 8000),
        Size(FULL, 32, 2, 160, 8, 10000),
        Size(FULL, 32, 2, 224, 8, 10000),
        Size(FULL, 32, 2, 224, 8, 20000),
        Size(FULL, 32, 2, 224, 8, 40000),
    ),
}


@dataclass(frozen=True, slots=True)
class Found:
    """What can be trained on."""

    train: Videos
    val: Videos
    files: Mapping[str, str]  # their lists, by split
    seconds: np.ndarray  # float64 (n,), of a sample of the training videos
    short_sides: np.ndarray  # pixels, of the same videos


@dataclass(frozen=True, slots=True)
class Proposal:
    """Two recipes that differ in `schedule:` only, and the estimated time of the baseline's training."""

    texts: dict[str, str]  # `baseline` and `multigrid`
    recipe: Recipe  # the baseline
    seconds: float


@dataclass(frozen=True, slots=True)
class Project:
    """What `mgtrain init` has written, and why."""

    parts: Parts
    stats: Stats  # of a sample of the training videos
    proposal: Proposal
    recipes: dict[str, Path]  # `baseline` and `multigrid`
    written: list[Path]  # lists, classes.txt and recipes

    @property
    def counts(self) -> dict[str, int]:
        """Videos of each part."""
        return {part: len(videos) for part, videos in self.parts.splits.items()}

    def describe(self) -> dict[str, Any]:
        """Plain values of the schema mgtrain.init/1."""
        train = self.parts.splits["train"]
        return {
            "schema": "mgtrain.init/1", "root": train.root, "files": [str(file) for file in self.written],
            "videos": self.counts, "classes": len(train.classes), "split_by": self.parts.rule,
            "groups": self.parts.groups, "baseline_seconds": self.proposal.seconds,
        }  # fmt: skip

    def render(self) -> str:
        """What was written and what to run next."""
        recipe, (baseline, multigrid) = self.proposal.recipe, self.recipes.values()
        classes = len(self.parts.splits["train"].classes)
        broken = len(self.stats.broken)
        return "\n".join([
            f"videos    {self.counts['train']:,} to train, {self.counts['val']:,} to validate, of {classes} classes",
            f"split by  {self.parts.rule}",
            f"baseline  {recipe.model.name}, clips of {recipe.clip.frames} frames of {recipe.clip.crop}², "
            f"{sum(recipe.optim.stages):g} epochs: about {self.proposal.seconds / 3600:.1f} h of training here",
            f"wrote     {', '.join(map(str, self.written))}",
            f"next      mgtrain plan {multigrid} --measure 2",
            f"          mgtrain fit {baseline}",
            f"          mgtrain fit {multigrid} --baseline {baseline.stem}",
            f"          mgtrain compare {baseline.stem} {multigrid.stem} --html report.html",
            *([f"first     mgtrain data check {multigrid}: {broken} videos cannot be opened"] if broken else []),
        ])  # fmt: skip


def make_project(
    data: Path,
    to: Path,
    name: str,
    *,
    root: Path | None = None,
    val: float = 0.2,
    group_by: str | None = None,
    hours: float | None = None,
    seed: int = 0,
    device: str | None = None,
    report: Callable[[str, bool], None] = lambda text, warns: None,
    progress: ShowProgress = no_progress,
) -> Project:
    """Inspect the videos at `data`, split them, and write lists and two recipes to the folder `to`.

    `report` is given each finding about the videos, and whether it is a warning.

    Raises:
        DataError: there are no labelled videos that can be used.
        UsageError: a recipe of this name exists.
    """
    videos = find_videos(data, root)
    recipes = {kind: to / f"{name}_{kind}.yaml" for kind in ("baseline", "multigrid")}
    there = next((file for file in recipes.values() if file.exists()), None)
    if there:
        raise UsageError(f"{there}: exists already; give another --name or --to")
    index = make_index(videos, progress=progress)
    for finding in index.findings:
        report(str(finding), finding.warns)
    parts = make_parts(videos, index, val=val, group_by=group_by, seed=seed)
    train, held_out = parts.splits["train"], parts.splits["val"]
    any_clip = Clip(frames=1, stride=1, crop=8, short_side=(8, 8))
    stats = make_stats(train, any_clip, sample=SAMPLE, seed=seed, workers=min(16, usable_cores()), progress=progress)
    for cause in stats.broken:
        report(cause, True)
    files = {part: os.path.abspath(to / f"{part}.csv") for part in parts.splits}
    found = Found(train, held_out, files, stats.column("seconds"), stats.column("short_side"))
    gpus = default_procs(device)
    with connect(device) as world:
        proposal = propose(found, world, gpus, hours)
    written = write_lists(to, {part: (of, range(len(of))) for part, of in parts.splits.items()})
    for kind, file in recipes.items():
        file.write_text(proposal.texts[kind], encoding="utf-8")
    return Project(parts, stats, proposal, recipes, [*written, *recipes.values()])


def propose(found: Found, world: World, gpus: int, hours: float | None) -> Proposal:
    """The recipes of the largest size whose baseline trains in `hours` on `gpus` devices like this one."""
    kind = world.device.type
    limit = 3600 * (hours if hours is not None else HOURS[kind])
    best: Proposal | None = None
    peak = 0.0
    for size in SIZES[kind]:
        texts = {name: _write(name, size, found, kind, gpus) for name in ("baseline", "multigrid")}
        recipe = parse_recipe(texts["baseline"], "proposal")
        plan = make_plan(recipe, len(found.train))
        peak = peak or matrix_product(recipe, world)
        flops = check_shapes(recipe, [recipe.base])[recipe.base]
        work = 2 * FORWARD_AND_BACKWARD * flops * plan.totals().clips
        made = Proposal(texts, recipe, work / (peak * SHARE_OF_PEAK[kind] * gpus))
        if best is None or made.seconds <= limit:
            best = made
    assert best is not None
    multigrid = parse_recipe(best.texts["multigrid"], "proposal")
    plan = make_plan(multigrid, len(found.train))
    check_world(plan, gpus)
    check_shapes(multigrid, plan.shapes())
    return best


def mirrored(classes: Sequence[str]) -> tuple[list[tuple[str, str]], bool]:
    """Pairs of classes that a flip turns into each other, going by their names; whether a flip breaks another class.

    >>> mirrored(["turn left", "turn right", "stop"])
    ([('turn left', 'turn right')], False)
    >>> mirrored(["look left", "stop"])
    ([], True)
    """
    pairs: list[tuple[str, str]] = []
    paired: set[str] = set()
    sided = set()
    for one, other in MIRRORED:
        for name in classes:
            if not re.search(rf"(?<![a-z]){one}(?![a-z])", name, re.IGNORECASE):
                continue
            twin = re.sub(rf"(?<![a-z]){one}(?![a-z])", other, name, flags=re.IGNORECASE)
            found = next((known for known in classes if known.lower() == twin.lower()), None)
            if found and not {name, found} & paired:
                pairs.append((name, found))
                paired |= {name, found}
        sided |= {name for name in classes if re.search(rf"(?<![a-z])({one}|{other})(?![a-z])", name, re.IGNORECASE)}
    return pairs, bool(sided - paired)


def _write(name: str, size: Size, found: Found, kind: str, gpus: int) -> str:
    """The text of a recipe."""
    train, clips = found.train, size.clips * gpus
    epochs = max(LEAST_EPOCHS, math.ceil(size.steps * clips / len(train)))
    ends = [round(epochs * sum(STAGES[:n])) for n in range(len(STAGES) + 1)]
    stages = [after - before for before, after in pairwise(ends)]
    # A clip spans no more than the first quartile of the videos' lengths.
    stride = max(1, min(size.stride, int(np.quantile(found.seconds, 0.25) * 30 / size.frames)))
    crop = max(48, min(size.crop, int(np.quantile(found.short_sides, 0.25)) // 16 * 16))
    low, high = (crop, crop * 5 / 4) if kind == "cpu" else (crop * 8 / 7, crop * 10 / 7)
    lr, multigrid = 0.1 * clips / 64, "multigrid                  # the cycles of the paper are the defaults"
    pairs, breaks = mirrored(train.classes)
    flip = "0.0                        # a class says left or right" if breaks else "0.5"
    precision = "bf16" if kind == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    same = f"\n  mirrored: {json.dumps(pairs, ensure_ascii=False)}" if pairs else ""
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
  videos: {len(train)}{same}

clip:                            # the median video has {np.median(found.seconds):.1f} s
  frames: {size.frames}
  stride: {stride}                      # a clip spans {size.frames * stride / 30:.1f} s
  crop: {crop}
  short_side: [{round(low)}, {round(high)}]
  flip: {flip}

evaluation:
  crop: {crop}
  short_side: {crop}
  recalibration_batches: {max(5, min(200, len(train) // clips))}

model:
{size.model}

batch:
  clips: {clips}
  bn_clips: 8

optim:
  lr: {lr:.4g}
  stages: {stages}            # epochs of each learning rate
  warmup_epochs: {max(1, round(epochs / 30))}
  warmup_lr: {lr / 10:.4g}

hardware:
  precision: {precision}

schedule:
  name: {"baseline" if name == "baseline" else multigrid}
"""
