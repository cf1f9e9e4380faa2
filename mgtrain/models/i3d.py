"""I3D, an inflated ResNet, without and with non-local blocks (Carreira & Zisserman 2017; Wang et al. 2018)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from mgtrain.models.nonlocal3d import NonLocal3d
from mgtrain.models.resnet3d import EXPANSION, Head, Stem, init_weights, stage, stage_blocks


class I3D(nn.Module):
    """I3D on a ResNet: normalized clips (B, 3, T, S, S) to logits (B, classes).

    The stem has `width` channels; `depth` is 50, 101 or the numbers of blocks of res2 .. res5. `attention` is that of
    the non-local blocks; None: without them.
    """

    def __init__(
        self, classes: int, attention: str | None = None, *, width: int = 64, depth: int | Sequence[int] = 50,
        dropout: float = 0.5,
    ) -> None:  # fmt: skip
        super().__init__()
        res2, res3, res4, res5 = stage_blocks(depth)
        out = EXPANSION * width
        self.stem = Stem(width, frames=5)
        self.res2 = stage(width, width, res2, frames=(3,), stride=1)
        self.res3 = stage(out, 2 * width, res3, frames=(3, 1), stride=2)
        self.res3 = _with_nonlocal(self.res3, 2 * out, (1, 3), attention)
        self.res4 = stage(2 * out, 4 * width, res4, frames=(3, 1), stride=2)
        self.res4 = _with_nonlocal(self.res4, 4 * out, (1, 3, 5), attention)
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


def i3d_nln_r50(
    classes: int, *, width: int = 64, depth: int | Sequence[int] = 50, dropout: float = 0.5, attention: str = "softmax"
) -> I3D:
    """I3D with non-local blocks after every second block of res3 and res4: five in a ResNet-50."""
    return I3D(classes, attention, width=width, depth=depth, dropout=dropout)


def _with_nonlocal(blocks: nn.Module, channels: int, after: Collection[int], attention: str | None) -> nn.Sequential:
    """Insert non-local blocks after these blocks (from 0), under names of their own; no other names change."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for index, block in enumerate(blocks.children()):
        layers[str(index)] = block
        if attention is not None and index in after:
            layers[f"nonlocal{index}"] = NonLocal3d(channels, attention)
    return nn.Sequential(layers)
