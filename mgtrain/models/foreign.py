"""Networks that are not ours: torchvision's and one's own, made to keep the laws of training.

A network fits the method if its output does not depend on a fixed number of frames or pixels: convolution, recurrence
and self-attention, and an average over time and space before the classifier. `engine.checks.check_shapes` tries that.
Here BatchNorm is given its groups and dropout its mask of the global batch, under the names that the layers had.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import video
from torchvision.ops import StochasticDepth

from mgtrain.errors import UsageError
from mgtrain.models.dropout import DropFeatures, Dropout, DropPath
from mgtrain.models.norm import GroupBatchNorm3d


def torchvision_video(classes: int, *, name: str) -> nn.Module:
    """torchvision's network of that name, at any size: where it fixes one, it is told the clip's.

    S3D's last average is over 2 x 7 x 7 features, or over all of them where there are fewer. MViT scales its relative
    positions to the clip, as its authors' code does.
    """
    network: Any = getattr(video, name)(num_classes=classes)
    if name == "s3d":
        network.avgpool = LocalAverage(network.avgpool.kernel_size)
    elif name == "mvit_v2_s":
        network.conv_proj.register_forward_hook(_tell_size(network.pos_encoding))
    return fitted(network)


def own_network(classes: int, *, module: str, network: str, options: Mapping[str, Any]) -> nn.Module:
    """`MODELS[network](classes, **options)` of a Python module, installed or in the current folder.

    Raises:
        UsageError: there is no such module, network or option, or the network cannot be trained so.
    """
    factories = getattr(_imported(module), "MODELS", None)
    if not isinstance(factories, dict):
        raise UsageError(f"model.module {module}: has no MODELS, a dict from names to functions that make networks")
    if network not in factories:
        near = difflib.get_close_matches(network, factories, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(map(repr, factories)) or 'none'}"
        raise UsageError(f"model.network: {module} has no network {network!r}; {hint}")
    factory: Callable[..., nn.Module] = factories[network]
    try:
        inspect.signature(factory).bind(classes, **options)
    except TypeError as error:
        raise UsageError(f"model.options: {module}.MODELS[{network!r}](classes, **options): {error}") from None
    made = factory(classes, **options)
    if not isinstance(made, nn.Module):
        raise UsageError(f"model.network: {module}.MODELS[{network!r}] makes a {type(made).__name__}, no nn.Module")
    return fitted(made)


def fitted(model: nn.Module) -> nn.Module:
    """The network, in which BatchNorm and dropout know of the global batch, in place; the names of tensors stay.

    Raises:
        UsageError: a layer normalizes over the clips of a rank, which no group can be made of.
    """
    streams = iter(range(1, 1 << 30))  # ours, which has one dropout, is stream 0
    for parent_name, parent in list(model.named_modules()):
        for name, layer in parent.named_children():
            path = f"{parent_name}.{name}".removeprefix(".")
            if type(layer) is nn.BatchNorm3d and layer.affine and layer.track_running_stats:
                grouped = GroupBatchNorm3d(layer.num_features, layer.eps, layer.momentum or 0.1)
                grouped.load_state_dict(layer.state_dict(), assign=True)
                setattr(parent, name, grouped)
            elif isinstance(layer, nn.Dropout) and layer.p:
                setattr(parent, name, Dropout(layer.p, next(streams)))
            elif isinstance(layer, nn.Dropout1d | nn.Dropout2d | nn.Dropout3d) and layer.p:
                setattr(parent, name, DropFeatures(layer.p, next(streams)))
            elif isinstance(layer, StochasticDepth) and layer.p:
                if layer.mode != "row":
                    raise UsageError(f"{path}: StochasticDepth of whole batches depends on the ranks; use mode 'row'")
                setattr(parent, name, DropPath(layer.p, next(streams)))
            elif isinstance(layer, _BatchNorm) and not isinstance(layer, GroupBatchNorm3d):
                raise UsageError(
                    f"{path}: {type(layer).__name__} normalizes over the clips that a rank happens to have; use "
                    "BatchNorm3d as it is, which mgtrain gives its groups, or LayerNorm or GroupNorm"
                )
    return model


def classifier_of(model: nn.Module) -> str:
    """The name of the layer that gives the logits: the model's `classifier_name`, or its last `Linear` or `Conv3d`."""
    said = getattr(model, "classifier_name", None)
    if isinstance(said, str):
        return said
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv3d)]
    return layers[-1] if layers else ""


class LocalAverage(nn.Module):
    """Average over windows (stride 1) of features (B, C, T, H, W), or over all along an axis that has fewer."""

    def __init__(self, window: tuple[int, int, int]) -> None:
        super().__init__()
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        window = [min(w, size) for w, size in zip(self.window, x.shape[2:], strict=True)]
        return F.avg_pool3d(x, window, stride=1)

    def extra_repr(self) -> str:
        return f"window={self.window}"


def _tell_size(positions: Any) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(_: nn.Module, __: Any, patches: Tensor) -> None:  # (B, C, T, H, W)
        positions.temporal_size, *size = patches.shape[2:]
        positions.spatial_size = tuple(size)

    return hook


def _imported(module: str) -> ModuleType:
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)  # last: what lies there must not replace an installed module
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise UsageError(f"model.module {module}: needs {error.name}, which is not installed") from None
        raise UsageError(
            f"model.module {module}: no such Python module is installed or in {folder}; start mgtrain where "
            f"{module.partition('.')[0]}.py is"
        ) from None
    except Exception as error:
        raise UsageError(f"model.module {module}: cannot be imported: {type(error).__name__}: {error}") from error
