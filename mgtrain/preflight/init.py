"""The first recipes for somebody's own videos: as large as the data and the machine allow within the time given.

The baseline's training is estimated from the network's multiply-adds and the machine's product of matrices, which is
good to a factor of two or so; `mgtrain plan --measure` times the real steps.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from mgtrain.data.videos import Videos
from mgtrain.engine.checks import check_shapes
from mgtrain.preflight.bench_step import FORWARD_AND_BACKWARD, matrix_product
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe, parse_recipe
from mgtrain.schedule import check_world, make_plan

SHARE_OF_PEAK = {"cpu": 0.45, "cuda": 0.35}  # of the matrix product's rate, that a step reaches
HOURS = {"cpu": 1.0, "cuda": 12.0}  # of the baseline's training, unless told
STAGES = (0.67, 0.22, 0.11)  # of the epochs, at each learning rate
LEAST_EPOCHS = 15
TURNED = (
    ("left", "right"),
    ("leftward", "rightward"),
    ("clockwise", "anticlockwise"),
    ("clockwise", "counterclockwise"),
)


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
# From small to large: the largest that is through in time is taken; the first one, if none is.
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
    """What there is to train on."""

    train: Videos
    val: Videos
    files: Mapping[str, str]  # the lists of both, by split
    seconds: np.ndarray  # float64 (n,), of a sample of the training videos
    short_sides: np.ndarray  # pixels, of the same


@dataclass(frozen=True, slots=True)
class Proposal:
    """A pair of recipes that differ in `schedule:` only, and what the baseline's training is thought to take."""

    texts: dict[str, str]  # `baseline` and `multigrid`
    recipe: Recipe  # the baseline
    seconds: float


def propose(found: Found, world: World, gpus: int, hours: float | None) -> Proposal:
    """The recipes of the largest size whose baseline trains in `hours` on so many devices like this one."""
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
    """Pairs of classes that a flip makes of one another, by their words; and whether a flip would break some class.

    >>> mirrored(["turn left", "turn right", "stop"])
    ([('turn left', 'turn right')], False)
    >>> mirrored(["look left", "stop"])
    ([], True)
    """
    pairs: list[tuple[str, str]] = []
    paired: set[str] = set()
    sided = set()
    for one, other in TURNED:
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
    """A recipe's text."""
    train, clips = found.train, size.clips * gpus
    epochs = max(LEAST_EPOCHS, math.ceil(size.steps * clips / len(train)))
    ends = [round(epochs * sum(STAGES[:n])) for n in range(len(STAGES) + 1)]
    stages = [after - before for before, after in pairwise(ends)]
    # A clip spans no more than a video that is shorter than three of four others.
    stride = max(1, min(size.stride, int(np.quantile(found.seconds, 0.25) * 30 / size.frames)))
    crop = max(48, min(size.crop, int(np.quantile(found.short_sides, 0.25)) // 16 * 16))
    low, high = (crop, crop * 5 / 4) if kind == "cpu" else (crop * 8 / 7, crop * 10 / 7)
    lr = 0.1 * clips / 64
    pairs, breaks = mirrored(train.classes)
    flip = "0.0                        # a class says left or right" if breaks else "0.5"
    precision = "bf16" if kind == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    schedule = "multigrid                  # the cycles of the paper, which are the defaults"
    lines = [
        f"# {os.path.basename(os.path.abspath(train.root))}: {len(train.classes)} classes, {len(train):,} training and "
        f"{len(found.val):,} validation videos, by `mgtrain init`.",
        "#",
        "# Baseline and multigrid recipe differ in `schedule:` only; diff the two to see the experiment.",
        "",
        "seed: 0",
        "",
        "data:",
        "  format: list",
        f"  root: {json.dumps(os.path.abspath(train.root), ensure_ascii=False)}",
        f"  train: {json.dumps(found.files['train'], ensure_ascii=False)}",
        f"  val: {json.dumps(found.files['val'], ensure_ascii=False)}",
        f"  classes: {len(train.classes)}",
        f"  videos: {len(train)}",
        *([f"  mirrored: {json.dumps(pairs, ensure_ascii=False)}"] if pairs else []),
        "",
        f"clip:                            # of videos of {np.median(found.seconds):.1f} s, their median",
        f"  frames: {size.frames}",
        f"  stride: {stride}                      # a clip spans {size.frames * stride / 30:.1f} s",
        f"  crop: {crop}",
        f"  short_side: [{round(low)}, {round(high)}]",
        f"  flip: {flip}",
        "",
        "evaluation:",
        f"  crop: {crop}",
        f"  short_side: {crop}",
        f"  recalibration_batches: {max(5, min(200, len(train) // clips))}",
        "",
        "model:",
        size.model,
        "",
        "batch:",
        f"  clips: {clips}",
        "  bn_clips: 8",
        "",
        "optim:",
        f"  lr: {lr:.4g}",
        f"  stages: {stages}            # epochs of each learning rate",
        f"  warmup_epochs: {max(1, round(epochs / 30))}",
        f"  warmup_lr: {lr / 10:.4g}",
        "",
        "hardware:",
        f"  precision: {precision}",
        "",
        "schedule:",
        f"  name: {'baseline' if name == 'baseline' else schedule}",
    ]
    return "\n".join(lines) + "\n"
