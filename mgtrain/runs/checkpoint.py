"""Checkpoints: a safetensors file with the model, the optimizer, a description of the run, and a checksum.

Tensors are `model.<parameter or buffer>`, `optimizer.<kind>.<parameter>`, `groups.<BatchNorm>` and `ema.<parameter>`,
the average of the weights; the header has the rest (step, recipe, class names, times) as JSON. There is no pickle, so a
checkpoint cannot run code.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mgtrain.errors import CheckpointError, LackError, NonFiniteError, lack_of
from mgtrain.models.norm import put_group_stats
from mgtrain.models.weights.files import apart
from mgtrain.processes.files import replacing

log = logging.getLogger(__name__)

FORMAT = "mgtrain.checkpoint/1"


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """The description of a run at a checkpoint."""

    step: Annotated[int, Field(ge=0)]  # finished steps
    recipe: str  # complete, YAML
    classes: Sequence[str]
    plan: str  # the plan's fingerprint
    data: str  # the training videos' fingerprint
    val_data: str = ""  # the validation videos' fingerprint
    train_seconds: float = 0.0
    data_seconds: float = 0.0  # waiting for data
    clock_seconds: float = 0.0  # start-up, training, evaluations and checkpoints
    evaluated: bool = False  # whether the evaluation after this step is done
    recalibrated: bool = False  # whether BatchNorm's running statistics are those of the evaluation's shape
    left_out: int = 0  # steps so far whose update was skipped or rolled back because it was not finite
    scaler: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    info: CheckpointInfo,
    groups: Mapping[str, Tensor] = MappingProxyType({}),
    average: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Write a checkpoint atomically, or raise `CheckpointError`; `NonFiniteError` if a learned tensor is not finite.

    `groups` are the statistics of all ranks from `models.norm.group_stats`; `average` is that of the weights, by name.
    """
    learned = _learned(model)
    parts: dict[str, Mapping[str, Tensor]] = {"model": model.state_dict(), "groups": groups, "ema": average}
    tensors = {f"{part}.{name}": tensor for part, named in parts.items() for name, tensor in named.items()}
    for name, parameter in model.named_parameters():
        for kind, tensor in optimizer.state.get(parameter, {}).items():
            if isinstance(tensor, Tensor):
                tensors[f"optimizer.{kind}.{name}"] = tensor
    tensors = apart({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    if bad := not_finite({name: t for name, t in tensors.items() if name in learned or name[:6] != "model."}):
        raise NonFiniteError(
            f"{path}: not written, because {bad}; earlier checkpoints are unchanged; lower optim.lr or lengthen "
            "optim.warmup_epochs (with --allow-changes), then run again with --resume"
        )
    facts = json.dumps(asdict(info))
    checksum = _checksum(facts, tensors, tensors.__getitem__)
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={"format": FORMAT, "info": facts, "sha256": checksum})
            _fsync(temporary)
        _fsync(path.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: cannot be written: {error}; earlier checkpoints are unchanged; "
            "free some space, then run again with --resume"
        ) from None


def not_finite(tensors: Mapping[str, Tensor]) -> str:
    """A message about the tensors that hold NaN or infinity; empty if there are none.

    >>> not_finite({"a": torch.ones(2), "b": torch.tensor([1.0, torch.inf])})
    '1 of 2 tensors holds NaN or infinity, such as b'
    """
    bad = [name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    hold = "holds" if len(bad) == 1 else "hold"
    return f"{len(bad)} of {len(tensors)} tensors {hold} NaN or infinity, such as {bad[0]}" if bad else ""


def is_checkpoint(path: Path) -> bool:
    """Whether a file is a checkpoint of mgtrain."""
    try:
        _header(path)
    except CheckpointError:
        return False
    return True


def read_info(path: Path) -> CheckpointInfo:
    """The description in a checkpoint, validated, read without its tensors."""
    facts = _header(path).get("info", "")
    try:
        info = TypeAdapter(CheckpointInfo).validate_json(facts, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        what = ".".join(map(str, first["loc"])) or "info"
        raise CheckpointError(f"{path}: its header is damaged: {what}: {first['msg']}") from None
    if unknown := json.loads(facts).keys() - asdict(info).keys():
        raise CheckpointError(
            f"{path}: has the unknown entry {min(unknown)!r}, of another version of mgtrain; use that one"
        )
    return info


def verify(path: Path) -> CheckpointInfo:
    """Read a whole checkpoint and return its description. Raises `CheckpointError` if it is damaged or not one."""
    header = _header(path)
    with safe_open(path, framework="pt") as file:
        if _checksum(header.get("info", ""), file.keys(), file.get_tensor) != header.get("sha256"):
            raise CheckpointError(f"{path}: damaged: its checksum does not match its contents; use an earlier one")
    return read_info(path)


def newest_whole(checkpoints: Sequence[Path]) -> Path | None:
    """The newest undamaged checkpoint, None if there are none. Raises `CheckpointError` if all are damaged."""
    for path in reversed(checkpoints):
        try:
            verify(path)
            return path
        except CheckpointError as error:
            log.warning("skipping a checkpoint: %s", error)
    if checkpoints:
        raise CheckpointError(
            f"{checkpoints[0].parent}: all {len(checkpoints)} checkpoints are damaged; start a new run"
        )
    return None


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all tensors of a checkpoint."""
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def load_model(path: Path, model: nn.Module) -> None:
    """Load the model's weights and buffers. Raises `CheckpointError` if they do not fit it or are not finite."""
    own, stored, groups = model.state_dict(), _stored(path, "model."), _stored(path, "groups.")
    if odd := sorted(stored.keys() ^ own.keys()):
        raise CheckpointError(
            f"{path}: is of another model: {len(odd)} tensors differ, such as {odd[0]!r}; use its own recipe"
        )
    for name, tensor in own.items():
        value = stored[name]
        if value.shape != tensor.shape:
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(value.shape)}, but {tuple(tensor.shape)} in the model"
            )
        if value.dtype != tensor.dtype:
            raise CheckpointError(f"{path}: {name} is {value.dtype}, but {tensor.dtype} in the model")
        tensor.copy_(value)
    learned = _learned(model)
    if bad := not_finite({name: tensor for name, tensor in own.items() if f"model.{name}" in learned}):
        raise CheckpointError(f"{path}: {bad}; use an earlier checkpoint")
    for name, value in groups.items():
        mean = own.get(f"{name}.running_mean")
        if mean is None or value.ndim != 3 or value.shape[1:] != (2, *mean.shape):
            raise CheckpointError(f"{path}: groups.{name} is {tuple(value.shape)}, which fits no BatchNorm layer")
    put_group_stats(model, groups)


def load_optimizer(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load a checkpoint's optimizer state, in place."""
    parameters = dict(model.named_parameters())
    for key, value in _stored(path, "optimizer.").items():
        kind, _, name = key.partition(".")
        parameter = parameters.get(name)
        if parameter is None or value.shape not in (parameter.shape, ()):  # () is a number of steps
            raise CheckpointError(f"{path}: optimizer.{key} fits no parameter of the model")
        like = parameter if value.shape == parameter.shape else torch.empty((), device=parameter.device)
        optimizer.state[parameter][kind] = torch.empty_like(like).copy_(value)


@torch.no_grad()
def load_average(path: Path, weights: Mapping[str, Tensor]) -> bool:
    """Load a checkpoint's averaged weights into the tensors of these names; returns whether it has any."""
    stored = _stored(path, "ema.")
    for name, value in stored.items():
        tensor = weights.get(name)
        if tensor is None or value.shape != tensor.shape:
            raise CheckpointError(f"{path}: ema.{name} fits no parameter of the model")
        if bad := not_finite({f"ema.{name}": value}):
            raise CheckpointError(f"{path}: {bad}; use a checkpoint before it")
        tensor.copy_(value)
    return bool(stored)


def _stored(path: Path, start: str) -> dict[str, Tensor]:
    """A checkpoint's tensors whose names begin with `start`, by the rest of the name."""
    with safe_open(path, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(start)]  # noqa: SIM118
        return {name.removeprefix(start): file.get_tensor(name) for name in names}


def _learned(model: nn.Module) -> set[str]:
    """The names of the model's trained tensors in a checkpoint; other buffers, such as masks, may hold infinity."""
    statistics = [name for name, _ in model.named_buffers() if name.endswith(("running_mean", "running_var"))]
    return {f"model.{name}" for name in [*dict(model.named_parameters()), *statistics]}


def _header(path: Path) -> dict[str, str]:
    """The entries of a checkpoint's header; raises `CheckpointError` for other or truncated files."""
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, str] = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        if lack := lack_of(error):  # then the checkpoint may be undamaged
            raise LackError(f"{path}: cannot be read: {lack}") from None
        raise CheckpointError(f"{path}: not a readable checkpoint: {error}") from None
    if header.get("format") != FORMAT:
        raise CheckpointError(f"{path}: a safetensors file, but not a checkpoint of mgtrain ({FORMAT})")
    return header


def _checksum(facts: str, names: Iterable[str], tensor_of: Callable[[str], Tensor]) -> str:
    """SHA-256 of the description and of each tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(facts.encode())
    for name in sorted(names):
        tensor = tensor_of(name)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
