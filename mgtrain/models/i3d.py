"""I3D, an inflated ResNet, without and with non-local blocks (Carreira & Zisserman 2017; Wang et al. 2018)."""

from collections import OrderedDict
from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgtrain.models.conv import Conv3d
from mgtrain.models.norm import GroupBatchNorm3d
from mgtrain.models.resnet3d import EXPANSION, Head, Stem, init_weights, stage, stage_blocks


class I3D(nn.Module):
    """I3D on a ResNet: normalized clips (B, 3, T, S, S) to logits (B, classes).

    The stem has `width` channels; `depth` is 50, 101 or the numbers of blocks of res2 .. res5. With the `attention` of
    a `NonLocal3d`, such blocks follow every second block of res3 and res4: five in a ResNet-50.
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
        self.res3 = _with_nonlocal(stage(out, 2 * width, res3, (3, 1), stride=2), 2 * out, (1, 3), attention)
        self.res4 = _with_nonlocal(stage(2 * out, 4 * width, res4, (3, 1), stride=2), 4 * out, (1, 3, 5), attention)
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


def _with_nonlocal(blocks: nn.Module, channels: int, after: Collection[int], attention: str | None) -> nn.Sequential:
    """Insert non-local blocks after these blocks (from 0), under names of their own; no other names change."""
    layers = OrderedDict[str, nn.Module]()
    for name, block in blocks.named_children():
        layers[name] = block
        if attention is not None and int(name) in after:
            layers[f"nonlocal{name}"] = NonLocal3d(channels, attention)
    return nn.Sequential(layers)


class NonLocal3d(nn.Module):
    """Add to each position its attention over the whole clip; features (B, C, T, H, W) to the same shape.

    C/2 inner channels; keys and values are pooled by 2 in space. `attention` is the paper's embedded Gaussian
    ("softmax") or its dot product without a softmax ("dot_product").
    """

    def __init__(self, channels: int, attention: str = "softmax") -> None:
        super().__init__()
        self.attention = attention
        inner = channels // 2
        self.query = Conv3d(channels, inner, 1)  # theta in the paper
        self.key = Conv3d(channels, inner, 1)  # phi
        self.value = Conv3d(channels, inner, 1)  # g
        self.out = Conv3d(inner, channels, 1)
        self.norm = GroupBatchNorm3d(channels)
        nn.init.zeros_(self.norm.weight)  # the block starts as the identity

    def forward(self, x: Tensor) -> Tensor:
        pool = (1, min(2, x.shape[3]), min(2, x.shape[4]))  # a side of one pixel stays as it is
        pooled = F.max_pool3d(x, pool)  # (B, C, T, H/2, W/2)
        attend = F.scaled_dot_product_attention if self.attention == "softmax" else dot_product_attention
        query, key, value = _tokens(self.query(x)), _tokens(self.key(pooled)), _tokens(self.value(pooled))
        attended = attend(query, key, value)  # (B, 1, T*H*W, C/2)
        attended = attended.squeeze(1).transpose(1, 2).reshape(x.shape[0], -1, *x.shape[2:])  # (B, C/2, T, H, W)
        change: Tensor = self.norm(self.out(attended))
        return x + change


def dot_product_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """query keyᵀ value / M for a query (B, 1, N, C) and key and value (B, 1, M, C), without a softmax: (B, 1, N, C).

    The products are computed in the cheaper order: query (keyᵀ value), which is linear in N and M, unless C is large.
    """
    queries, keys, channels = query.shape[2], key.shape[2], key.shape[3]
    if queries * keys < channels * (queries + keys) / 2:
        return (query @ (key / keys).transpose(2, 3)) @ value
    return query @ ((key / keys).transpose(2, 3) @ value)


def _tokens(x: Tensor) -> Tensor:
    """Features (B, C, T, H, W) as one head of attention (B, 1, T*H*W, C)."""
    tokens = x.flatten(2).transpose(1, 2).unsqueeze(1)
    # A view of a single position has strides with gaps, which attention kernels on GPUs refuse.
    return tokens if tokens.shape[2] > 1 else tokens.clone(memory_format=torch.contiguous_format)
