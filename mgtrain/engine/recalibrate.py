"""Recalibration of BatchNorm ("precise BN"): statistics of the evaluation's shape for the weights as they are.

After steps of coarse shapes the running averages belong to coarse shapes, so they are measured again before every
reported accuracy (Wu et al. 2020, section 4; Wu and Johnson 2021).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mgtrain.clips.loader import BadVideos, recalibration_batches
from mgtrain.data.videos import Videos
from mgtrain.engine.step import autocast, to_input
from mgtrain.models.norm import merge_group_stats, reset_group_stats, set_momentum
from mgtrain.models.part import Part, set_part
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe
from mgtrain.schedule.plan import bn_groups


def recalibrate(model: nn.Module, train: Videos, recipe: Recipe, world: World) -> bool:
    """Recalibrate on training clips of the evaluation's grid, as many batches as the recipe says; whether it does."""
    if recipe.evaluation.recalibration_batches == 0:
        return False
    bad = BadVideos(len(train), recipe.data.max_bad_fraction)
    recalibrate_bn(model, recalibration_batches(train, recipe, world, bad), recipe, world)
    return True


@torch.no_grad()
def recalibrate_bn(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], recipe: Recipe, world: World) -> int:
    """Set BatchNorm's running statistics to the mean over `batches`, of all ranks; returns how many batches there were.

    Weights do not change. Each batch is this rank's share of a batch of the base shape's clips.
    """
    model.train()
    groups = bn_groups(recipe.base, recipe.batch.bn_clips)
    count = 0
    for clips, _ in batches:
        if count == 0:
            reset_group_stats(model)
        count += 1
        set_momentum(model, 1 / count, pool=True)  # the running statistics become those of all batches together
        share = len(clips)
        set_part(model, Part(world.rank * share, share, share * world.size, groups, world.size, 0, world.gather))
        with autocast(recipe, world):
            model(to_input(clips, recipe))
    set_momentum(model, None)
    merge_group_stats(model, world.gather)
    return count
