"""Before the first step on a CPU: measure which form of each of the plan's convolutions is fastest on this machine.

No rule is right for all processors and sizes of clips. The run's folder keeps the chosen forms, so that a resumed run
computes the same bits.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mgtrain.console import duration
from mgtrain.engine.checks import DTYPES, make_model, pass_clips
from mgtrain.errors import CheckpointError
from mgtrain.grid import Shape
from mgtrain.models.conv import Choices, Conv3d, choose
from mgtrain.models.forms import DIRECTIONS, Forms, Kind, candidates, fixed_forms, input_grad, output, weight_grad
from mgtrain.processes.cores import cpu_name
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe
from mgtrain.runs.folder import RunDir
from mgtrain.schedule import Plan
from mgtrain.schedule.totals import steps_of_shapes

log = logging.getLogger(__name__)

FILE = "convolutions.json"  # in the run's folder
LEAST_SECONDS, SHARE = 5.0, 0.01  # of measuring: at least so long, or this share of the run's time in convolutions
WORK = 3e7  # multiply-adds of a measurement; it uses as many clips
TIMES = 3  # measurements of a form, unless it is clearly slower than the best
GAIN = 0.95  # a form replaces the default one if it takes less than this share of its time
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}  # relative error of a correct form


def tune(model: nn.Module, run: RunDir, recipe: Recipe, plan: Plan, world: World) -> None:
    """Set the forms of the network's convolutions: those that the run has saved, or the fastest, measured now."""
    if not tunable(recipe, world):
        return
    machine = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    choices: Choices = {}
    if world.main:
        found = _read(run, machine)
        choices = measure(recipe, plan, world, log.info) if found is None else found
        rows = [{**asdict(kind), "dtype": str(dtype)[6:], "forms": forms} for (kind, dtype), forms in choices.items()]
        run.write(FILE, {"machine": machine, "convolutions": rows})
    with world.watchdog.paused():  # the others wait
        choose(model, world.from_main(choices))


def tunable(recipe: Recipe, world: World) -> bool:
    """Whether to measure forms: on a CPU, unless the recipe says `hardware.deterministic`."""
    return world.device.type == "cpu" and recipe.hardware.channels_last and not recipe.hardware.deterministic


def _read(run: RunDir, machine: dict[str, Any]) -> Choices | None:
    """The saved forms; None if there are none or they are from another machine."""
    if not (run.path / FILE).is_file():
        return None
    found = run.read(FILE)
    if found.get("machine") != machine:
        log.info("measuring convolutions again: this is another machine, or another number of threads")
        return None
    choices: dict[tuple[Kind, torch.dtype], Forms] = {}
    try:
        for row in found["convolutions"]:
            kind = Kind(*(tuple(row[name]) for name in ("kernel", "stride", "padding", "channels", "size")))
            dtype = getattr(torch, row["dtype"])
            for direction, form in zip(DIRECTIONS, row["forms"], strict=True):
                if form not in candidates(kind, direction, dtype):
                    raise ValueError(f"no form {form!r}")
            choices[kind, dtype] = tuple(row["forms"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{run.path / FILE}: damaged ({error}); delete it to measure again") from None
    return choices


@dataclass(slots=True)
class Use:
    """How a plan uses a kind of convolution."""

    clips: float = 0.0  # in the whole run
    most: int = 1  # clips in one forward pass
    needs_input_grad: bool = False
    trained: bool = False  # false: used in evaluations only


def measure(recipe: Recipe, plan: Plan, world: World, tell: Callable[[str], None] = log.debug) -> Choices:
    """The fastest forms of a plan's convolutions; none if they are not `tunable`. `tell` gets the summary."""
    if not tunable(recipe, world):
        return {}
    uses, dtype = uses_of(recipe, plan, world), DTYPES[recipe.hardware.precision]
    return fastest(uses, dtype, LEAST_SECONDS, world.watchdog.beat, tell)


def fastest(
    uses: Mapping[Kind, Use],
    dtype: torch.dtype,
    least: float,
    beat: Callable[[], None] = lambda: None,
    tell: Callable[[str], None] = log.debug,
) -> Choices:
    """The fastest forms of convolutions, measured for `least` seconds or 1 % of their time in the run.

    Each layer is measured at its most expensive size first. Sizes for which there is no time borrow the forms.
    """
    if not uses:
        return {}

    def work(kind: Kind) -> float:
        use = uses[kind]
        return kind.multiply_adds() * use.clips * (1 + use.trained + use.needs_input_grad)

    by_work = sorted(uses, key=work, reverse=True)
    costliest = {_layer(kind): kind for kind in reversed(by_work)}
    begun, found = time.perf_counter(), dict[Kind, Forms]()
    whole, measured = sum(map(work, uses)), 0.0
    by_default = by_choice = 0.0  # seconds of the measured convolutions in the run
    for kind in sorted(by_work, key=lambda kind: costliest[_layer(kind)] != kind):
        found[kind], default, chosen = _fastest(kind, uses[kind], dtype)
        measured, by_default, by_choice = measured + work(kind), by_default + default, by_choice + chosen
        beat()
        if time.perf_counter() - begun > max(least, SHARE * by_choice * whole / measured):
            break
    others = sum(forms != fixed_forms(kind, dtype) for kind, forms in found.items())
    tell(
        f"measured {len(found)} of {len(uses)} convolutions in {duration(time.perf_counter() - begun)}: {others} do "
        f"not use the default forms, which saves {100 * (1 - by_choice / max(by_default, 1e-9)):.0f} % of the time"
    )
    return {(kind, dtype): found.get(kind) or _borrowed(kind, dtype, found) for kind in uses}


def _layer(kind: Kind) -> tuple[object, ...]:
    return kind.kernel, kind.stride, kind.padding, kind.channels


def _borrowed(kind: Kind, dtype: torch.dtype, found: Mapping[Kind, Forms]) -> Forms:
    """The forms of the same layer at the nearest size if they are sure to be correct, else the default ones."""
    alike = [other for other in found if _layer(other) == _layer(kind)]
    if not alike or kind.size[0] < kind.kernel[0] or kind.leaves_a_pixel:
        return fixed_forms(kind, dtype)
    return found[min(alike, key=lambda other: abs(math.log(other.size[0] / kind.size[0])))]


def uses_of(recipe: Recipe, plan: Plan, world: World) -> dict[Kind, Use]:
    """The kinds of convolutions in a plan's steps and evaluations, found on the meta device."""
    with torch.device("meta"):
        model = make_model(recipe)
    uses: dict[Kind, Use] = {}
    groups = plan.fewest_groups()
    for shape, steps in steps_of_shapes(plan).items():
        clips = pass_clips(recipe, shape, groups[shape], world.size)
        add_uses(uses, model.train(), shape, clips, steps * shape.clips / world.size)
    add_uses(uses, model.eval(), recipe.evaluation_shape, max(1, recipe.batch.clips // world.size), 1.0)
    return uses


def add_uses(uses: dict[Kind, Use], model: nn.Module, shape: Shape, clips: int, total: float) -> None:
    """Add the convolutions of a network on the meta device for `clips` of a shape at once and `total` in the run."""

    def see(layer: Conv3d, args: tuple[Tensor, ...]) -> None:
        use = uses.setdefault(layer.kind(args[0].shape), Use())
        use.clips += total
        use.most = max(use.most, clips)
        use.trained |= model.training
        use.needs_input_grad |= model.training and args[0].requires_grad

    with ExitStack() as hooks, torch.set_grad_enabled(model.training):
        for layer in model.modules():
            if isinstance(layer, Conv3d):
                hooks.enter_context(layer.register_forward_pre_hook(see))
        model(torch.empty(2, 3, shape.frames, shape.crop, shape.crop, device="meta"))


def _fastest(kind: Kind, use: Use, dtype: torch.dtype) -> tuple[Forms, float, float]:
    """The fastest forms for the directions that are used, and the seconds of the default and of these in the run."""
    clips = int(max(1, min(use.most, WORK // kind.multiply_adds())))
    (inputs, outputs), (frames, high, wide) = kind.channels, kind.size
    x = _numbers(clips, frames, high, wide, inputs).to(dtype)
    weight = _numbers(outputs, *kind.kernel, inputs).to(dtype)
    forms = list(fixed_forms(kind, dtype))
    grad = output(x, weight, kind, forms[0])
    calls: list[tuple[bool, Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (True, output, (x, weight)),
        (use.needs_input_grad, input_grad, (grad, x, weight)),
        (use.trained, weight_grad, (grad, x, weight)),
    ]
    by_default = by_choice = 0.0
    for n, (used, compute, given) in enumerate(calls):
        if not used:
            continue
        right = compute(*(tensor.float() for tensor in given), kind, forms[n])
        seconds = dict(_timed(compute, given, kind, candidates(kind, DIRECTIONS[n], dtype), right, TOLERANCE[dtype]))
        if not seconds:
            continue  # no form is correct: keep the default
        best = min(seconds, key=seconds.__getitem__)
        by_rule = seconds.get(forms[n])
        by_default += (by_rule or seconds[best]) * use.clips / clips
        if by_rule is None or seconds[best] < GAIN * by_rule:
            forms[n] = best
        by_choice += seconds[forms[n]] * use.clips / clips
    return (forms[0], forms[1], forms[2]), by_default, by_choice


def _numbers(*size: int) -> Tensor:
    """Values of both signs without a random generator, whose state must not depend on the time for measuring."""
    return torch.arange(float(torch.Size(size).numel())).sin_().view(size)


def _timed(
    compute: Callable[..., Tensor], given: tuple[Tensor, ...], kind: Kind, forms: list[str], right: Tensor, most: float
) -> Iterator[tuple[str, float]]:
    """The forms that compute the `right` values, and the seconds of each."""
    least = float("inf")
    for form in forms:
        begun = time.thread_time()
        found = compute(*given, kind, form)
        best = time.thread_time() - begun
        if best > 5 * least:
            continue
        if not (found.float() - right).norm() <= most * right.norm():
            continue  # some builds of oneDNN are wrong if a clip is shorter than a kernel
        for _ in range(TIMES):
            begun = time.thread_time()  # does not count the time in which other processes use the core
            compute(*given, kind, form)
            best = min(best, time.thread_time() - begun)
            if best > 1.5 * least:
                break
        least = min(least, best)
        yield form, best
