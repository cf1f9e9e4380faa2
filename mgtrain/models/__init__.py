"""Networks, their convolutions and their BatchNorm.

In come normalized clips, float (B, 3, T, S, S), out go logits (B, classes), for any B, T and S. A network never learns
which shape a step has, and nothing here reads files but `weights/`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, get_args

from torch import nn

from mgtrain.errors import UsageError
from mgtrain.models.foreign import own_network, torchvision_video
from mgtrain.models.i3d import i3d_nln_r50, i3d_r50
from mgtrain.models.slowfast import slowfast_r50
from mgtrain.recipe.model import TorchvisionOptions

TORCHVISION: tuple[str, ...] = get_args(TorchvisionOptions.model_fields["name"].annotation)
MODELS: dict[str, Callable[..., nn.Module]] = {
    "slowfast_r50": slowfast_r50,
    "i3d_r50": i3d_r50,
    "i3d_nln_r50": i3d_nln_r50,
    **{name: partial(torchvision_video, name=name) for name in TORCHVISION},
    "own": own_network,
}


def build_model(name: str, *, classes: int, **options: Any) -> nn.Module:
    """The named model: normalized clips, float (B, 3, T, S, S), to logits (B, classes), for any B, T and S."""
    if name not in MODELS:
        raise UsageError(f"no model is called {name!r}; choose one of {', '.join(MODELS)}")
    return MODELS[name](classes, **options)
