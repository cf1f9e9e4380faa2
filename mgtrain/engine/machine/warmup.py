"""Before the first step: run every shape once, and compile it if that saves time. No weight or statistic changes."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import nn

from mgtrain.console import duration
from mgtrain.engine.checks import pass_clips
from mgtrain.engine.machine.memory import lack_explained
from mgtrain.engine.step import autocast, memory_format, part_of
from mgtrain.errors import MgtrainError, one_line
from mgtrain.models.norm import undisturbed
from mgtrain.models.part import set_part
from mgtrain.processes.distributed import World, no_sync, unwrap
from mgtrain.recipe import Recipe
from mgtrain.schedule import Plan, Step
from mgtrain.schedule.plan import Kind

log = logging.getLogger(__name__)

MODES = {"default": "default", "graphs": "reduce-overhead"}  # of torch.compile
FIRST_GAIN = 0.2  # saved share of a step, assumed for the first shape
FIRST_SECONDS = 60.0  # compile time, assumed likewise; on a CPU, whose graphs unroll BatchNorm groups, of each group
PASSES = 3  # timed ones, after two that compile

Run = Callable[[Step], AbstractContextManager[object]]


def set_up(recipe: Recipe, device: torch.device) -> None:
    """On a GPU, apply the recipe's `hardware.memory_gib`, `tf32` and `deterministic` to this process."""
    if device.type != "cuda":
        return
    total = torch.cuda.mem_get_info(device)[1] / 2**30
    limit = recipe.hardware.memory_gib or total  # of all that torch allocates, cuDNN's search included
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
    # Not by their new names, `fp32_precision`: torch.compile of torch 2.9 reads the old ones, and refuses a mixture.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = recipe.hardware.tf32
    deterministic = recipe.hardware.deterministic
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(deterministic, warn_only=True)  # not all operations have such a kernel
    for allow in ("enable_flash_sdp", "enable_mem_efficient_sdp", "enable_cudnn_sdp"):  # which only warn, too
        getattr(torch.backends.cuda, allow)(not deterministic)


def settle(replica: nn.Module, recipe: Recipe, world: World) -> None:
    """Let DDP arrange its buckets of gradients, as it does once after a process's first backward pass.

    They decide the order in which three or more ranks' gradients are added up, so without this, the first step of a
    resumed run would round otherwise than that step of a run that was not stopped.
    """
    if world.size == 1:
        return
    base = recipe.base
    clip = torch.zeros(1, 3, base.frames, base.crop, base.crop, device=world.device)
    replica.eval()  # no statistic changes
    with autocast(recipe, world):
        logits = replica(clip.to(memory_format=memory_format(recipe)))
    logits.float().sum().backward()
    replica.zero_grad(set_to_none=True)


def warm_up(replica: nn.Module, recipe: Recipe, plan: Plan, start: int, world: World) -> Run:
    """Run each kind of step from `start` on once, so that cuDNN chooses its algorithms; returns a step's context.

    With `hardware.compile`, the kind with the most work left is compiled first, then every other that it pays for.
    `replica` is what `replicate` returns: torch cuts the code that it compiles in a call of it at the buckets of
    gradients, so that ranks exchange them during the backward pass.
    """
    model = unwrap(replica)
    compiles = recipe.hardware.compile != "no"
    if not compiles and world.device.type == "cpu":
        return lambda step: nullcontext()
    left = plan.kinds(start)
    with undisturbed(model), world.watchdog.paused():
        eager = {}
        for kind, (step, _) in left.items():
            with lack_explained(step, recipe, world):
                eager[kind] = world.from_main(_timed(replica, recipe, step, world))
        chosen = _compiled(replica, recipe, left, eager, world) if compiles else frozenset()
    model.zero_grad(set_to_none=True)
    return lambda step: _running(model, recipe) if (step.shape, step.bn_groups) in chosen else nullcontext()


@contextmanager
def _running(model: nn.Module, recipe: Recipe) -> Iterator[None]:
    """As `compiled`, for a step of the run, which must not compile: whatever is not compiled yet runs uncompiled."""
    with torch.compiler.set_stance("eager_on_recompile"), compiled(model, recipe):
        yield


@contextmanager
def compiled(model: nn.Module, recipe: Recipe) -> Iterator[None]:
    """Within the block, which is a step's, calls of the model are compiled, once per input shape."""
    if not hasattr(model, "compiled_call"):
        model.compile(dynamic=False, mode=MODES[recipe.hardware.compile])
        object.__setattr__(model, "compiled_call", model._compiled_call_impl)
    model._compiled_call_impl = model.compiled_call  # type: ignore[assignment]
    try:
        yield
    finally:
        model._compiled_call_impl = None


def _compiled(
    replica: nn.Module, recipe: Recipe, left: dict[Kind, tuple[Step, int]], eager: dict[Kind, float], world: World
) -> frozenset[Kind]:
    """Compile the kinds for which that pays, until one cannot be compiled; returns those that have become faster."""
    torch._dynamo.config.recompile_limit = max(64, 4 * len(left))
    chosen, spent, gain, per_group = set(), 0.0, FIRST_GAIN, FIRST_SECONDS
    for kind in sorted(left, key=lambda kind: -left[kind][1] * eager[kind]):
        (shape, groups), (step, steps) = kind, left[kind]
        whole = pass_clips(recipe, shape, groups, world.size) == shape.clips // world.size
        unrolled = 1 if world.device.type == "cuda" else groups // world.size  # groups in the graph
        if not whole or groups < world.size or not pays(steps, eager[kind], gain, per_group * unrolled):
            continue  # one of several micro-batches, or a BatchNorm group over several GPUs, would be compiled
        begun, now, failed = time.perf_counter(), 0.0, False
        try:
            with compiled(unwrap(replica), recipe):
                now = _timed(replica, recipe, step, world)
        except MgtrainError:  # the run is asked to stop
            raise
        except Exception as error:  # of torch, of a compiler, or out of memory
            cause, failed = f"{type(error).__name__}: {one_line(error, 300)}", True
            log.warning("cannot compile %s with %d BatchNorm groups, running it uncompiled: %s", shape, groups, cause)
        if world.any(failed):  # all ranks must decide alike
            break
        now, seconds = world.from_main((now, time.perf_counter() - begun - PASSES * now))
        gain, spent, per_group = 1 - now / eager[kind], spent + seconds, seconds / unrolled
        log.info(f"compiled {shape} in {duration(seconds)}: {1e3 * eager[kind]:.0f} -> {1e3 * now:.0f} ms a pass")
        if gain > 0:
            chosen.add(kind)
    log.info(f"{len(chosen)} of {len(left)} shapes use compiled code, after {duration(spent)} of compiling")
    return frozenset(chosen)


def pays(steps: int, seconds: float, gain: float, cost: float) -> bool:
    """Whether saving the share `gain` of `steps` steps of `seconds` exceeds the `cost` of compiling, in seconds.

    >>> pays(steps=1000, seconds=0.5, gain=0.2, cost=60), pays(steps=100, seconds=0.5, gain=0.2, cost=60)
    (True, False)
    """
    return steps * seconds * gain > cost


def _timed(replica: nn.Module, recipe: Recipe, step: Step, world: World) -> float:
    """Seconds of a micro-batch's forward and backward pass, without exchanging gradients: the minimum of `PASSES`."""
    shape, clips = step.shape, pass_clips(recipe, step.shape, step.bn_groups, world.size)
    pixels = torch.zeros(clips, 3, shape.frames, shape.crop, shape.crop, device=world.device)
    pixels = pixels.to(memory_format=memory_format(recipe))

    def forward_and_backward() -> None:
        if clips == shape.clips // world.size:  # as in a step of one pass, so that it can use the same CUDA graphs
            replica.zero_grad(set_to_none=True)
        with no_sync(replica, last=False):
            with autocast(recipe, world):
                logits = replica(pixels)
            logits.float().sum().backward()

    replica.train()
    set_part(replica, replace(part_of(step, recipe, world, 0, clips), seed=0))
    return min(seconds_of(forward_and_backward, 2 + PASSES, world.device)[2:])


def seconds_of(call: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """The seconds of each of `repeats` calls."""
    times = []
    for _ in range(repeats):
        wait_for_gpu(device)
        start = time.perf_counter()
        call()
        wait_for_gpu(device)
        times.append(time.perf_counter() - start)
    return times


def wait_for_gpu(device: torch.device) -> None:
    """Wait until a GPU has computed everything, to take the time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
