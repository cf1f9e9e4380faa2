"""What is checked before a video is opened, so that no run stops at its first change of shape."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import islice

import torch
from torch import nn

from mgtrain.errors import MissingCapabilityError, PlanError
from mgtrain.grid import Shape
from mgtrain.models import build_model
from mgtrain.models.flops import count_flops
from mgtrain.models.recompute import recompute
from mgtrain.recipe import Recipe
from mgtrain.schedule import Phase, Plan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_model(recipe: Recipe) -> nn.Module:
    """The recipe's model with the weights that torch's current seed gives."""
    options = recipe.model.model_dump(exclude={"name", "mean", "std"})
    model = build_model(recipe.model.name, classes=recipe.data.classes, **options)
    if recipe.hardware.recompute and not recompute(model):
        raise PlanError(f"hardware.recompute: {recipe.model.name} repeats no block that could be; set it to false")
    return model


def check_shapes(recipe: Recipe, shapes: Iterable[Shape]) -> dict[Shape, int]:
    """Try every shape on the meta device; returns the multiply-adds of one clip's forward pass for each.

    Raises:
        PlanError: the model cannot take one of the shapes; it names the layer, why, and what shapes fit.
    """
    with torch.device("meta"):
        model = make_model(recipe)
    flops = {}
    for shape in shapes:
        problem = misfit(model, shape.frames, shape.crop, recipe.data.classes)
        if problem:
            sizes = [f"{n}x{size}²" for n, size in fitting(model, shape.frames, shape.crop, recipe.data.classes)]
            remedy = "no other size was found to fit: average over time and space before the classifier"
            if sizes:
                remedy = f"clips of {', '.join(sizes)} fit: choose clip, evaluation.crop and schedule's factors so"
            raise PlanError(
                f"{recipe.model.name} cannot take clips of {shape.frames} frames of {shape.crop}² pixels: {problem}; "
                f"{remedy}"
            )
        flops[shape] = count_flops(model, (1, shape.frames, shape.crop))
    return flops


def misfit(model: nn.Module, frames: int, crop: int, classes: int) -> str | None:
    """Why a model on the meta device makes no logits of clips of that size, with the layer's name; None: it does."""
    within: list[str] = []  # the layers that are at work, from the outermost
    hooks = []
    for name, layer in model.named_modules():
        hooks.append(layer.register_forward_pre_hook(lambda *_, name=name: within.append(name)))
        hooks.append(layer.register_forward_hook(lambda *_: within.__delitem__(-1)))
    try:
        with torch.inference_mode():
            logits = model(torch.empty(2, 3, frames, crop, crop, device="meta"))
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        layer = model.get_submodule(within[-1])
        named = f"{f'layer {within[-1]}' if within[-1] else 'the network itself'}, {type(layer).__name__}"
        cause = " ".join(str(error).split())[:200]
        return f"{named}, {_reason(layer, cause)} ({cause})"
    finally:
        for hook in hooks:
            hook.remove()
    shape = tuple(getattr(logits, "shape", ()))
    if shape != (2, classes):
        return f"of 2 such clips it makes {shape or type(logits).__name__}, not logits (2, {classes})"
    return None


def _reason(layer: nn.Module, cause: str) -> str:
    """What is fixed in a layer that fails so."""
    if isinstance(layer, nn.Linear):
        return f"takes {layer.in_features} features, however many the clip has: flattened features depend on its size"
    if "ernel size" in cause or "too small" in cause or "smaller than" in cause:
        return "has a window larger than what is left of the clip"
    if "must match" in cause or "broadcast" in cause:
        return "adds or joins a table of fixed size, such as one of positions"
    if "invalid for input" in cause or "view size" in cause or "reshape" in cause:
        return "cuts its features into pieces of a fixed size, which do not divide them"
    return "depends on the clip's size"


def fitting(model: nn.Module, frames: int, crop: int, classes: int, most: int = 4) -> list[tuple[int, int]]:
    """Sizes near to (frames, crop) that a model on the meta device takes, the nearest first, as (frames, crop)."""
    lengths = sorted({frames + 1, *(2**n for n in range(7))}, key=lambda n: abs(math.log(n / frames)))
    crops = {size for step in (7, 16, 32) for size in range(step, 2 * crop + 33, step) if size >= 8}
    near = sorted(crops, key=lambda size: abs(math.log(size / crop)))[:24]
    others = [(n, size) for n in lengths for size in (32, 64, 112, 224)]
    for sizes in ([(n, crop) for n in lengths], [(frames, size) for size in near], others):
        found = ((n, size) for n, size in sizes if misfit(model, n, size, classes) is None)
        if fit := list(islice(found, most)):
            return fit
    return []


def check_micro_batches(recipe: Recipe, plan: Plan, ranks: int) -> None:
    """A micro-batch holds at least one whole BatchNorm group, or one rank's share of it, and whole pairs to be mixed.

    Raises:
        PlanError: hardware.micro_clips is smaller than that, or cuts pairs.
    """
    for phase in plan.phases:
        for shape in phase.shapes:
            smallest, limit = smallest_pass(phase, shape, ranks), micro_limit(recipe, shape)
            if limit is not None and limit < smallest:
                raise PlanError(
                    f"hardware.micro_clips {recipe.hardware.micro_clips} allows {limit} clips of "
                    f"{shape.frames}x{shape.crop}², but phase {phase.index + 1} has {smallest} in one BatchNorm group; "
                    "raise it, or lower batch.bn_clips"
                )
            clips = pass_clips(recipe, shape, phase.bn_groups, ranks)
            if recipe.augment.mixes and clips % 2:
                raise PlanError(
                    f"hardware.micro_clips {recipe.hardware.micro_clips} makes micro-batches of {clips} clips in phase "
                    f"{phase.index + 1}, but augment.mixup and augment.cutmix mix pairs; use another "
                    "hardware.micro_clips or an even batch.bn_clips, or set both to 0"
                )


def check_precision(recipe: Recipe, device: torch.device) -> None:
    """Compare the gradients of a convolution over a short clip with those in float32.

    Some builds of torch get them wrong on a CPU in bf16 when a clip has fewer frames than a kernel (oneDNN 3.12), as
    the clips of coarse shapes do.

    Raises:
        MissingCapabilityError: this machine cannot train in `hardware.precision`.
    """
    precision = recipe.hardware.precision
    if precision == "fp32":
        return
    layout = torch.channels_last_3d if recipe.hardware.channels_last else torch.contiguous_format
    conv = nn.Conv3d(16, 32, kernel_size=(5, 1, 1), padding=(2, 0, 0), device=device)
    conv = conv.to(memory_format=layout)
    clips = torch.arange(2 * 16 * 2 * 8 * 8.0, device=device).sin().view(2, 16, 2, 8, 8).to(memory_format=layout)
    gradients = []
    for enabled in (False, True):
        with torch.autocast(device.type, DTYPES[precision], enabled=enabled):
            loss = (conv(clips).float() ** 2).mean()
        gradients.append(torch.autograd.grad(loss, conv.weight)[0])
    error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    if not error < 0.05:
        raise MissingCapabilityError(
            f"hardware.precision {precision}: torch {torch.__version__} computes wrong gradients in it on this "
            f"{device.type} for clips shorter than a kernel; use hardware.precision=fp32, or another build of torch"
        )


def micro_limit(recipe: Recipe, shape: Shape) -> int | None:
    """The most clips of this shape in one forward pass: `hardware.micro_clips` clips of the base shape in volume."""
    if recipe.hardware.micro_clips is None:
        return None
    base = recipe.base
    # Up to 2 % over the volume, which rounding puts into coarse shapes, is no reason to halve a micro-batch.
    return int(1.02 * recipe.hardware.micro_clips * base.frames * base.crop**2 / (shape.frames * shape.crop**2))


def pass_clips(recipe: Recipe, shape: Shape, bn_groups: int, ranks: int) -> int:
    """Clips of a micro-batch: as many whole BatchNorm groups as `hardware.micro_clips` allows."""
    share = shape.clips // ranks
    unit = min(share, shape.clips // bn_groups)  # a whole group, or this rank's piece of one
    limit = micro_limit(recipe, shape) or share
    return min(share, max(unit, limit // unit * unit))


def smallest_pass(phase: Phase, shape: Shape, ranks: int) -> int:
    return min(shape.clips // ranks, shape.clips // phase.bn_groups)
