"""The tensors of a file of weights, by name. Nothing that a file says is run.

safetensors hold no code. torch's files are pickles, which torch's own restricted reader opens. Caffe2's are pickles of
numpy arrays: the reader here knows these and plain containers, and builds the arrays itself, from bytes that it checks.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mgtrain.errors import CheckpointError

ZIP = b"PK\x03\x04"
LEGACY_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the first pickle of torch < 1.6's files, a number
STATE_KEYS = ("model_state", "state_dict", "model")  # PySlowFast and PyTorchVideo, MMAction2 and many, timm


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pth, .pyth or Caffe2 .pkl file; its contents say which it is, not its name.

    Raises:
        CheckpointError: it cannot be read, holds no tensors, or asks for more than data.
    """
    try:
        with path.open("rb") as file:
            start = file.read(16)
            file.seek(0)
            if start.startswith((ZIP, LEGACY_TORCH)):
                content = torch.load(file, map_location="cpu", weights_only=True)
            elif start[8:9] == b"{":
                content = load_file(path)
            else:
                content = _read_caffe2(file)
    except (pickle.UnpicklingError, SafetensorError, OSError, ValueError, TypeError, LookupError, AttributeError,
            EOFError, RuntimeError, MemoryError, RecursionError, OverflowError, AssertionError) as error:  # fmt: skip
        raise CheckpointError(f"{path}: cannot be read as weights: {_cause(error)}") from None
    for key in STATE_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    named = content.items() if isinstance(content, dict) else ()
    tensors = {str(name): value for name, value in named if isinstance(value, Tensor) and _is_plain(value)}
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors under names; give a file of a model's weights")
    return tensors


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_complex()


def _cause(error: Exception) -> str:
    """One line; of what is refused, its name."""
    refused = re.search(r"GLOBAL ([\w.]+)|(?:global|class|type):? ([\w.]+\.[\w.]+)", str(error))
    if refused:
        return (
            f"it asks for {refused[1] or refused[2]}, and only tensors and plain data are read, so that no file can "
            "run code; save the model's state_dict alone"
        )
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _read_caffe2(file: BinaryIO) -> dict[str, Tensor]:
    content = _ArraysOnly(file, encoding="latin1").load()
    blobs = content.get("blobs", content)
    return {
        name: torch.from_numpy(blob.array.astype(blob.array.dtype.newbyteorder("="), order="C"))
        for name, blob in blobs.items()
        if isinstance(blob, _Array)
    }


class _Dtype:
    """What a pickle says of a number's type: `f4`, and later the order of its bytes."""

    def __init__(self, kind: str, *_: Any) -> None:
        if not re.fullmatch(r"[<>=|]?([fiu][1248]|b1)", kind):
            raise pickle.UnpicklingError(f"arrays of {kind[:20]!r} are no weights")
        self.dtype = np.dtype(kind)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """What a pickle says of an array: its shape, type and bytes, as numpy writes them."""

    def __init__(self, *_: Any) -> None:
        self.array = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, content = state
        data = content.encode("latin1") if isinstance(content, str) else content  # Python 2 had no bytes
        if len(data) != math.prod(shape) * kind.dtype.itemsize:
            raise pickle.UnpicklingError(f"an array of shape {shape} has {len(data)} bytes")
        self.array = np.frombuffer(data, kind.dtype).reshape(shape, order="F" if fortran else "C")


def _encoded(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes in a pickle for Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in {encoding[:20]!r}")
    return text.encode("latin1")


class _ArraysOnly(pickle.Unpickler):
    """A reader of pickles in which every name stands for something of this module, or is refused."""

    KNOWN: dict[tuple[str, str], Callable[..., Any]] = {  # noqa: RUF012
        ("multiarray", "_reconstruct"): _Array,
        ("multiarray", "scalar"): lambda *_: None,  # a learning rate, a count
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): _encoded,
        ("collections", "OrderedDict"): dict,
    }

    def find_class(self, module: str, name: str) -> Any:
        known = self.KNOWN.get((re.sub(r"^numpy\._?core\.", "", module), name))
        if known is None:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return known
