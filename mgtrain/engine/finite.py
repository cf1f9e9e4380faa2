"""Losses and gradients that are not finite: noticed on the device before the update, dealt with at the next log line.

The update of such a step is left out on the device, by every rank, so nothing waits for a GPU to find out. The host
learns of it where it reads the device anyway, and before every checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from mgtrain.clips.order import step_requests
from mgtrain.data.videos import Videos
from mgtrain.errors import NonFiniteError
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe
from mgtrain.runs.folder import RunDir
from mgtrain.schedule import Plan, Step

log = logging.getLogger(__name__)

NAMED = 3  # videos of a step that a message names; the run's folder has them all


def not_finite(loss: Tensor, parameters: Iterable[nn.Parameter], scaled: bool, world: World) -> Tensor:
    """1 on every rank if any rank's loss or the gradients' norm is not finite, else 0: float32 (), on its device.

    Gradients that a loss scaler has `scaled` are its own affair: it finds the scale by overflows.
    """
    numbers = [loss]
    if not scaled:
        numbers.append(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True))
    bad = (~torch.stack(numbers).isfinite()).any().float()
    return world.sum(bad).clamp(max=1) if world.size > 1 else bad


class NonFiniteSteps:
    """The steps that were not finite since they were last asked for."""

    def __init__(self) -> None:
        self._flags: list[tuple[int, Tensor]] = []

    def add(self, step: Step, bad: Tensor) -> None:
        """Take in a step's flag, still on the device."""
        self._flags.append((step.index, bad))

    def take(self) -> list[int]:
        """Their indices. Reading them waits for the device."""
        flags, self._flags = self._flags, []
        bad = torch.stack([flag for _, flag in flags]).tolist() if flags else []
        return [index for (index, _), is_bad in zip(flags, bad, strict=True) if is_bad]


def refuse_or_report(
    bad: Sequence[int], left_out: int, run: RunDir, recipe: Recipe, plan: Plan, videos: Videos
) -> None:
    """Say that the updates of steps were left out, after `left_out` others before; write down what they were made of.

    Raises:
        NonFiniteError: the recipe says to stop, or they are too many.
    """
    steps = [plan[index] for index in bad]
    names = [[videos.name(r.video) for r in step_requests(step, len(videos), recipe.seed, 0, 1)] for step in steps]
    facts = [
        {"step": step.index + 1, "lr": step.lr, "shape": str(step.shape), "videos": files}
        for step, files in zip(steps, names, strict=True)
    ]
    run.write("non_finite.json", {"steps": facts})
    first, files = steps[0], names[0]
    others = f" and {len(files) - NAMED} more, see {run.path}/non_finite.json" if len(files) > NAMED else ""
    what = (
        f"the loss or the gradient of step {first.index + 1} is not finite (phase {first.phase.index + 1}, "
        f"{first.shape}, lr {first.lr:.3g}; videos {', '.join(files[:NAMED])}{others})"
    )
    policy, most = recipe.faults.non_finite, recipe.faults.non_finite_steps
    total = left_out + len(bad)
    if policy != "stop" and total <= most:
        log.warning("%s: its update is left out, %d of at most %d such steps", what, total, most)
        return
    why = f"these are {total} such steps, more than faults.non_finite_steps {most}; " if policy != "stop" else ""
    saved = run.checkpoints()
    good = f"the last checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
    raise NonFiniteError(
        f"{what}; {why}{good}; set faults.non_finite to skip or rollback, or lower optim.lr or lengthen "
        "optim.warmup_epochs (with --allow-changes), then run again with --resume"
    )
