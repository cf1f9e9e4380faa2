"""Checks before the first step, so that a run does not fail when the shape first changes."""

import math
import platform
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from itertools import islice

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mgtrain import __version__
from mgtrain.data.videos import Videos
from mgtrain.engine.resume import PLACES
from mgtrain.errors import DataError, MissingCapabilityError, PlanError, one_line
from mgtrain.grid import Shape
from mgtrain.models import build_model
from mgtrain.models.conv import Conv3d
from mgtrain.models.recompute import recompute
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe, recipe_differences
from mgtrain.schedule import Plan

MAY_DIFFER = (*PLACES, "data.prepared", "data.checked", "init.weights", "hardware.workers")  # between ranks
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_model(recipe: Recipe) -> nn.Module:
    """The recipe's model, initialized from torch's random state."""
    options = recipe.model.model_dump(exclude={"name", "mean", "std"})
    model = build_model(recipe.model.name, classes=recipe.data.classes, **options)
    if recipe.hardware.recompute and not recompute(model):
        raise PlanError(f"hardware.recompute: {recipe.model.name} has no repeated blocks to recompute; set it to false")
    return model


def check_shapes(recipe: Recipe, shapes: Iterable[Shape]) -> dict[Shape, int]:
    """Multiply-adds of one clip's forward pass at each shape. Raises `PlanError` if the model does not accept one."""
    with torch.device("meta"):
        model = make_model(recipe)
    flops = {}
    for shape in shapes:
        with FlopCounterMode(display=False) as counter:
            problem = misfit(model, shape.frames, shape.crop, recipe.data.classes)
        if problem:
            sizes = [f"{n}x{size}²" for n, size in fitting(model, shape.frames, shape.crop, recipe.data.classes)]
            remedy = "found no other size that fits: average over time and space before the classifier"
            if sizes:
                remedy = f"clips of {', '.join(sizes)} fit: choose clip, evaluation.crop and schedule accordingly"
            raise PlanError(
                f"{recipe.model.name} does not accept clips of {shape.frames} frames of {shape.crop}² pixels: "
                f"{problem}; {remedy}"
            )
        flops[shape] = counter.get_total_flops() // 4  # of 2 clips; torch counts a multiply-add as 2
    return flops


def check_alike(recipe: Recipe, plan: Plan, splits: Sequence[Videos], world: World) -> None:
    """Raise `DataError` if this rank's machine has another recipe, other videos or another version than rank 0's."""
    identities = [videos.identity for videos in splits]
    mine = {"mgtrain": __version__, "torch": torch.__version__, "videos": identities, "plan": plan.fingerprint()}
    flat, theirs = world.from_main((recipe.flat(), mine))
    of_recipes = recipe_differences(flat, recipe.flat())
    differences = [f"{key} {a} -> {b}" for key, (a, b) in of_recipes.items() if key not in MAY_DIFFER]
    differences += [f"{key} {theirs[key]} -> {value}" for key, value in mine.items() if value != theirs[key]]
    if differences:
        raise DataError(
            f"rank {world.rank} on {platform.node()} would train something else than rank 0: {'; '.join(differences)}; "
            "give all machines the same recipe, lists of videos and versions"
        )


def misfit(model: nn.Module, frames: int, crop: int, classes: int) -> str | None:
    """Why a model on the meta device does not accept clips of that size, with the layer's name; None if it does."""
    within: list[str] = []  # the running layers, the outermost first
    with ExitStack() as hooks, torch.inference_mode():
        for name, layer in model.named_modules():
            hooks.enter_context(layer.register_forward_pre_hook(lambda *_, name=name: within.append(name)))
            hooks.enter_context(layer.register_forward_hook(lambda *_: within.__delitem__(-1)))
        try:
            logits = model(torch.empty(2, 3, frames, crop, crop, device="meta"))
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
            layer = model.get_submodule(within[-1])
            named = f"{f'layer {within[-1]}' if within[-1] else 'the network itself'}, {type(layer).__name__}"
            cause = one_line(error, 200)
            return f"{named}, {_reason(layer, cause)} ({cause})"
    shape = tuple(getattr(logits, "shape", ()))
    if shape != (2, classes):
        return f"for 2 such clips it returns {shape or type(logits).__name__}, not logits (2, {classes})"
    return None


def _reason(layer: nn.Module, cause: str) -> str:
    """How a layer depends on the clip's size, guessed from its error."""
    if isinstance(layer, nn.Linear):
        return f"expects {layer.in_features} features, but flattened features depend on the clip's size"
    if "ernel size" in cause or "too small" in cause or "smaller than" in cause:
        return "has a kernel larger than its input"
    if "must match" in cause or "broadcast" in cause:
        return "adds or joins a tensor of fixed size, such as position embeddings"
    if "invalid for input" in cause or "view size" in cause or "reshape" in cause:
        return "splits its features into parts of a fixed size, which do not divide them"
    return "depends on the clip's size"


def fitting(model: nn.Module, frames: int, crop: int, classes: int) -> list[tuple[int, int]]:
    """Up to 4 sizes near (frames, crop) that a model on the meta device accepts, the nearest first."""
    lengths = sorted({frames + 1, *(2**n for n in range(7))}, key=lambda n: abs(math.log(n / frames)))
    crops = {size for step in (7, 16, 32) for size in range(step, 2 * crop + 33, step) if size >= 8}
    near = sorted(crops, key=lambda size: abs(math.log(size / crop)))[:24]
    others = [(n, size) for n in lengths for size in (32, 64, 112, 224)]
    for sizes in ([(n, crop) for n in lengths], [(frames, size) for size in near], others):
        found = ((n, size) for n, size in sizes if misfit(model, n, size, classes) is None)
        if fit := list(islice(found, 4)):
            return fit
    return []


def check_micro_batches(recipe: Recipe, plan: Plan, ranks: int) -> None:
    """Raise `PlanError` if `hardware.micro_clips` cuts a BatchNorm group, a rank's share of one, or a pair to mix."""
    for phase in plan.phases:
        for shape, groups in phase.batches():
            smallest, limit = min(shape.clips // ranks, shape.clips // groups), micro_limit(recipe, shape)
            if limit is not None and limit < smallest:
                raise PlanError(
                    f"hardware.micro_clips {recipe.hardware.micro_clips} allows {limit} clips of "
                    f"{shape.frames}x{shape.crop}², but phase {phase.index + 1} has {smallest} in one BatchNorm group; "
                    "raise it, or lower batch.bn_clips"
                )
            clips = pass_clips(recipe, shape, groups, ranks)
            if recipe.augment.mixes and clips % 2:
                raise PlanError(
                    f"hardware.micro_clips {recipe.hardware.micro_clips} makes micro-batches of {clips} clips in phase "
                    f"{phase.index + 1}, but augment.mixup and augment.cutmix mix pairs; use another "
                    "hardware.micro_clips or an even batch.bn_clips, or set mixup and cutmix to 0"
                )


def check_precision(recipe: Recipe, device: torch.device) -> None:
    """Raise `MissingCapabilityError` if gradients in `hardware.precision` are wrong: see `right_gradients`."""
    if not right_gradients(recipe, device):
        raise MissingCapabilityError(
            f"hardware.precision {recipe.hardware.precision}: torch {torch.__version__} computes wrong gradients on "
            f"this {device.type} for clips shorter than a kernel; use hardware.precision=fp32 or another build of torch"
        )


def right_gradients(recipe: Recipe, device: torch.device) -> bool:
    """Whether gradients in `hardware.precision` are close to those in float32.

    Some builds of torch (oneDNN 3.12) compute wrong ones on a CPU in bf16 for clips with fewer frames than a kernel,
    which coarse shapes have. `Conv3d` computes them in another way.
    """
    precision = recipe.hardware.precision
    if precision == "fp32":
        return True
    if device.type == "cpu":
        with torch.device("meta"):
            model = make_model(recipe)
        if all(isinstance(layer, Conv3d) for layer in model.modules() if isinstance(layer, nn.Conv3d)):
            return True
    layout = torch.channels_last_3d if recipe.hardware.channels_last else torch.contiguous_format
    conv = nn.Conv3d(16, 32, kernel_size=(5, 1, 1), padding=(2, 0, 0), device=device).to(memory_format=layout)
    clips = torch.arange(2 * 16 * 2 * 8 * 8.0, device=device).sin().view(2, 16, 2, 8, 8).to(memory_format=layout)
    gradients = []
    for enabled in (False, True):
        with torch.autocast(device.type, DTYPES[precision], enabled=enabled):
            loss = (conv(clips).float() ** 2).mean()
        gradients.append(torch.autograd.grad(loss, conv.weight)[0])
    return bool((gradients[1] - gradients[0]).norm() / gradients[0].norm() < 0.05)


def micro_limit(recipe: Recipe, shape: Shape) -> int | None:
    """The limit of clips of this shape in one forward pass, with the volume of `hardware.micro_clips` base clips."""
    if recipe.hardware.micro_clips is None:
        return None
    base = recipe.base
    # Rounding makes coarse shapes up to 2 % larger, which must not halve a micro-batch.
    return int(1.02 * recipe.hardware.micro_clips * base.frames * base.crop**2 / (shape.frames * shape.crop**2))


def pass_clips(recipe: Recipe, shape: Shape, bn_groups: int, ranks: int) -> int:
    """Clips of a micro-batch: as many whole BatchNorm groups as `hardware.micro_clips` allows."""
    share = shape.clips // ranks
    unit = min(share, shape.clips // bn_groups)  # a group, or a rank's share of one
    limit = micro_limit(recipe, shape) or share
    return min(share, max(unit, limit // unit * unit))
