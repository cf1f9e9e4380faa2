"""From decoded pixels to the network's input, on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mgtrain.recipe.model import MEAN, STD

BLACK, WHITE = -MEAN / STD, (1 - MEAN) / STD  # of normalized pixels


def normalize(clips: Tensor, memory_format: torch.memory_format) -> Tensor:
    """Pixels 0..255 to zero mean and unit deviation: uint8 (B, 3, T, S, S) -> float32 (B, 3, T, S, S)."""
    return clips.to(torch.float32, memory_format=memory_format).mul_(1 / (255 * STD)).sub_(MEAN / STD)


def restandardize(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalized pixels (B, 3, T, S, S) as a network wants them that has a mean and a deviation of each channel."""
    for channel, (m, s) in enumerate(zip(mean, std, strict=True)):
        if (m, s) != (MEAN, STD):
            x[:, channel].mul_(STD / s).add_((MEAN - m) / s)  # plain numbers, so that nothing has to go to the device
    return x
