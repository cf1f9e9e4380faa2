"""The memory of a training step: estimate it without running one, choose micro-batches that fit, measure it."""

import logging
import resource
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from mgtrain.engine.checks import DTYPES, check_micro_batches, make_model, pass_clips
from mgtrain.errors import LackError, PlanError
from mgtrain.grid import Shape
from mgtrain.models.recompute import blocks
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe
from mgtrain.schedule import Plan, Step

log = logging.getLogger(__name__)

USABLE = 0.75  # of a device's memory; the rest is for the workspaces of convolutions and the allocator's cache
COPIES = {"sgd": 3, "adamw": 4}  # of the parameters, in float32: weights, gradients, optimizer state
AVERAGE = 2  # more with optim.ema: the average and its change
LOADED = 2  # batches on the device: the current one and the next
CLIPS = 2  # in the traced forward pass; BatchNorm needs more than one value


class Memory:
    """Estimates the bytes that training with a recipe needs on a device."""

    def __init__(self, recipe: Recipe, shapes: Iterable[Shape]) -> None:
        self.recipe = recipe
        whole = recipe.changed("hardware", recompute=False)  # `_kept` finds what recomputed blocks keep
        with torch.device("meta"):
            model = make_model(whole)
        copies = COPIES[recipe.optim.name] + (AVERAGE if recipe.optim.ema is not None else 0)
        self.state = copies * 4 * sum(parameter.numel() for parameter in model.parameters())
        self.can_recompute = bool(blocks(model))
        model = model.to(DTYPES[recipe.hardware.precision]).train()
        self._kept = {shape: _kept(model, shape) for shape in shapes}

    def per_clip(self, shape: Shape) -> int:
        """Bytes that a forward pass keeps for the backward pass, per clip."""
        return self._kept[shape][self.recipe.hardware.recompute]

    def step(self, shape: Shape, bn_groups: int, ranks: int) -> int:
        """Peak bytes of a step: state, this rank's clips and the activations of one micro-batch."""
        loaded = LOADED * 3 * shape.voxels // ranks  # uint8
        return self.state + loaded + pass_clips(self.recipe, shape, bn_groups, ranks) * self.per_clip(shape)

    def most(self, plan: Plan, ranks: int) -> tuple[int, Shape]:
        """Bytes of the plan's largest step, and its shape."""
        steps = ((self.step(shape, groups, ranks), shape) for shape, groups in plan.kinds())
        return max(steps, key=lambda step: step[0])

    def limit(self, plan: Plan, ranks: int, gib: float) -> Recipe:
        """The recipe with the largest `hardware.micro_clips` for which all steps fit into `USABLE` of `gib` GiB.

        It gets `hardware.recompute` only if none fits without. Neither changes a loss, because micro-batches are whole
        BatchNorm groups. Raises `PlanError` if not even a single group fits.
        """
        given, share = self.recipe, self.recipe.base.clips // ranks
        check_micro_batches(given, plan, ranks)
        fewer = range(min(share, given.hardware.micro_clips or share), 0, -1)
        for recompute in (True,) if given.hardware.recompute else (False, True)[: 1 + self.can_recompute]:
            for micro_clips in (given.hardware.micro_clips, *fewer):
                changed = given.changed("hardware", micro_clips=micro_clips, recompute=recompute)
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
            f"memory, but {gib:.3g} GiB can be used; lower batch.bn_clips, clip.crop or clip.frames, or use more GPUs"
        )


def fit_memory(recipe: Recipe, plan: Plan, world: World) -> Recipe:
    """The recipe with micro-batches that fit `hardware.memory_gib` and the free memory of this GPU: see `limit`."""
    gib = recipe.hardware.memory_gib
    if world.device.type == "cuda":
        torch.cuda.empty_cache()  # blocks that an earlier run of this process has kept are not free
        free = torch.tensor(torch.cuda.mem_get_info(world.device)[0])
        free_gib = world.gather(free).min().item() / 2**30  # all ranks must choose the same micro-batches
        gib = min(free_gib, gib or free_gib)
    if gib is None:
        return recipe
    changed = Memory(recipe, plan.shapes()).limit(plan, world.size, gib)
    if changed != recipe:
        clips = changed.hardware.micro_clips or recipe.base.clips // world.size
        recomputed = ", and recomputed blocks," if changed.hardware.recompute else ""
        log.info(f"micro-batches of {clips} clips of the base shape{recomputed} for {gib:.3g} GiB of memory")
    return changed


@contextmanager
def lack_explained(step: Step, recipe: Recipe, world: World) -> Iterator[None]:
    """If the GPU's memory runs out, report the step, the estimate and which keys to change."""
    try:
        yield
    except torch.OutOfMemoryError:
        shape, hardware = step.shape, recipe.hardware
        clips = pass_clips(recipe, shape, step.bn_groups, world.size)
        needed = Memory(recipe, [shape]).step(shape, step.bn_groups, world.size) / 2**30
        there = torch.cuda.mem_get_info(world.device)[1] / 2**30 if world.device.type == "cuda" else float("nan")
        more = "" if hardware.recompute else ", or hardware.recompute=true"
        raise LackError(
            f"rank {world.rank}: step {step.index + 1} of {shape}, {clips} clips at a time in {hardware.precision}, "
            f"does not fit into the {there:.3g} GiB of {world.device} (estimate: {needed:.3g} GiB); set "
            f"hardware.memory_gib={0.8 * there:.3g} for smaller micro-batches{more}, or stop other programs on the "
            "GPU; then run again with --resume"
        ) from None


def _kept(model: nn.Module, shape: Shape) -> tuple[int, int]:
    """Bytes per clip that a meta model's forward pass keeps for the backward pass, without and with recomputation."""
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    everything, outside, of_block = (dict[int, torch.UntypedStorage]() for _ in range(3))
    largest, within = 0, False  # recomputed blocks keep their inputs, and one at a time its activations

    def size(storages: dict[int, torch.UntypedStorage]) -> int:
        return sum(storage.nbytes() for storage in storages.values())

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
        largest, within = max(largest, size(of_block)), False
        of_block.clear()

    dtype = next(model.parameters()).dtype
    x = torch.empty(CLIPS, 3, shape.frames, shape.crop, shape.crop, device="meta", dtype=dtype)
    with ExitStack() as hooks, saved_tensors_hooks(keep, lambda tensor: tensor):
        for block in blocks(model):
            hooks.enter_context(block.register_forward_pre_hook(enter))
            hooks.enter_context(block.register_forward_hook(leave))
        model(x)
    return size(everything) // CLIPS, (size(outside) + largest) // CLIPS


def reset_peak(device: torch.device) -> None:
    """Let `peak` count from now on: the memory of a GPU, or of this process, for which it needs Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """The most bytes that a GPU, or on a CPU this process, has held since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, StopIteration):
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    return (1 if sys.platform == "darwin" else 1024) * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
