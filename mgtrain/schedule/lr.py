"""The baseline's learning-rate curves; the plan scales them by the long cycle's batch (Wu et al. 2020, section 3.4)."""

from __future__ import annotations

import math


def stepwise(base_lr: float, gamma: float, stage: int) -> float:
    """The learning rate of a stage, `base_lr * gamma**stage`.

    >>> [stepwise(0.1, 0.1, stage) for stage in range(2)]
    [0.1, 0.010000000000000002]
    """
    return base_lr * gamma**stage


def cosine(base_lr: float, end_lr: float, progress: float) -> float:
    """The learning rate on half a cosine from `base_lr` at progress 0 to `end_lr` at progress 1.

    >>> cosine(0.1, 0.0, 0.5)
    0.05
    """
    return end_lr + (base_lr - end_lr) * (1 + math.cos(math.pi * progress)) / 2


def warmup(start_lr: float, end_lr: float, epoch: float, epochs: float) -> float:
    """The learning rate on a line from `start_lr` at epoch 0 to `end_lr` at epoch `epochs`.

    >>> warmup(0.01, 0.81, epoch=17, epochs=34)
    0.41000000000000003
    """
    return start_lr + (end_lr - start_lr) * epoch / epochs
