"""A trained network as a file that other programs run: ONNX, torch.export's, or plain weights.

Each takes one input, normalized clips float32 (B, 3, T, S, S), and gives logits (B, classes); that SlowFast's slow
pathway sees fewer frames is part of the graph. The file says how clips are cut and normalized, and the classes' names.
What was written is read back and run before it gets its name.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mgtrain import __version__
from mgtrain.engine.trained import Trained
from mgtrain.errors import CheckpointError, MissingCapabilityError, ThresholdError, UsageError
from mgtrain.models.weights.load import is_ours, load_weights, read_weights, save_weights
from mgtrain.recipe.model import pixel_statistics
from mgtrain.rng import Draw, generator

TOLERANCE = 1e-4  # of the largest logit; frameworks sum in another order
INPUT, OUTPUT, NOTES = "clips", "logits", "mgtrain.json"
AXES = {"clips": 0, "frames": 2, "pixels": 3}
FREEDOMS = (("clips", "frames", "pixels"), ("clips",), ())  # what may vary, tried in this order
BIG = (32, 96)  # frames and pixels of the clips that a graph of any size is traced with: small maps would be constants

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Parity:
    """How far a file's logits are from the network's, for clips of one shape."""

    shape: tuple[int, ...]  # (B, 3, T, S, S)
    error: float  # largest difference, of the largest logit


@dataclass(frozen=True, slots=True)
class Exported:
    """What became of a network."""

    path: Path
    free: tuple[str, ...]  # which of clips, frames and pixels may be another number than the evaluation's
    parity: tuple[Parity, ...]

    def describe(self) -> dict[str, Any]:
        """As plain data."""
        found = [{"shape": parity.shape, "error": parity.error} for parity in self.parity]
        return {"file": str(self.path), "bytes": self.path.stat().st_size, "free": self.free, "parity": found}


def export(trained: Trained, path: Path) -> Exported:
    """Write the network in the format of the path's suffix, with as many of its sizes free as the format can.

    Raises:
        UsageError: another suffix than .onnx, .pt2 or .safetensors.
        MissingCapabilityError: packages for ONNX are missing, or torch cannot write the network so.
        ThresholdError: the file computes something else; it is not kept.
    """
    if path.suffix not in FORMATS:
        raise UsageError(f"{path}: write to a file that ends in {', '.join(FORMATS)}")
    model = trained.model.cpu().to(memory_format=torch.contiguous_format).eval()
    temporary = path.with_name(f".{path.name}.tmp{path.suffix}")
    problem = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for free in FREEDOMS:
            found = _attempt(model, trained, temporary, free)
            if isinstance(found, str):
                problem = problem or found
                continue
            temporary.replace(path)
            return Exported(path, free, found)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)
    raise ThresholdError(f"{path}: {problem}; nothing was written")


def _attempt(model: nn.Module, trained: Trained, file: Path, free: tuple[str, ...]) -> tuple[Parity, ...] | str:
    """What the file's logits were like with these sizes free, or what is wrong with them."""
    shape = trained.recipe.evaluation_shape
    frames, size = shape.frames, shape.crop
    trials = [clips_of(1, frames, size)]
    if "clips" in free:
        trials.append(clips_of(3, frames, size))
    if "pixels" in free:
        trials += [
            clips_of(2, frames, size + 32),
            clips_of(1, max(8, frames // 2), size),
            clips_of(1, 2 * frames, size),
        ]
    traced = (max(frames, BIG[0]), max(size, BIG[1])) if "pixels" in free else (frames, size)
    try:
        with torch.no_grad(), _quiet():
            run = FORMATS[file.suffix](model, clips_of(2 if free else 1, *traced), free, file, describe(trained))
            found = tuple(compared(model, run, clips) for clips in trials)
    except (MissingCapabilityError, OSError, KeyboardInterrupt):
        raise
    except Exception as error:  # whatever torch or onnxruntime cannot do with this network
        return f"cannot be written for this network: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    worst = max(found, key=lambda parity: parity.error)
    if not worst.error < TOLERANCE:
        return (
            f"its logits of clips {worst.shape} are {worst.error:.1g} of the largest one away from the network's, more "
            f"than {TOLERANCE:g}"
        )
    return found


def describe(trained: Trained) -> dict[str, Any]:
    """What a program must know to use the network."""
    recipe = trained.recipe
    mean, std = pixel_statistics(recipe.model)
    return {
        "format": "mgtrain.export/1",
        "mgtrain": __version__,
        "classes": list(trained.classes),
        "input": f"{INPUT}: float32 (B, 3, T, S, S), RGB, (pixel / 255 - mean) / std",
        "output": f"{OUTPUT}: float32 (B, classes), before the {'sigmoid' if recipe.data.multi_label else 'softmax'}",
        "mean": mean,
        "std": std,
        "frames": recipe.clip.frames,
        "sampling": recipe.clip.sampling,
        "stride": recipe.clip.stride,
        "fps": recipe.clip.fps,
        "short_side": recipe.evaluation.short_side,
        "crop": recipe.evaluation.crop,
        "model": recipe.model.model_dump(mode="json"),
    }


def compared(model: nn.Module, run: Run, clips: Tensor) -> Parity:
    """The network and a file on the same clips."""
    expected, found = model(clips), run(clips)
    error = (found - expected).abs().max() / expected.abs().max()
    return Parity(tuple(clips.shape), float(error))


def clips_of(clips: int, frames: int, size: int) -> Tensor:
    """Normalized clips of noise, the same ones each time: float32 (clips, 3, frames, size, size)."""
    noise = generator(0, Draw.NOISE, clips).standard_normal((clips, 3, frames, size, size), np.float32)
    return torch.from_numpy(noise)


def _traced(model: nn.Module, example: Tensor, free: tuple[str, ...]) -> ExportedProgram:
    """The network's graph."""
    axes = dict.fromkeys((AXES[what] for what in free), Dim.AUTO)
    if "pixels" in free:
        axes[4] = Dim.AUTO
    return torch.export.export(model, (example,), dynamic_shapes=(axes,))


def _to_pt2(model: nn.Module, example: Tensor, free: tuple[str, ...], path: Path, notes: dict[str, Any]) -> Run:
    torch.export.save(_traced(model, example, free), path, extra_files={NOTES: json.dumps(notes)})
    run: Run = torch.export.load(path).module()
    return run


def _to_onnx(model: nn.Module, example: Tensor, free: tuple[str, ...], path: Path, notes: dict[str, Any]) -> Run:
    try:
        import onnxruntime  # type: ignore[import-untyped]
        import onnxscript  # noqa: F401  # torch needs it
    except ImportError as error:
        raise MissingCapabilityError(
            f"ONNX needs the package {error.name}; install mgtrain with `pip install 'mgtrain[onnx]'`"
        ) from None
    program = _traced(model, example, free)
    written = torch.onnx.export(program, input_names=[INPUT], output_names=[OUTPUT], dynamo=True, verbose=False)
    assert written is not None, "dynamo=True gives a program"
    written.model.metadata_props.update({"mgtrain": json.dumps(notes), "classes": json.dumps(notes["classes"])})
    written.save(path)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])

    def run(clips: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: clips.numpy()})[0])

    return run


def _to_safetensors(model: nn.Module, _: Tensor, __: tuple[str, ...], path: Path, notes: dict[str, Any]) -> Run:
    options = {**notes["model"], "classes": len(notes["classes"])}
    save_weights(path, model, options, notes["classes"], notes={"mgtrain": json.dumps(notes)})
    again = copy.deepcopy(model)
    for tensor in again.state_dict().values():
        tensor.zero_()
    load_weights(again, read_weights(path, is_ours(again))).demand(1.0, path)
    return again


@contextmanager
def _quiet() -> Iterator[None]:
    """What torch says as it writes a file is of no use to anybody."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


FORMATS = {".onnx": _to_onnx, ".pt2": _to_pt2, ".safetensors": _to_safetensors}
