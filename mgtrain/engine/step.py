"""One optimizer step: forward and backward in micro-batches along BatchNorm groups, then the update."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgtrain.clips.augment import erase, jitter_colour
from mgtrain.clips.pixels import normalize, restandardize
from mgtrain.engine.checks import DTYPES, pass_clips
from mgtrain.engine.finite import not_finite
from mgtrain.engine.mix import mix
from mgtrain.models.part import Part, set_part
from mgtrain.processes.distributed import World, no_sync, unwrap
from mgtrain.recipe import Recipe
from mgtrain.recipe.model import pixel_statistics
from mgtrain.rng import Draw, generator, seed_of
from mgtrain.schedule import Step


@dataclass(frozen=True, slots=True)
class StepResult:
    """A step's outcome over this rank's clips, still on the device: reading it would wait for the GPU."""

    loss: Tensor  # () mean
    correct: Tensor  # () share of clips whose most probable class is right; of a mixed clip, the class it is most of;
    # of a clip with several labels, one of them
    bad: Tensor  # () 1 if the loss or a gradient was not finite on any rank; the update was then left out


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    clips: Tensor,
    labels: Tensor,
    step: Step,
    recipe: Recipe,
    world: World,
) -> StepResult:
    """Train on this rank's share of one step: clips uint8 (b, 3, T, S, S), labels int64 (b,) or uint8 (b, classes)."""
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = step.lr * group["lr_factor"]
    optimizer.zero_grad(set_to_none=True)
    loss_sum = torch.zeros((), device=world.device)
    correct = torch.zeros((), device=world.device)
    first_of_rank = world.rank * len(clips)
    for part in parts(step, recipe, world):
        mine = slice(part.first - first_of_rank, part.first - first_of_rank + part.clips)
        set_part(unwrap(model), part)
        x, targets = augmented(clips[mine], labels[mine], part, step, recipe)
        with no_sync(model, last=mine.stop == len(clips)):
            with autocast(recipe, world):
                logits = model(x).float()  # (part.clips, classes)
            loss = loss_sum_of(logits, targets, recipe) / len(clips)
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        loss_sum += loss.detach()
        correct += hits(logits.detach(), targets).sum() / len(clips)
    bad = not_finite(loss_sum, unwrap(model).parameters(), scaler.is_enabled(), world)
    if not scaler.is_enabled():  # an enabled one tells the optimizer itself
        optimizer.found_inf, optimizer.grad_scale = bad, None  # type: ignore[attr-defined]
    scaler.step(optimizer)
    scaler.update()
    return StepResult(loss_sum, correct, bad)


def loss_sum_of(logits: Tensor, targets: Tensor, recipe: Recipe) -> Tensor:
    """The clips' losses added up: cross entropy, or, with several labels, binary cross entropy averaged over classes.

    Logits (B, classes); targets are as `augmented` gives them.
    """
    if recipe.data.multi_label:
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1).sum()
    return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=recipe.augment.label_smoothing)


def hits(logits: Tensor, targets: Tensor) -> Tensor:
    """Which clips' most probable class no other surpasses in the target: bool (B,)."""
    first = logits.argmax(1)
    if targets.ndim == 1:
        return first == targets
    own = targets.gather(1, first[:, None]).squeeze(1)
    return (own == targets.amax(1)) & (own > 0)


def parts(step: Step, recipe: Recipe, world: World) -> Iterator[Part]:
    """The micro-batches of this rank's share: as many whole BatchNorm groups as `hardware.micro_clips` allows."""
    total, groups = step.shape.clips, step.bn_groups
    share, size = total // world.size, pass_clips(recipe, step.shape, groups, world.size)
    seed = seed_of(recipe.seed, Draw.STEP, step.index)
    for first in range(0, share, size):
        clips = min(size, share - first)
        yield Part(world.rank * share + first, clips, total, groups, world.size, seed, world.gather)


def augmented(clips: Tensor, labels: Tensor, part: Part, step: Step, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """One pass's input, float32 (B, 3, T, S, S), and targets: int64 (B,), or float32 (B, classes) where clips are mixed
    or have several labels."""
    x, augment = normalize(clips, memory_format(recipe)), recipe.augment

    def draws(purpose: Draw, numbers: int) -> np.ndarray:
        everyone = generator(recipe.seed, purpose, step.index).random((part.total, numbers))
        mine: np.ndarray = everyone[part.first : part.first + part.clips]
        return mine  # (B, numbers), uniform in [0, 1)

    if augment.jitters_colour:
        x = jitter_colour(x, draws(Draw.COLOUR, 4), augment)
    if augment.erase:
        x = erase(x, draws(Draw.ERASE, 5), augment.erase)
    x = restandardize(x, *pixel_statistics(recipe.model))
    if augment.mixes:
        return mix(x, labels, part, generator(recipe.seed, Draw.MIX, step.index), recipe)
    return x, labels if labels.ndim == 1 else labels.to(x.dtype)


def to_input(clips: Tensor, recipe: Recipe) -> Tensor:
    """The network's input on its device: uint8 (B, 3, T, S, S) -> float32 (B, 3, T, S, S)."""
    return restandardize(normalize(clips, memory_format(recipe)), *pixel_statistics(recipe.model))


def to_device(model: nn.Module, recipe: Recipe, world: World) -> nn.Module:
    """The model on this rank's device, in the memory format of its inputs."""
    model.to(world.device)
    return model.to(memory_format=memory_format(recipe))


def memory_format(recipe: Recipe) -> torch.memory_format:
    """Channels last, as the loader lays out pixels, unless the recipe says otherwise."""
    return torch.channels_last_3d if recipe.hardware.channels_last else torch.contiguous_format


def autocast(recipe: Recipe, world: World) -> torch.autocast:
    """Convolutions in the recipe's precision; the rest stays in float32 where it must."""
    precision = recipe.hardware.precision
    return torch.autocast(world.device.type, DTYPES[precision], enabled=precision != "fp32")
