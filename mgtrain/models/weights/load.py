"""Load weights into a model, from a file or torchvision: convert names and shapes, and report what matched."""

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
from torchvision.models import ResNet50_Weights, ResNet101_Weights, get_model_weights

from mgtrain.errors import CheckpointError, MissingCapabilityError, ThresholdError, UsageError
from mgtrain.models import TORCHVISION, build_model
from mgtrain.models.foreign import classifier_of
from mgtrain.models.i3d import I3D
from mgtrain.models.norm import GroupBatchNorm3d
from mgtrain.models.resnet3d import STAGE_BLOCKS
from mgtrain.models.slowfast import SlowFast
from mgtrain.models.weights.files import apart, read_tensors
from mgtrain.models.weights.naming import NAMINGS, OWN, STAGES
from mgtrain.processes.files import replacing
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
    """Which of a model's tensors a file has."""

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
            lacking = min(self.missing, key=lambda name: (name.startswith(self.classifier), name))
            raise ThresholdError(
                f"{path}: matched {len(self.matched)} of {len(self.matched) + len(self.missing)} tensors, a share of "
                f"{math.floor(1000 * self.share) / 1000:g}, below the required {share:g} (for example {lacking}: "
                f"{self.missing[lacking]}); use the model that the weights belong to, or lower "
                "--at-least (in a recipe, init.at_least)"
            )


def read_weights(path: Path, common: bool = True, tensors: Mapping[str, Tensor] | None = None) -> Weights:
    """Read a file's tensors, unless given: with common names, of whichever known project, or with the file's own names.

    Raises `CheckpointError` if it cannot be read, has NaN or infinite values, or the names are of no known project.
    """
    tensors = read_tensors(path) if tensors is None else tensors
    averaged = {name for name in tensors if name.startswith("ema.") and f"model.{name[4:]}" in tensors}
    given = {**tensors, **{f"model.{name[4:]}": tensors[name] for name in averaged}}  # a checkpoint's average counts
    found = {re.sub(WRAPPERS, "", name): tensor for name, tensor in given.items() if name not in averaged}
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
    naming.convert(renamed)
    return Weights(naming.project, renamed, notes)


def model_options(weights: Weights, name: str | None = None) -> dict[str, Any]:
    """The `model:` section, and `classes`, of the network that the weights belong to.

    `name` chooses the network if the weights fit several, as 2-D weights do. Raises `CheckpointError` if they fit none,
    or several without a `name`, and `UsageError` if no network has that name.
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
            if options["fusion_kernel"] == 5:  # of the published 4x16; no weight has the size of `alpha`
                options["alpha"] = 8
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
    matched, inflated, missing = list[str](), list[str](), dict[str, str]()
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(COUNTER)}
    logits = unused.get(common(f"{classifier}.weight"))
    layer = state.get(f"{classifier}.weight")
    if logits is not None and layer is not None and fit_shape(logits, layer.shape) is None:
        sizes = f"{tuple(logits.shape)} in the file and {tuple(layer.shape)} here"
        resized = f"the classifier (classes, features) is {sizes}, so it starts from random weights"
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
            matched.append(own)
            if value.ndim == 4:
                inflated.append(own)
    for module in model.modules():
        if isinstance(module, GroupBatchNorm3d):
            module.groups = 0  # the groups' statistics start from the loaded ones
    return Report(weights.project, matched, inflated, missing, classifier, sorted(unused), resized, weights.notes)


def is_ours(model: nn.Module) -> bool:
    """Whether the model is one of ours, with the stages of `STAGES`, so that tensors of other projects fit."""
    return isinstance(model, SlowFast | I3D)


def fit_shape(value: Tensor, shape: Sequence[int]) -> Tensor | None:
    """Convert a tensor to another shape, if there is one correct way; else None.

    A kernel (out, in, H, W) is inflated, one of a single frame becomes the middle of a longer one, and dimensions of
    size 1 are added or removed (Caffe2 writes some classifiers as convolutions).

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
    """Inflate a 2-D kernel (out, in, H, W) to (out, channels, frames, H, W): repeat it over time, divide by `frames`.

    A still clip has the same output (Carreira & Zisserman 2017, section 2.1.4). SlowFast's lateral channels get zeros.
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
    state = apart({name: t.contiguous() for name, t in model.state_dict().items() if not name.endswith(COUNTER)})
    metadata = {"format": "mgtrain.weights/1", "source": source, "model": json.dumps(options), **(notes or {})}
    if classes:
        metadata["classes"] = json.dumps(list(classes))
    try:
        with replacing(path) as temporary:
            save_file({f"model.{name}": state[name] for name in (state if only is None else only)}, temporary, metadata)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error}") from None


def start_from(model: nn.Module, init: Init, fresh: bool) -> None:
    """Apply a recipe's `init:` section: load the weights, if the run is `fresh`, and freeze layers.

    Raises `CheckpointError` if the file cannot be read, `ThresholdError` if too few of the model's tensors match, and
    `UsageError` if the network does not have the stages to freeze.
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

    Raises `UsageError` if the network has no such stages.
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


def download(source: str) -> tuple[Path, tuple[str, ...]]:
    """Download the weights of `torchvision:NAME` to torch's cache; return the file and the names of its classes.

    Those of ImageNet, for the 2-D networks, are not returned. Raises `UsageError` if torchvision has no such
    weights here, and `MissingCapabilityError` if the download fails.
    """
    known: dict[str, Any] = {
        "torchvision:resnet50": ResNet50_Weights.IMAGENET1K_V1,
        "torchvision:resnet101": ResNet101_Weights.IMAGENET1K_V1,
        **{f"torchvision:{name}": get_model_weights(name)["DEFAULT"] for name in TORCHVISION},
    }
    if source not in known:
        raise UsageError(f"--from {source}: must be one of {', '.join(known)}; give other weights as a file")
    url: str = known[source].url
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not file.is_file():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), hash_prefix=file.stem.rpartition("-")[2])
        except (OSError, RuntimeError) as error:
            raise MissingCapabilityError(
                f"{url}: cannot be downloaded: {error}; download it elsewhere and give the file instead of --from"
            ) from None
    video = source.partition(":")[2] in TORCHVISION
    return file, tuple(known[source].meta["categories"]) if video else ()
