"""How long a training step takes at every shape of a plan, without loading data.

On a CPU only a part of each batch is measured, the same volume of every shape, so that a step takes seconds and not
minutes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from mgtrain.console import ShowProgress
from mgtrain.engine.checks import DTYPES, check_shapes, make_model, pass_clips
from mgtrain.engine.optim import make_optimizer
from mgtrain.engine.step import autocast, memory_format, to_device, train_step
from mgtrain.grid import Shape
from mgtrain.models.part import set_part
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe
from mgtrain.schedule import Plan, Step

PEAK = 2048  # rows and columns of the square matrices whose product measures the machine
CPU_CLIPS = 2  # of the base shape: the volume of a measured step on a CPU
SPANS = {
    "seconds": ("start", "done"),
    "copy": ("start", "copied"),
    "forward": ("forward", "backward"),
    "backward": ("backward", "update"),
    "update": ("update", "end"),
}
FORWARD_AND_BACKWARD = 3  # a backward pass costs two forward passes: for the weights and for the input
STEPS = 2  # timed by `step_seconds`, after one that is not


def bench_step(recipe: Recipe, plan: Plan, world: World, repeats: int, progress: ShowProgress) -> dict[str, Any]:
    """Time steps of every distinct shape of the plan, each `repeats` times after one that is not counted."""
    firsts = plan.first_steps()
    flops = check_shapes(recipe, firsts)
    peak = matrix_product(recipe, world)
    model = to_device(make_model(recipe), recipe, world)
    rows: list[dict[str, Any]] = []
    for n, (shape, step) in enumerate(firsts.items(), start=1):
        _reset_peak(world)
        row = time_step(model, recipe, step, world, repeats)
        row["peak_bytes"] = _peak(world)  # None: not known
        size = (row["clips"], 3, shape.frames, shape.crop, shape.crop)
        row["convolutions"] = convolutions_alone(model, recipe, size, world, repeats)
        row["over_convolutions"] = row["seconds"] / row["convolutions"]
        row["clips_per_second"] = row["clips"] / row["seconds"]
        row["flops"] = 2 * FORWARD_AND_BACKWARD * flops[shape] * row["clips_per_second"]
        row["peak_share"] = row["flops"] / peak
        rows.append({"shape": asdict(shape), **row})
        progress("measuring", n, len(firsts))
    of_volume = [row["seconds"] / row["clips"] / shape.frames / shape.crop**2
                 for row, shape in zip(rows, firsts, strict=True)]  # fmt: skip
    return {
        "device": str(world.device),
        "threads": torch.get_num_threads(),
        "precision": recipe.hardware.precision,
        "matrix_product_flops": peak,  # per second, a multiply-add being two
        "shapes": rows,
        "slowest_over_fastest": max(of_volume) / min(of_volume),
    }


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


def time_step(model: nn.Module, recipe: Recipe, step: Step, world: World, repeats: int) -> dict[str, Any]:
    """Run the measured part of a training step as `fit` runs it: its clips and groups, and medians of the `SPANS`."""
    clips, groups = measured(recipe, step, world)
    shape = Shape(clips, step.shape.frames, step.shape.crop)
    part = replace(step, shape=shape, bn_groups=groups)
    pixels = torch.zeros(clips, shape.frames, shape.crop, shape.crop, 3, dtype=torch.uint8)
    labels = torch.zeros((clips, recipe.data.classes) if recipe.data.multi_label else clips, dtype=torch.int64)
    optimizer = make_optimizer(model, recipe.optim)
    scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.hardware.precision == "fp16")
    whole_pass = recipe.hardware.model_copy(update={"micro_clips": None})
    unmixed = recipe.augment.model_copy(update={"mixup": 0.0, "cutmix": 0.0})  # mixing takes pairs of clips
    one = recipe.model_copy(update={"hardware": whole_pass, "augment": unmixed})
    marks: dict[str, float] = {}

    def mark(name: str) -> None:
        _wait(world.device)
        marks[name] = time.perf_counter()

    hooks = [
        model.register_forward_pre_hook(lambda *_: mark("forward")),
        model.register_forward_hook(lambda *_: mark("backward")),
        optimizer.register_step_pre_hook(lambda *_: mark("update")),
        optimizer.register_step_post_hook(lambda *_: mark("end")),
    ]
    rows: list[list[float]] = []
    try:
        for _ in range(repeats + 1):
            mark("start")
            there = pixels.to(world.device).permute(0, 4, 1, 2, 3), labels.to(world.device)
            mark("copied")
            train_step(model, optimizer, scaler, *there, part, one, world).loss.item()
            mark("done")
            rows.append([marks[end] - marks[start] for start, end in SPANS.values()])
    finally:
        for hook in hooks:
            hook.remove()
    medians = [statistics.median(column) for column in zip(*rows[1:], strict=True)]
    return {"clips": clips, "bn_groups": groups, **dict(zip(SPANS, medians, strict=True))}


def step_seconds(recipe: Recipe, steps: Iterable[Step], world: World) -> Iterator[tuple[Shape, float]]:
    """The shape of each step, and how long a rank computes at it: the measured part scaled up, and one update."""
    model = to_device(make_model(recipe), recipe, world)
    for step in steps:
        row = time_step(model, recipe, step, world, STEPS)
        share = step.shape.clips / row["clips"] / world.size
        yield step.shape, (row["seconds"] - row["update"]) * share + row["update"]


def convolutions_alone(model: nn.Module, recipe: Recipe, shape: Sequence[int], world: World, repeats: int) -> float:
    """Seconds of all convolutions of a step, forward and backward, each run by itself: a lower bound for the step."""
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
    """Operations per second (a multiply-add is two) of a product of square matrices in the recipe's precision."""
    a = torch.ones(PEAK, PEAK, device=world.device, dtype=DTYPES[recipe.hardware.precision])
    return 2.0 * PEAK**3 / min(seconds_of(lambda: a @ a, 6, world.device))


def render(result: dict[str, Any]) -> Table:
    """The result as a table."""
    table = Table(
        title=f"a step on {result['device']}, {result['threads']} threads, {result['precision']}; "
        f"a matrix product reaches {result['matrix_product_flops'] / 1e9:,.0f} GFLOP/s",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    names = ("shape", "measured", "step", "copy", "forward", "backward", "update", "clips/s", "GFLOP/s", "of peak",
             "over convs", "memory")  # fmt: skip
    for name in names:
        table.add_column(name, justify="right")
    for row in result["shapes"]:
        table.add_row(
            str(Shape(**row["shape"])),
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


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Seconds of each of several calls."""
    times = []
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - start)
    return times


def _time_layer(
    layer: nn.Conv3d, size: torch.Size, needs_grad: bool, recipe: Recipe, world: World, repeats: int
) -> float:
    x = torch.ones(size, device=world.device).to(memory_format=memory_format(recipe)).requires_grad_(needs_grad)
    above: Tensor | None = None

    def forward_and_backward() -> None:
        nonlocal above
        with autocast(recipe, world):
            y = layer(x)
        if above is None:
            above = torch.ones_like(y)
        torch.autograd.grad(y, [layer.weight, *([x] if needs_grad else [])], above)

    return statistics.median(seconds_of(forward_and_backward, repeats + 1, world.device)[1:])


def _reset_peak(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far


def _peak(world: World) -> int | None:
    """Peak memory since `_reset_peak` in bytes: of the device, or of this process."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    with suppress(OSError, StopIteration):
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return None
