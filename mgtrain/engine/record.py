"""Write a run's records, its description, steps, evaluations and times, and show its progress."""

import logging
import math
import platform
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import chain, pairwise
from typing import Any, TypeVar

import av
import numpy as np
import torch
import torchvision
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from mgtrain import __version__
from mgtrain.clips.loader import worker_count
from mgtrain.console import duration, err
from mgtrain.data.videos import Videos
from mgtrain.engine.examples import examples
from mgtrain.engine.step import StepResult
from mgtrain.errors import CheckpointError, DataError
from mgtrain.grid import Shape
from mgtrain.processes.cores import cpu_name
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe
from mgtrain.runs.checkpoint import CheckpointInfo
from mgtrain.runs.compare import DEVICE_KEYS, changed, devices, times
from mgtrain.runs.folder import RunDir
from mgtrain.runs.history import History, accuracy, best_until, ranks_since, seconds_left, speedup_at_equal_accuracy
from mgtrain.runs.scores import Predictions, Scores
from mgtrain.schedule import Plan, Step

log = logging.getLogger(__name__)

Batch = TypeVar("Batch")
TABLED = ("seed", "schedule", "optim", "batch", "clip", "model")  # sections in TensorBoard's table of runs
STEP_TAGS = {
    "train/loss": "loss",
    "train/top1": "top1",
    "train/lr": "lr",
    "train/epoch": "epoch",
    "multigrid/clips": "clips",
    "multigrid/frames": "frames",
    "multigrid/crop": "crop",
    "time/train": "train_seconds",
    "time/data": "data_seconds",
}


def describe_run(run: RunDir, recipe: Recipe, plan: Plan, flops: dict[Shape, int], train: Videos, val: Videos) -> None:
    """Write the description of the run: recipe, plan and data."""
    per_clip = [{"frames": s.frames, "crop": s.crop, "multiply_adds": n} for s, n in flops.items()]
    run.write("recipe.yaml", recipe.to_yaml())
    run.write("plan.json", {**plan.describe(), "totals": asdict(plan.totals()), "flops_per_clip": per_clip})
    run.write("data.json", {"train": _data_facts(train), "val": _data_facts(val), "classes": list(train.classes)})
    log.info(
        f"{recipe.model.name} on {len(train):,} training and {len(val):,} validation videos of {len(train.classes)} "
        f"classes: {len(plan):,} steps in {len(plan.phases)} phases, {plan.totals().epochs:.1f} epochs"
    )
    for name, videos in (("training", train), ("validation", val)):
        for remark in videos.remarks:
            log.info(remark)
        if videos.left_out:
            log.info(f"{name} videos: {videos.left_out_words}, according to {recipe.data.checked}")


def environment(
    run: RunDir, recipe: Recipe, world: World, state: CheckpointInfo, changes: Sequence[str]
) -> dict[str, Any]:
    """Versions, device and ranks for `env.json`; for a run resumed from `state`, those of all its parts.

    `changes` are those of its recipe or videos since that checkpoint.
    """
    now = {
        "mgtrain": __version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "av": av.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else cpu_name(),
        "ranks": world.size,
        "threads": torch.get_num_threads(),
        "workers": worker_count(recipe, world),
        "git": _git_revision(),
    }
    parts: list[tuple[Any, ...]] = []  # (device, ranks, threads)
    ranks: list[tuple[float, int]] = []  # (seconds of training before, ranks)
    said: list[str] = []
    if state.step and run.writes:
        with suppress(CheckpointError, LookupError, TypeError, ValueError):  # it is missing or damaged
            before = run.read("env.json")
            parts, ranks, said = devices(before), ranks_since(before), changed(before)
    here = tuple(now[key] for key in DEVICE_KEYS)
    since = [part for part in ranks if part[0] < state.train_seconds]
    news = [f"after step {state.step:,}: {change}" for change in changes]
    return {
        **now,
        "devices": parts if here in parts[-1:] else [*parts, here],
        "ranks_since": [*since, (state.train_seconds, world.size)],
        "changed": [*said, *(new for new in news if new not in said)],
    }


def _git_revision() -> str | None:
    """The commit of the current folder; None outside of a git repository, or without git.

    It does not check for changed files: git may then run programs that the folder's configuration names.
    """
    with suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "rev-parse", "--short=12", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None


def show_step(run: RunDir, row: dict[str, Any]) -> None:
    """Show a row of `steps.jsonl` on the boards."""
    run.scalars(row["step"], {tag: row[key] for tag, key in STEP_TAGS.items() if row[key] is not None})


def show_run(run: RunDir, recipe: Recipe, plan: Plan, train: Videos) -> None:
    """Show a new run on the boards, with pictures of a clip at every shape."""
    keys = {key: value for key, value in recipe.flat().items() if key.partition(".")[0] in TABLED}
    run.parameters(keys, ["val/top1", "time/train", "time/data"])
    if run.writes:
        try:
            for shape, pixels in examples(train, recipe, plan):
                run.image(0, f"clips/{shape}", pixels.numpy())
        except DataError as error:
            log.warning("no pictures of clips on the boards: %s", error)


class Clock:
    """Seconds of training without evaluations and checkpoints, of waiting for data meanwhile, and of wall-clock time.

    Wall-clock time is all that a user waits for since `began`, a value of `time.perf_counter()`. A resumed run goes on
    from the times in its `state`. Logged steps wait for the GPU, so their times are right.
    """

    def __init__(self, state: CheckpointInfo, began: float) -> None:
        self._train, self._data, self._last = state.train_seconds, state.data_seconds, time.perf_counter()
        # Checkpoints of earlier versions have no wall-clock time, which is at least the training time.
        self._start = began - max(state.clock_seconds, state.train_seconds)
        self.paused_seconds = 0.0  # of the last pause
        self.pauses = 0

    def seconds(self) -> dict[str, Any]:
        """The times, with the names of logs and checkpoints."""
        now = time.perf_counter()
        return {
            "train_seconds": self._train + now - self._last,
            "data_seconds": self._data,
            "clock_seconds": now - self._start,
        }

    def wait_for(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; the time until it arrives is time spent waiting for data."""
        start = time.perf_counter()
        batch = next(batches)
        self._data += time.perf_counter() - start
        return batch

    def lap(self) -> float:
        """Add the seconds since the last call to the training time; returns them."""
        last, self._last = self._last, time.perf_counter()
        self._train += self._last - last
        return self._last - last

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time within the block as training."""
        self.lap()
        self.pauses += 1
        yield
        before, self._last = self._last, time.perf_counter()
        self.paused_seconds = self._last - before


class Record:
    """Logs the steps and evaluations of a run, with the times of its clock, and shows them on the terminal."""

    def __init__(
        self, run: RunDir, plan: Plan, start: int, clock: Clock, videos: int, world: World, baseline: RunDir | None
    ) -> None:
        self._run, self._plan, self._clock, self._videos = run, plan, clock, videos
        self._world, self._baseline = world, baseline
        self._evaluated = ""  # the last evaluation, for the progress line
        self._times: dict[Shape, list[float]] = defaultdict(list)  # seconds of each step since the last evaluation
        self._speed: dict[Shape, float] = {}  # seconds per step, a moving average
        self._marks: list[tuple[torch.cuda.Event, Shape, int]] = []  # on a GPU: ends of steps, and the pauses before
        self._ends: dict[int, list[dict[str, Any]]] = {}  # the first and the last logged row of each phase
        self._bar = Progress(
            TextColumn("{task.fields[phase]}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[facts]}", table_column=Column(ratio=1, no_wrap=True)),  # cut off before others
            TimeElapsedColumn(),
            TextColumn("{task.fields[eta]}"),
            console=err,
            disable=not (world.main and err.is_terminal),
            transient=True,
            expand=True,
        )
        self._task = self._bar.add_task("", total=len(plan), completed=start, phase="", facts="", eta="")

    def __enter__(self) -> None:
        self._bar.start()

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        self._bar.stop()
        self._run.close(failed=failure is not None)

    def lap(self, step: Step) -> None:
        """Record the time of a finished step and report progress to the watchdog."""
        seconds = self._clock.lap()
        if self._world.device.type == "cuda":  # which may not have begun with this step
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append((event, step.shape, self._clock.pauses))
        else:
            self._add(step.shape, seconds)
        self._world.watchdog.beat()

    def _add(self, shape: Shape, seconds: float) -> None:
        self._speed[shape] = 0.8 * self._speed.get(shape, seconds) + 0.2 * seconds
        self._times[shape].append(seconds)

    def _read_marks(self) -> None:
        """Add the times that a GPU took for the steps so far, when it has finished them."""
        for (before, _, pauses), (event, shape, now) in pairwise(self._marks):
            if now == pauses:
                self._add(shape, before.elapsed_time(event) / 1000)
        del self._marks[:-1]

    def step(self, step: Step, result: StepResult) -> None:
        """Log a step, with loss and accuracy over all ranks."""
        loss, top1 = (self._world.sum(torch.stack([result.loss, result.correct])) / self._world.size).tolist()
        self._read_marks()  # the GPU has finished all steps before this one
        phase, shape = step.phase, step.shape
        row = {
            "step": step.index + 1,
            "phase": phase.index,
            "epoch": (step.first_clip + shape.clips) / self._plan.videos,
            **asdict(shape),
            "lr": step.lr,
            "loss": loss if math.isfinite(loss) else None,
            "top1": top1,
            **self._clock.seconds(),
        }
        self._run.append("steps.jsonl", row)
        show_step(self._run, row)
        self._ends.setdefault(phase.index, [row, row])[1] = row
        speed = f"{shape.clips / self._speed[shape]:.0f} clips/s" if self._speed.get(shape) else ""
        self._bar.update(
            self._task,
            completed=step.index + 1,
            phase=f"phase {phase.index + 1}/{len(self._plan.phases)}  {shape}",
            facts=(
                f"lr {step.lr:.3g}  loss {loss:.3f}  top-1 {100 * top1:.0f} %  {speed}  "
                f"data wait {100 * row['data_seconds'] / row['train_seconds']:.0f} %{self._evaluated}"
            ),
            eta=f"{duration(seconds_left(self._plan, [*chain(*self._ends.values())]))} left",
        )

    def evaluation(self, step: Step, predictions: Predictions, scores: Scores, weights: str) -> None:
        """Log the evaluation of the `model` or `ema` weights after a step, and compare it with the baseline's."""
        run, plan, phase = self._run, self._plan, step.phase
        row = {
            "step": step.index + 1,
            "phase": phase.index,
            "epoch": (step.first_clip + step.shape.clips) / plan.videos,
            **self._clock.seconds(),
            "eval_seconds": self._clock.paused_seconds,
            "weights": weights,
            **scores.row(),
            **predictions.right_row(self._videos),
            "mistakes": predictions.mistakes(),
        }
        run.append("evals.jsonl", row)
        compared, beside, speedup = self._compared(row)
        self._evaluated = f"  val {100 * accuracy(row):.1f} %{beside}"
        values = {f"val/{name}": getattr(scores, name) for name in ("top1", "mean_class", "top5", "loss", "mean_ap")}
        values = {tag: value for tag, value in values.items() if value is not None} | compared
        self._read_marks()
        values |= {f"step_seconds/{shape}": float(np.median(s)) for shape, s in self._times.items()}
        run.scalars(step.index + 1, values)
        self._times.clear()
        found = ", ".join(scores.accuracies(1)) + (" of the averaged weights" if weights == "ema" else "")
        log.info(
            f"step {step.index + 1}/{len(plan)}, epoch {row['epoch']:.1f}, phase {phase.index + 1}/{len(plan.phases)} "
            f"({phase.name}), lr {step.lr:.3g}: {found}, {duration(row['train_seconds'])} of training "
            f"({100 * row['data_seconds'] / row['train_seconds']:.0f} % waiting for data), "
            f"{duration(row['clock_seconds'])} of wall-clock time{speedup}"
        )

    def _compared(self, row: dict[str, Any]) -> tuple[dict[str, float], str, str]:
        """Compare an evaluation with the baseline's: values for TensorBoard, text for the progress line and the log."""
        if self._baseline is None or not self._run.writes:
            return {}, "", ""
        values, beside, gained = {}, "", ""
        rival, name = History(self._baseline).evals, self._baseline.name
        for what, theirs in best_until(rival, row).items():
            if theirs is not None:
                values[f"compare/baseline_at_same_{what}"] = theirs
                beside += f", {name} {100 * theirs:.1f} % at this {what}"
        speedup = speedup_at_equal_accuracy(rival, History(self._run).evals)
        if speedup is not None:
            values["compare/speedup"] = speedup
            gained = f", {times(speedup)} training time than {name} at equal accuracy"
        return values, beside, gained


def _data_facts(videos: Videos) -> dict[str, Any]:
    return {"videos": len(videos), "fingerprint": videos.fingerprint, "left_out": dict(videos.left_out)}
