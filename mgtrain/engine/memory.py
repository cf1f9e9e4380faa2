"""How much memory a training step takes, estimated without running it, and the micro-batches that fit a limit."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from mgtrain.engine.checks import DTYPES, check_micro_batches, make_model, pass_clips
from mgtrain.errors import PlanError
from mgtrain.grid import Shape
from mgtrain.models.recompute import blocks
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe
from mgtrain.schedule import Plan

log = logging.getLogger(__name__)

USABLE = 0.75  # of a device's memory; the rest is for convolutions' workspaces and what allocators keep for shapes
COPIES = 3  # of the parameters, in float32: themselves, gradients, momentum
LOADED = 2  # batches: the one that is worked on, and the next
CLIPS = 2  # of the pass that is looked at; BatchNorm needs more than one value


class Memory:
    """Bytes of a device in training with a recipe: its state's, and those that each clip's forward pass keeps."""

    def __init__(self, recipe: Recipe, shapes: Iterable[Shape]) -> None:
        with torch.device("meta"):
            model = make_model(recipe)
        self.recipe = recipe
        self.state = COPIES * 4 * sum(parameter.numel() for parameter in model.parameters())
        self.can_recompute = bool(blocks(model))
        model = model.to(DTYPES[recipe.hardware.precision]).train()
        self._kept = {shape: _kept(model, shape) for shape in shapes}  # without and with `hardware.recompute`

    def per_clip(self, shape: Shape) -> int:
        """Bytes that a clip of a forward pass keeps for the backward pass."""
        return self._kept[shape][self.recipe.hardware.recompute]

    def step(self, shape: Shape, bn_groups: int, ranks: int) -> int:
        """Bytes that a step of the plan takes at its height: state, this rank's clips, one pass's activations."""
        clips = pass_clips(self.recipe, shape, bn_groups, ranks)
        loaded = LOADED * 3 * shape.voxels // ranks  # uint8
        return self.state + loaded + clips * self.per_clip(shape)

    def most(self, plan: Plan, ranks: int) -> tuple[int, Shape]:
        """Bytes of the plan's largest step, and its shape."""
        steps = ((self.step(s, p.bn_groups, ranks), s) for p in plan.phases for s in p.shapes[: p.steps])
        return max(steps, key=lambda step: step[0])

    def limit(self, plan: Plan, ranks: int, gib: float) -> Recipe:
        """The recipe, changed so that every step of the plan takes no more than `USABLE` of `gib` GiB.

        With the largest `hardware.micro_clips` that does, and with `hardware.recompute` only where none does without.
        Neither changes a loss: micro-batches are whole BatchNorm groups.

        Raises:
            PlanError: one BatchNorm group already takes more.
        """
        given, share = self.recipe, self.recipe.base.clips // ranks
        check_micro_batches(given, plan, ranks)
        fewer = range(min(share, given.hardware.micro_clips or share), 0, -1)
        for recompute in (True,) if given.hardware.recompute else (False, True)[: 1 + self.can_recompute]:
            for micro_clips in (given.hardware.micro_clips, *fewer):
                changes = {"micro_clips": micro_clips, "recompute": recompute}
                changed = given.model_copy(update={"hardware": given.hardware.model_copy(update=changes)})
                try:
                    check_micro_batches(changed, plan, ranks)
                except PlanError:
                    continue  # smaller than a BatchNorm group
                self.recipe = changed
                needed, shape = self.most(plan, ranks)
                if needed <= USABLE * gib * 2**30:
                    return changed
        raise PlanError(
            f"one BatchNorm group of clips of {shape.frames}x{shape.crop}² needs {needed / USABLE / 2**30:.3g} GiB of "
            f"memory, and there are {gib:.3g}; lower batch.bn_clips, clip.crop or clip.frames, or use more GPUs"
        )


def fit_memory(recipe: Recipe, plan: Plan, world: World) -> Recipe:
    """The recipe for a device of `hardware.memory_gib`, or for what is free on this GPU.

    Raises:
        PlanError: not even one BatchNorm group fits.
    """
    gib = recipe.hardware.memory_gib
    if gib is None and world.device.type == "cuda":
        gib = torch.cuda.mem_get_info(world.device)[0] / 2**30
    if gib is None:
        return recipe
    changed = Memory(recipe, plan.shapes()).limit(plan, world.size, gib)
    if changed != recipe:
        hardware = changed.hardware
        log.info(
            f"micro-batches of {hardware.micro_clips or recipe.base.clips // world.size} clips of the base shape"
            f"{', and recomputed blocks,' if hardware.recompute else ''} for {gib:.3g} GiB of memory"
        )
    return changed


def _kept(model: nn.Module, shape: Shape) -> tuple[int, int]:
    """Bytes per clip that a forward pass of a meta model keeps for the backward pass, each storage once.

    And those if blocks keep their inputs only: then the largest block's activations come on top.
    """
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    everything: dict[int, torch.UntypedStorage] = {}
    outside: dict[int, torch.UntypedStorage] = {}
    of_block: dict[int, torch.UntypedStorage] = {}
    largest, within = 0, False

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            everything[storage._cdata] = storage
            (of_block if within else outside)[storage._cdata] = storage
        return tensor

    def enter(_: nn.Module, inputs: tuple[Tensor]) -> None:
        nonlocal within
        keep(inputs[0])
        within = True

    def leave(*_: object) -> None:
        nonlocal within, largest
        largest, within = max(largest, sum(storage.nbytes() for storage in of_block.values())), False
        of_block.clear()

    hooks = [
        hook
        for block in blocks(model)
        for hook in (block.register_forward_pre_hook(enter), block.register_forward_hook(leave))
    ]
    dtype = next(model.parameters()).dtype
    x = torch.empty(CLIPS, 3, shape.frames, shape.crop, shape.crop, device="meta", dtype=dtype)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x)
    for hook in hooks:
        hook.remove()
    sums = [sum(storage.nbytes() for storage in kept.values()) for kept in (everything, outside)]
    return sums[0] // CLIPS, (sums[1] + largest) // CLIPS
