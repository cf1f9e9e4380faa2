"""Multigrid in your own training loop: the batches, BatchNorm groups, loss and evaluations of a plan.

`fit` is made of the same parts, so a loop that uses them has its losses. If the loop has initialized a process group
with torch.distributed, each rank gets its share of every step.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mgtrain.clips.loader import train_batches as load_batches
from mgtrain.data.videos import Videos
from mgtrain.engine import evaluate as evaluation
from mgtrain.engine import recalibrate as recalibration
from mgtrain.engine.start import first_model
from mgtrain.engine.step import augmented, loss_sum_of, part_of
from mgtrain.errors import UsageError
from mgtrain.models.norm import GroupBatchNorm3d, merge_group_stats
from mgtrain.models.part import set_part
from mgtrain.processes.distributed import joined, unwrap
from mgtrain.recipe import Recipe
from mgtrain.runs.scores import Scores
from mgtrain.schedule import Plan, Step, check_world

Device = torch.device | str | None  # None: the current GPU, or the CPU where there is none


class Batches:
    """What `train_batches` returns: an iterable of known length."""

    def __init__(self, recipe: Recipe, plan: Plan, videos: Videos, start: int, device: Device) -> None:
        self._recipe, self._plan, self._videos, self._start, self._device = recipe, plan, videos, start, device

    def __len__(self) -> int:
        """Steps from `start` on."""
        return len(self._plan) - self._start

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        world = joined(self._device, together=True)
        check_world(self._plan, world.size)
        batches = load_batches(self._videos, self._recipe, self._plan.steps(self._start), world)
        for step, (clips, labels) in zip(self._plan.steps(self._start), batches, strict=True):
            part = part_of(step, self._recipe, world, 0, len(clips))
            yield augmented(clips, labels, part, step, self._recipe)


def train_batches(recipe: Recipe, plan: Plan, videos: Videos, start: int = 0, device: Device = None) -> Batches:
    """This rank's share of each step from `start` on, decoded ahead by `hardware.workers` processes, on its device.

    Each item is a network's input, float32 (b, 3, T, S, S), augmented and normalized as the recipe says, and its
    targets: int64 (b,), or where clips are mixed or have several labels, float32 (b, classes). T and S change from step
    to step, and b is `step.shape.clips` divided by the number of ranks. `device` None: the current GPU, or the CPU.

    Raises `UsageError` if the plan has fewer than `start` steps. Iteration raises `PlanError` if the ranks cannot share
    the steps, `DataError` if too many videos cannot be decoded.
    """
    if not 0 <= start <= len(plan):
        raise UsageError(f"train_batches: start={start} is not a number of finished steps; the plan has {len(plan):,}")
    return Batches(recipe, plan, videos, start, device)


def make_model(recipe: Recipe, device: Device = None) -> nn.Module:
    """The recipe's network with the weights that `fit` starts from: random ones by its seed, or `init.weights`.

    It takes clips, float (b, 3, T, S, S), of any size, and returns logits (b, classes). Raises `CheckpointError` if
    `init.weights` cannot be read or is of another network.
    """
    return first_model(recipe, joined(device))


def loss(logits: Tensor, targets: Tensor, recipe: Recipe) -> Tensor:
    """The mean loss that `fit` minimizes, a scalar, of logits (b, classes) and the targets of `train_batches`.

    Cross entropy with the recipe's label smoothing or, with several labels (`data.multi_label`), binary cross entropy.
    """
    return loss_sum_of(logits, targets, recipe) / len(logits)


@contextmanager
def at_step(model: nn.Module, step: Step, recipe: Recipe, first: int = 0, clips: int | None = None) -> Iterator[None]:
    """Tell the network which of this rank's clips it sees: run the forward and backward pass of a step in this block.

    The pass sees all of this rank's clips or, for gradient accumulation, `clips` of them from `first` on. Raises
    `UsageError` if these are not whole BatchNorm groups of this rank (of `step.shape.clips // step.bn_groups` clips),
    or if a BatchNorm of the network has no groups.
    """
    world = joined()
    share, group = step.shape.clips // world.size, step.shape.clips // step.bn_groups
    count = share - first if clips is None else clips
    whole = min(share, group)
    if first % whole or count % whole or not 0 <= first < first + count <= share:
        raise UsageError(
            f"at_step: clips {first} to {first + count} of the {share} of this rank are not whole BatchNorm groups; "
            f"use multiples of {whole}"
        )
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and layer.training and not isinstance(layer, GroupBatchNorm3d):
            raise UsageError(f"{name}: this {type(layer).__name__} has no groups; use mgtrain.group_batchnorm(model)")
    set_part(model, part_of(step, recipe, world, first, count))
    try:
        yield
    finally:
        set_part(model, None)


def recalibrate(
    model: nn.Module, recipe: Recipe, plan: Plan, videos: Videos, steps: int, device: Device = None
) -> None:
    """Before an evaluation after `steps` steps: measure BatchNorm's statistics on the evaluation's shape, if needed.

    If all recent steps had this shape, the model gets the running statistics of training instead, which it keeps by
    groups. `videos` are those of training. All ranks take part. Call it before you save weights, too.
    """
    world = joined(device, together=True)
    count = recalibration.batches_needed(recipe, plan, steps, recalibration.remembered(model))
    norms = [layer for layer in model.modules() if isinstance(layer, GroupBatchNorm3d)]
    constant = [norm for norm in norms if model.training and not norm.training and not norm.frozen]  # by the user
    with _mode_kept(model):
        for norm in constant:
            norm.frozen = True
        try:
            recalibration.recalibrate(unwrap(model), videos, count, recipe, world)
            merge_group_stats(unwrap(model), world.gather)
        finally:
            for norm in constant:
                norm.frozen = False
        set_part(model, None)


def evaluate(
    model: nn.Module, recipe: Recipe, videos: Videos, views: tuple[int, int] = (1, 1), device: Device = None
) -> Scores:
    """The network's scores on the evaluation's grid, with `views` (in time, crops) of each video.

    `evaluation.views` says whether their mean or their maximum counts. All ranks take part, and all get the scores of
    all videos: `top1`, `top5` (fractions), `loss` (nats), and more. Raises `NonFiniteError` if a probability is NaN,
    `DataError` if too many videos cannot be decoded.
    """
    with _mode_kept(model):
        return evaluation.evaluate(unwrap(model), videos, recipe, joined(device, together=True), views).scores()


@contextmanager
def _mode_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards each layer is in the mode, of training or evaluation, that it was in."""
    before = {layer: layer.training for layer in model.modules()}
    try:
        yield
    finally:
        for layer, mode in before.items():
            layer.training = mode
