"""The non-local block (Wang et al. 2018)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mgtrain.models.conv import Conv3d
from mgtrain.models.norm import GroupBatchNorm3d


class NonLocal3d(nn.Module):
    """Adds to each place what it attends to in the whole clip; (B, C, T, H, W) to the same shape.

    Half the channels inside, keys and values pooled by 2 in space. `attention` is the paper's embedded Gaussian
    ("softmax") or its dot product, without a softmax, whose two matrix products are taken in the cheaper order.
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
        nn.init.zeros_(self.norm.weight)  # so that the block starts as the identity

    def forward(self, x: Tensor) -> Tensor:
        pool = (1, min(2, x.shape[3]), min(2, x.shape[4]))  # a map one pixel wide cannot be halved
        pooled = F.max_pool3d(x, pool)  # (B, C, T, H/2, W/2)
        attend = F.scaled_dot_product_attention if self.attention == "softmax" else dot_product_attention
        attended = attend(
            _tokens(self.query(x)), _tokens(self.key(pooled)), _tokens(self.value(pooled))
        )  # (B, 1, T*H*W, C/2)
        attended = attended.squeeze(1).transpose(1, 2).reshape(x.shape[0], -1, *x.shape[2:])  # (B, C/2, T, H, W)
        change: Tensor = self.norm(self.out(attended))
        return x + change


def dot_product_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Values weighed by the products of queries and keys, over the number of keys: (B, 1, N, C) and (B, 1, M, C) twice.

    (query keyᵀ) value = query (keyᵀ value): the second is linear in N and M, and cheaper unless C is larger than these.
    """
    queries, keys, channels = query.shape[2], key.shape[2], key.shape[3]
    if queries * keys < channels * (queries + keys) / 2:
        return (query @ key.transpose(2, 3)) @ value / keys
    return query @ (key.transpose(2, 3) @ value / keys)


def _tokens(x: Tensor) -> Tensor:
    """Features (B, C, T, H, W) as one head of attention (B, 1, T*H*W, C)."""
    return x.flatten(2).transpose(1, 2).unsqueeze(1)
