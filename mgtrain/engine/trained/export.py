"""Export a trained network for other programs: as ONNX, as a torch.export program, or as plain weights.

The input is normalized clips, float32 (B, 3, T, S, S), and the output logits (B, classes); metadata describes how clips
are cut and normalized, and names the classes. A file is read back and run before it gets its final name.
"""

import copy
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mgtrain import __version__
from mgtrain.engine.trained import Trained
from mgtrain.errors import (
    CheckpointError,
    LackError,
    MgtrainError,
    MissingCapabilityError,
    NonFiniteError,
    ThresholdError,
    UsageError,
    lack_of,
    one_line,
)
from mgtrain.models.weights.load import is_ours, load_weights, read_weights, save_weights
from mgtrain.processes.files import replacing
from mgtrain.recipe.model import pixel_statistics
from mgtrain.rng import Draw, generator

TOLERANCE = 1e-4  # relative to the largest logit; frameworks sum in different orders
INPUT, OUTPUT, NOTES = "clips", "logits", "mgtrain.json"
AXES = {"clips": (0,), "frames": (2,), "pixels": (3, 4)}
FREEDOMS = (("clips", "frames", "pixels"), ("clips",), ())  # sizes that may vary, tried in this order
BIG = (32, 96)  # minimum frames and pixels to trace a graph of any size: small feature maps become constants

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Parity:
    """The difference between a file's logits and the network's, for clips of one shape."""

    shape: tuple[int, ...]  # (B, 3, T, S, S)
    error: float  # largest difference, relative to the largest logit


@dataclass(frozen=True, slots=True)
class Exported:
    """The result of an export."""

    path: Path
    free: tuple[str, ...]  # which of clips, frames and pixels may vary
    parity: tuple[Parity, ...]

    def describe(self) -> dict[str, Any]:
        """The result as plain values."""
        parity = [asdict(parity) for parity in self.parity]
        return {"file": str(self.path), "bytes": self.path.stat().st_size, "free": self.free, "parity": parity}


def export(trained: Trained, path: Path) -> Exported:
    """Write the network in the format of the path's suffix, with as many variable sizes as possible.

    Raises `ThresholdError` if torch cannot write the network, or the file's logits differ; no file is left.
    """
    if path.suffix not in FORMATS:
        raise UsageError(f"{path}: the file's name must end in {', '.join(FORMATS)}")
    model = trained.model.cpu().to(memory_format=torch.contiguous_format).eval()
    problem = ""
    try:
        with replacing(path) as temporary:
            for free in FREEDOMS:
                found = _attempt(model, trained, path, temporary, free)
                if not isinstance(found, str):
                    return Exported(path, free, found)
                problem = problem or found
            raise ThresholdError(f"{path}: {problem}; nothing was written")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error}; no file is left") from None


def _attempt(
    model: nn.Module, trained: Trained, path: Path, temporary: Path, free: tuple[str, ...]
) -> tuple[Parity, ...] | str:
    """Write a file in which the sizes in `free` may vary; returns its parity, or why it failed."""
    frames, size = trained.recipe.evaluation_shape.frames, trained.recipe.evaluation_shape.crop
    trials = [(1, frames, size)]
    if "clips" in free:
        trials.append((3, frames, size))
    if "pixels" in free:
        trials += [(2, frames, size + 32), (1, max(8, frames // 2), size), (1, 2 * frames, size)]
    traced = (max(frames, BIG[0]), max(size, BIG[1])) if "pixels" in free else (frames, size)
    try:
        with torch.no_grad(), _quiet():
            run = FORMATS[path.suffix](model, clips_of(2 if free else 1, *traced), free, temporary, describe(trained))
            found = tuple(compared(model, run, clips_of(*trial)) for trial in trials)
    except (MgtrainError, OSError, KeyboardInterrupt):
        raise
    except Exception as error:  # torch and onnxruntime raise many kinds
        if lack := lack_of(error):
            raise LackError(f"{path}: not written: {lack}") from None
        return f"cannot be written for this network: {type(error).__name__}: {one_line(error, 200)}"
    odd = next((parity for parity in found if not parity.error < TOLERANCE), None)  # NaN is odd, too
    if odd is not None:
        return (
            f"for clips {odd.shape}, its logits differ from the network's by {odd.error:.1g} of the largest one, "
            f"more than {TOLERANCE:g}"
        )
    return found


def describe(trained: Trained) -> dict[str, Any]:
    """The metadata that a program needs to use the network."""
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
    """Compare the logits of the network and of a file, which `run` computes, for the same clips."""
    expected, found = model(clips), run(clips)
    if not expected.isfinite().all():
        raise NonFiniteError(f"the network's logits of clips {tuple(clips.shape)} are not finite; export other weights")
    error = (found - expected).abs().max() / expected.abs().max()
    return Parity(tuple(clips.shape), float(error))


def clips_of(clips: int, frames: int, size: int) -> Tensor:
    """Clips of normal noise with a fixed seed: float32 (clips, 3, frames, size, size)."""
    noise = generator(0, Draw.NOISE, clips).standard_normal((clips, 3, frames, size, size), np.float32)
    return torch.from_numpy(noise)


def _traced(model: nn.Module, example: Tensor, free: tuple[str, ...]) -> ExportedProgram:
    axes = {axis: Dim.AUTO for what in free for axis in AXES[what]}
    return torch.export.export(model, (example,), dynamic_shapes=(axes,))


def _to_pt2(model: nn.Module, example: Tensor, free: tuple[str, ...], path: Path, notes: dict[str, Any]) -> Run:
    content = io.BytesIO()  # torch aborts the process if it cannot write to a file
    torch.export.save(_traced(model, example, free), content, extra_files={NOTES: json.dumps(notes)})
    path.write_bytes(content.getbuffer())
    with path.open("rb") as file:  # torch wants a path to end in .pt2
        run: Run = torch.export.load(file).module()
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
    """Silence torch's messages while it writes a file."""
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
