"""Whether this machine can train, and what would improve it: `mgtrain doctor`. Every finding ends in what to do."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import av
import torch
import torchvision
from torch import Tensor

from mgtrain import __version__
from mgtrain.clips.units import RandomClips
from mgtrain.engine.checks import DTYPES, check_precision
from mgtrain.engine.fit import open_data
from mgtrain.errors import MissingCapabilityError
from mgtrain.models.conv import Conv3d
from mgtrain.preflight.bench_step import seconds_of
from mgtrain.preflight.loading import cut_on_one_core, endless_requests
from mgtrain.processes.cores import busy_cores, crowded, usable_cores
from mgtrain.recipe import Recipe, load_recipe
from mgtrain.schedule import make_plan

Level = Literal["good", "could be better", "missing"]
BAD_PYAV = {"15.1.0": "crashes on a truncated mp4", "18.0.0": "crashes on a truncated mp4"}
DECODERS = {"h264": "most videos", "hevc": "phones' videos", "vp9": "webm, such as Something-Something's",
            "av1": "newer web videos", "mpeg4": "old avi files, such as UCF101's"}  # fmt: skip
NEEDED_DECODER, ENCODER = "h264", "libx264"
SHARED_BYTES = 1 << 30  # through which loader processes pass clips; containers often have 64 MiB
PROBE = (8, 64, 8, 28, 28)  # features of an early layer
CLOSE = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.01}  # relative error of a gradient


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    what: str
    level: Level
    found: str
    advice: str = ""  # what to do; empty if all is well

    def __str__(self) -> str:
        mark = {"good": "ok ", "could be better": "-> ", "missing": "!! "}[self.level]
        return f"{mark} {self.what:28} {self.found}" + (f"; {self.advice}" if self.advice else "")


def examine(device: torch.device, recipe: Recipe | None = None) -> Iterator[Finding]:
    """Run all checks one after the other; with a recipe, check its data too."""
    yield from versions()
    yield from devices(device)
    yield cores()
    yield from codecs()
    yield from room()
    yield from convolutions(device)
    if recipe:
        yield from data(recipe)


def refuse_missing(findings: Iterable[Finding]) -> None:
    """Raise `MissingCapabilityError` if something needed is missing."""
    missing = [f"{finding.what}: {finding.advice}" for finding in findings if finding.level == "missing"]
    if missing:
        raise MissingCapabilityError("; ".join(missing))


def judged(what: str, found: str, advice: str, bad: Level = "could be better") -> Finding:
    """A finding that is good unless there is advice."""
    return Finding(what, bad if advice else "good", found, advice)


def versions() -> Iterator[Finding]:
    """The packages that matter."""
    found = (
        f"mgtrain {__version__}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}, PyAV {av.__version__}"
    )
    bad = BAD_PYAV.get(av.__version__)
    yield judged("versions", found, f"PyAV {av.__version__} {bad}: pip install 'av>=18.1'" if bad else "")
    onnx = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
    if onnx:
        yield judged("export", f"no {', '.join(onnx)}", "for ONNX: pip install 'mgtrain[onnx]'")
    else:
        yield Finding("export", "good", "onnx, pt2, safetensors")


def devices(device: torch.device) -> Iterator[Finding]:
    """GPUs, and how ranks communicate."""
    count = torch.cuda.device_count()
    if count:
        yield Finding("devices", "good", ", ".join(torch.cuda.get_device_name(n) for n in range(count)))
        nccl = torch.distributed.is_nccl_available()
        found = f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if nccl else "no NCCL"  # type: ignore[no-untyped-call]
        yield judged("ranks", found, "" if nccl else "install a build of torch with CUDA and NCCL", "missing")
    else:
        smi = shutil.which("nvidia-smi")
        advice = "torch sees no GPU though nvidia-smi is there: install a build of torch for its driver" if smi else ""
        found = f"no GPU; {usable_cores()} cores, {torch.get_num_threads()} threads ({device})"
        yield judged("devices", found, advice)
        gloo = torch.distributed.is_gloo_available()
        advice = "" if gloo else "install a build of torch with torch.distributed"
        yield judged("ranks", "gloo" if gloo else "no gloo", advice, "missing")


def cores() -> Finding:
    """Whether other processes use the cores, and whether there are enough for torch's threads.

    The threads of a step wait for each other, so a core that another process uses makes the step many times slower.
    """
    there, threads, busy = usable_cores(), torch.get_num_threads(), busy_cores()
    if threads > there:
        advice = f"this makes a step many times slower: set OMP_NUM_THREADS={there}"
        return judged("cores", f"{threads} threads of torch on {there} cores", advice)
    if busy is not None and crowded(busy):
        advice = "torch's threads wait for them: stop them, or measure later"
        return judged("cores", f"other processes use {busy:.1f} of {there} cores", advice)
    return Finding("cores", "good", f"{there}, {'idle' if busy is not None else 'use unknown'}")


def codecs() -> Iterator[Finding]:
    """What PyAV can decode, and encode for `mgtrain data prepare`."""
    absent = [name for name in DECODERS if not _has_codec(name, "r")]
    if absent:
        lacking = ", ".join(f"{name} ({DECODERS[name]})" for name in absent)
        level: Level = "missing" if NEEDED_DECODER in absent else "could be better"
        yield Finding("decoders", level, f"no {lacking}", "pip install --force-reinstall av, whose wheels have them")
    else:
        version = ".".join(map(str, av.library_versions["libavcodec"]))
        yield Finding("decoders", "good", f"{', '.join(DECODERS)} (libavcodec {version})")
    encodes = _has_codec(ENCODER, "w")
    advice = "" if encodes else "for `data prepare`: pip install av from a wheel"
    yield judged("encoder", ENCODER if encodes else f"no {ENCODER}", advice)


def room() -> Iterator[Finding]:
    """Shared memory and disk."""
    if os.path.isdir("/dev/shm"):
        size = shutil.disk_usage("/dev/shm").total
        advice = "start the container with --shm-size=8g, or train with hardware.workers=0"
        yield judged("shared memory", f"{size / 2**30:.1f} GiB", advice if size < SHARED_BYTES else "")
    free = shutil.disk_usage(".").free
    advice = "checkpoints need room: free some, or start in another folder" if free < 2**30 else ""
    yield judged("disk", f"{free / 2**30:.0f} GiB free here", advice)


def convolutions(device: torch.device) -> Iterator[Finding]:
    """A 3-D convolution in each memory layout and precision: its time, and its error against double precision."""
    usable: list[tuple[float, str, bool]] = []
    for precision in ("fp32", "bf16", "fp16") if device.type == "cuda" else ("fp32", "bf16"):
        for last, layout in ((True, torch.channels_last_3d), (False, torch.contiguous_format)):
            seconds, error = _probe(device, precision, layout)
            if error <= CLOSE[precision]:
                usable.append((seconds, precision, last))
            advice = f"do not train with hardware.precision={precision} on this build of torch"
            what = f"conv3d {precision}, channels {'last' if last else 'first'}"
            found = f"{1e3 * seconds:.1f} ms, relative error {error:.1e}"
            yield judged(what, found, advice if error > CLOSE[precision] else "")
    if usable:
        _, precision, last = min(usable)
        advice = f"fastest: hardware.precision={precision} hardware.channels_last={str(last).lower()}"
        if not _can_train(precision, device):
            advice += ", but this build computes wrong gradients of short clips with it: use fp32"
        level: Level = "good" if last else "could be better"
        yield Finding("layout", level, f"channels {'last' if last else 'first'}", advice)


def data(recipe: Recipe) -> Iterator[Finding]:
    """Whether the recipe's videos are there, and how fast one core cuts clips from them."""
    train, val = open_data(recipe)
    yield Finding("data", "good", f"{len(train):,} training and {len(val):,} validation videos")
    requests = endless_requests(len(train), recipe, make_plan(recipe, len(train))[0].grid)
    core = cut_on_one_core(RandomClips(train, recipe), requests, seconds=2)
    rate = core.clips / core.seconds
    advice = "`mgtrain data prepare` makes coarse clips several times faster" if not recipe.data.prepared else ""
    yield Finding("loading", "good", f"{rate:.0f} clips/s on one core at the coarsest shape", advice)
    if core.bad:
        found = f"{core.bad} of {core.clips} cannot be decoded"
        yield judged("videos", found, "find them: mgtrain data check")


def _probe(device: torch.device, precision: str, layout: torch.memory_format) -> tuple[float, float]:
    """Seconds of a convolution's forward and backward pass, and the relative error of its gradient."""
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
    given = x.to(device).to(memory_format=layout)
    times = seconds_of(lambda: gradient(given, DTYPES[precision], enabled), 4, device)
    return statistics.median(times[1:]), float(error)


def _can_train(precision: str, device: torch.device) -> bool:
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
