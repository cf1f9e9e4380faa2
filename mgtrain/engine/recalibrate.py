"""Recalibration of BatchNorm ("precise BN"): compute its statistics at the evaluation's shape.

After steps at coarse shapes the running averages are those of coarse shapes, so an evaluation first computes them again
(Wu et al. 2020, section 4; Wu and Johnson 2021).
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mgtrain.clips.loader import recalibration_batches
from mgtrain.data.videos import Videos
from mgtrain.engine.checks import pass_clips
from mgtrain.engine.step import autocast, to_input
from mgtrain.grid import Shape
from mgtrain.models.norm import GroupBatchNorm3d, group_slots, merge_group_stats, reset_group_stats, set_momentum
from mgtrain.models.part import Part, set_part
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe
from mgtrain.schedule import Plan
from mgtrain.schedule.plan import bn_groups, check_shares

REMEMBERED = 50  # steps; with a momentum of 0.1, earlier ones make up 0.5 % of a running average
SHARE = 1 / 7  # of the steps: the limit of the batches to recalibrate on
LEAST = 5  # batches that useful statistics need


def recalibrate(model: nn.Module, train: Videos, count: int, recipe: Recipe, world: World) -> None:
    """Recalibrate on `count` batches of training clips, cut with the evaluation's grid; 0: keep the statistics."""
    if count and group_slots(model):  # else there is no BatchNorm, or only frozen ones
        groups = bn_groups(recipe.base, recipe.batch.bn_clips)
        check_shares("recalibration has batches", recipe.base.clips, groups, world.size)
        recalibrate_bn(model, recalibration_batches(train, count, recipe, world), recipe, world)


def remembered(model: nn.Module) -> int:
    """The last steps that determine the running averages, to 0.5 %: `REMEMBERED` with the usual momentum of 0.1."""
    norms = (layer for layer in model.modules() if isinstance(layer, GroupBatchNorm3d) and not layer.frozen)
    momentum = min((norm.usual_momentum for norm in norms if norm.usual_momentum), default=0.1)
    return REMEMBERED if momentum >= 1 else max(1, round(math.log(0.005) / math.log1p(-momentum)))


def batches_needed(recipe: Recipe, plan: Plan, step: int, remembered: int = REMEMBERED) -> int:
    """The number of batches to recalibrate on after `step` steps.

    0 if the last `remembered` steps all had the evaluation's shape, and the weights themselves are evaluated, not their
    average. Otherwise at most `SHARE` of the steps since the last evaluation, or of all steps at the end of the run: a
    batch takes about a third of the time of a base step, so recalibration takes 5 to 10 % of the training time.
    """
    most, shape = recipe.evaluation.recalibration_batches, recipe.evaluation_shape
    recent = plan[max(0, step - remembered) : step]
    settled = step >= remembered or remembered <= REMEMBERED  # the first steps are too few to matter
    alike = all((s.shape.frames, s.shape.crop) == (shape.frames, shape.crop) for s in recent)
    if recipe.optim.ema is None and settled and alike:
        return 0
    earlier = [milestone for milestone in plan.milestones(recipe.evaluation.times) if milestone < step]
    since = step if step == len(plan) else step - (earlier[-1] if earlier else 0)
    return min(most, max(LEAST, int(SHARE * since)))


@torch.no_grad()
def recalibrate_bn(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], recipe: Recipe, world: World) -> int:
    """Set BatchNorm's running statistics to their mean over the `batches` of all ranks; returns their number."""
    model.train()
    groups, count = bn_groups(recipe.base, recipe.batch.bn_clips), 0
    for count, (clips, _) in enumerate(batches, start=1):
        if count == 1:
            reset_group_stats(model)
        set_momentum(model, 1 / count, pool=True)  # a running mean over all batches
        share = len(clips)  # of as many clips as a base step has
        total, grid = share * world.size, recipe.evaluation_shape
        size = pass_clips(recipe, Shape(total, grid.frames, grid.crop), groups, world.size)
        for first in range(0, share, size):
            mine = clips[first : first + size]
            set_part(model, Part(world.rank * share + first, len(mine), total, groups, world.size, 0, world.gather))
            with autocast(recipe, world):
                model(to_input(mine, recipe))
    set_momentum(model, None)
    merge_group_stats(model, world.gather)
    return count
