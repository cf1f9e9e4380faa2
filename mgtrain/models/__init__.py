"""Video classifiers whose output does not depend on a fixed number of frames or pixels.

Importing this package, or `mgtrain.models.options`, does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

from mgtrain.errors import UsageError
from mgtrain.models.options import TorchvisionOptions

TORCHVISION: tuple[str, ...] = get_args(TorchvisionOptions.model_fields["name"].annotation)

if TYPE_CHECKING:
    from torch import nn

    MODELS: dict[str, Callable[..., nn.Module]]


def __getattr__(name: str) -> Any:
    """`MODELS`, the factories by name, is made when first asked for, because the factories import torch."""
    if name != "MODELS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mgtrain.models.foreign import own_network, torchvision_video
    from mgtrain.models.i3d import i3d_nln_r50, i3d_r50
    from mgtrain.models.slowfast import slowfast_r50

    return {
        "slowfast_r50": slowfast_r50,
        "i3d_r50": i3d_r50,
        "i3d_nln_r50": i3d_nln_r50,
        **{name: partial(torchvision_video, name=name) for name in TORCHVISION},
        "own": own_network,
    }


def build_model(name: str, *, classes: int, **options: Any) -> nn.Module:
    """The named model: normalized clips, float (B, 3, T, S, S), to logits (B, classes), for any B, T and S."""
    from mgtrain.models import MODELS

    if name not in MODELS:
        raise UsageError(f"no model is called {name!r}; choose one of {', '.join(MODELS)}")
    return MODELS[name](classes, **options)
