"""Dropout whose mask belongs to the global batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mgtrain.models.part import Part

STREAMS = 0x9E3779B97F4A7C15  # odd, so that the seeds of all streams differ


class Dropout(nn.Module):
    """Dropout of features (B, ...) with probability `p`; each layer of a network is a `stream` of its own.

    Given a `part`, the mask is drawn for all clips of the global batch and sliced, so that neither the number of ranks
    nor the micro-batch has a say in it.
    """

    part: Part | None = None
    axes: int | None = None  # of the features, how many tell apart what is dropped; None: all

    def __init__(self, p: float, stream: int = 0) -> None:
        super().__init__()
        self.p, self.stream = p, stream

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        drawn = x.shape[1:][: self.axes]
        if self.part is None:
            keep = torch.rand(len(x), drawn.numel(), device=x.device) >= self.p
        else:
            keep = keep_mask(self.part, drawn.numel(), self.p, self.stream).to(x.device)
        return x * keep.view(len(x), *drawn, *[1] * (x.ndim - 1 - len(drawn))) / (1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class DropFeatures(Dropout):
    """Dropout of whole channels of (B, C, ...)."""

    axes = 1


class DropPath(Dropout):
    """Dropout of whole clips of (B, ...): stochastic depth (Huang et al. 2016)."""

    axes = 0


# Traced, the seed would be a constant, and each step would compile again.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def keep_mask(part: Part, features: int, p: float, stream: int) -> Tensor:
    """Which of the features (clips, features) of this part are kept: True with probability `1 - p`."""
    # The one generator not made in rng.py, which knows no torch. On the CPU, because devices draw differently.
    generator = torch.Generator().manual_seed((part.seed + stream * STREAMS) % (1 << 63))
    keep = torch.rand(part.total, features, generator=generator) >= p  # (total, features)
    return keep[part.first : part.first + part.clips]  # (clips, features)
