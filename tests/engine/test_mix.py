"""MixUp and CutMix: pairs of the global batch, whatever part of it a pass sees."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mgtrain.clips.augment import sent
from mgtrain.engine.mix import mix, mix_rows
from mgtrain.models.part import Part
from mgtrain.recipe import Recipe
from mgtrain.rng import Draw, generator

CLIPS = 48
WHOLE = Part(0, CLIPS, CLIPS, 1)
MIXES = pytest.mark.parametrize("how", [("mixup=0.8",), ("cutmix=1",), ("mixup=0.8", "cutmix=1")], ids=" ".join)


def batch() -> tuple[Tensor, Tensor]:
    """Clips (48, 3, 2, 16, 16), each of one value of its own, and their labels."""
    x = torch.arange(1.0, CLIPS + 1)[:, None, None, None, None].repeat(1, 3, 2, 16, 16)
    return x.contiguous(memory_format=torch.channels_last_3d), torch.arange(CLIPS) % 4


def mixed(recipe: Recipe, part: Part = WHOLE, step: int = 0) -> tuple[Tensor, Tensor]:
    """What a pass makes of its part of the batch."""
    x, labels = batch()
    mine = slice(part.first, part.first + part.clips)
    rng, augment = generator(0, Draw.MIX, step), recipe.augment
    rows = sent({"mix": mix_rows(part, x.shape[-1], rng, augment.mixup, augment.cutmix)}, x.device)["mix"]
    return mix(x[mine], labels[mine], rows, classes=4)


def share_of_itself(targets: Tensor) -> Tensor:
    """Neighbours have other labels."""
    return targets.gather(1, (torch.arange(CLIPS) % 4)[:, None])[:, 0]


@MIXES
def test_targets_sum_to_one_and_name_the_pair(tiny: Callable[..., Recipe], how: tuple[str, ...]) -> None:
    _, targets = mixed(tiny(*(f"augment.{key}" for key in how)))
    labels = torch.arange(CLIPS) % 4
    assert targets.sum(1) == pytest.approx(torch.ones(CLIPS), abs=1e-6)
    partner = targets.gather(1, labels.view(-1, 2).flip(1).view(-1, 1))[:, 0]
    assert share_of_itself(targets) + partner == pytest.approx(torch.ones(CLIPS), abs=1e-6)


def test_mixup_is_the_weighted_mean_of_a_pair(tiny: Callable[..., Recipe]) -> None:
    (x, _), (clips, targets) = batch(), mixed(tiny("augment.mixup=0.8"))
    share = share_of_itself(targets)
    assert torch.equal(share[::2], share[1::2])
    assert len(share.unique()) == CLIPS // 2
    weight = share[:, None, None, None, None]
    assert clips == pytest.approx(weight * x + (1 - weight) * x.view(-1, 2, *x.shape[1:]).flip(1).view_as(x), abs=1e-4)


def test_cutmix_shows_the_partner_in_a_box_and_the_target_counts_pixels(tiny: Callable[..., Recipe]) -> None:
    (x, _), (clips, targets) = batch(), mixed(tiny("augment.cutmix=1"))
    own = clips == x  # (B, 3, T, S, S)
    assert torch.equal(own, own[:, :1, :1].expand_as(own))
    assert torch.equal(clips[~own], x.view(-1, 2, *x.shape[1:]).flip(1).flatten(0, 1)[~own])
    assert share_of_itself(targets) == pytest.approx(own.double().mean((1, 2, 3, 4)).float(), abs=1e-6)
    for mask in ~own[:, 0, 0]:
        assert torch.equal(mask, mask.any(1)[:, None] & mask.any(0))
    assert torch.equal(own[::2], own[1::2])


def test_with_both_each_pair_draws_one(tiny: Callable[..., Recipe]) -> None:
    x, _ = batch()
    clips, _ = mixed(tiny("augment.mixup=1", "augment.cutmix=1"))
    blended = ((clips != x) & (clips != x.view(-1, 2, *x.shape[1:]).flip(1).view_as(x))).flatten(1).any(1)
    assert 12 <= blended.sum() <= 36


@MIXES
def test_parts_are_mixed_as_the_whole_is(tiny: Callable[..., Recipe], how: tuple[str, ...]) -> None:
    recipe = tiny(*(f"augment.{key}" for key in how))
    sizes = (16, 24, 8)
    parts = [mixed(recipe, Part(sum(sizes[:i]), clips, CLIPS, 6)) for i, clips in enumerate(sizes)]
    for ours, theirs in zip(map(torch.cat, zip(*parts, strict=True)), mixed(recipe), strict=True):
        assert torch.equal(ours, theirs)


def test_each_step_mixes_anew_and_keeps_the_layout(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny("augment.mixup=0.8")
    clips, _ = mixed(recipe)
    assert not torch.equal(clips, mixed(recipe, step=1)[0])
    assert clips.is_contiguous(memory_format=torch.channels_last_3d)


def test_shares_are_drawn_by_the_alpha_of_each() -> None:
    whole = Part(0, 4000, 4000, 1)
    for alphas in ((100.0, 0.0), (0.0, 100.0), (100.0, 0.01), (0.01, 100.0)):
        rows = mix_rows(whole, 64, generator(0, Draw.MIX, 0), *alphas)[::2]
        for boxed, alpha in ((0, alphas[0]), (1, alphas[1])):
            share = rows[rows[:, 0] == boxed, 1]
            assert len(share) == 0 or (share.std() < 0.06) == (alpha == 100)


def test_a_box_has_the_area_that_the_share_leaves() -> None:
    rows = mix_rows(Part(0, 4000, 4000, 1), 1000, generator(0, Draw.MIX, 0), 0.0, 50.0)[::2]
    sides = rows[:, 4:] - rows[:, 2:4]
    assert sides.prod(1) / 1e6 == pytest.approx(1 - rows[:, 1], abs=0.005)
