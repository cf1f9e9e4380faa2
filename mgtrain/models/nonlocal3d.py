"""The non-local block (Wang et al. 2018)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgtrain.models.conv import Conv3d
from mgtrain.models.norm import GroupBatchNorm3d


class NonLocal3d(nn.Module):
    """Add to each position its attention over the whole clip; features (B, C, T, H, W) to the same shape.

    The block has C/2 inner channels and pools keys and values by 2 in space. `attention` is the paper's embedded
    Gaussian ("softmax") or its dot product without a softmax ("dot_product").
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
        attended = attend(
            _tokens(self.query(x)), _tokens(self.key(pooled)), _tokens(self.value(pooled))
        )  # (B, 1, T*H*W, C/2)
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
