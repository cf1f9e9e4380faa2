"""Networks, their convolutions and their BatchNorm.

A network takes normalized clips, float (B, 3, T, S, S), and returns logits (B, classes), for any B, T and S. It does
not depend on the shape of a step. Only `weights/` reads and writes files.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, get_args

from torch import nn

from mgtrain.models.foreign import own_network, torchvision_video
from mgtrain.models.i3d import I3D
from mgtrain.models.slowfast import SlowFast
from mgtrain.recipe.model import TorchvisionOptions

TORCHVISION: tuple[str, ...] = get_args(TorchvisionOptions.model_fields["name"].annotation)
MODELS: dict[str, Callable[..., nn.Module]] = {
    "slowfast_r50": SlowFast,
    "i3d_r50": I3D,
    "i3d_nln_r50": partial(I3D, attention="softmax"),
    **{name: partial(torchvision_video, name=name) for name in TORCHVISION},
    "own": own_network,
}


def build_model(name: str, *, classes: int, **options: Any) -> nn.Module:
    """Build the named network, from normalized clips, float (B, 3, T, S, S), to logits (B, classes).

    Raises `UsageError` if it is the user's own and cannot be built.
    """
    return MODELS[name](classes, **options)
