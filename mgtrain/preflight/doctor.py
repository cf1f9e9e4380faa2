"""Whether this machine can train, and what would make it better: `mgtrain doctor`. Every finding ends in what to do."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import av
import torch
import torchvision
from torch import Tensor

from mgtrain import __version__
from mgtrain.engine.checks import DTYPES, check_precision
from mgtrain.errors import MissingCapabilityError
from mgtrain.models.conv import Conv3d
from mgtrain.processes.cores import busy_cores, crowded, usable_cores
from mgtrain.recipe import Recipe

Level = Literal["good", "could be better", "missing"]
BAD_PYAV = {"15.1.0": "crashes on a truncated mp4", "18.0.0": "crashes on a truncated mp4"}
DECODERS = {"h264": "most videos", "hevc": "phones' videos", "vp9": "webm, such as Something-Something's",
            "av1": "newer web videos", "mpeg4": "old avi files, such as UCF101's"}  # fmt: skip
NEEDED_DECODER, ENCODER = "h264", "libx264"
SHARED_BYTES = 1 << 30  # that loader processes hand clips over in; containers often have 64 MiB
PROBE = (8, 64, 8, 28, 28)  # features of an early layer
CLOSE = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.01}  # relative error of a sum in it


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at."""

    what: str
    level: Level
    found: str
    advice: str = ""  # what to do; nothing where all is well


def examine(device: torch.device, recipe: Recipe | None = None) -> Iterator[Finding]:
    """Look at everything, one after the other; with a recipe at its data, too."""
    yield from versions()
    yield from devices(device)
    yield from cores()
    yield from codecs()
    yield from room()
    yield from convolutions(device)
    if recipe:
        yield from data(recipe)


def versions() -> Iterator[Finding]:
    """The packages that matter."""
    found = (
        f"mgtrain {__version__}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}, PyAV {av.__version__}"
    )
    bad = BAD_PYAV.get(av.__version__)
    advice = f"PyAV {av.__version__} {bad}: pip install 'av>=18.1'" if bad else ""
    yield Finding("versions", "could be better" if bad else "good", found, advice)
    onnx = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
    if onnx:
        yield Finding("export", "could be better", f"no {', '.join(onnx)}", "for ONNX: pip install 'mgtrain[onnx]'")
    else:
        yield Finding("export", "good", "onnx, pt2, safetensors")


def devices(device: torch.device) -> Iterator[Finding]:
    """GPUs, and how ranks talk to one another."""
    count = torch.cuda.device_count()
    if count:
        names = [torch.cuda.get_device_name(n) for n in range(count)]
        yield Finding("devices", "good", ", ".join(names))
        if torch.distributed.is_nccl_available():
            yield Finding("ranks", "good", f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}")  # type: ignore[no-untyped-call]
        else:
            yield Finding("ranks", "missing", "no NCCL", "install a build of torch with CUDA and NCCL")
    else:
        smi = shutil.which("nvidia-smi")
        advice = "torch sees no GPU though nvidia-smi is there: install a build of torch for its driver" if smi else ""
        found = f"no GPU; {usable_cores()} cores, {torch.get_num_threads()} threads ({device})"
        yield Finding("devices", "could be better" if smi else "good", found, advice)
        if torch.distributed.is_gloo_available():
            yield Finding("ranks", "good", "gloo")
        else:
            yield Finding("ranks", "missing", "no gloo", "install a build of torch with torch.distributed")


def cores() -> Iterator[Finding]:
    """Whether others are at work on the cores, and whether there are enough for torch's threads.

    Threads of one step wait for each other, so that a core that another process holds makes it many times slower.
    """
    there, threads, busy = usable_cores(), torch.get_num_threads(), busy_cores()
    if threads > there:
        found = f"{threads} threads of torch on {there} cores"
        yield Finding("cores", "could be better", found, f"a step is many times slower so: set OMP_NUM_THREADS={there}")
    elif busy is not None and crowded(busy):
        found = f"other processes are at work on {busy:.1f} of {there} cores"
        yield Finding("cores", "could be better", found, "torch's threads wait for these: stop them, or measure later")
    else:
        yield Finding("cores", "good", f"{there}, {'idle' if busy is not None else 'use unknown'}")


def codecs() -> Iterator[Finding]:
    """What PyAV can decode, and encode for `mgtrain data prepare`."""
    absent = [name for name in DECODERS if not _has_codec(name, "r")]
    libraries = ".".join(map(str, av.library_versions["libavcodec"]))
    if absent:
        lacking = ", ".join(f"{name} ({DECODERS[name]})" for name in absent)
        level: Level = "missing" if NEEDED_DECODER in absent else "could be better"
        yield Finding("decoders", level, f"no {lacking}", "pip install --force-reinstall av, whose wheels have them")
    else:
        yield Finding("decoders", "good", f"{', '.join(DECODERS)} (libavcodec {libraries})")
    if _has_codec(ENCODER, "w"):
        yield Finding("encoder", "good", ENCODER)
    else:
        yield Finding("encoder", "could be better", f"no {ENCODER}", "for `data prepare`: pip install av from a wheel")


def room() -> Iterator[Finding]:
    """Shared memory and disk."""
    if os.path.isdir("/dev/shm"):
        size = shutil.disk_usage("/dev/shm").total
        small = size < SHARED_BYTES
        advice = "start the container with --shm-size=8g, or train with hardware.workers=0" if small else ""
        yield Finding("shared memory", "could be better" if small else "good", f"{size / 2**30:.1f} GiB", advice)
    free = shutil.disk_usage(".").free
    advice = "checkpoints need room: free some, or start elsewhere" if free < 2**30 else ""
    yield Finding("disk", "could be better" if advice else "good", f"{free / 2**30:.0f} GiB free here", advice)


def convolutions(device: torch.device) -> Iterator[Finding]:
    """A 3-D convolution in each layout and precision: how fast, and how far from double precision."""
    rows = []
    for precision in ("fp32", "bf16", "fp16") if device.type == "cuda" else ("fp32", "bf16"):
        for name, layout in (("channels last", torch.channels_last_3d), ("channels first", torch.contiguous_format)):
            seconds, error = _probe(device, precision, layout)
            rows.append((precision, name, seconds, error))
    for precision, name, seconds, error in rows:
        bad = error > CLOSE[precision]
        advice = f"do not train with hardware.precision={precision} on this build of torch" if bad else ""
        found = f"{1e3 * seconds:.1f} ms, {error:.1e} off"
        yield Finding(f"conv3d {precision}, {name}", "could be better" if bad else "good", found, advice)
    best = min((row for row in rows if row[3] <= CLOSE[row[0]]), key=lambda row: row[2], default=None)
    if best:
        last = str(best[1] == "channels last").lower()
        usable = _can_train(best[0], device)
        advice = f"fastest: hardware.precision={best[0]} hardware.channels_last={last}"
        if not usable:
            advice += ", but this build's gradients of short clips are wrong in it: use fp32"
        yield Finding("layout", "good" if last == "true" else "could be better", best[1], advice)


def data(recipe: Recipe) -> Iterator[Finding]:
    """Whether the recipe's videos are there, and how fast one core cuts clips out of them."""
    from mgtrain.clips.order import step_requests
    from mgtrain.clips.units import RandomClips
    from mgtrain.engine.fit import open_data
    from mgtrain.preflight.bench_data import one_thread
    from mgtrain.schedule import make_plan

    train, val = open_data(recipe)
    yield Finding("data", "good", f"{len(train):,} training and {len(val):,} validation videos")
    plan = make_plan(recipe, len(train))
    requests, clips = step_requests(plan[0], len(train), recipe.seed), RandomClips(train, recipe)
    start, done, bad = time.perf_counter(), 0, 0
    with one_thread():
        for request in requests:
            loaded = clips[[request]]
            done, bad = done + 1, bad + len(loaded.bad)
            if time.perf_counter() - start > 2:
                break
    rate = done / (time.perf_counter() - start)
    advice = "`mgtrain data prepare` makes coarse clips several times faster" if not recipe.data.prepared else ""
    yield Finding("loading", "good", f"{rate:.0f} clips/s on one core at the coarsest shape", advice)
    if bad:
        yield Finding(
            "videos", "could be better", f"{bad} of {done} cannot be decoded", "find them: mgtrain data check"
        )


def _probe(device: torch.device, precision: str, layout: torch.memory_format) -> tuple[float, float]:
    """Seconds of a convolution's forward and backward pass, and its gradient's relative error."""
    conv = Conv3d(PROBE[1], PROBE[1], 3, padding=1, bias=False)
    values = torch.arange(float(conv.weight.numel())).sin().view_as(conv.weight) / 40
    x = torch.arange(float(torch.Size(PROBE).numel())).cos().view(PROBE)
    conv.weight.data.copy_(values)

    def gradient(x: Tensor, dtype: torch.dtype, enabled: bool) -> Tensor:
        with torch.autocast(x.device.type, dtype, enabled=enabled):
            y = conv(x)
        return torch.autograd.grad((y.float() if enabled else y).sum(), conv.weight)[0]

    small = x[:1, :, :4]
    conv.double()
    exact = gradient(small.double(), torch.float32, False)
    conv.float().to(device).to(memory_format=layout)
    enabled = precision != "fp32"
    given = small.to(device).to(memory_format=layout)
    error = (gradient(given, DTYPES[precision], enabled).double().cpu() - exact).norm() / exact.norm()
    given, times = x.to(device).to(memory_format=layout), []
    for _ in range(4):
        start = time.perf_counter()
        gradient(given, DTYPES[precision], enabled).sum().item()  # waits for the device
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]), float(error)


def _can_train(precision: str, device: torch.device) -> bool:
    from mgtrain.recipe import load_recipe

    try:
        check_precision(load_recipe("demo_baseline", [f"hardware.precision={precision}"]), device)
    except MissingCapabilityError:
        return False
    return True


def _has_codec(name: str, mode: Literal["r", "w"]) -> bool:
    make: Callable[..., Any] = av.Codec
    try:
        make(name, mode)
    except ValueError:  # PyAV's UnknownCodecError is one
        return False
    return True
