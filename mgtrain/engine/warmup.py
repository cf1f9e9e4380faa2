"""Before the first step: every shape is met once, and compiled where the plan has enough steps of it to pay.

Nothing here changes the run: weights, statistics and gradients are afterwards what they were.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from mgtrain.console import duration
from mgtrain.engine.checks import pass_clips
from mgtrain.engine.step import autocast, memory_format
from mgtrain.grid import Shape
from mgtrain.models.norm import undisturbed
from mgtrain.models.part import Part, set_part
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe
from mgtrain.schedule import Plan, Step

log = logging.getLogger(__name__)

MODES = {"default": "default", "graphs": "reduce-overhead"}  # of torch.compile
FIRST_GAIN = 0.2  # of a step, that is hoped for before the first shape is compiled,
FIRST_SECONDS = 60.0  # and what that is thought to take
PASSES = 3  # that are timed, after those that compile

Run = Callable[[Shape], AbstractContextManager[object]]


def warm_up(model: nn.Module, recipe: Recipe, plan: Plan, start: int, world: World) -> Run:
    """Meet the shapes of the steps from `start` on; returns the context that a step of each shape is to run in.

    On a GPU cuDNN chooses its algorithms for them. With `hardware.compile` the shape with the most work left is
    compiled and timed first, then each of the others if, at that gain, its steps win back the time of compiling.
    """
    if world.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    compiles = recipe.hardware.compile != "no"
    if not compiles and world.device.type == "cpu":
        return lambda shape: nullcontext()
    left = _steps_left(plan, start)
    with undisturbed(model):
        eager = {shape: _timed(model, recipe, step, world) for shape, (step, _) in left.items()}
        chosen = _compiled(model, recipe, left, eager, world) if compiles else frozenset()
    model.zero_grad(set_to_none=True)
    return lambda shape: compiled(model, recipe) if shape in chosen else nullcontext()


@contextmanager
def compiled(model: nn.Module, recipe: Recipe) -> Iterator[None]:
    """Within it the model's calls are compiled, once per input shape; elsewhere they are not.

    Evaluations and recalibration stay as they are: these have shapes and settings of BatchNorm of their own.
    """
    if not hasattr(model, "compiled_call"):
        model.compile(dynamic=False, mode=MODES[recipe.hardware.compile])
        object.__setattr__(model, "compiled_call", model._compiled_call_impl)
    model._compiled_call_impl = model.compiled_call  # type: ignore[assignment]
    try:
        yield
    finally:
        model._compiled_call_impl = None


def _compiled(
    model: nn.Module, recipe: Recipe, left: dict[Shape, tuple[Step, int]], eager: dict[Shape, float], world: World
) -> frozenset[Shape]:
    """The shapes whose compiled passes are faster; those that would not pay are not compiled."""
    torch._dynamo.config.cache_size_limit = max(64, 4 * len(left))
    chosen, spent = set(), 0.0
    gain, seconds = FIRST_GAIN, FIRST_SECONDS
    for shape in sorted(left, key=lambda shape: -left[shape][1] * eager[shape]):
        step, steps = left[shape]
        whole = pass_clips(recipe, shape, step.bn_groups, world.size) == shape.clips // world.size
        if not whole or not pays(steps, eager[shape], gain, seconds):
            continue  # each pass of several would be compiled by itself
        begun = time.perf_counter()
        with compiled(model, recipe):
            now = _timed(model, recipe, step, world)
        seconds = world.from_main(time.perf_counter() - begun - PASSES * now)  # all ranks have to decide alike
        gain, spent = 1 - now / eager[shape], spent + seconds
        log.info(f"compiled {shape} in {duration(seconds)}: {1e3 * eager[shape]:.0f} -> {1e3 * now:.0f} ms a pass")
        if gain > 0:
            chosen.add(shape)
    log.info(f"{len(chosen)} of {len(left)} shapes run compiled, after {duration(spent)} of compiling")
    return frozenset(chosen)


def pays(steps: int, seconds: float, gain: float, cost: float) -> bool:
    """Whether so many steps of so many seconds, of which `gain` is saved, win back the `cost` of compiling.

    >>> pays(steps=1000, seconds=0.5, gain=0.2, cost=60), pays(steps=100, seconds=0.5, gain=0.2, cost=60)
    (True, False)
    """
    return steps * seconds * gain > cost


def _steps_left(plan: Plan, start: int) -> dict[Shape, tuple[Step, int]]:
    """Of each shape that is still to come, the next step and how many there are."""
    found: dict[Shape, tuple[Step, int]] = {}
    for phase in plan.phases:
        for turn, shape in enumerate(phase.shapes):
            first = max(start, phase.first_step)
            first += (turn - (first - phase.first_step)) % len(phase.shapes)
            steps = len(range(first, phase.end_step, len(phase.shapes)))
            if steps:
                step, before = found.get(shape, (plan[first], 0))
                found[shape] = step, before + steps
    return found


def _timed(model: nn.Module, recipe: Recipe, step: Step, world: World) -> float:
    """Seconds of a forward and backward pass of the step's size, the least of some; all ranks at once."""
    shape, share = step.shape, step.shape.clips // world.size
    clips = pass_clips(recipe, shape, step.bn_groups, world.size)
    pixels = torch.zeros(clips, 3, shape.frames, shape.crop, shape.crop, device=world.device)
    pixels = pixels.to(memory_format=memory_format(recipe))
    part = Part(world.rank * share, clips, shape.clips, step.bn_groups, world.size, 0, world.gather)
    times = []
    model.train()
    for _ in range(2 + PASSES):
        set_part(model, part)
        _wait(world)
        begun = time.perf_counter()
        with autocast(recipe, world):
            model(pixels).float().sum().backward()
        _wait(world)
        times.append(time.perf_counter() - begun)
    return world.from_main(min(times[2:]))


def _wait(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()
