"""torchvision's networks and the user's own, with BatchNorm groups and dropout masks of the global batch.

A network suits multigrid training if it accepts any number of frames and pixels: convolution, recurrence and
self-attention, and an average over time and space before the classifier. `engine.checks.check_shapes` tests that.
"""

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import video
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d
from torchvision.ops import StochasticDepth

from mgtrain.errors import MgtrainError, UsageError
from mgtrain.models.dropout import DropFeatures, Dropout, DropPath
from mgtrain.models.norm import GroupBatchNorm3d


def torchvision_video(classes: int, *, name: str, drop_path: float | None = None) -> nn.Module:
    """Build torchvision's video network of that name, changed to accept clips of any size.

    MViT scales its relative positions to the clip, as its authors' code does; Swin's stay those of its windows.
    `drop_path` is the last block's probability of stochastic depth, which rises linearly from 0.
    """
    network: Any = getattr(video, name)(num_classes=classes)
    if name == "s3d":
        network.avgpool.__class__ = LocalAverage
    elif name == "mvit_v2_s":
        network.conv_proj.register_forward_hook(partial(_tell_size, network.pos_encoding))
    elif name == "swin3d_t":
        for layer in [m for m in network.modules() if type(m) is ShiftedWindowAttention3d]:
            layer.__class__ = WindowAttention
    if drop_path is not None:
        paths = [layer for layer in network.modules() if isinstance(layer, StochasticDepth)]
        most = max(layer.p for layer in paths)
        for layer in paths:
            layer.p *= drop_path / most
    return group_batchnorm(network)


def own_network(classes: int, *, module: str, network: str, options: Mapping[str, Any]) -> nn.Module:
    """Build `MODELS[network](classes, **options)` of a Python module, installed or in the current folder.

    Raises `UsageError` if there is no such module, network or option, or `group_batchnorm` refuses the network.
    """
    factories = getattr(_imported(module), "MODELS", None)
    if not isinstance(factories, dict):
        raise UsageError(f"model.module {module}: has no MODELS, a dict from names to functions that return networks")
    if network not in factories:
        near = difflib.get_close_matches(network, factories, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(map(repr, factories)) or 'none'}"
        raise UsageError(f"model.network: {module} has no network {network!r}; {hint}")
    factory: Callable[..., nn.Module] = factories[network]
    named = f"{module}.MODELS[{network!r}]"
    try:
        inspect.signature(factory).bind(classes, **options)
    except TypeError as error:
        raise UsageError(f"model.options: {named}(classes, **options): {error}") from None
    try:
        made = factory(classes, **options)
    except (MgtrainError, MemoryError):
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise UsageError(f"model.network: {named}(classes, **options) fails: {what}") from error
    if not isinstance(made, nn.Module):
        raise UsageError(f"model.network: {named} returns {type(made).__name__}, which is not an nn.Module")
    return group_batchnorm(made)


def group_batchnorm(model: nn.Module) -> nn.Module:
    """Replace a network's BatchNorm3d and dropout, in place, by layers that `at_step` tells which clips they see.

    BatchNorm then normalizes over groups of `batch.bn_clips` clips in a step of any shape, and dropout's mask does not
    depend on the number of ranks. Tensors keep their names and values; without `at_step` the layers act as before.
    Raises `UsageError` if a layer, such as SyncBatchNorm, normalizes over clips and cannot be split into groups.
    """
    streams = iter(range(1, 1 << 30))  # ours, which has one dropout, is stream 0
    replaced: dict[nn.Module, nn.Module] = {}  # a layer may be used in several places
    with next((parameter.device for parameter in model.parameters()), torch.device("cpu")):
        for parent_name, parent in list(model.named_modules()):
            for name, layer in list(parent._modules.items()):
                path = f"{parent_name}.{name}".removeprefix(".")
                if layer in replaced:
                    pass
                elif type(layer) is nn.BatchNorm3d and layer.affine and layer.track_running_stats:
                    grouped = GroupBatchNorm3d(
                        layer.num_features, layer.eps, 0.1 if layer.momentum is None else layer.momentum
                    )
                    grouped.load_state_dict(layer.state_dict(), assign=True)
                    grouped.weight, grouped.bias = layer.weight, layer.bias  # perhaps frozen, or known to an optimizer
                    replaced[layer] = grouped.train(layer.training)
                elif isinstance(layer, nn.Dropout) and layer.p:
                    replaced[layer] = Dropout(layer.p, next(streams))
                elif isinstance(layer, nn.Dropout1d | nn.Dropout2d | nn.Dropout3d) and layer.p:
                    replaced[layer] = DropFeatures(layer.p, next(streams))
                elif isinstance(layer, StochasticDepth) and layer.p:
                    if layer.mode != "row":
                        cause = "StochasticDepth of whole batches depends on the number of ranks; use mode 'row'"
                        raise UsageError(f"{path}: {cause}")
                    replaced[layer] = DropPath(layer.p, next(streams))
                elif isinstance(layer, _BatchNorm) and not isinstance(layer, GroupBatchNorm3d):
                    raise UsageError(
                        f"{path}: {type(layer).__name__} normalizes over the clips of a rank; use BatchNorm3d with its "
                        "default options, which mgtrain splits into groups, or LayerNorm or GroupNorm"
                    )
                if layer in replaced:
                    setattr(parent, name, replaced[layer])
    return model


def classifier_of(model: nn.Module) -> str:
    """The name of the layer that computes the logits: `model.classifier_name`, or the last `Linear` or `Conv3d`."""
    name = getattr(model, "classifier_name", None)
    if isinstance(name, str):
        return name
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv3d)]
    return layers[-1] if layers else ""


class WindowAttention(ShiftedWindowAttention3d):  # type: ignore[misc]
    """Video Swin's attention, with the right relative positions in windows that are cut to a small clip.

    Each pair of tokens takes the table's bias for its distance, at every size; nothing is interpolated. torchvision
    takes those of the first tokens of a full window, which are at other distances if a window is less high or wide.
    """

    def get_relative_position_bias(self, window_size: list[int]) -> Tensor:
        (d, h, w), full = window_size, self.window_size
        index = self.relative_position_index.view(*full, *full)[:d, :h, :w, :d, :h, :w]
        bias: Tensor = self.relative_position_bias_table[index.flatten()].view(d * h * w, d * h * w, -1)
        return bias.permute(2, 0, 1).contiguous().unsqueeze(0)  # (1, heads, tokens, tokens)


class LocalAverage(nn.AvgPool3d):
    """Average features (B, C, T, H, W) over windows with stride 1, cut to the features' size where that is smaller."""

    kernel_size: tuple[int, int, int]

    def forward(self, x: Tensor) -> Tensor:
        window = [min(w, size) for w, size in zip(self.kernel_size, x.shape[2:], strict=True)]
        return F.avg_pool3d(x, window, stride=1)


def _tell_size(positions: Any, _: nn.Module, __: Any, patches: Tensor) -> None:
    """A forward hook that sets MViT's position tables to the size of `patches`, (B, C, T, H, W)."""
    positions.temporal_size, *size = patches.shape[2:]
    positions.spatial_size = tuple(size)


def _imported(module: str) -> ModuleType:
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)  # last, so that files there do not replace installed modules
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise UsageError(f"model.module {module}: needs {error.name}, which is not installed") from None
        raise UsageError(
            f"model.module {module}: no such Python module is installed or in {folder}; start mgtrain where "
            f"{module.partition('.')[0]}.py is"
        ) from None
    except MgtrainError:  # the run is asked to stop
        raise
    except Exception as error:
        raise UsageError(f"model.module {module}: cannot be imported: {type(error).__name__}: {error}") from error
