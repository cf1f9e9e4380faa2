"""Load a file of weights into a model: convert names and shapes, and report what matched."""

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mgtrain.errors import CheckpointError, ThresholdError, UsageError
from mgtrain.models import TORCHVISION, build_model
from mgtrain.models.foreign import classifier_of
from mgtrain.models.i3d import I3D
from mgtrain.models.norm import GroupBatchNorm3d
from mgtrain.models.resnet3d import STAGE_BLOCKS
from mgtrain.models.slowfast import SlowFast
from mgtrain.models.weights.files import apart, read_tensors
from mgtrain.models.weights.naming import NAMINGS, OWN, STAGES
from mgtrain.recipe import Init
from mgtrain.recipe.model import ModelOptions

WRAPPERS = r"^(module\.|model\.)+"  # of DistributedDataParallel, of PySlowFast around PyTorchVideo, of checkpoints
COUNTER = "num_batches_tracked"  # of BatchNorm: not a weight, and some files lack it
SHOWN = 6  # tensors of each kind in a report

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Weights:
    """A network's tensors by their common names (see `mgtrain.models.weights.naming`)."""

    project: str
    tensors: Mapping[str, Tensor]
    notes: Sequence[str]  # differences between the project's networks and ours


@dataclass(frozen=True, slots=True)
class Report:
    """Which of a model's tensors came from a file."""

    project: str
    matched: Sequence[str]
    inflated: Sequence[str]  # matched tensors that were inflated from 2-D kernels
    missing: Mapping[str, str]  # the model's other tensors, which did not change, and why they do not match
    classifier: str  # the layer of the model that computes the logits
    unused: Sequence[str]  # the file's other tensors
    resized: str  # a remark if the classifier has another size; else empty
    notes: Sequence[str]

    @property
    def share(self) -> float:
        """The share of the model's tensors that matched, without a classifier of another size."""
        missing = [name for name in self.missing if not (self.resized and name.startswith(f"{self.classifier}."))]
        return len(self.matched) / max(1, len(self.matched) + len(missing))

    def lines(self) -> list[str]:
        """The report as text, with the first few tensors that did not match."""
        total = len(self.matched) + len(self.missing)
        lines = [f"{self.project}: matched {len(self.matched)} of {total} tensors"]
        if self.inflated:
            lines[0] += f", {len(self.inflated)} of them inflated from 2-D kernels"
        if self.resized:
            lines.append(self.resized)
        missing = [f"{name} ({why})" for name, why in self.missing.items()]
        for what, names in (("not in the file", missing), ("not in the model", self.unused)):
            if names:
                more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
                lines.append(f"{what}: {', '.join(names[:SHOWN])}{more}")
        return [*lines, *(f"note: {note}" for note in self.notes)]

    def demand(self, share: float, path: Path) -> None:
        """Raise `ThresholdError` if less than `share` of the model's tensors matched."""
        if self.share < share:
            lacking = sorted(set(self.missing), key=lambda name: (name.startswith(self.classifier), name))
            raise ThresholdError(
                f"{path}: matched {len(self.matched)} of {len(self.matched) + len(self.missing)} tensors, a share of "
                f"{math.floor(1000 * self.share) / 1000:g}, below the required {share:g} (for example {lacking[0]}: "
                f"{self.missing[lacking[0]]}); use the model that the weights belong to, or lower "
                "--at-least (in a recipe, init.at_least)"
            )


def read_weights(path: Path, common: bool = True, tensors: Mapping[str, Tensor] | None = None) -> Weights:
    """Read a file's tensors: with common names, whichever known project they are from, or with the file's own names.

    `tensors` are those of the file, if they have been read.

    Raises:
        CheckpointError: the file cannot be read, a tensor has NaN or infinite values, or the names are not those of a
            known project.
    """
    tensors = read_tensors(path) if tensors is None else tensors
    averaged = {name for name in tensors if name.startswith("ema.") and f"model.{name[4:]}" in tensors}
    plain = {f"model.{name[4:]}": tensors[name] for name in averaged}  # a checkpoint's average takes the weights' place
    plain = {name: tensor for name, tensor in {**tensors, **plain}.items() if name not in averaged}
    found = {re.sub(WRAPPERS, "", name): tensor for name, tensor in plain.items()}
    weights = {n: t for n, t in found.items() if not (n.endswith(COUNTER) or n.startswith("optimizer."))}
    for name, tensor in weights.items():
        odd = tensor.isnan() | (tensor.isinf() if common else tensor.isposinf())  # an own network's mask may hold -inf
        if odd.any():
            raise CheckpointError(
                f"{path}: {name} has NaN or infinity in {int(odd.sum()):,} of its {odd.numel():,} values; "
                "use earlier weights"
            )
    if not common:
        return Weights("the file", weights, ())
    naming = next((n for n in NAMINGS if any(re.match(n.sign, name) for name in found)), None)
    if naming is None:
        raise CheckpointError(
            f"{path}: has tensors such as {min(found)!r}, which no known network has; known are the networks of "
            f"{', '.join(n.project for n in NAMINGS)}; for torchvision's video networks, give --model"
        )
    renamed = {naming.common(name): t for name, t in weights.items() if not re.match(naming.ignored, name)}
    notes = [note for pattern, note in naming.notes if any(re.match(pattern, name) for name in renamed)]
    return Weights(naming.project, naming.convert(renamed), notes)


def model_options(weights: Weights, name: str | None = None) -> dict[str, Any]:
    """The `model:` section, and `classes`, of the network that the weights belong to.

    `name` chooses the network if the weights fit several, as 2-D weights do.

    Raises:
        CheckpointError: the weights do not fit our networks, or fit several and there is no `name`.
        UsageError: no network has that name.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in weights.tensors.items()}
    stem = shapes.get("slow.stem.conv.weight", ())
    own = {
        "slowfast_r50": any(key.startswith("fast.") for key in shapes),
        "i3d_nln_r50": any(".nonlocal" in key for key in shapes),
        "i3d_r50": stem[2:3] == (5,),
    }
    if name in TORCHVISION:
        with torch.device("meta"):
            logits = f"{classifier_of(build_model(name, classes=2))}.weight"
        if logits not in shapes:
            raise CheckpointError(f"the weights have no {logits!r}, so they are not those of {name}")
        return {"name": name, "classes": shapes[logits][0]}
    if name is not None and name not in own:
        raise UsageError(f"no model is called {name!r}; choose one of {', '.join([*own, *TORCHVISION])}")
    chosen = name or next((key for key, fits in own.items() if fits and len(stem) == 5), None)
    if chosen is None or not stem:
        raise CheckpointError(
            f"weights of {weights.project} with a stem of {stem} fit several models; choose one of {', '.join(own)}"
        )
    blocks = tuple(len({key.split(".")[2] for key in shapes if re.match(rf"slow\.{s}\.\d", key)}) for s in STAGES[1:])
    depth = next((depth for depth, known in STAGE_BLOCKS.items() if known == blocks), blocks)
    options: dict[str, Any] = {"name": chosen, "width": stem[0], "depth": depth}
    try:
        if own[chosen] and chosen == "slowfast_r50":
            options["beta_inv"] = stem[0] // shapes["fast.stem.conv.weight"][0]
            options["fusion_kernel"] = shapes["laterals.stem.conv.weight"][2]
        TypeAdapter(ModelOptions).validate_python(options)
        return {**options, "classes": shapes["head.linear.weight"][0]}
    except (ValidationError, LookupError, ZeroDivisionError):
        raise CheckpointError(
            f"weights of {weights.project} do not have the shapes of a model {options}; "
            "use init.weights in a recipe to load what fits"
        ) from None


@torch.no_grad()
def load_weights(model: nn.Module, weights: Weights) -> Report:
    """Copy the weights into the model where names and shapes fit, but not a classifier of another size."""
    unused, resized, classifier = dict(weights.tensors), "", classifier_of(model)
    common = OWN.common if is_ours(model) else partial(re.sub, WRAPPERS, "")
    values: dict[str, Tensor] = {}
    missing: dict[str, str] = {}
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(COUNTER)}
    logits = weights.tensors.get(common(f"{classifier}.weight"))
    if logits is not None and fit_shape(logits, state[f"{classifier}.weight"].shape) is None:
        theirs, ours = tuple(logits.shape), tuple(state[f"{classifier}.weight"].shape)
        resized = (
            f"the classifier (classes, features) is {theirs} in the file and {ours} here, so it starts from random "
            "weights"
        )
    for own, target in state.items():
        value = unused.pop(common(own), None)
        if value is None:
            missing[own] = "absent"
        elif own.startswith(f"{classifier}.") and resized:
            missing[own] = "classifier of another size"
        elif (fitted := fit_shape(value, target.shape)) is None:
            missing[own] = f"{tuple(value.shape)} in the file, {tuple(target.shape)} here"
        else:
            target.copy_(fitted)
            values[own] = value
    for module in model.modules():
        if isinstance(module, GroupBatchNorm3d):
            module.groups = 0  # the groups' statistics start from the loaded ones
    inflated = [name for name, value in values.items() if value.ndim == 4]
    return Report(weights.project, [*values], inflated, missing, classifier, sorted(unused), resized, weights.notes)


def is_ours(model: nn.Module) -> bool:
    """Whether the model is one of ours, with the stages of `STAGES`, so that tensors of other projects fit."""
    return isinstance(model, SlowFast | I3D)


def fit_shape(value: Tensor, shape: Sequence[int]) -> Tensor | None:
    """Convert a tensor to another shape, if there is one correct way; else None.

    A kernel (out, in, H, W) is inflated. A kernel of one frame becomes the middle of a longer one, which computes the
    same. Dimensions of size 1 are added or removed (Caffe2 writes some classifiers as convolutions).

    >>> fit_shape(torch.ones(8, 4, 3, 3), (8, 4, 5, 3, 3)).unique()
    tensor([0.2000])
    >>> fit_shape(torch.ones(8, 4, 1, 1, 1), (8, 4, 3, 1, 1))[0, 0].flatten()
    tensor([0., 1., 0.])
    """
    if value.ndim == 4 and len(shape) == 5:
        value = inflate(value, shape[1], shape[2])
    elif value.ndim == len(shape) == 5 and value.shape[2] == 1:
        value = F.pad(value, (0, 0, 0, 0, shape[2] // 2, shape[2] // 2))
    elif [n for n in value.shape if n > 1] == [n for n in shape if n > 1]:
        value = value.reshape(tuple(shape))
    return value if tuple(value.shape) == tuple(shape) else None


def inflate(kernel: Tensor, channels: int, frames: int) -> Tensor:
    """Inflate a 2-D kernel (out, in, H, W) to (out, channels, frames, H, W); a still clip has the same output.

    The kernel is repeated over time and divided by `frames` (Carreira & Zisserman 2017, section 2.1.4). Further
    channels, those of SlowFast's lateral connections, get zeros.
    """
    kernel = F.pad(kernel, (0, 0, 0, 0, 0, max(0, channels - kernel.shape[1])))  # (out, channels, H, W)
    return kernel.unsqueeze(2).repeat(1, 1, frames, 1, 1) / frames


def read_classes(path: Path) -> tuple[str, ...]:
    """The names of the classes in a file of `save_weights` or a checkpoint; empty if it has none."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
        stored = header.get("classes") or json.dumps(json.loads(header.get("info", "{}")).get("classes", []))
        return tuple(TypeAdapter(list[str]).validate_json(stored))
    except (OSError, SafetensorError, ValueError, AttributeError):
        return ()


def save_weights(
    path: Path, model: nn.Module, options: Mapping[str, Any], classes: Sequence[str] = (),
    only: Sequence[str] | None = None, source: str = OWN.project, notes: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Write the model's tensors, or those in `only`, as safetensors, which `init: {weights: ...}` reads."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if not name.endswith(COUNTER)}
    state = apart(state)
    metadata = {"format": "mgtrain.weights/1", "source": source, "model": json.dumps(options), **(notes or {})}
    if classes:
        metadata["classes"] = json.dumps(list(classes))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({f"model.{name}": state[name] for name in (state if only is None else only)}, path, metadata)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error}") from None


def start_from(model: nn.Module, init: Init, fresh: bool) -> None:
    """Apply a recipe's `init:` section: load the weights, if the run is `fresh`, and freeze layers.

    Raises:
        CheckpointError: the file cannot be read.
        ThresholdError: too few of the model's tensors match.
        UsageError: the network does not have the stages to freeze.
    """
    if init.weights and fresh:
        path = Path(init.weights)
        report = load_weights(model, read_weights(path, is_ours(model)))
        report.demand(init.at_least, path)
        for line in report.lines():
            log.info("%s: %s", path.name, line)
    freeze(model, init)


def freeze(model: nn.Module, init: Init) -> None:
    """Freeze the stages up to `init.freeze`, with their BatchNorm statistics; all statistics with `init.freeze_bn`.

    Raises:
        UsageError: the network has no such stages.
    """
    classifier, stages = classifier_of(model), STAGES[: ("none", *STAGES[:-1], "backbone").index(init.freeze)]
    if init.freeze not in ("none", "backbone") and not is_ours(model):
        raise UsageError(f"init.freeze {init.freeze}: only SlowFast and I3D have such stages; use none or backbone")

    def frozen(name: str) -> bool:
        if init.freeze == "backbone":
            return not name.startswith(f"{classifier}.")
        return bool(stages) and OWN.common(name).split(".")[1] in stages

    for name, parameter in model.named_parameters():
        if frozen(name):
            parameter.requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, GroupBatchNorm3d):
            module.frozen = init.freeze_bn or frozen(f"{name}.weight")
