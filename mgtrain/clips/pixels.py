"""Normalize pixels on the device for the network."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mgtrain.recipe.model import MEAN, STD

BLACK, WHITE = -MEAN / STD, (1 - MEAN) / STD  # of normalized pixels


def normalize(clips: Tensor, memory_format: torch.memory_format) -> Tensor:
    """Normalize pixels 0..255 by `MEAN` and `STD`: uint8 (B, 3, T, S, S) -> float32 (B, 3, T, S, S)."""
    return clips.to(torch.float32, memory_format=memory_format).mul_(1 / (255 * STD)).sub_(MEAN / STD)


def restandardize(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Change the normalization of clips (B, 3, T, S, S), in place, to a mean and deviation for each channel."""
    for channel, (m, s) in enumerate(zip(mean, std, strict=True)):
        if (m, s) != (MEAN, STD):
            x[:, channel].mul_(STD / s).add_((MEAN - m) / s)  # Python numbers are not copied to the device
    return x
