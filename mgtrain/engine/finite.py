"""Losses and gradients that are not finite: detected on the device, reported at the next log line or checkpoint.

All ranks skip the update of such a step, and its changes to BatchNorm's running statistics, without waiting for a GPU.
"""

import logging
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from mgtrain.clips.order import Order, step_requests
from mgtrain.data.videos import Videos
from mgtrain.errors import CheckpointError, NonFiniteError
from mgtrain.models.norm import group_slots
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe
from mgtrain.runs.folder import RunDir
from mgtrain.schedule import Step

log = logging.getLogger(__name__)

LEAST_SCALE = 2.0**-10  # of the loss in fp16; it halves with each step whose gradients are not finite
NAMED = 3  # videos in a message; the run's folder has them all


def not_finite(loss: Tensor, norm: Tensor | None, statistics: Tensor, world: World) -> Tensor:
    """1 on every rank if the loss, the gradients' `norm` or BatchNorm `statistics` of any rank are not finite, else 0.

    float32 (), on the device. With a loss scaler the norm is None: it adapts its scale to overflows.
    """
    bad = ~(torch.stack([loss] if norm is None else [loss, norm]).isfinite().all() & statistics.isfinite().all())
    return world.sum(bad.float()).clamp(max=1) if world.size > 1 else bad.float()


class Statistics:
    """The BatchNorm groups' running statistics before a step, to restore if its update is skipped."""

    def __init__(self, model: nn.Module) -> None:
        self._slots = [slots for slots in group_slots(model) if slots.numel()]
        self._before = self.now()

    def now(self) -> Tensor:
        """The current running statistics in one tensor."""
        return torch.cat([slots.flatten() for slots in self._slots]) if self._slots else torch.empty(0)

    def restore_if(self, bad: Tensor, now: Tensor) -> None:
        """Restore the statistics from before the step if `bad` is 1, without waiting for the device."""
        if not self._slots:
            return
        kept = torch.split(torch.where(bad.bool(), self._before, now), [slots.numel() for slots in self._slots])
        torch._foreach_copy_(self._slots, [values.view_as(s) for values, s in zip(kept, self._slots, strict=True)])


def report_skipped(flags: list[tuple[Step, Tensor]], earlier: int, recipe: Recipe, videos: Videos, run: RunDir) -> int:
    """Log the steps whose updates were skipped, after `earlier` ones, with their videos; returns their number.

    `flags` are those of the steps since the last report (see `StepResult.bad`) and are removed; waits for the device.
    Raises `NonFiniteError` if the recipe says to stop, or if there are too many.
    """
    bad = torch.stack([flag for _, flag in flags]).tolist()
    steps = [step for (step, _), is_bad in zip(flags, bad, strict=True) if is_bad]
    flags.clear()
    if not steps:
        return 0
    order = Order.of(videos, recipe)
    facts: list[dict[str, Any]] = []
    for step in steps:
        files = [videos.name(request.video) for request in step_requests(step, order)]  # of all ranks
        facts.append({"step": step.index + 1, "lr": step.lr, "shape": str(step.shape), "videos": files})
    note_skipped(run, facts)
    first, files = steps[0], facts[0]["videos"]
    others = f" and {len(files) - NAMED} more, see {run.path}/non_finite.json" if len(files) > NAMED else ""
    what = (
        f"the loss or the gradient of step {first.index + 1} is not finite (phase {first.phase.index + 1}, "
        f"{first.shape}, lr {first.lr:.3g}; videos {', '.join(files[:NAMED])}{others})"
    )
    policy, most, total = recipe.faults.non_finite, recipe.faults.non_finite_steps, earlier + len(steps)
    if policy != "stop" and total <= most:
        log.warning("%s: its update is skipped, %d of at most %d such steps", what, total, most)
        return len(steps)
    why = f"{total} such steps are more than faults.non_finite_steps {most}; " if policy != "stop" else ""
    saved = run.checkpoints()
    good = f"the last checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
    raise NonFiniteError(
        f"{what}; {why}{good}; set faults.non_finite to skip or rollback, or lower optim.lr or lengthen "
        "optim.warmup_epochs (with --allow-changes), then run again with --resume"
    )


def check_scale(scaler: torch.amp.GradScaler, step: Step) -> None:
    """Raise `NonFiniteError` if no loss scale makes fp16's gradients finite; waits for the device."""
    if scaler.is_enabled() and scaler.get_scale() < LEAST_SCALE:
        raise NonFiniteError(
            f"at step {step.index + 1}, no scale of the loss makes fp16's gradients finite, so recent steps changed "
            "no weights; use hardware.precision=bf16 or fp32, or lower optim.lr"
        )


def note_skipped(run: RunDir, facts: list[dict[str, Any]]) -> None:
    """Add steps to `non_finite.json`, in place of those that a resumed run has repeated."""
    earlier: list[dict[str, Any]] = []
    if run.writes:
        with suppress(CheckpointError, LookupError, TypeError):  # there is none yet, or it is damaged
            earlier = [fact for fact in run.read("non_finite.json")["steps"] if fact["step"] < facts[0]["step"]]
    run.write("non_finite.json", {"steps": earlier + facts})
