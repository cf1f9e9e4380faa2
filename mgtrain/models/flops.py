"""Multiply-adds of a forward pass, counted without computing it."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_flops(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """Multiply-adds of the convolutions and matrix products of a forward pass at `shape` (B, T, S).

    One multiply-add counts as 1, as in the papers' tables. The pass runs on the meta device, so it takes no memory.
    """
    meta = model if next(model.parameters()).is_meta else copy.deepcopy(model).to("meta")
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        meta.eval()(torch.empty(shape[0], 3, shape[1], shape[2], shape[2], device="meta"))
    flops: int = counter.get_total_flops()  # torch counts a multiply-add as 2
    return flops // 2
