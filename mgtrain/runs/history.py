"""A run's logs and their summary, for `compare`, `watch`, `report`, `study` and the log."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from mgtrain.errors import CheckpointError, UsageError
from mgtrain.recipe import Recipe
from mgtrain.runs.folder import RunDir, is_number
from mgtrain.runs.scores import mean_class, unpacked
from mgtrain.schedule import Plan, make_plan

EVALUATED = ("step", "train_seconds", "data_seconds", "eval_seconds", "clock_seconds", "top1", "top5", "videos")


@dataclass(frozen=True, slots=True)
class Summary:
    """The costs and results of a run."""

    name: str
    finished: bool
    steps: int
    epochs: float
    clips: int
    voxels: int
    multiply_adds: float  # in forward passes
    train_seconds: float  # without evaluations and checkpoints
    clock_seconds: float  # start-up, training, evaluations and checkpoints
    gpu_hours: float  # training time times ranks, also on CPUs
    data_seconds: float  # part of the training time spent waiting for data
    eval_seconds: float
    evaluations: int
    metric: str  # the kind of accuracy: top-1, or mAP if videos have several labels
    accuracy: float  # of the last evaluation
    best_accuracy: float
    top1: float
    top5: float
    videos: int  # in the evaluation
    mean_class: float | None = None  # mean class accuracy; None if videos have several labels
    train_loss: float | None = None  # of clips of the base shape in the last tenth of the steps; None without such


class History:
    """A run's files; each is read once, when it is needed."""

    def __init__(self, run: RunDir) -> None:
        self.run, self.name, self.path = run, run.name, run.path

    @classmethod
    def of(cls, run: RunDir | History) -> History:
        """The history of a run, which may already be open."""
        return run if isinstance(run, History) else cls(run)

    @cached_property
    def recipe(self) -> Recipe:
        return self.run.recipe()

    @cached_property
    def plan_file(self) -> dict[str, Any]:
        return self.run.read("plan.json")

    @cached_property
    def plan(self) -> Plan:
        return make_plan(self.recipe, self.plan_file["videos"])

    @cached_property
    def env(self) -> dict[str, Any]:
        return self.run.read("env.json")

    @cached_property
    def data(self) -> dict[str, Any]:
        return self.run.read("data.json")

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        return self.run.rows("steps.jsonl")

    @cached_property
    def evals(self) -> list[dict[str, Any]]:
        """The evaluations. For runs of earlier versions, `clock_seconds` is the sum of training and evaluations."""
        rows = self.run.rows("evals.jsonl")
        evaluating = accumulate(row.get("eval_seconds", 0.0) for row in rows)
        return [{"clock_seconds": row["train_seconds"] + s, **row} for row, s in zip(rows, evaluating, strict=True)]

    @property
    def knows_clock(self) -> bool:
        """Whether wall-clock time was logged, which includes start-up and checkpoints."""
        return all("clock_seconds" in row for row in self.run.rows("evals.jsonl"))

    @cached_property
    def summary(self) -> Summary:
        """Raises `UsageError` if there is no evaluation yet, and `CheckpointError` if a number is missing."""
        evals, plan = self.evals, self.plan
        if not evals:
            raise UsageError(f"{self.path}: no evaluation yet; wait for the first one, or resume the run with --resume")
        last, classes = evals[-1], class_accuracy(evals[-1])
        if not all(is_number(row[key]) for row in evals for key in EVALUATED) or not is_number(classes or 0.0):
            names = ", ".join((*EVALUATED, "mean_class"))
            raise CheckpointError(f"{self.path}: evals.jsonl is damaged: {names} must be numbers")
        shapes = [plan[index].shape for index in range(last["step"])]
        clips = sum(shape.clips for shape in shapes)
        return Summary(
            name=self.name,
            finished=last["step"] == len(plan),
            steps=last["step"],
            epochs=clips / plan.videos,
            clips=clips,
            voxels=sum(shape.voxels for shape in shapes),
            multiply_adds=self.multiply_adds_until([last["step"]])[0],
            gpu_hours=self.device_hours(last["train_seconds"]),
            eval_seconds=sum(row["eval_seconds"] for row in evals),
            evaluations=len(evals),
            metric=accuracy_name(last),
            accuracy=accuracy(last),
            best_accuracy=max(map(accuracy, evals)),
            mean_class=classes,
            train_loss=self.train_loss(last["step"]),
            **{key: last[key] for key in ("train_seconds", "clock_seconds", "data_seconds", "top1", "top5", "videos")},
        )

    def train_loss(self, done: int) -> float | None:
        """The mean loss of training clips of the base shape in the last tenth of `done` steps; None without such."""
        base = self.recipe.base
        losses = [
            row["loss"]
            for row in self.steps
            if 0.9 * done < row["step"] <= done and (row["frames"], row["crop"]) == (base.frames, base.crop)
        ]
        finite = [loss for loss in losses if loss is not None]
        return math.fsum(finite) / len(finite) if finite else None

    def multiply_adds_until(self, ends: Sequence[int]) -> list[float]:
        """The multiply-adds of the forward passes of all steps before each of `ends`."""
        per_clip = {(row["frames"], row["crop"]): row["multiply_adds"] for row in self.plan_file["flops_per_clip"]}
        shapes = (step.shape for step in self.plan[: max(ends)])
        sums = list(accumulate(shape.clips * per_clip[shape.frames, shape.crop] for shape in shapes))
        return [float(sums[end - 1]) for end in ends]

    def device_hours(self, seconds: float) -> float:
        """The sum of all ranks' hours after so many seconds of training."""
        parts = ranks_since(self.env)
        ends = [*(start for start, _ in parts[1:]), seconds]
        worked = (ranks * max(0.0, min(end, seconds) - start) for (start, ranks), end in zip(parts, ends, strict=True))
        return sum(worked) / 3600

    def curve(self) -> list[dict[str, Any]]:
        """The cost up to each evaluation, and its accuracy."""
        work = self.multiply_adds_until([row["step"] for row in self.evals])
        return [
            {
                **{key: row[key] for key in ("step", "epoch", "train_seconds", "clock_seconds")},
                "multiply_adds": done,
                "gpu_hours": self.device_hours(row["train_seconds"]),
                "accuracy": accuracy(row),
            }
            for row, done in zip(self.evals, work, strict=True)
        ]

    def right(self) -> np.ndarray | None:
        """For each video, int8 (V,): 1 if the last evaluation was right, 0 if not, -1 if skipped; None if unknown."""
        last = self.evals[-1]
        return unpacked(last["right"], last["videos"], last["left_out"]) if "right" in last else None


def ranks_since(env: Mapping[str, Any]) -> list[tuple[float, int]]:
    """The ranks of each part of a run, with the seconds of training before it."""
    return [(float(start), int(ranks)) for start, ranks in env.get("ranks_since", ())] or [(0.0, int(env["ranks"]))]


@contextmanager
def guarded(*runs: RunDir | History) -> Iterator[None]:
    """Raise `CheckpointError` for an error within the block, which reads the runs' logs: they are damaged."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{' or '.join(str(run.path) for run in runs)}: the logs are damaged ({type(error).__name__}: {error}); "
            "copy the run again, or repeat it"
        ) from None


def accuracy(row: dict[str, Any]) -> float:
    """An evaluation's accuracy: mean average precision if videos have several labels, else top-1."""
    value: float = row["mean_ap"] if row.get("mean_ap") is not None else row["top1"]
    return value


def accuracy_name(row: dict[str, Any]) -> str:
    return "top-1" if row.get("mean_ap") is None else "mAP"


def class_accuracy(row: dict[str, Any]) -> float | None:
    """Mean class accuracy of an evaluation, computed from the counts for runs of earlier versions."""
    if row.get("mean_ap") is not None:
        return None
    value: float | None = row.get("mean_class", mean_class(row.get("correct", ()), row.get("counts", ())))
    return value


def best_until(evals: Sequence[dict[str, Any]], now: dict[str, Any]) -> dict[str, float | None]:
    """The best accuracy up to the training time, and up to the step, of another run's evaluation; None before any.

    >>> best_until([{"top1": 0.2, "step": 10, "train_seconds": 5.0}], {"step": 15, "train_seconds": 4.0})
    {'time': None, 'step': 0.2}
    """
    return {
        what: max((accuracy(row) for row in evals if row[key] <= now[key]), default=None)
        for what, key in (("time", "train_seconds"), ("step", "step"))
    }


def seconds_left(plan: Plan, rows: Sequence[dict[str, Any]]) -> float:
    """Estimated seconds of training left, from the pace of phases with the same shapes, or else of the whole run."""
    paces: dict[tuple[Any, ...], list[float]] = {}
    for before, after in pairwise(rows):
        if before["phase"] == after["phase"] and after["step"] > before["step"]:
            pace = (after["train_seconds"] - before["train_seconds"]) / (after["step"] - before["step"])
            paces.setdefault(plan[after["step"] - 1].phase.shapes, []).append(pace)
    overall = [rows[-1]["train_seconds"] / max(1, rows[-1]["step"])]
    left = 0.0
    for phase in plan.phases:
        to_go = min(phase.steps, max(0, phase.end_step - rows[-1]["step"]))
        known = paces.get(phase.shapes, overall)
        left += to_go * (sum(known) / len(known))
    return left


def time_to_accuracy(evals: Sequence[dict[str, Any]], target: float) -> float | None:
    """Seconds of training until `target` was reached, interpolated between evaluations; None if it was not.

    >>> time_to_accuracy([{"top1": 0.2, "train_seconds": 10.0}, {"top1": 0.6, "train_seconds": 20.0}], target=0.5)
    17.5
    """
    before, before_seconds = 0.0, 0.0
    for row in evals:
        seconds: float = row["train_seconds"]
        now = accuracy(row)
        if now >= target:
            part = (target - before) / (now - before) if now > before else 1.0
            return before_seconds + max(0.0, part) * (seconds - before_seconds)
        before, before_seconds = max(before, now), seconds
    return None


def speedup_at_equal_accuracy(baseline: Sequence[dict[str, Any]], run: Sequence[dict[str, Any]]) -> float | None:
    """The ratio of the training times until the highest accuracy that both runs have reached; None if there is none.

    >>> slow = [{"top1": 0.5, "train_seconds": 40.0}]
    >>> speedup_at_equal_accuracy(slow, [{"top1": 0.5, "train_seconds": 10.0}])
    4.0
    """
    both = min(max(map(accuracy, rows), default=0.0) for rows in (baseline, run))
    theirs, ours = time_to_accuracy(baseline, both), time_to_accuracy(run, both)
    return theirs / ours if theirs and ours else None
