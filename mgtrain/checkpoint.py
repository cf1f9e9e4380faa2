"""Checkpoints: one safetensors file each, with the model, the optimizer, and what they belong to.

Names in the file: `model.<parameter or buffer>`, `optimizer.<kind>.<parameter>`; everything else (step, recipe, class
names, times) is JSON in the header. There is no pickle, so a checkpoint cannot run code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mgtrain.errors import CheckpointError

FORMAT = "mgtrain.checkpoint/1"


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """What a checkpoint belongs to."""

    step: int  # steps that are finished
    recipe: str  # YAML, complete
    classes: Sequence[str]
    plan: str  # the plan's fingerprint
    data: str  # the training videos' fingerprint
    train_seconds: float = 0.0
    data_seconds: float = 0.0
    recalibrated: bool = False  # whether BatchNorm's running statistics are those of the evaluation's shape
    scaler: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, info: CheckpointInfo) -> None:
    """Write a checkpoint so that it is there whole or not at all: a temporary name, fsync, rename."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for kind, tensor in optimizer.state.get(parameter, {}).items():
            if isinstance(tensor, Tensor):
                tensors[f"optimizer.{kind}.{name}"] = tensor
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            temporary,
            metadata={"format": FORMAT, "info": json.dumps(asdict(info))},
        )
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):  # the folder itself may be what is missing
            temporary.unlink()
        raise CheckpointError(
            f"{path}: cannot be written: {error}; free some space, then run again with --resume"
        ) from None


def read_info(path: Path) -> CheckpointInfo:
    """What a checkpoint belongs to, without its tensors."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable checkpoint: {error}") from None
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path}: a safetensors file, but not a checkpoint of mgtrain ({FORMAT})")
    return CheckpointInfo(**json.loads(metadata["info"]))


def load_model(path: Path, model: nn.Module) -> None:
    """Put a checkpoint's weights and buffers into the model, in place."""
    with safe_open(path, framework="pt") as file:
        own = model.state_dict()
        stored = {name.removeprefix("model.") for name in file.keys() if name.startswith("model.")}  # noqa: SIM118
        if stored != own.keys():
            odd = sorted(stored ^ own.keys())
            raise CheckpointError(f"{path}: belongs to another model: {len(odd)} tensors differ, such as {odd[0]!r}")
        for name, tensor in own.items():
            value = file.get_tensor(f"model.{name}")
            if value.shape != tensor.shape:
                raise CheckpointError(f"{path}: {name} is {tuple(value.shape)}, the model's is {tuple(tensor.shape)}")
            tensor.copy_(value)


def load_optimizer(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's optimizer state back, in place."""
    parameters = dict(model.named_parameters())
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            if key.startswith("optimizer."):
                _, kind, name = key.split(".", 2)
                parameter = parameters[name]
                optimizer.state[parameter][kind] = torch.empty_like(parameter).copy_(file.get_tensor(key))
