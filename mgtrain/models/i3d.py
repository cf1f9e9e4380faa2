"""I3D, an inflated ResNet, without and with non-local blocks (Carreira & Zisserman 2017; Wang et al. 2018)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from mgtrain.models.nonlocal3d import NonLocal3d
from mgtrain.models.resnet3d import EXPANSION, Head, Stem, init_weights, stage, stage_blocks


class I3D(nn.Module):
    """I3D network: normalized clips (B, 3, T, S, S) to logits (B, classes).

    `nonlocal_after` lists the blocks (from 0) of res3 and of res4 that a non-local block follows. Blocks that a
    shortened network does not have are ignored.
    """

    def __init__(
        self,
        classes: int,
        width: int,
        depth: int | Sequence[int],
        dropout: float,
        nonlocal_after: tuple[Collection[int], Collection[int]],
        attention: str = "softmax",
    ) -> None:
        super().__init__()
        res2, res3, res4, res5 = stage_blocks(depth)
        out = EXPANSION * width
        self.stem = Stem(width, frames=5)
        self.res2 = stage(width, width, res2, frames=(3,), stride=1)
        self.res3 = _with_nonlocal(
            stage(out, 2 * width, res3, frames=(3, 1), stride=2), 2 * out, nonlocal_after[0], attention
        )
        self.res4 = _with_nonlocal(
            stage(2 * out, 4 * width, res4, frames=(3, 1), stride=2), 4 * out, nonlocal_after[1], attention
        )
        self.res5 = stage(4 * out, 8 * width, res5, frames=(1, 3), stride=2)
        self.head = Head(8 * out, classes, dropout)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.res2(self.stem(x))  # (B, 4 * width, T, S/4, S/4)
        # Drops an odd frame at the end, as in the published networks, but keeps a single frame.
        x = F.max_pool3d(x, (min(2, x.shape[2]), 1, 1))  # (B, 4 * width, T/2, S/4, S/4)
        x = self.res5(self.res4(self.res3(x)))  # (B, 32 * width, T/2, S/32, S/32)
        logits: Tensor = self.head(x)
        return logits


def i3d_r50(classes: int, *, width: int = 64, depth: int | Sequence[int] = 50, dropout: float = 0.5) -> I3D:
    """I3D on a ResNet: `width` channels in the stem; `depth` is 50, 101 or the numbers of blocks of res2 .. res5."""
    return I3D(classes, width, depth, dropout, nonlocal_after=((), ()))


def i3d_nln_r50(
    classes: int, *, width: int = 64, depth: int | Sequence[int] = 50, dropout: float = 0.5, attention: str = "softmax"
) -> I3D:
    """I3D with non-local blocks after every second block of res3 and res4: five in a ResNet-50."""
    return I3D(classes, width, depth, dropout, ((1, 3), (1, 3, 5)), attention)


def _with_nonlocal(blocks: nn.Sequential, channels: int, after: Collection[int], attention: str) -> nn.Sequential:
    """Insert non-local blocks under their own names, so that the names of the other blocks do not change."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for index, block in enumerate(blocks):
        layers[str(index)] = block
        if index in after:
            layers[f"nonlocal{index}"] = NonLocal3d(channels, attention)
    return nn.Sequential(layers)
