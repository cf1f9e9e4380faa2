"""Measure a training step at every shape of a plan, without loading data.

On a CPU only a part of each batch is measured, with the same volume for every shape, so that a step takes seconds
instead of minutes.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from mgtrain.console import ShowProgress, table
from mgtrain.engine.checks import DTYPES, check_shapes, make_model, pass_clips, right_gradients
from mgtrain.engine.machine.memory import fit_memory, peak, reset_peak
from mgtrain.engine.machine.tuning import measure
from mgtrain.engine.machine.warmup import seconds_of, set_up, wait_for_gpu
from mgtrain.engine.step import autocast, memory_format, to_device, train_step
from mgtrain.engine.update.optim import make_optimizer
from mgtrain.grid import Shape
from mgtrain.models.conv import choose
from mgtrain.models.part import set_part
from mgtrain.processes.cores import cpu_name, has_bf16
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe
from mgtrain.schedule import Plan, Step, baseline_recipe, make_plan

PEAK = {"cpu": 2048, "cuda": 8192}  # size of the square matrices whose product measures the peak speed
PICTURES = {"cpu": (8, 128, 28), "cuda": (64, 256, 56)}  # pictures, channels and size of a convolution for the same
CPU_CLIPS = 2  # of the base shape have the volume of a measured step on a CPU
SPANS = {
    "seconds": ("start", "done"),
    "copy": ("start", "copied"),
    "forward": ("forward", "backward"),
    "backward": ("backward", "update"),
    "update": ("update", "end"),
}
FORWARD_AND_BACKWARD = 3  # a backward pass costs two forward passes: for the weights and for the input
HALF_PAYS = 1.3  # speed relative to float32 from which on bf16 is proposed
STEPS = 2  # timed steps in `step_seconds`, after one warm-up step


def bench_step(recipe: Recipe, plan: Plan, world: World, repeats: int, progress: ShowProgress) -> dict[str, Any]:
    """Time `repeats` steps of every distinct shape of the plan, each after one warm-up step."""
    set_up(recipe, world.device)
    recipe = fit_memory(recipe, plan, world)
    firsts = plan.first_steps()
    flops = check_shapes(recipe, firsts)
    fastest = max(matrix_product(recipe, world), picture_convolution(recipe, world))
    model = tuned_model(recipe, plan, world)
    rows, of_volume = list[dict[str, Any]](), list[float]()
    for shape, step in firsts.items():
        reset_peak(world.device)
        row = time_step(model, recipe, step, world, repeats)
        row["peak_bytes"] = peak(world.device)
        size = (row["clips"], 3, shape.frames, shape.crop, shape.crop)
        row["convolutions"] = convolutions_alone(model, recipe, size, world, repeats)
        row["over_convolutions"] = row["seconds"] / row["convolutions"]
        row["clips_per_second"] = row["clips"] / row["seconds"]
        row["flops"] = 2 * FORWARD_AND_BACKWARD * flops[shape] * row["clips_per_second"]
        row["peak_share"] = row["flops"] / fastest
        rows.append({"shape": asdict(shape), **row})
        of_volume.append(row["seconds"] / row["clips"] / shape.frames / shape.crop**2)
        progress("measuring", len(rows), len(firsts))
    return {
        "device": cpu_name() if world.device.type == "cpu" else torch.cuda.get_device_name(world.device),
        "threads": torch.get_num_threads(),
        "precision": recipe.hardware.precision,
        "peak_flops": fastest,  # per second; a multiply-add is two
        "shapes": rows,
        "slowest_over_fastest": max(of_volume) / min(of_volume),
    }


def measured(recipe: Recipe, step: Step, world: World) -> tuple[int, int]:
    """The clips and BatchNorm groups of a measured step: those of a micro-batch, or on a CPU a part of them."""
    shape, group = step.shape, step.shape.clips // step.bn_groups
    if world.device.type != "cpu":
        clips = pass_clips(recipe, shape, step.bn_groups, 1)
        return clips, max(1, clips // group)
    base = recipe.base
    fits = round(CPU_CLIPS * base.frames * base.crop**2 / (shape.frames * shape.crop**2))
    clips = max(1, min(shape.clips, fits))
    return (clips // group * group, clips // group) if clips > group else (clips, 1)


def time_step(model: nn.Module, recipe: Recipe, step: Step, world: World, repeats: int) -> dict[str, Any]:
    """Time the measured part of a training step: its clips and groups, and the medians of the `SPANS` in seconds."""
    clips, groups = measured(recipe, step, world)
    shape = Shape(clips, step.shape.frames, step.shape.crop)
    part = replace(step, shape=shape, bn_groups=groups)
    pixels = torch.zeros(clips, shape.frames, shape.crop, shape.crop, 3, dtype=torch.uint8)
    labels = torch.zeros((clips, recipe.data.classes) if recipe.data.multi_label else clips, dtype=torch.int64)
    optimizer = make_optimizer(model, recipe.optim)
    scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.hardware.precision == "fp16")
    if world.device.type == "cuda":
        pixels, labels = pixels.pin_memory(), labels.pin_memory()  # as the loader does
    unmixed = recipe.changed("augment", mixup=0.0, cutmix=0.0)  # mixing takes pairs of clips
    whole_pass = unmixed.changed("hardware", micro_clips=None)
    marks: list[dict[str, Any]] = []  # of each step: times, or events of a GPU, which computes while the host goes on

    def mark(name: str) -> None:
        if world.device.type == "cuda":
            marks[-1][name] = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            marks[-1][name].record()
        else:
            marks[-1][name] = time.perf_counter()

    def seconds(start: Any, end: Any) -> float:
        return float(start.elapsed_time(end) / 1e3 if world.device.type == "cuda" else end - start)

    with (
        model.register_forward_pre_hook(lambda *_: mark("forward")),
        model.register_forward_hook(lambda *_: mark("backward")),
        optimizer.register_step_pre_hook(lambda *_: mark("update")),
        optimizer.register_step_post_hook(lambda *_: mark("end")),
    ):
        for _ in range(repeats + 1):
            marks.append({})
            mark("start")
            there = pixels.to(world.device, non_blocking=True), labels.to(world.device, non_blocking=True)
            mark("copied")
            train_step(model, optimizer, scaler, there[0].permute(0, 4, 1, 2, 3), there[1], part, whole_pass, world)
            mark("done")
    wait_for_gpu(world.device)
    rows = [[seconds(of[start], of[end]) for start, end in SPANS.values()] for of in marks]
    medians = [statistics.median(column) for column in zip(*rows[1:], strict=True)]
    return {"clips": clips, "bn_groups": groups, **dict(zip(SPANS, medians, strict=True))}


def tuned_model(recipe: Recipe, plan: Plan, world: World) -> nn.Module:
    """The network, whose convolutions use the same forms as in a run of the `plan`."""
    set_up(recipe, world.device)
    model = to_device(make_model(recipe), recipe, world)
    choose(model, measure(recipe, plan, world))
    return model


def step_seconds(
    model: nn.Module, recipe: Recipe, steps: Iterable[Step], world: World
) -> Iterator[tuple[Shape, float]]:
    """The shape of each step and the seconds that a rank computes: the measured part, scaled up, and one update.

    `model` is of `tuned_model`, and the recipe has micro-batches that fit.
    """
    for step in steps:
        row = time_step(model, recipe, step, world, STEPS)
        share = step.shape.clips / row["clips"] / world.size
        yield step.shape, (row["seconds"] - row["update"]) * share + row["update"]


def convolutions_alone(model: nn.Module, recipe: Recipe, shape: Sequence[int], world: World, repeats: int) -> float:
    """Seconds of all convolutions of a step, forward and backward, run separately: a lower bound for the step."""
    alike: defaultdict[tuple[Any, ...], list[nn.Conv3d]] = defaultdict(list)  # by all that their time depends on

    def note(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        if isinstance(layer, nn.Conv3d):
            x = inputs[0]
            alike[x.shape, x.requires_grad, layer.weight.shape, layer.stride, layer.padding].append(layer)

    set_part(model, None)
    with register_module_forward_pre_hook(note), autocast(recipe, world):
        model.train()(torch.zeros(*shape, device=world.device).to(memory_format=memory_format(recipe)))
    return sum(
        len(layers) * _time_layer(layers[0], size, needs_grad, recipe, world, repeats)
        for (size, needs_grad, *_), layers in alike.items()
    )


def matrix_product(recipe: Recipe, world: World) -> float:
    """Operations per second (a multiply-add is two) of a matrix product in the recipe's precision."""
    size = PEAK[world.device.type]
    # Not of equal numbers: with these a GPU draws less power, and so has a higher clock rate than in training.
    a = torch.randn(size, size, device=world.device, dtype=DTYPES[recipe.hardware.precision])
    return 2.0 * size**3 / min(seconds_of(lambda: a @ a, 6, world.device))


def picture_convolution(recipe: Recipe, world: World) -> float:
    """Operations per second of a 2-D convolution in channels_last, in the recipe's precision."""
    pictures, channels, size = PICTURES[world.device.type]
    dtype = DTYPES[recipe.hardware.precision]
    x = torch.randn(pictures, channels, size, size, device=world.device, dtype=dtype)
    weight = torch.randn(channels, channels, 3, 3, device=world.device, dtype=dtype)
    x, weight = (tensor.to(memory_format=torch.channels_last) for tensor in (x, weight))
    seconds = min(seconds_of(lambda: torch.nn.functional.conv2d(x, weight, padding=1), 6, world.device))
    return 2.0 * pictures * (3 * channels * size) ** 2 / seconds


def half_precision_gain(recipe: Recipe, videos: int, world: World) -> float | None:
    """The speed of a base step in bf16 relative to float32.

    None on GPUs, on CPUs without bf16 instructions, and where torch computes wrong gradients for this network in bf16.
    """
    half = recipe.changed("hardware", precision="bf16")
    if world.device.type != "cpu" or not has_bf16() or not right_gradients(half, world.device):
        return None
    seconds: list[float] = []
    for precision in ("fp32", "bf16"):
        in_it = baseline_recipe(recipe.changed("hardware", precision=precision))
        plan = make_plan(in_it, videos)
        in_it = fit_memory(in_it, plan, world)
        seconds += [found for _, found in step_seconds(tuned_model(in_it, plan, world), in_it, [plan[0]], world)]
    return seconds[0] / seconds[1]


def render(result: dict[str, Any]) -> Table:
    names = ("shape", "measured", "step", "copy", "forward", "backward", "update", "clips/s", "GFLOP/s", "of peak",
             "over convs", "memory")  # fmt: skip
    rows = (
        (
            str(Shape(**row["shape"])),
            f"{row['clips']} clips",
            *(f"{1e3 * row[key]:,.0f} ms" for key in SPANS),
            f"{row['clips_per_second']:.1f}",
            f"{row['flops'] / 1e9:,.0f}",
            f"{100 * row['peak_share']:.0f} %",
            f"{row['over_convolutions']:.2f}x",
            f"{row['peak_bytes'] / 2**30:.2f} GiB",
        )
        for row in result["shapes"]
    )
    made = table(names, rows, wrap=True)
    made.title = (
        f"a step on {result['device']}, {result['threads']} threads, {result['precision']}; "
        f"products and convolutions reach {result['peak_flops'] / 1e9:,.0f} GFLOP/s"
    )
    made.title_justify = "left"
    made.caption = f"per voxel, the slowest shape takes {result['slowest_over_fastest']:.2f}x the time of the fastest"
    return made


def _time_layer(
    layer: nn.Conv3d, size: torch.Size, needs_grad: bool, recipe: Recipe, world: World, repeats: int
) -> float:
    x = torch.ones(size, device=world.device).to(memory_format=memory_format(recipe)).requires_grad_(needs_grad)
    with autocast(recipe, world):
        above = torch.ones_like(layer(x))

    def forward_and_backward() -> None:
        with autocast(recipe, world):
            y = layer(x)
        torch.autograd.grad(y, [layer.weight, *([x] if needs_grad else [])], above)

    return statistics.median(seconds_of(forward_and_backward, repeats + 1, world.device)[1:])
