"""What `mgtrain bench step` measures: a training step at every shape of a plan, without data to load.

On a CPU a part of each batch stands for it, the same volume of every shape, so that a step takes seconds, not minutes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from mgtrain.engine.checks import DTYPES, check_shapes, make_model, pass_clips
from mgtrain.engine.optim import make_optimizer
from mgtrain.engine.step import autocast, memory_format, to_device, train_step
from mgtrain.grid import Shape
from mgtrain.models.part import set_part
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe
from mgtrain.schedule import Plan, Step

PEAK = 2048  # rows and columns of the matrices whose product is the measure of the machine
CPU_CLIPS = 2  # of the base shape, whose volume a step on a CPU has here
SPANS = (("start", "done"), ("start", "copied"), ("forward", "backward"), ("backward", "update"), ("update", "end"))
FORWARD_AND_BACKWARD = 3  # a backward pass costs two forward ones: for the weights and for the input


@dataclass(frozen=True, slots=True)
class ShapeCost:
    """A step of one shape. Seconds are medians; `clips` is how many were measured."""

    shape: Shape  # of the plan
    clips: int
    bn_groups: int  # of those clips
    seconds: float  # the whole step
    copy: float  # uint8 clips to the device
    forward: float
    backward: float
    update: float
    convolutions: float  # all convolutions of the step, forward and backward, run alone
    flops: float  # per second, a multiply-add being two
    peak_share: float  # of the machine's matrix product
    peak_bytes: int | None  # of memory; None: not known

    def describe(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "clips_per_second": self.clips / self.seconds, "over_convolutions": self.over}

    @property
    def over(self) -> float:
        """The step's seconds over those of its convolutions alone."""
        return self.seconds / self.convolutions


def bench_step(
    recipe: Recipe, plan: Plan, world: World, repeats: int, progress: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Time steps of every distinct shape of the plan, each `repeats` times after one that is not counted."""
    firsts = plan.first_steps()
    flops = check_shapes(recipe, firsts)
    peak = matrix_product(recipe, world)
    model = to_device(make_model(recipe), recipe, world)
    rows = []
    for n, (shape, step) in enumerate(firsts.items(), start=1):
        clips, groups = measured(recipe, step, world)
        rows.append(time_shape(model, recipe, step, clips, groups, flops[shape], peak, world, repeats))
        progress("measuring", n, len(firsts))
    return {
        "device": str(world.device),
        "threads": torch.get_num_threads(),
        "precision": recipe.hardware.precision,
        "matrix_product_flops": peak,
        "shapes": [row.describe() for row in rows],
        "slowest_over_fastest": max(r.seconds / volume(r) for r in rows) / min(r.seconds / volume(r) for r in rows),
    }


def volume(row: ShapeCost) -> int:
    """Pixels of the clips that were measured."""
    return row.clips * row.shape.frames * row.shape.crop**2


def measured(recipe: Recipe, step: Step, world: World) -> tuple[int, int]:
    """How many clips of a step are measured, in how many BatchNorm groups: a micro-batch, or on a CPU a part of one."""
    shape, group = step.shape, step.shape.clips // step.bn_groups
    if world.device.type != "cpu":
        clips = pass_clips(recipe, shape, step.bn_groups, 1)
        return clips, max(1, clips // group)
    base = recipe.base
    fits = round(CPU_CLIPS * base.frames * base.crop**2 / (shape.frames * shape.crop**2))
    clips = max(1, min(shape.clips, fits))
    return (clips // group * group, clips // group) if clips > group else (clips, 1)


def time_shape(
    model: nn.Module,
    recipe: Recipe,
    step: Step,
    clips: int,
    groups: int,
    flops: int,
    peak: float,
    world: World,
    repeats: int,
) -> ShapeCost:
    """One shape's row: the training step as `fit` does it, timed from outside."""
    shape = step.shape
    part = _only(step, clips, groups)
    pixels = torch.zeros(clips, shape.frames, shape.crop, shape.crop, 3, dtype=torch.uint8)
    labels = torch.zeros((clips, recipe.data.classes) if recipe.data.multi_label else clips, dtype=torch.int64)
    optimizer = make_optimizer(model, recipe.optim)
    scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.hardware.precision == "fp16")
    whole_pass = recipe.hardware.model_copy(update={"micro_clips": None})
    unmixed = recipe.augment.model_copy(update={"mixup": 0.0, "cutmix": 0.0})  # which takes pairs of clips
    one = recipe.model_copy(update={"hardware": whole_pass, "augment": unmixed})
    marks: dict[str, float] = {}
    hooks = [
        model.register_forward_pre_hook(lambda *_: _mark(marks, "forward", world)),
        model.register_forward_hook(lambda *_: _mark(marks, "backward", world)),
        optimizer.register_step_pre_hook(lambda *_: _mark(marks, "update", world)),
        optimizer.register_step_post_hook(lambda *_: _mark(marks, "end", world)),
    ]
    rows: list[tuple[float, ...]] = []
    _reset_peak(world)
    try:
        for _ in range(repeats + 1):
            _mark(marks, "start", world)
            there = pixels.to(world.device).permute(0, 4, 1, 2, 3), labels.to(world.device)
            _mark(marks, "copied", world)
            train_step(model, optimizer, scaler, *there, part, one, world).loss.item()
            _mark(marks, "done", world)
            rows.append(tuple(marks[end] - marks[start] for start, end in SPANS))
    finally:
        for hook in hooks:
            hook.remove()
    peak_bytes = _peak(world)
    whole, copy, forward, backward, update = (statistics.median(column) for column in zip(*rows[1:], strict=True))
    convolutions = convolutions_alone(model, recipe, (clips, 3, shape.frames, shape.crop, shape.crop), world, repeats)
    rate = 2 * FORWARD_AND_BACKWARD * flops * clips / whole
    return ShapeCost(
        shape, clips, groups, whole, copy, forward, backward, update, convolutions, rate, rate / peak, peak_bytes
    )


def step_seconds(model: nn.Module, recipe: Recipe, step: Step, flops: int, world: World, repeats: int) -> float:
    """How long a rank computes at a whole step; what is measured of it is a part of its clips, and one update."""
    clips, groups = measured(recipe, step, world)
    row = time_shape(model, recipe, step, clips, groups, flops, 1.0, world, repeats)
    return (row.seconds - row.update) * step.shape.clips / clips / world.size + row.update


def convolutions_alone(model: nn.Module, recipe: Recipe, shape: Sequence[int], world: World, repeats: int) -> float:
    """Seconds of all the convolutions of a step, forward and backward, each by itself: the step's floor.

    The first one's input needs no gradient.
    """
    inputs: list[tuple[nn.Conv3d, torch.Size, bool]] = []
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv3d)]
    hooks = [
        layer.register_forward_pre_hook(lambda conv, args: inputs.append((conv, args[0].shape, args[0].requires_grad)))
        for layer in layers
    ]
    x = torch.zeros(*shape, device=world.device).to(memory_format=memory_format(recipe))
    set_part(model, None)
    with autocast(recipe, world):
        model.train()(x)
    for hook in hooks:
        hook.remove()
    del x
    known: dict[tuple[Any, ...], float] = {}
    total = 0.0
    for layer, size, needs_grad in inputs:
        key = (size, needs_grad, layer.weight.shape, layer.stride, layer.padding)
        if key not in known:
            known[key] = _time_layer(layer, size, needs_grad, recipe, world, repeats)
        total += known[key]
    return total


def matrix_product(recipe: Recipe, world: World) -> float:
    """Operations per second, a multiply-add being two, of a product of square matrices in the recipe's precision."""
    a = torch.ones(PEAK, PEAK, device=world.device, dtype=DTYPES[recipe.hardware.precision])
    times: list[float] = []
    for _ in range(6):
        with _timed(times, world):
            a @ a
    return 2.0 * PEAK**3 / min(times)


def render(result: dict[str, Any]) -> Table:
    """For people."""
    table = Table(
        title=f"a step on {result['device']}, {result['threads']} threads, {result['precision']}; "
        f"a product of matrices makes {result['matrix_product_flops'] / 1e9:,.0f} GFLOP/s",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    names = ("shape", "measured", "step", "copy", "forward", "backward", "update", "clips/s", "GFLOP/s", "of peak",
             "over convs", "memory")  # fmt: skip
    for name in names:
        table.add_column(name, justify="right")
    for row in result["shapes"]:
        shape = row["shape"]
        table.add_row(
            f"{shape['clips']}x{shape['frames']}x{shape['crop']}²",
            f"{row['clips']} clips",
            *(f"{1e3 * row[key]:,.0f} ms" for key in ("seconds", "copy", "forward", "backward", "update")),
            f"{row['clips_per_second']:.1f}",
            f"{row['flops'] / 1e9:,.0f}",
            f"{100 * row['peak_share']:.0f} %",
            f"{row['over_convolutions']:.2f}x",
            "?" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f} GiB",
        )
    table.caption = f"at equal volume the slowest shape takes {result['slowest_over_fastest']:.2f}x the fastest"
    return table


def _only(step: Step, clips: int, groups: int) -> Step:
    """The step with fewer clips, in fewer groups."""
    return replace(step, shape=Shape(clips, step.shape.frames, step.shape.crop), bn_groups=groups)


def _mark(marks: dict[str, float], name: str, world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    marks[name] = time.perf_counter()


@contextmanager
def _timed(times: list[float], world: World) -> Iterator[None]:
    marks: dict[str, float] = {}
    _mark(marks, "start", world)
    yield
    _mark(marks, "end", world)
    times.append(marks["end"] - marks["start"])


def _time_layer(
    layer: nn.Conv3d, size: torch.Size, needs_grad: bool, recipe: Recipe, world: World, repeats: int
) -> float:
    x = torch.ones(size, device=world.device).to(memory_format=memory_format(recipe)).requires_grad_(needs_grad)
    times: list[float] = []
    above: Tensor | None = None
    for _ in range(repeats + 1):
        with _timed(times, world):
            with autocast(recipe, world):
                y = layer(x)
            if above is None:
                above = torch.ones_like(y)
            torch.autograd.grad(y, [layer.weight, *([x] if needs_grad else [])], above)
    return statistics.median(times[1:])


def _reset_peak(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far


def _peak(world: World) -> int | None:
    """Most bytes that were in use since `_reset_peak`: the device's, or the process's."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    with suppress(OSError, StopIteration):
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return None
