"""Dropout whose mask belongs to the global batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgtrain.models.part import Part


class Dropout(nn.Module):
    """Dropout of features (B, C) with probability `p`.

    Given a `part`, the mask is drawn for all clips of the global batch and sliced, so that neither the number of ranks
    nor the micro-batch has a say in it.
    """

    part: Part | None = None

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if self.part is None or not self.training or self.p == 0:
            return F.dropout(x, self.p, self.training)
        keep: Tensor = keep_mask(self.part, x.shape[1], self.p)
        return x * keep.to(x.device) / (1 - self.p)  # (clips, C)

    def extra_repr(self) -> str:
        return f"p={self.p}"


# Traced, the seed would be a constant, and each step would compile anew.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def keep_mask(part: Part, channels: int, p: float) -> Tensor:
    """Which of the features (clips, channels) of this part are kept: True with probability `1 - p`."""
    # The one generator not made in rng.py, which knows no torch. On the CPU, because devices draw differently.
    generator = torch.Generator().manual_seed(part.seed)
    keep = torch.rand(part.total, channels, generator=generator) >= p  # (total, C)
    return keep[part.first : part.first + part.clips]  # (clips, C)
