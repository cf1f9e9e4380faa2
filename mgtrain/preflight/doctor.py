"""Check whether this machine can train, and advise what would improve it: `mgtrain doctor`."""

import importlib.util
import os
import platform
import shutil
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import av
import torch
import torchvision
from torch import Tensor

from mgtrain import __version__
from mgtrain.engine.checks import DTYPES, check_precision, check_shapes, right_gradients
from mgtrain.engine.machine.warmup import seconds_of, set_up
from mgtrain.engine.start import open_data
from mgtrain.errors import MgtrainError, MissingCapabilityError
from mgtrain.models import fused
from mgtrain.models.conv import Conv3d
from mgtrain.models.norm import GroupBatchNorm3d
from mgtrain.models.part import Part, set_part
from mgtrain.preflight.bench_step import half_precision_gain
from mgtrain.preflight.loading import cut_on_one_core
from mgtrain.processes.cores import busy_cores, crowded, usable_cores
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe, load_recipe
from mgtrain.schedule import make_plan

Level = Literal["good", "could be better", "missing"]
BAD_PYAV = {"15.1.0": "crashes on a truncated mp4", "18.0.0": "crashes on a truncated mp4"}
DECODERS = {"h264": "most videos", "hevc": "phones' videos", "vp9": "webm, such as Something-Something's",
            "av1": "newer web videos", "mpeg4": "old avi files, such as UCF101's"}  # fmt: skip
NEEDED_DECODER, ENCODER = "h264", "libx264"
SHARED_BYTES = 1 << 30  # of shared memory for the clips of loader processes; containers often have 64 MiB
DEMO_VIDEOS = 160  # training videos of the demo
PROBE = (8, 64, 8, 28, 28)  # shape of an early layer's features
CLOSE = {"fp32": 1e-4, "tf32": 0.01, "bf16": 0.05, "fp16": 0.01}  # relative error of a gradient


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    what: str
    level: Level
    found: str
    advice: str = ""  # what to do; empty if nothing is wrong

    def __str__(self) -> str:
        mark = {"good": "ok ", "could be better": "-> ", "missing": "!! "}[self.level]
        return f"{mark} {self.what:28} {self.found}" + (f"; {self.advice}" if self.advice else "")


def examine(device: torch.device, recipe: Recipe | None = None) -> Iterator[Finding]:
    """Run all checks; with a recipe, check its data, too."""
    yield from versions()
    yield from devices(device)
    yield cores()
    yield from codecs()
    yield from room()
    if device.type == "cuda":
        set_up(recipe or load_recipe("demo_baseline"), device)
        yield tf32()
        yield groups(device)
    yield from convolutions(device, recipe or load_recipe("demo_baseline"))
    if recipe:
        try:
            yield from data(recipe, device)
        except MgtrainError as error:
            found, _, advice = str(error).partition("; ")
            yield Finding("recipe", "missing", found, advice or "see above")


def refuse_missing(findings: Iterable[Finding]) -> None:
    """Raise `MissingCapabilityError` if something required is missing."""
    if missing := [f"{finding.what}: {finding.advice}" for finding in findings if finding.level == "missing"]:
        raise MissingCapabilityError("; ".join(missing))


def judged(what: str, found: str, advice: str, bad: Level = "could be better") -> Finding:
    """A finding that is good unless there is advice."""
    return Finding(what, bad if advice else "good", found, advice)


def versions() -> Iterator[Finding]:
    """Versions of the packages that matter."""
    found = (
        f"mgtrain {__version__}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}, PyAV {av.__version__}"
    )
    bad = BAD_PYAV.get(av.__version__)
    yield judged("versions", found, f"PyAV {av.__version__} {bad}: pip install 'av>=18.1'" if bad else "")
    onnx = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
    found = f"no {', '.join(onnx)}" if onnx else "onnx, pt2, safetensors"
    yield judged("export", found, "for ONNX: pip install 'mgtrain[onnx]'" if onnx else "")


def devices(device: torch.device) -> Iterator[Finding]:
    """The GPUs, and the backend with which ranks communicate."""
    if count := torch.cuda.device_count():
        yield Finding("devices", "good", ", ".join(torch.cuda.get_device_name(n) for n in range(count)))
        nccl = torch.distributed.is_nccl_available()
        found = f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if nccl else "no NCCL"  # type: ignore[no-untyped-call]
        yield judged("ranks", found, "" if nccl else "install a build of torch with CUDA and NCCL", "missing")
        return
    smi = shutil.which("nvidia-smi")
    advice = "nvidia-smi exists, but torch sees no GPU: install a build of torch for its driver" if smi else ""
    yield judged("devices", f"no GPU; {usable_cores()} cores, {torch.get_num_threads()} threads ({device})", advice)
    gloo = torch.distributed.is_gloo_available()
    advice = "" if gloo else "install a build of torch with torch.distributed"
    yield judged("ranks", "gloo" if gloo else "no gloo", advice, "missing")


def cores() -> Finding:
    """Whether the cores are free, and enough for torch's threads.

    The threads of a step wait for each other, so one busy core makes the step many times slower.
    """
    count, threads, busy = usable_cores(), torch.get_num_threads(), busy_cores()
    if threads > count:
        advice = f"this makes a step many times slower: set OMP_NUM_THREADS={count}"
        return judged("cores", f"{threads} threads of torch on {count} cores", advice)
    if busy is not None and crowded(busy):
        advice = "torch's threads wait for them: stop them, or measure later"
        return judged("cores", f"other processes use {busy:.1f} of {count} cores", advice)
    return Finding("cores", "good", f"{count}, {'idle' if busy is not None else 'use unknown'}")


def codecs() -> Iterator[Finding]:
    """The codecs that PyAV can decode, and encode for `mgtrain data prepare`."""
    missing = [name for name in DECODERS if not _has_codec(name, "r")]
    found = f"{', '.join(DECODERS)} (libavcodec {'.'.join(map(str, av.library_versions['libavcodec']))})"
    if missing:
        found = f"no {', '.join(f'{name} ({DECODERS[name]})' for name in missing)}"
    advice = "use PyAV's wheels: pip install --force-reinstall av" if missing else ""
    yield judged("decoders", found, advice, "missing" if NEEDED_DECODER in missing else "could be better")
    encodes = _has_codec(ENCODER, "w")
    advice = "" if encodes else "for `data prepare`: pip install --force-reinstall --only-binary av av"
    yield judged("encoder", ENCODER if encodes else f"no {ENCODER}", advice)


def room() -> Iterator[Finding]:
    """Shared memory and free disk space."""
    if os.path.isdir("/dev/shm"):
        size = shutil.disk_usage("/dev/shm").total
        advice = "start the container with --shm-size=8g, or train with hardware.workers=0"
        yield judged("shared memory", f"{size / 2**30:.1f} GiB", advice if size < SHARED_BYTES else "")
    free = shutil.disk_usage(".").free
    advice = "too little for checkpoints: free some space, or use another folder" if free < 2**30 else ""
    yield judged("disk", f"{free / 2**30:.0f} GiB free here", advice)


def tf32() -> Finding:
    """Whether float32 products round their inputs to TF32, as the recipe says."""
    found = "off: full precision in fp32; hardware.tf32=true is several times as fast"
    if _in_tf32():
        found = "on: several times as fast, with relative errors of about 1e-3 in precision fp32; "
        found += "hardware.tf32=false for full precision"
    return Finding("TF32", "good", found)


def _in_tf32() -> bool:
    return torch.backends.cudnn.allow_tf32


def groups(device: torch.device) -> Finding:
    """Whether a fused kernel normalizes all BatchNorm groups at once, and computes the same values."""
    norm, part = GroupBatchNorm3d(64).to(device), Part(0, 8, 8, 4)
    x = torch.arange(8.0 * 64 * 128, device=device).sin().view(8, 64, 2, 8, 8)
    set_part(norm, part)
    if not fused.usable(x.to(memory_format=torch.channels_last_3d)):
        return judged("BatchNorm groups", "not fused", "coarse steps are slow: install Triton and a C compiler")
    outputs = [norm(x.to(memory_format=layout)) for layout in (torch.channels_last_3d, torch.contiguous_format)]
    error = float((outputs[0] - outputs[1]).detach().abs().max())
    advice = "" if error < 1e-4 else "report it, and train with hardware.channels_last=false"
    return judged("BatchNorm groups", f"fused, error {error:.1e}", advice, "missing")


def convolutions(device: torch.device, recipe: Recipe) -> Iterator[Finding]:
    """The time of a 3-D convolution in each memory format and precision, and its error against double precision.

    Advises a precision only if the gradients of the recipe's network are right in it.
    """
    usable: list[tuple[float, str, bool]] = []
    for precision in ("fp32", "bf16", "fp16") if device.type == "cuda" else ("fp32", "bf16"):
        for last, layout in ((True, torch.channels_last_3d), (False, torch.contiguous_format)):
            seconds, error = _probe(device, precision, layout)
            close = CLOSE["tf32" if precision == "fp32" and device.type == "cuda" and _in_tf32() else precision]
            if error <= close:
                usable.append((seconds, precision, last))
            advice = f"do not train with hardware.precision={precision} on this build of torch"
            what = f"conv3d {precision}, channels {'last' if last else 'first'}"
            found = f"{1e3 * seconds:.1f} ms, relative error {error:.1e}"
            yield judged(what, found, advice if error > close else "")
    if usable:
        _, precision, last = min(usable)
        advice = f"fastest: hardware.precision={precision} hardware.channels_last={str(last).lower()}"
        if not right_gradients(recipe.changed("hardware", precision=precision), device):
            advice += f", but this build of torch computes wrong gradients of {recipe.model.name} with it: use fp32"
        level: Level = "good" if last else "could be better"
        yield Finding("layout", level, f"channels {'last' if last else 'first'}", advice)
    if gain := half_precision_gain(load_recipe("demo_baseline"), DEMO_VIDEOS, World(device=device)):
        yield Finding("half precision", "good", f"a step of demo_baseline is {gain:.2f}x as fast in bf16 as in fp32")


def data(recipe: Recipe, device: torch.device) -> Iterator[Finding]:
    """Whether the recipe's videos exist and its network accepts their clips, and how fast one core loads them."""
    train, val = open_data(recipe)
    yield Finding("data", "good", f"{len(train):,} training and {len(val):,} validation videos")
    plan = make_plan(recipe, len(train))
    check_precision(recipe, device)
    check_shapes(recipe, plan.shapes())
    core = cut_on_one_core(recipe, train, plan[0].grid, seconds=2)
    rate = core.clips / core.seconds
    if not core.given_up:
        advice = "`mgtrain data prepare` makes it several times faster" if not recipe.data.prepared else ""
        yield Finding("loading", "good", f"{rate:.0f} clips/s on one core at {plan[0].shape}", advice)
    if core.bad:
        many = core.given_up or len(core.bad) > recipe.data.max_bad_fraction * len(train)
        found = f"{len(core.bad)} of the first {core.clips + len(core.bad)} cannot be decoded, such as {min(core.bad)}"
        yield judged("videos", found, "find them with mgtrain data check", "missing" if many else "could be better")


def _probe(device: torch.device, precision: str, layout: torch.memory_format) -> tuple[float, float]:
    """Seconds of a convolution's forward and backward pass, and the relative error of its gradient."""
    conv = Conv3d(PROBE[1], PROBE[1], 3, padding=1, bias=False)
    conv.weight.data.copy_(torch.arange(float(conv.weight.numel())).sin().view_as(conv.weight) / 40)
    x = torch.arange(float(torch.Size(PROBE).numel())).cos().view(PROBE)

    def gradient(x: Tensor, enabled: bool) -> Tensor:
        with torch.autocast(x.device.type, DTYPES[precision], enabled=enabled):
            y = conv(x)
        return torch.autograd.grad((y.float() if enabled else y).sum(), conv.weight)[0]

    small = x[:1, :, :4]
    conv.double()
    exact = gradient(small.double(), enabled=False)
    conv.float().to(device).to(memory_format=layout)
    enabled = precision != "fp32"
    given = small.to(device).to(memory_format=layout)
    error = (gradient(given, enabled).double().cpu() - exact).norm() / exact.norm()
    given = x.to(device).to(memory_format=layout)
    times = seconds_of(lambda: gradient(given, enabled), 4, device)
    return statistics.median(times[1:]), float(error)


def _has_codec(name: str, mode: Literal["r", "w"]) -> bool:
    try:
        av.Codec(name, mode)
    except ValueError:  # PyAV's UnknownCodecError is one
        return False
    return True
