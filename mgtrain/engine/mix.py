"""MixUp and CutMix: mix pairs of clips and their labels (Zhang et al. 2018; Yun et al. 2019).

Clips 2i and 2i + 1 of the global batch are mixed with each other, with random numbers drawn for all of its pairs, so
the result does not depend on the number of ranks or micro-batches, which hold whole pairs.
"""

import numpy as np
import torch
from torch import Tensor

from mgtrain.clips.augment import box_rows, inside
from mgtrain.models.part import Part


def mix(x: Tensor, labels: Tensor, rows: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Mix pairs by `mix_rows`, on the device: returns mixed clips (B, 3, T, S, S) and targets, float32 (B, classes).

    Each pair draws a share from Beta(alpha, alpha): the weight of a clip's own pixels (MixUp), or the area of its
    frames that a box of its partner's pixels does not cover (CutMix). The target has the same share.
    """
    boxed, share = rows[::2, 0].bool(), rows[::2, 1]  # (B / 2)
    spread = (slice(None), None, None, None, None)
    weight = torch.where(boxed[spread], ~inside(rows[::2, 2:], x.shape[-1]), share[spread])  # (B / 2, 1, 1, S, S)
    pairs = x.view(-1, 2, *x.shape[1:])  # (B / 2, 2, 3, T, S, S)
    mixed = pairs.flip(1).lerp_(pairs, weight[:, None]).flatten(0, 1)
    targets = labels  # (B, classes)
    if labels.ndim == 1:  # `one_hot` would wait for the GPU
        targets = labels[:, None] == torch.arange(classes, device=labels.device)
    own = targets.to(x.dtype).view(-1, 2, classes)  # (B / 2, 2, classes)
    targets = own.flip(1).lerp_(own, weight.mean((1, 2, 3, 4))[:, None, None]).flatten(0, 1)
    return mixed, targets


def mix_rows(part: Part, size: int, rng: np.random.Generator, mixup: float, cutmix: float) -> np.ndarray:
    """A row for each clip of a micro-batch, (B, 6): 1 for CutMix, the share of MixUp, the box of CutMix."""
    pairs, mine = part.total // 2, slice(part.first // 2, (part.first + part.clips) // 2)
    boxed = rng.random(pairs) < (0.5 if mixup and cutmix else bool(cutmix))
    share = np.where(boxed, rng.beta(cutmix or 1, cutmix or 1, pairs), rng.beta(mixup or 1, mixup or 1, pairs))
    centre, half = rng.random((pairs, 2)), np.sqrt(1 - share)[:, None] / 2
    boxes = box_rows(centre - half, centre + half, size)
    return np.concatenate([boxed[:, None], share[:, None], boxes], axis=1)[mine].repeat(2, axis=0)
