"""A GPU that computes nothing: torch's CUDA build believes in one, and what is asked of it is counted.

`environment(folder)` says how to start a process that has one; `set_up` is called there. Real are CUDA tensors, the
caching allocator and its peak, streams, autograd, autocast, optimizers and torch's choice of kernels. Kernels are
counted and compute nothing, so no value means anything. Convolutions, which cuDNN would compute, are allocations
that count as nothing, Triton's kernels are counted; CUDA graphs and NCCL are not there.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

LIBRARY = "MGTRAIN_NULL_GPU"  # the variable that names the library to the process
OF_TORCH = ("libtorch_cuda", "libc10_cuda", "libtorch_cuda_linalg", "libtorch_python", "libcaffe2_nvrtc")
REAL = re.compile(r"__cuda(Un)?[rR]egister|cudaGetError(Name|String)")  # harmless, and needed when torch is imported
PRODUCTS = re.compile(r"cublas\w*(gemm|Gemm|gemv|syrk|LtMatmul$)")


def why_not() -> str | None:
    """Why this machine cannot have a null GPU."""
    if any(shutil.which(tool) is None for tool in ("gcc", "nm")):
        return "needs gcc and nm"
    if _headers() is None or not (_torch() / "libtorch_cuda.so").exists():
        return "needs torch's CUDA build with the headers that pip installs beside it"
    return None


def environment(folder: Path) -> dict[str, str]:
    """This process's variables, and those that give a child a null GPU, built in `folder`."""
    headers = _headers()
    assert headers is not None, why_not()
    asked = {
        name
        for library in OF_TORCH
        for line in _run("nm", "-D", "--undefined-only", f"{_torch()}/{library}.so").splitlines()
        if re.fullmatch(r"(__)?cu(da|blas)?[A-Z_]\w*", name := line.split()[-1].partition("@")[0])
    }
    asked = {name for name in asked if not REAL.match(name)}
    source, library = Path(__file__).with_suffix(".c"), folder / "libnullgpu.so"
    own = set(re.findall(r"\b(\w+)\([^;{}]*\)\s*{", source.read_text()))
    others = {name for name in asked - own if name.startswith(("cuda", "__cuda", "cublas"))}
    rest, driver = folder / "rest.c", folder / "driver.c"
    counts = {name: "null_launches++; " if PRODUCTS.match(name) else "" for name in sorted(others)}
    stubs = [f"int {name}() {{ {count}return 0; }}" for name, count in counts.items()]
    rest.write_text("\n".join(["extern long null_launches;", *stubs, ""]))
    driver.write_text("\n".join(f"int {name}() {{ return 0; }}" for name in sorted(asked - own - others)))
    build = ("gcc", "-w", "-O1", "-fPIC", "-shared", "-fno-builtin")
    _run(*build, *headers, str(source), str(rest), "-o", str(library))
    _run(*build, str(driver), "-o", str(folder / "libcuda.so.1"))
    paths = {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": f"{source.parent}:{source.parents[1]}"}
    usual = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    joined = {key: f"{value}:{usual[key]}" if usual.get(key) else value for key, value in paths.items()}
    return usual | joined | {"LD_PRELOAD": str(library), LIBRARY: str(library), "OMP_NUM_THREADS": "1"}


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None, "torch is there"
    assert spec.origin is not None, "torch is a package"
    return Path(spec.origin).parent / "lib"


def _headers() -> list[str] | None:
    """Options of gcc: CUDA's headers, of which the compiler's own (crt) come with Triton."""
    found = []
    for package, header in (("nvidia", "*/include/cuda_runtime_api.h"), ("triton", "backends/nvidia/include/crt")):
        spec = importlib.util.find_spec(package)
        places = (spec.submodule_search_locations if spec else None) or ()
        found.append(next((f"-I{file.parent}" for place in places for file in Path(place).glob(header)), None))
    return None if None in found else found  # type: ignore[return-value]


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@dataclass
class Asked:
    """What was asked of the GPU."""

    launches: int = 0  # of kernels, copies within the device among them
    waits: int = 0  # of the host
    arrivals: int = 0  # copies from the host
    pageable: int = 0  # of them, out of memory that is not pinned, for which the host waits


@contextmanager
def counted() -> Iterator[Asked]:
    """Within: what is asked; known once the block ends."""
    names, asked = list(vars(Asked())), Asked()
    before = {name: _counter(name).value for name in names}
    yield asked
    for name in names:
        setattr(asked, name, _counter(name).value - before[name])


@lru_cache
def _counter(name: str) -> Any:
    return ctypes.c_long.in_dll(ctypes.CDLL(os.environ[LIBRARY]), f"null_{name}")


def set_up() -> None:
    """In the child: let convolutions be allocations, and Triton's kernels be counted."""
    import torch
    from triton.runtime.jit import JITFunction

    def run(*_: object, **__: object) -> None:
        _counter("launches").value += 1

    JITFunction.run = run  # of mgtrain's kernels, and of some of torch's own
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    library = torch.library.Library("aten", "IMPL")
    library.impl("convolution", _convolution, "CUDA")
    library.impl("convolution_backward", _convolution_backward, "CUDA")
    set_up.kept = library  # type: ignore[attr-defined]  # as long as the process


def _layout(x: Any, weight: Any) -> Any:
    import torch

    formats = {torch._prims_common.suggest_memory_format(tensor) for tensor in (x, weight)}
    return next((one for one in formats if one != torch.contiguous_format), torch.contiguous_format)


def _convolution(x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, *_: Any) -> Any:
    import torch

    sizes = [
        (size + 2 * pad - space * (kernel - 1) - 1) // step + 1
        for size, kernel, step, pad, space in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    ]
    layout = _layout(x, weight)
    return torch.empty(len(x), len(weight), *sizes, dtype=x.dtype, device=x.device, memory_format=layout)


def _convolution_backward(grad: Any, x: Any, weight: Any, sizes: Any, *rest: Any) -> Any:
    import torch

    needed = rest[-1]
    made = (torch.empty_like(x), torch.empty_like(weight), weight.new_empty(len(weight)))
    return tuple(tensor if needs else None for tensor, needs in zip(made, needed, strict=True))
