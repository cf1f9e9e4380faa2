"""One optimizer step: forward and backward passes in micro-batches of BatchNorm groups, then the update."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgtrain.clips.augment import colour_rows, erase, erase_rows, jitter_colour, normalize, restandardize, sent
from mgtrain.engine.checks import DTYPES, pass_clips
from mgtrain.engine.finite import Statistics, not_finite
from mgtrain.engine.mix import mix, mix_rows
from mgtrain.engine.update.optim import set_lr
from mgtrain.models.part import Part, set_part
from mgtrain.processes.distributed import World, no_sync, unwrap
from mgtrain.recipe import Recipe
from mgtrain.recipe.model import pixel_statistics
from mgtrain.rng import Draw, generator, seed_of
from mgtrain.schedule import Step


@dataclass(frozen=True, slots=True)
class StepResult:
    """The result of a step for this rank's clips, on the device: reading it waits for the GPU."""

    loss: Tensor  # () mean over the clips
    correct: Tensor  # () share of clips with a correct prediction (see `hits`)
    bad: Tensor  # () 1 if the loss or a gradient was not finite on any rank, so that the update was skipped
    skipped: Tensor  # () 1 also if a gradient was too large for the scale of the loss in fp16, which then halves


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
    set_lr(optimizer, step)
    optimizer.zero_grad(set_to_none=True)
    loss_sum = torch.zeros((), device=world.device)
    correct = torch.zeros((), device=world.device)
    statistics = None
    for part in parts(step, recipe, world):
        first = part.first - world.rank * len(clips)
        mine = slice(first, first + part.clips)
        set_part(unwrap(model), part)
        statistics = statistics or Statistics(unwrap(model))  # the first part creates the groups' statistics
        x, targets = augmented(clips[mine], labels[mine], part, step, recipe)
        with no_sync(model, last=mine.stop == len(clips)):
            with autocast(recipe, world):
                logits = model(x).float()  # (part.clips, classes)
            loss = loss_sum_of(logits, targets, recipe) / len(clips)
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        loss_sum += loss.detach()
        correct += hits(logits.detach(), targets).sum() / len(clips)
    assert statistics is not None, "a step without clips"
    now = statistics.now()
    scaled, most = scaler.is_enabled(), recipe.optim.clip_norm
    if scaled:
        scaler.unscale_(optimizer)
    norm = clipped(model, most)
    bad = not_finite(loss_sum, None if scaled else norm, now, world)
    statistics.restore_if(bad, now)
    if not scaled:  # an enabled scaler tells the optimizer itself
        optimizer.found_inf, optimizer.grad_scale = bad, None  # type: ignore[attr-defined]
    scaler.step(optimizer)
    scaler.update()
    skipped = torch.maximum(bad, (~norm.isfinite()).float()) if scaled else bad
    return StepResult(loss_sum, correct, bad, skipped)


def clipped(model: nn.Module, most: float | None) -> Tensor:
    """The norm of the global batch's gradient, float32 (), which is scaled down to the norm `most` if it is larger."""
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    if most is not None:
        nn.utils.clip_grads_with_norm_(model.parameters(), most, norm)
    return norm


def loss_sum_of(logits: Tensor, targets: Tensor, recipe: Recipe) -> Tensor:
    """The sum of the clips' losses: cross entropy, or with several labels the mean binary cross entropy of classes.

    Logits (B, classes); targets as `augmented` returns them.
    """
    if recipe.data.multi_label:
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1).sum()
    return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=recipe.augment.label_smoothing)


def hits(logits: Tensor, targets: Tensor) -> Tensor:
    """Whether each clip's most probable class is correct, bool (B,).

    For a mixed clip that is the class with the largest share, for a clip with several labels any of them.
    """
    first = logits.argmax(1)
    if targets.ndim == 1:
        return first == targets
    own = targets.gather(1, first[:, None]).squeeze(1)
    return (own == targets.amax(1)) & (own > 0)


def parts(step: Step, recipe: Recipe, world: World) -> Iterator[Part]:
    """The micro-batches of this rank's share of a step (see `pass_clips`)."""
    share, size = step.shape.clips // world.size, pass_clips(recipe, step.shape, step.bn_groups, world.size)
    for first in range(0, share, size):
        yield part_of(step, recipe, world, first, min(size, share - first))


def part_of(step: Step, recipe: Recipe, world: World, first: int, clips: int) -> Part:
    """So many clips of this rank's share of a step, from `first` on."""
    seed, share = seed_of(recipe.seed, Draw.STEP, step.index), step.shape.clips // world.size
    return Part(world.rank * share + first, clips, step.shape.clips, step.bn_groups, world.size, seed, world.gather)


def augmented(clips: Tensor, labels: Tensor, part: Part, step: Step, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """The network's input, float32 (B, 3, T, S, S), and targets for one micro-batch.

    Targets are int64 (B,), or float32 (B, classes) if clips are mixed or have several labels.
    """
    augment, size = recipe.augment, clips.shape[-1]

    def draws(purpose: Draw, numbers: int) -> np.ndarray:
        of_batch = generator(recipe.seed, purpose, step.index).random((part.total, numbers))
        mine: np.ndarray = of_batch[part.first : part.first + part.clips]
        return mine  # (B, numbers), uniform in [0, 1)

    rows: dict[str, np.ndarray] = {}
    if augment.jitters_colour:
        rows["colour"] = colour_rows(draws(Draw.COLOUR, 4), augment)
    if augment.erase:
        rows["erase"] = erase_rows(draws(Draw.ERASE, 5), augment.erase, size)
    if augment.mixes:
        rng = generator(recipe.seed, Draw.MIX, step.index)
        rows["mix"] = mix_rows(part, size, rng, augment.mixup, augment.cutmix)
    there = sent(rows, clips.device)

    x = normalize(clips, memory_format(recipe))
    if augment.jitters_colour:
        x = jitter_colour(x, there["colour"]).contiguous(memory_format=memory_format(recipe))
    if augment.erase:
        x = erase(x, there["erase"])
    x = restandardize(x, *pixel_statistics(recipe.model))
    if augment.mixes:
        return mix(x, labels, there["mix"], recipe.data.classes)
    return x, labels if labels.ndim == 1 else labels.to(x.dtype)


def to_input(clips: Tensor, recipe: Recipe) -> Tensor:
    """The network's input without augmentation: uint8 (B, 3, T, S, S) -> float32 (B, 3, T, S, S)."""
    return restandardize(normalize(clips, memory_format(recipe)), *pixel_statistics(recipe.model))


def to_device(model: nn.Module, recipe: Recipe, world: World) -> nn.Module:
    """The model on this rank's device, in the memory format of its inputs."""
    return model.to(world.device).to(memory_format=memory_format(recipe))


def memory_format(recipe: Recipe) -> torch.memory_format:
    """The memory format of clips and weights: channels last, as the loader returns pixels, if the recipe allows it."""
    return torch.channels_last_3d if recipe.hardware.channels_last else torch.contiguous_format


def autocast(recipe: Recipe, world: World) -> torch.autocast:
    """The autocast context of the recipe's precision."""
    precision = recipe.hardware.precision
    return torch.autocast(world.device.type, DTYPES[precision], enabled=precision != "fp32")
