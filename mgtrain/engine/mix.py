"""MixUp and CutMix: pairs of clips, and their labels, are mixed (Zhang et al. 2018; Yun et al. 2019).

Clip 2i of the global batch is mixed with clip 2i + 1 and the reverse, and the draws are made for all pairs of the
global batch, so neither the number of ranks nor the micro-batch has a say in it: each holds whole pairs, which
`check_world` and `check_micro_batches` see to. torchvision's MixUp and CutMix cannot do that: they mix each clip with
the one before it in whatever batch they are given.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mgtrain.clips.augment import inside
from mgtrain.models.part import Part
from mgtrain.recipe import Recipe


def mix(x: Tensor, labels: Tensor, part: Part, rng: np.random.Generator, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """The pairs of one pass mixed: (B, 3, T, S, S) and labels to the same and targets, float32 (B, classes).

    A clip keeps a share of itself, drawn from Beta(alpha, alpha) for each pair: the weight of its pixels (MixUp), or
    the part of every frame outside a box, in which the partner shows (CutMix). Its target keeps as much, by pixels.
    """
    weight = kept(part, x.shape[-1], rng, recipe.augment.mixup, recipe.augment.cutmix).to(x.device, x.dtype)
    pairs = x.view(-1, 2, *x.shape[1:])  # (B / 2, 2, 3, T, S, S)
    mixed = pairs.flip(1).lerp_(pairs, weight[:, None]).flatten(0, 1)
    rows = labels  # (B, classes)
    if labels.ndim == 1:  # not by `one_hot`, which looks at the labels first
        rows = labels[:, None] == torch.arange(recipe.data.classes, device=labels.device)
    own = rows.to(x.dtype).view(-1, 2, recipe.data.classes)  # (B / 2, 2, classes)
    targets = own.flip(1).lerp_(own, weight.mean((1, 2, 3, 4))[:, None, None]).flatten(0, 1)
    return mixed, targets


def kept(part: Part, size: int, rng: np.random.Generator, mixup: float, cutmix: float) -> Tensor:
    """How much of itself each pixel of a pair's clips keeps: (pairs of this part, 1, 1, size, size), in 0..1."""
    pairs, mine = part.total // 2, slice(part.first // 2, (part.first + part.clips) // 2)
    boxed = rng.random(pairs) < (0.5 if mixup and cutmix else bool(cutmix))
    share = np.where(boxed, rng.beta(cutmix or 1, cutmix or 1, pairs), rng.beta(mixup or 1, mixup or 1, pairs))
    centre, half = rng.random((pairs, 2)), np.sqrt(1 - share)[:, None] / 2
    blend = torch.from_numpy(share[mine])[:, None, None, None, None]
    box = inside((centre - half)[mine], (centre + half)[mine], size)
    return torch.where(torch.from_numpy(boxed[mine])[:, None, None, None, None], ~box, blend)
