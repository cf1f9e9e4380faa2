"""The plan of a run: an immutable sequence of steps, each computed from its number by bisection over the phases."""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any, overload

from mgtrain.errors import PlanError
from mgtrain.grid import Grid, Shape, train_grid
from mgtrain.recipe import MultigridSchedule, Recipe

MOST_STEPS = 10**12

Kind = tuple[Shape, int]  # of a step: its shape and number of BatchNorm groups


@dataclass(frozen=True, slots=True)
class Stretch:
    """A part of a schedule before its steps are rounded: it alternates the shapes of `cycle`."""

    stage: int  # learning-rate stage of the baseline that it replaces
    lr_stage: int  # learning-rate stage that sets its learning rate
    cycle: tuple[Shape, ...]  # coarse first; the last one is the long cycle's shape
    steps: float  # not yet a whole number


@dataclass(frozen=True, slots=True)
class Phase:
    """Consecutive steps at one long-cycle shape."""

    index: int
    stage: int
    lr_stage: int
    first_step: int
    steps: int
    first_clip: int  # position in the run's endless stream of clips
    shapes: tuple[Shape, ...]  # the short cycle: coarse first, the long-cycle shape last
    grids: tuple[Grid, ...]  # one for each shape
    bn_groups: int  # BatchNorm groups of the global batch at the long-cycle shape
    groups: tuple[int, ...] = field(repr=False)  # the same for each shape; not in the fingerprint

    @property
    def shape(self) -> Shape:
        """The long-cycle shape."""
        return self.shapes[-1]

    @property
    def name(self) -> str:
        """The distinct shapes, such as `1024x8x112², 512x8x158²`."""
        return ", ".join(map(str, dict.fromkeys(self.shapes)))

    @property
    def end_step(self) -> int:
        """The first step after the phase."""
        return self.first_step + self.steps

    @property
    def end_clip(self) -> int:
        """The first position in the stream of clips after the phase."""
        return self.first_clip + clips_before(self.shapes, self.steps)

    def batches(self) -> Iterator[tuple[Shape, int]]:
        """Each shape of the short cycle with its number of BatchNorm groups."""
        return zip(self.shapes, self.groups, strict=True)


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step: the shape of its batch over all ranks, its learning rate, its BatchNorm groups."""

    index: int  # 0 is the first
    phase: Phase
    shape: Shape
    grid: Grid
    lr: float
    epoch: float  # epochs of clips seen before this step
    first_clip: int  # position in the run's endless stream of clips
    bn_groups: int  # of the global batch


def lr(step: Step) -> float:
    """The learning rate of a step, per update: warmed up, decayed, and scaled by the long cycle's batch."""
    return step.lr


@dataclass(frozen=True, slots=True)
class Totals:
    """Totals of a whole run."""

    steps: int
    epochs: float
    clips: int
    voxels: int


class Plan(Sequence[Step]):
    """The steps of a run: `plan[i]` is step `i`, `plan.steps(start)` iterates from step `start`."""

    def __init__(self, recipe: Recipe, videos: int, stretches: Sequence[Stretch]) -> None:
        if videos < 1:
            raise PlanError(f"a plan needs at least 1 training video, got {videos}")
        self.videos = videos
        self.base = recipe.base
        self.base_bn_groups = bn_groups(recipe.base, recipe.batch.bn_clips)
        self.mixes = recipe.augment.mixes
        self._optim = recipe.optim
        self._lr_scaling = recipe.schedule.lr_scaling if isinstance(recipe.schedule, MultigridSchedule) else "long"
        self.phases = _phases(recipe, stretches)
        if self.phases[-1].end_step > MOST_STEPS:
            raise PlanError(
                f"a run of {self.phases[-1].end_step:.3g} steps for {videos:,} videos; at most {MOST_STEPS:.0g} are "
                "allowed: lower optim.stages or schedule.epoch_factor, or raise batch.clips"
            )
        if recipe.optim.warmup_epochs * videos >= self.phases[-1].end_clip:
            raise PlanError(
                f"optim.warmup_epochs {recipe.optim.warmup_epochs:g} is not less than the run's "
                f"{self.phases[-1].end_clip / videos:.3g} epochs; lower it, too, if you lower optim.stages"
            )
        self._first_steps = [phase.first_step for phase in self.phases]
        self._warmup_target = self._lr_after_warmup()

    def __len__(self) -> int:
        return self.phases[-1].end_step

    @overload
    def __getitem__(self, index: int) -> Step: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Step]: ...
    def __getitem__(self, index: int | slice) -> Step | Sequence[Step]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"step {index} of a plan of {len(self)} steps")
        index %= len(self)
        phase = self.phases[bisect_right(self._first_steps, index) - 1]
        offset = index - phase.first_step
        turn = offset % len(phase.shapes)
        shape = phase.shapes[turn]
        first_clip = phase.first_clip + clips_before(phase.shapes, offset)
        epoch = first_clip / self.videos
        lr = self._lr(phase, shape, index, epoch)
        return Step(index, phase, shape, phase.grids[turn], lr, epoch, first_clip, phase.groups[turn])

    def steps(self, start: int = 0) -> Iterator[Step]:
        """The steps from step `start` to the end."""
        return (self[index] for index in range(start, len(self)))

    def kinds(self, start: int = 0) -> dict[Kind, tuple[Step, int]]:
        """Each kind of the steps from `start` on, in order -> its first step, and how many there are."""
        found: dict[Kind, tuple[Step, int]] = {}
        for phase in self.phases:
            first, cycle = max(start, phase.first_step), len(phase.shapes)
            for index in range(first, min(first + cycle, phase.end_step)):
                step = self[index]
                kind = step.shape, step.bn_groups
                first_of_kind, before = found.get(kind, (step, 0))
                found[kind] = first_of_kind, before + len(range(index, phase.end_step, cycle))
        return found

    def first_steps(self) -> dict[Shape, Step]:
        """Each distinct shape -> its first step, in order."""
        firsts: dict[Shape, Step] = {}
        for step, _ in self.kinds().values():
            firsts.setdefault(step.shape, step)
        return firsts

    def shapes(self) -> tuple[Shape, ...]:
        """The distinct shapes, in order of their first step."""
        return tuple(self.first_steps())

    def fewest_groups(self) -> dict[Shape, int]:
        """Each distinct shape -> its number of BatchNorm groups, in the phase where they have the most clips."""
        fewest: dict[Shape, int] = {}
        for shape, groups in self.kinds():
            fewest[shape] = min(groups, fewest.get(shape, groups))
        return fewest

    def milestones(self, times: int) -> tuple[int, ...]:
        """The numbers of steps after which to evaluate: `times` of them, equally spaced, the last at the end.

        They do not depend on the phases, so a baseline and its multigrid run evaluate equally often.
        """
        return tuple(sorted({max(1, round(len(self) * k / times)) for k in range(1, times + 1)}))

    def phase_lr(self, phase: Phase, index: int | None = None) -> float:
        """The learning rate of a phase's step, by default its first, without warm-up."""
        optim = self._optim
        if optim.curve == "steps":
            lr = optim.lr * optim.gamma**phase.lr_stage
        else:
            # All stages keep the same share of their baseline steps, so progress in steps equals the baseline's.
            done = (phase.first_step if index is None else index) / len(self)
            lr = optim.end_lr + (optim.lr - optim.end_lr) * (1 + math.cos(math.pi * done)) / 2
        # Scaling by the long cycle's batch, not the short cycle's (Wu et al. 2020, section 3.4).
        return lr if self._lr_scaling == "none" else lr * self._growth(phase.shape.clips / self.base.clips)

    def totals(self) -> Totals:
        """Steps, epochs, clips and voxels of the whole run."""
        clips = self.phases[-1].end_clip
        voxels = sum(_sum_of_steps([s.voxels for s in phase.shapes], phase.steps) for phase in self.phases)
        return Totals(len(self), clips / self.videos, clips, voxels)

    def fingerprint(self) -> str:
        """A short hash that is the same for equal plans."""
        what: list[object] = [self.videos, self.base, self.phases, self._optim]
        # Only what is unusual, which keeps the hashes of earlier versions.
        what += [key for key in (self._lr_scaling, self._optim.scaling) if key not in ("long", "linear")]
        what += [phase.groups for phase in self.phases if len(set(phase.groups)) > 1]
        return hashlib.sha256(repr(tuple(what)).encode()).hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        """The plan as plain values for `plan.json` and `mgtrain plan --json`."""
        phases = [
            {
                "index": phase.index,
                "stage": phase.stage,
                "first_step": phase.first_step,
                "steps": phase.steps,
                "end_epoch": phase.end_clip / self.videos,
                "lr": self.phase_lr(phase),
                "stride": list(phase.grids[-1].stride),
                "shapes": [
                    {**asdict(shape), "short_side": list(grid.short_side), "bn_clips": shape.clips // groups}
                    for grid, (shape, groups) in zip(phase.grids, phase.batches(), strict=True)
                ],
            }
            for phase in self.phases
        ]
        return {"videos": self.videos, "steps": len(self), "epochs": self.totals().epochs, "phases": phases}

    def _lr(self, phase: Phase, shape: Shape, index: int, epoch: float) -> float:
        optim = self._optim
        if epoch < optim.warmup_epochs:
            lr = optim.warmup_lr + (self._warmup_target - optim.warmup_lr) * epoch / optim.warmup_epochs
        else:
            lr = self.phase_lr(phase, index)
        return lr * self._growth(shape.clips / phase.shape.clips) if self._lr_scaling == "both" else lr

    def _growth(self, clips: float) -> float:
        """The factor of the learning rate for a factor of the batch."""
        return clips if self._optim.scaling == "linear" else math.sqrt(clips)

    def _lr_after_warmup(self) -> float:
        """The learning rate at the end of warm-up."""
        end_clip = self._optim.warmup_epochs * self.videos
        phase = next((phase for phase in self.phases if phase.end_clip > end_clip), self.phases[-1])
        cycle_clips = sum(shape.clips for shape in phase.shapes)
        offset = min(phase.steps - 1, max(0, round((end_clip - phase.first_clip) / cycle_clips * len(phase.shapes))))
        return self.phase_lr(phase, phase.first_step + offset)


def _phases(recipe: Recipe, stretches: Sequence[Stretch]) -> tuple[Phase, ...]:
    """Round the stretches to whole steps, at least one each.

    A stretch ends at the step nearest to its exact end, counted in clips, so rounding errors do not add up.
    """
    phases: list[Phase] = []
    first_step = first_clip = 0
    grouping = recipe.schedule.bn_groups if isinstance(recipe.schedule, MultigridSchedule) else "long"
    exact_clips = [s.steps * sum(shape.clips for shape in s.cycle) / len(s.cycle) for s in stretches]
    for index, (stretch, exact_end) in enumerate(zip(stretches, accumulate(exact_clips), strict=True)):
        grids = tuple(train_grid(s, recipe.base, recipe.clip.stride, recipe.clip.short_side) for s in stretch.cycle)
        grouped = stretch.cycle if grouping == "both" else stretch.cycle[-1:] * len(stretch.cycle)
        groups = tuple(bn_groups(shape, recipe.batch.bn_clips) for shape in grouped)
        steps = _nearest_steps(stretch.cycle, exact_end - first_clip)
        place = (index, stretch.stage, stretch.lr_stage, first_step, steps, first_clip)
        phases.append(Phase(*place, stretch.cycle, grids, groups[-1], groups))
        first_step, first_clip = phases[-1].end_step, phases[-1].end_clip
    return tuple(phases)


def clips_before(cycle: Sequence[Shape], steps: int) -> int:
    """The number of clips in the first `steps` steps that alternate the shapes of `cycle`."""
    return _sum_of_steps([shape.clips for shape in cycle], steps)


def _sum_of_steps(cycle: Sequence[int], steps: int) -> int:
    """The sum of the first `steps` items of `cycle`, repeated endlessly."""
    cycles, rest = divmod(steps, len(cycle))
    return cycles * sum(cycle) + sum(cycle[:rest])


def _nearest_steps(cycle: Sequence[Shape], clips: float) -> int:
    """The number of steps, at least 1, with a number of clips nearest to `clips`."""
    whole = len(cycle) * max(0, int(clips // sum(shape.clips for shape in cycle)))
    return max(1, min(range(whole, whole + len(cycle) + 1), key=lambda steps: abs(clips_before(cycle, steps) - clips)))


def bn_groups(shape: Shape, bn_clips: int) -> int:
    """The number of BatchNorm groups of `bn_clips` clips in a batch of `shape`, over all GPUs.

    >>> bn_groups(Shape(512, 8, 158), bn_clips=8)
    64
    """
    if shape.clips <= bn_clips:
        return 1
    if shape.clips % bn_clips:
        raise PlanError(
            f"batches of {shape.clips} clips cannot be split into BatchNorm groups of {bn_clips} clips; "
            f"make batch.clips a multiple of {bn_clips}, or batch.bn_clips a divisor of {shape.clips}"
        )
    return shape.clips // bn_clips


def check_shares(what: str, clips: int, groups: int, ranks: int) -> None:
    """Raise `PlanError` if ranks cannot share a batch's clips and BatchNorm groups equally; `what` has such batches."""
    if clips % ranks:
        raise PlanError(
            f"{what} of {clips} clips, which {ranks} GPUs cannot share equally; "
            f"use a number of GPUs that divides {clips}"
        )
    if groups % ranks and ranks % groups:
        raise PlanError(
            f"{what} of {groups} BatchNorm groups, which {ranks} GPUs cannot share; "
            f"use a number of GPUs that divides {groups} or is a multiple of it, or another batch.bn_clips"
        )


def check_world(plan: Plan, ranks: int) -> None:
    """Raise `PlanError` if ranks cannot share the clips, mixed pairs and BatchNorm groups of every step equally."""
    for phase in plan.phases:
        for shape, groups in phase.batches():
            check_shares(f"phase {phase.index + 1} has steps", shape.clips, groups, ranks)
    check_shares("recalibration has batches", plan.base.clips, plan.base_bn_groups, ranks)
    for phase in plan.phases:
        odd = [shape for shape in phase.shapes if shape.clips // ranks % 2]
        if plan.mixes and odd:
            raise PlanError(
                f"phase {phase.index + 1} has steps of {odd[0].clips} clips, {odd[0].clips // ranks} on each of "
                f"{ranks} GPUs, but augment.mixup and augment.cutmix mix pairs; choose batch.clips and the number of "
                "GPUs such that each has an even number, or set both to 0"
            )
