"""Sections of `gpu_check.py`: the machine, waits, steps of all shapes, BatchNorm, PySlowFast's and compiled steps."""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from mgtrain.clips.loader import _transfer
from mgtrain.engine.checks import check_shapes, make_model
from mgtrain.engine.machine.warmup import compiled, seconds_of, set_up
from mgtrain.engine.step import to_device, train_step
from mgtrain.engine.update.optim import make_optimizer
from mgtrain.grid import Shape
from mgtrain.models import fused
from mgtrain.models.norm import GroupBatchNorm3d
from mgtrain.models.part import Part, set_part
from mgtrain.preflight import doctor
from mgtrain.preflight.bench_step import FORWARD_AND_BACKWARD, matrix_product
from mgtrain.processes.distributed import World, replicate
from mgtrain.recipe import Recipe, load_recipe
from mgtrain.schedule import Step, make_plan

Row = dict[str, Any]

BASE = "k400_slowfast_8x8_r50_multigrid"
CLIPS = 8  # of the base shape, for each GPU
TINY_CLIP = (
    "clip={frames: 8, stride: 2, crop: 32, short_side: [32, 40]}",
    "evaluation={crop: 32, short_side: 36, recalibration_batches: 1, times: 1}",
)
TINY = "model={{name: {0}, width: 16, depth: [1, 1, 1, 1]}}"
AUGMENTED = (
    "augment={brightness: 0.4, contrast: 0.4, saturation: 0.4, hue: 0.1, erase: 0.5, mixup: 0.8, cutmix: 1, "
    "label_smoothing: 0.1}"
)
IN_PASSES = "hardware={micro_clips: 4, recompute: true, precision: bf16}"
MOST_LAUNCHES = 2500  # in a step of SlowFast: 1,125, and a few for each of 110 convolutions
ACTIVATIONS = {"wide": (64, 256, 2, 56, 56), "narrow": (64, 8, 32, 112, 112)}  # larger than any cache
TRAFFIC = 8  # least number of times an activation goes through memory in BatchNorm and ReLU, forward and backward
RACED = (1, 4, 7)  # of the eight shapes: 64x8x158², 16x16x224² and the base


@dataclass(frozen=True)
class Check:
    """The settings of the check, and the results of earlier sections."""

    world: World
    toy: bool
    data: Path | None = None
    pyslowfast: Path | None = None
    peak: dict[str, float] = field(default_factory=dict)  # operations per second by precision
    seconds: dict[Shape, float] = field(default_factory=dict)  # of a step

    @property
    def gpu(self) -> bool:
        return self.world.device.type == "cuda"

    def recipe(self, *overrides: str) -> Recipe:
        """SlowFast 8x8 on Kinetics with `CLIPS` clips for each GPU, in bf16; tiny with `--toy`."""
        tiny = (*TINY_CLIP, TINY.format("slowfast_r50")) if self.toy else ()
        precision = "bf16" if self.gpu else "fp32"  # oneDNN's bf16 gives NaN for 1x1 maps on some CPUs
        usual = (f"batch.clips={CLIPS * self.world.size}", f"hardware.precision={precision}")
        return load_recipe(BASE, [*usual, *tiny, *overrides])

    def small(self, *overrides: str) -> Recipe:
        """A tiny network and tiny clips, in fp32."""
        usual = (f"batch.clips={CLIPS * self.world.size}", "hardware.precision=fp32", *TINY_CLIP)
        return load_recipe(BASE, [*usual, TINY.format("slowfast_r50"), *overrides])

    def time(self, call: Callable[[], object], repeats: int) -> float:
        """Median seconds of a call."""
        return statistics.median(seconds_of(call, 1 if self.toy else repeats, self.world.device))


class Trainer:
    """Steps of a recipe on random clips, which are the same on every device and for any number of ranks.

    Without `search`, cuDNN takes its first choice of algorithm for each convolution, so the first step takes less time.
    """

    def __init__(self, recipe: Recipe, world: World, search: bool = True) -> None:
        set_up(recipe, world.device)
        torch.backends.cudnn.benchmark &= search
        torch.manual_seed(0)
        self.recipe, self.world = recipe, world
        self.plan = make_plan(recipe, 1000)
        self.model = to_device(make_model(recipe), recipe, world)
        self.replica = replicate(self.model, world)
        self.optimizer = make_optimizer(self.model, recipe.optim)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.hardware.precision == "fp16")

    def batch(self, step: Step) -> tuple[Tensor, Tensor]:
        """This rank's clips of a step on its device, uint8 (b, 3, T, S, S), and labels (b)."""
        shape, rng = step.shape, torch.Generator().manual_seed(step.index)
        size = (shape.clips, shape.frames, shape.crop, shape.crop, 3)
        words = torch.randint(-(2**63), 2**63 - 1, (-(-3 * shape.voxels // 8),), generator=rng)  # of eight numbers each
        clips = words.view(torch.uint8)[: 3 * shape.voxels].view(size).chunk(self.world.size)[self.world.rank]
        labels = torch.randint(0, 4, (shape.clips,), generator=rng).chunk(self.world.size)[self.world.rank]
        if self.world.device.type == "cuda":
            clips, labels = clips.pin_memory(), labels.pin_memory()
        there, of = _transfer(clips, labels, self.world.device)
        return there.permute(0, 4, 1, 2, 3), of

    def step(self, step: Step, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Train on a batch; the loss, still on the device."""
        given = (self.replica, self.optimizer, self.scaler, *batch, step, self.recipe, self.world)
        return train_step(*given).loss


def row(name: str, good: bool | None = None, **found: Any) -> Row:
    """A row of the report; `good` None: there is nothing to judge."""
    return {"name": name, "good": good, **found}


# 0
def first_steps(check: Check) -> Iterator[Row]:
    """The first steps on this GPU: Triton compiles its kernels, and cuDNN is loaded"""
    for name, recipe in {
        "SlowFast": check.recipe(), "tiny, fp32": check.small(), "tiny, bf16": check.small("hardware.precision=bf16"),
    }.items():  # fmt: skip
        start = time.perf_counter()
        trainer = Trainer(recipe, check.world, search=False)
        loss = trainer.step(trainer.plan[-1], trainer.batch(trainer.plan[-1])).item()  # waits, so a fault is found here
        yield row(name, math.isfinite(loss), loss=loss, seconds=time.perf_counter() - start)


# 1
def machine(check: Check) -> Iterator[Row]:
    """The machine: versions, TF32, BatchNorm's kernels, matrix products and bandwidth"""
    device, world = check.world.device, check.world
    set_up(check.recipe(), device)
    findings = [*doctor.versions(), *doctor.devices(device)]
    findings += [doctor.tf32(), doctor.groups(device)] if check.gpu else []
    for finding in findings:
        good = finding.level != "missing" and (finding.what != "BatchNorm groups" or finding.level == "good")
        yield row(finding.what, good, found=finding.found)
    for name, precision, tf32 in (("bf16", "bf16", True), ("tf32", "fp32", True), ("fp32", "fp32", False)):
        recipe = check.recipe(f"hardware={{precision: {precision}, tf32: {tf32}}}".lower())
        set_up(recipe, device)
        check.peak[name] = matrix_product(recipe, world)
        yield row(f"product in {name}", tflops=check.peak[name] / 1e12)
    x = torch.zeros(2**24 if check.toy else 2**31, dtype=torch.uint8, device=device)
    y = torch.zeros_like(x)
    yield row("copy on the device", gbytes_per_second=2e-9 * len(x) / min(seconds_of(lambda: y.copy_(x), 6, device)))


# 2
def waits(check: Check) -> Iterator[Row]:
    """No step waits for the GPU: plain, in passes, with all augmentation, swin3d_t"""
    kinds = {
        "plain": (), "bf16 in recomputed passes": (IN_PASSES,), "augmented": (AUGMENTED,),
        "augmented, in passes": (AUGMENTED, IN_PASSES), "swin3d_t, augmented": ("model={name: swin3d_t}", AUGMENTED),
    }  # fmt: skip
    for name, overrides in kinds.items():
        trainer = Trainer(check.small(*overrides), check.world, search=False)
        where = ""
        for step in list(trainer.plan.first_steps().values())[::3]:  # of 8, 4 and 1 groups
            batch = trainer.batch(step)
            for _ in range(2):  # may wait: torch queries the device, and DDP arranges gradients after its first step
                trainer.step(step, batch)
            try:
                with waiting_refused(check):
                    trainer.step(step, batch)
            except RuntimeError as error:
                if "synchronizing" not in str(error):
                    raise
                where = str(error)
                break  # with ranks, this step's gradients are left unexchanged
        yield row(name, None if not check.gpu else not where, waits=where or "none")


@contextmanager
def waiting_refused(check: Check) -> Iterator[None]:
    if check.gpu:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if check.gpu:
            torch.cuda.set_sync_debug_mode("default")


# 3
def shapes(check: Check) -> Iterator[Row]:
    """The eight shapes of SlowFast 8x8 in bf16, 8 clips of the base shape for each GPU"""
    trainer = Trainer(check.recipe(), check.world)
    firsts = trainer.plan.first_steps()
    flops, repeats = check_shapes(trainer.recipe, firsts), 1 if check.toy else 10
    for shape, step in sorted(firsts.items(), key=lambda item: item[0] != trainer.recipe.base):  # others need its time
        batch = trainer.batch(step)
        first = seconds_of(lambda s=step, b=batch: trainer.step(s, b), 1, check.world.device)[0]
        for _ in range(10 if check.world.size > 1 and step.shape == trainer.recipe.base else 1):
            trainer.step(step, batch)  # DDP times the first ten of a process, and waits for that
        wait(check)
        start = time.perf_counter()
        for _ in range(repeats):
            trainer.step(step, batch)
        host = (time.perf_counter() - start) / repeats  # the device may still be at work
        wait(check)
        seconds = check.seconds[shape] = (time.perf_counter() - start) / repeats
        rate = shape.clips / seconds
        per_gpu = 2 * FORWARD_AND_BACKWARD * flops[shape] * rate / check.world.size  # operations per second
        share = per_gpu / check.peak["bf16"] if "bf16" in check.peak else None
        launches, busy = profiled(check, lambda s=step, b=batch: trainer.step(s, b))
        good = None if launches is None else launches <= MOST_LAUNCHES
        yield row(str(shape), good, groups=step.bn_groups, ms=1e3 * seconds, host_ms=1e3 * host, clips_per_second=rate,
                  of_peak=share, launches=launches, idle=None if busy is None else 1 - busy / seconds,
                  first_step_s=first)  # fmt: skip
    of_volume = [seconds / shape.voxels for shape, seconds in check.seconds.items()]
    retries = torch.cuda.memory_stats()["num_alloc_retries"] if check.gpu else None  # the memory was full or in pieces
    yield row("slowest over fastest", ratio=max(of_volume) / min(of_volume), allocated_again=retries)


def wait(check: Check) -> None:
    if check.gpu:
        torch.cuda.synchronize()


def profiled(check: Check, call: Callable[[], object]) -> tuple[int | None, float | None]:
    """How many kernels a call launches, and for how many seconds the GPU is busy with them; None: unknown."""
    if not check.gpu:
        call()
        return None, None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        wait(check)
    events = [e for e in profile.events() or () if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((e.time_range.start, e.time_range.end) for e in events)  # microseconds
    busy, until = 0.0, 0.0
    for begin, end in spans:
        busy, until = busy + max(0.0, end - max(begin, until)), max(until, end)
    kernels = [e for e in events if not e.name.startswith(("Memcpy", "Memset"))]
    return (len(kernels), busy / 1e6) if kernels else (None, None)


# 4
def normalization(check: Check) -> Iterator[Row]:
    """BatchNorm and ReLU, forward and backward, in bf16: GB/s, counting the least possible memory traffic"""
    device = check.world.device
    for name, (clips, *rest) in ACTIVATIONS.items():
        size = (clips, 8, 2, 4, 4) if check.toy else (clips, *rest)
        x = torch.randn(size, device=device, dtype=torch.bfloat16).to(memory_format=torch.channels_last_3d)
        above, norm = torch.randn_like(x), GroupBatchNorm3d(size[1]).to(device)

        def five(of: Tensor, groups: int, norm: Any = norm) -> Tensor:
            given = (norm.running_mean, norm.running_var, norm.weight, norm.bias, True)
            return torch.cat([F.batch_norm(piece, *given) for piece in of.chunk(groups)]).relu()

        def four(of: Tensor, groups: int, norm: Any = norm) -> Tensor:
            return five(of.flatten(2, 3), 1, norm).view(of.shape)

        def ours(of: Tensor, groups: int, norm: Any = norm) -> Tensor:
            set_part(norm, Part(0, len(of), len(of), groups))
            result: Tensor = norm(of, relu=True)
            return result

        kernels = check.gpu and fused.usable(x)
        for groups in (1, 2, 4, 8, 64):
            rates = {}
            ways = {"plain_4d": four, "by_groups_5d": five, "flattened": ours, **({"kernels": ours} if kernels else {})}
            for way, function in ways.items():
                if groups == 64 and way == "by_groups_5d" and not check.toy:
                    continue  # slow, and 8 groups show enough
                with mock.patch.object(fused, "usable", lambda _, way=way: way == "kernels"):
                    seconds = check.time(lambda f=function, g=groups, x=x, y=above: both_ways(f, x, g, y), 6)
                rates[way] = TRAFFIC * x.nbytes / seconds / 1e9
            good = rates["kernels"] >= rates["flattened"] if kernels and groups > 1 else None
            yield row(f"{name}, {groups} groups", good, **rates)


def both_ways(function: Callable[[Tensor, int], Tensor], x: Tensor, groups: int, above: Tensor) -> None:
    x = x.detach().requires_grad_()
    function(x, groups).backward(above)


# 5
def peers(check: Check) -> Iterator[Row]:
    """The same batches through PySlowFast's network in its best layout, with its sub-batch BatchNorm"""
    if check.pyslowfast is None:
        yield row("left out", because="no --pyslowfast")
        return
    with mock.patch.object(sys, "meta_path", [*sys.meta_path]):  # in which `theirs` hides packages, also from others
        yield from raced(check)


def raced(check: Check) -> Iterator[Row]:
    from bench_step import theirs  # needs what parity.py needs

    recipe, device, args = check.recipe(), check.world.device, argparse.Namespace(pyslowfast=check.pyslowfast)
    firsts = list(make_plan(recipe, 1000).first_steps().items())
    for shape, step in [firsts[n] for n in RACED]:
        size = (shape.clips, 3, shape.frames, shape.crop, shape.crop)
        labels = torch.zeros(shape.clips, dtype=torch.int64, device=device)
        found: dict[str, float | None] = {}
        for name, layout in (("first", torch.contiguous_format), ("last", torch.channels_last_3d)):
            x = torch.rand(size).to(memory_format=layout)
            model, optimizer, given = theirs("SLOWFAST_8x8_R50", args, x, step.bn_groups)
            model = model.to(device).to(memory_format=layout)
            given = [[pathway.to(device).to(memory_format=layout) for pathway in given]]

            def both(model: Any = model, optimizer: Any = optimizer, given: Any = given, labels: Any = labels) -> None:
                optimizer.zero_grad(set_to_none=True)
                with torch.autocast(device.type, torch.bfloat16):
                    logits = model(*given)
                F.cross_entropy(logits.float(), labels).backward()
                optimizer.step()

            try:
                both()
                found[name] = check.time(both, 5)
            except RuntimeError as error:
                if "view size" not in str(error):
                    raise
                found[name] = None  # its BatchNorm over several groups does not support channels_last
            del model, optimizer, given, x
        best = min(seconds for seconds in found.values() if seconds is not None)
        ratio = best / check.seconds[shape] if shape in check.seconds else None
        yield row(str(shape), groups=step.bn_groups, seconds_channels_first=found["first"],
                  seconds_channels_last=found["last"], ours_times_as_fast=ratio)  # fmt: skip


# 8
def compiling(check: Check) -> Iterator[Row]:
    """torch.compile and CUDA graphs at one and at eight BatchNorm groups, with one block in each stage"""
    for mode in ("default", "graphs"):
        trainer = Trainer(check.recipe("model.depth=[1, 1, 1, 1]", f"hardware.compile={mode}"), check.world)
        firsts = list(trainer.plan.first_steps().values())
        for step in (firsts[-1], firsts[1]):
            batch = trainer.batch(step)

            def one(step: Step = step, batch: Any = batch, trainer: Trainer = trainer) -> None:
                trainer.step(step, batch)

            one()
            eager = check.time(one, 5)
            with compiled(trainer.model, trainer.recipe):
                first = seconds_of(one, 1, check.world.device)[0]
                yield row(f"{mode}, {step.bn_groups} groups, compiled", seconds=first)  # what follows may be cut
                one()
                now = check.time(one, 5)
            yield row(f"{mode}, {step.bn_groups} groups", eager_ms=1e3 * eager, ms=1e3 * now, gain=1 - now / eager)
