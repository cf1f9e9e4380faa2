"""What is checked before a video is opened, so that no run stops at its first change of shape."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from mgtrain.errors import MissingCapabilityError, PlanError
from mgtrain.grid import Shape
from mgtrain.models import build_model
from mgtrain.models.flops import count_flops
from mgtrain.recipe import Recipe
from mgtrain.schedule import Phase, Plan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_model(recipe: Recipe) -> nn.Module:
    """The recipe's model with the weights that torch's current seed gives."""
    return build_model(recipe.model.name, classes=recipe.data.classes, **recipe.model.model_dump(exclude={"name"}))


def check_shapes(recipe: Recipe, shapes: Iterable[Shape]) -> dict[Shape, int]:
    """Try every shape on the meta device; returns the multiply-adds of one clip's forward pass for each.

    Raises:
        PlanError: the model cannot take one of the shapes.
    """
    with torch.device("meta"):
        model = make_model(recipe)
    flops = {}
    for shape in shapes:
        try:
            flops[shape] = count_flops(model, (1, shape.frames, shape.crop))
        except (RuntimeError, ValueError) as error:
            cause = str(error).splitlines()[0]
            raise PlanError(
                f"{recipe.model.name} cannot take clips of {shape.frames} frames of {shape.crop} pixels ({cause}); "
                "use a larger clip.frames or clip.crop, or finer factors in schedule.long_cycle and short_cycle"
            ) from None
    return flops


def check_micro_batches(recipe: Recipe, plan: Plan, ranks: int) -> None:
    """A micro-batch holds at least one whole BatchNorm group, or one rank's share of it, and whole pairs to be mixed.

    Raises:
        PlanError: hardware.micro_clips is smaller than that, or cuts pairs.
    """
    for phase in plan.phases:
        for shape in phase.shapes:
            smallest, limit = _smallest_pass(phase, shape, ranks), micro_limit(recipe, shape)
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


def _smallest_pass(phase: Phase, shape: Shape, ranks: int) -> int:
    return min(shape.clips // ranks, shape.clips // phase.bn_groups)
