"""Checkpoints: one safetensors file each, with the model, the optimizer, what they belong to, and a checksum.

Names in the file: `model.<parameter or buffer>`, `optimizer.<kind>.<parameter>`, `groups.<BatchNorm>`; everything else
(step, recipe, class names, times) is JSON in the header. There is no pickle, so a checkpoint cannot run code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mgtrain.errors import CheckpointError
from mgtrain.models.norm import put_group_stats

log = logging.getLogger(__name__)

FORMAT = "mgtrain.checkpoint/1"


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """What a checkpoint belongs to."""

    step: Annotated[int, Field(ge=0)]  # steps that are finished
    recipe: str  # YAML, complete
    classes: Sequence[str]
    plan: str  # the plan's fingerprint
    data: str  # the training videos' fingerprint
    val_data: str = ""  # the validation videos'
    train_seconds: float = 0.0
    data_seconds: float = 0.0
    evaluated: bool = False  # whether the evaluation that belongs to this step is done
    recalibrated: bool = False  # whether BatchNorm's running statistics are those of the evaluation's shape
    left_out: int = 0  # steps so far whose update was left out, or taken back, because it was not finite
    scaler: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    info: CheckpointInfo,
    groups: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Write a checkpoint so that it is there whole or not at all: a temporary name, fsync, rename, fsync.

    `groups` is what `models.norm.group_stats` gave, of all ranks.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"groups.{name}": tensor for name, tensor in groups.items()}
    for name, parameter in model.named_parameters():
        for kind, tensor in optimizer.state.get(parameter, {}).items():
            if isinstance(tensor, Tensor):
                tensors[f"optimizer.{kind}.{name}"] = tensor
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    facts = json.dumps(asdict(info))
    checksum = _checksum(facts, tensors, tensors.__getitem__)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata={"format": FORMAT, "info": facts, "sha256": checksum})
        _fsync(temporary)
        temporary.replace(path)
        _fsync(path.parent)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):  # the folder itself may be what is missing
            temporary.unlink()
        raise CheckpointError(
            f"{path}: cannot be written: {error}; the checkpoints before it are as they were; "
            "free some space, then run again with --resume"
        ) from None


def is_checkpoint(path: Path) -> bool:
    """Whether a file is a checkpoint of ours, rather than anything else."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):
        return False


def read_info(path: Path) -> CheckpointInfo:
    """What a checkpoint belongs to, without its tensors."""
    return _info(path, _header(path))


def verify(path: Path) -> CheckpointInfo:
    """Read a whole checkpoint; returns what it belongs to.

    Raises:
        CheckpointError: it is no checkpoint, or not the bytes that were written.
    """
    header = _header(path)
    with safe_open(path, framework="pt") as file:
        if _checksum(header.get("info", ""), file.keys(), file.get_tensor) != header.get("sha256"):
            raise CheckpointError(f"{path}: is not what was written: its checksum does not match its contents")
    return _info(path, header)


def newest_whole(checkpoints: Sequence[Path]) -> Path | None:
    """The last of the checkpoints that is whole; None if there are none. Others are named in the log.

    Raises:
        CheckpointError: there are some, but none is whole.
    """
    for path in reversed(checkpoints):
        try:
            verify(path)
        except CheckpointError as error:
            log.warning("passed over: %s", error)
        else:
            return path
    if checkpoints:
        raise CheckpointError(f"{checkpoints[0].parent}: none of its {len(checkpoints)} checkpoints is whole")
    return None


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors of a checkpoint, by name."""
    _header(path)
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def load_model(path: Path, model: nn.Module) -> None:
    """Put a checkpoint's weights and buffers into the model, in place."""
    with safe_open(path, framework="pt") as file:
        own = model.state_dict()
        names = file.keys()
        stored = {name.removeprefix("model.") for name in names if name.startswith("model.")}
        if stored != own.keys():
            odd = sorted(stored ^ own.keys())
            raise CheckpointError(f"{path}: belongs to another model: {len(odd)} tensors differ, such as {odd[0]!r}")
        for name, tensor in own.items():
            value = file.get_tensor(f"model.{name}")
            if value.shape != tensor.shape:
                raise CheckpointError(f"{path}: {name} is {tuple(value.shape)}, the model's is {tuple(tensor.shape)}")
            if value.dtype != tensor.dtype:
                raise CheckpointError(f"{path}: {name} is {value.dtype}, the model's is {tensor.dtype}")
            tensor.copy_(value)
        groups = {name.removeprefix("groups."): file.get_tensor(name) for name in names if name.startswith("groups.")}
        for name, value in groups.items():
            mean = own.get(f"{name}.running_mean")
            if mean is None or value.ndim != 3 or value.shape[1:] != (2, *mean.shape):
                raise CheckpointError(f"{path}: groups.{name} is {tuple(value.shape)}, which fits no BatchNorm there")
        put_group_stats(model, groups)


def load_optimizer(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's optimizer state back, in place."""
    parameters = dict(model.named_parameters())
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            if key.startswith("optimizer."):
                kind, _, name = key.removeprefix("optimizer.").partition(".")
                parameter, value = parameters.get(name), file.get_tensor(key)
                if parameter is None or value.shape != parameter.shape:
                    raise CheckpointError(f"{path}: {key} belongs to no parameter of the model")
                optimizer.state[parameter][kind] = torch.empty_like(parameter).copy_(value)


def _header(path: Path) -> dict[str, str]:
    """The header's own entries, of a checkpoint of ours; a file that ends too early or late is refused as well."""
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, str] = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable checkpoint: {error}") from None
    if header.get("format") != FORMAT:
        raise CheckpointError(f"{path}: a safetensors file, but not a checkpoint of mgtrain ({FORMAT})")
    return header


def _info(path: Path, header: Mapping[str, str]) -> CheckpointInfo:
    """The facts of a header, each there and of its type."""
    try:
        info = TypeAdapter(CheckpointInfo).validate_json(header.get("info", ""), strict=True)
        unknown = json.loads(header["info"]).keys() - asdict(info).keys()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        what = ".".join(map(str, first["loc"])) or "what it belongs to"
        raise CheckpointError(f"{path}: its header is damaged: {what}: {first['msg']}") from None
    if unknown:
        raise CheckpointError(f"{path}: was written by another version of mgtrain, which knows {min(unknown)!r}")
    return info


def _checksum(facts: str, names: Iterable[str], tensor_of: Callable[[str], Tensor]) -> str:
    """SHA-256 of everything in the file: the facts, and each tensor's name, type, shape and bytes."""
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
