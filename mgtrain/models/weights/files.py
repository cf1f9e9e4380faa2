"""Read the tensors of a file of weights. Nothing in a file is executed.

safetensors files contain no code. torch's files are pickles, read with torch's restricted unpickler. Caffe2's are
pickles of numpy arrays, read with the unpickler below, which allows only plain containers and arrays that it builds.
"""

import math
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mgtrain.errors import CheckpointError, short_of_memory

ZIP = b"PK\x03\x04"
LEGACY_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the first pickle, a number, in files of torch < 1.6
STATE_KEYS = ("model_state", "state_dict", "model")  # PySlowFast and PyTorchVideo, MMAction2 and many, timm


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors, by name, of a .safetensors, .pth, .pyth or Caffe2 .pkl file, whatever the file's own name.

    Raises `CheckpointError` if it cannot be read, contains no tensors, or needs more than data to be read.
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
        if short_of_memory():
            raise MemoryError from error
        raise CheckpointError(f"{path}: cannot be read as weights: {_cause(error)}") from None
    for key in STATE_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    named = content.items() if isinstance(content, dict) else ()
    tensors = {str(name): value for name, value in named if isinstance(value, Tensor) and _is_plain(value)}
    if not tensors:
        raise CheckpointError(f"{path}: contains no named tensors; give a file of a model's weights")
    return tensors


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, but copies of those, such as tied weights, that share memory, which safetensors refuses."""
    found, known = {}, set[int]()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in known else tensor
        known.add(place)
    return found


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_complex()


def _cause(error: Exception) -> str:
    """The error in one line; if the reader refused an object, its name."""
    refused = re.search(r"GLOBAL ([\w.]+)|(?:global|class|type):? ([\w.]+\.[\w.]+)", str(error))
    if refused:
        rule = "only tensors and plain data are allowed, because other objects can run code"
        return f"it contains {refused[1] or refused[2]}, but {rule}; save only the model's state_dict"
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _read_caffe2(file: BinaryIO) -> dict[str, Tensor]:
    content = _ArraysOnly(file, encoding="latin1").load()
    arrays = {name: blob.array for name, blob in content.get("blobs", content).items() if isinstance(blob, _Array)}
    return {name: torch.from_numpy(a.astype(a.dtype.newbyteorder("="), order="C")) for name, a in arrays.items()}


class _Dtype:
    """A dtype in a pickle: `f4`, and then its byte order."""

    def __init__(self, kind: str, *_: Any) -> None:
        if not re.fullmatch(r"[<>=|]?([fiu][1248]|b1)", kind):
            raise pickle.UnpicklingError(f"it contains arrays of {kind[:20]!r}, which are not weights")
        self.dtype = np.dtype(kind)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """An array in a pickle: its shape, type and bytes, as numpy writes them."""

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
    """An unpickler that maps each known name to an object of this module and refuses all others."""

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
