"""Recompute the activations of blocks in the backward pass instead of keeping them (Chen et al. 2016)."""

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mgtrain.models.norm import without_tracking

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that a network repeats: its outermost modules that contain layers and whose type occurs twice or more.

    >>> from mgtrain.models import build_model
    >>> from collections import Counter
    >>> Counter(type(block).__name__ for block in blocks(build_model("i3d_nln_r50", classes=4, width=8)))
    Counter({'Bottleneck': 16, 'NonLocal3d': 5})
    """
    composite = [m for m in model.modules() if type(m) not in CONTAINERS and next(m.children(), None) is not None]
    times = Counter(type(module) for module in composite)

    def outermost(module: nn.Module) -> Iterator[nn.Module]:
        if times[type(module)] > 1:
            yield module
        else:
            for child in module.children():
                yield from outermost(child)

    return list(outermost(model))


def recompute(model: nn.Module) -> int:
    """Change the network, in place, to keep only its blocks' inputs for the backward pass; return the number of blocks.

    Gradients and BatchNorm's running statistics are the same, bit for bit.
    """
    found = blocks(model)
    kinds = {kind: _recomputed(kind) for kind in {type(block) for block in found}}
    for block in found:
        block.__class__ = kinds[type(block)]
    return len(found)


def _recomputed(kind: Any) -> type[nn.Module]:
    """A subclass that recomputes its activations. A class, not a hook, so that copies of a module behave the same."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        usual = partial(kind.forward, self)
        if not (self.training and torch.is_grad_enabled()):
            return usual(*args, **kwargs)
        if torch.compiler.is_compiling():  # it updates running statistics once although it recomputes
            return checkpoint(usual, *args, use_reentrant=False, **kwargs)
        return checkpoint(
            usual, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), without_tracking()), **kwargs
        )

    return type(kind.__name__, (kind,), {"forward": forward})
