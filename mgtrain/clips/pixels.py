"""From decoded pixels to the network's input, on the device."""

from __future__ import annotations

import torch
from torch import Tensor

MEAN = 0.45  # of pixels in 0..1, all channels alike (Feichtenhofer et al. 2019)
STD = 0.225
BLACK, WHITE = -MEAN / STD, (1 - MEAN) / STD  # of normalized pixels


def normalize(clips: Tensor, memory_format: torch.memory_format) -> Tensor:
    """Pixels 0..255 to zero mean and unit deviation: uint8 (B, 3, T, S, S) -> float32 (B, 3, T, S, S)."""
    return clips.to(torch.float32, memory_format=memory_format).mul_(1 / (255 * STD)).sub_(MEAN / STD)
