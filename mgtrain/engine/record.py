"""What a run writes down: what it is, its steps, its evaluations."""

from __future__ import annotations

import logging
import math
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torchvision

from mgtrain import __version__
from mgtrain.clips.loader import worker_count
from mgtrain.console import duration
from mgtrain.data.videos import Videos
from mgtrain.engine.clock import Clock
from mgtrain.engine.examples import examples
from mgtrain.engine.progress import TrainProgress
from mgtrain.engine.step import StepResult
from mgtrain.errors import DataError
from mgtrain.grid import Shape
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe
from mgtrain.runs.folder import RunDir, accuracy, best_until, speedup_at_equal_accuracy
from mgtrain.runs.scores import Predictions, Scores
from mgtrain.schedule import Plan, Step

log = logging.getLogger(__name__)

TOLD = ("seed", "schedule", "optim", "batch", "clip", "model")  # sections in TensorBoard's table of runs
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


def describe_run(
    run: RunDir, recipe: Recipe, plan: Plan, flops: dict[Shape, int], train: Videos, val: Videos, world: World
) -> None:
    """Write down what the run is: recipe, plan, data and environment."""
    per_clip = [{"frames": s.frames, "crop": s.crop, "multiply_adds": n} for s, n in flops.items()]
    files: dict[str, dict[str, Any] | str] = {
        "recipe.yaml": recipe.to_yaml(),
        "plan.json": {**plan.describe(), "totals": asdict(plan.totals()), "flops_per_clip": per_clip},
        "data.json": {"train": _data_facts(train), "val": _data_facts(val), "classes": list(train.classes)},
        "env.json": environment(recipe, world),
    }
    for name, value in files.items():
        run.write(name, value)
    log.info(
        f"{recipe.model.name} on {len(train):,} training and {len(val):,} validation videos of {len(train.classes)} "
        f"classes: {len(plan):,} steps in {len(plan.phases)} phases, {plan.totals().epochs:.1f} epochs"
    )
    for name, videos in (("training", train), ("validation", val)):
        if videos.left_out:
            log.info(f"{name} videos: {videos.left_out_words}, as {recipe.data.checked} says")


def log_step(run: RunDir, step: Step, result: StepResult, clock: Clock, progress: TrainProgress, world: World) -> None:
    """Write a step down, over all ranks."""
    loss, top1 = (world.sum(torch.stack([result.loss, result.correct])) / world.size).tolist()
    seconds = clock.train_seconds + clock.since_lap()
    row = {
        "step": step.index + 1,
        "phase": step.phase.index,
        "epoch": step.epoch,
        "clips": step.shape.clips,
        "frames": step.shape.frames,
        "crop": step.shape.crop,
        "lr": step.lr,
        "loss": loss if math.isfinite(loss) else None,
        "top1": top1,
        "train_seconds": seconds,
        "data_seconds": clock.data_seconds,
    }
    run.append("steps.jsonl", row)
    show_step(run, row)
    progress.show(step, loss, top1, clock.data_seconds / seconds)


def show_step(run: RunDir, row: dict[str, Any]) -> None:
    """Add a step's line to TensorBoard's curves."""
    run.scalars(row["step"], {tag: row[key] for tag, key in STEP_TAGS.items() if row[key] is not None})


def show_run(run: RunDir, recipe: Recipe, plan: Plan, train: Videos) -> None:
    """Enter a new run into TensorBoard's table of runs, with what the network sees at every shape."""
    told = {key: value for key, value in recipe.flat().items() if key.partition(".")[0] in TOLD}
    run.parameters(told, ["val/top1", "time/train", "time/data"])
    if run.writes:
        try:
            for shape, pixels in examples(train, recipe, plan):
                run.image(0, f"clips/{shape}", pixels.numpy())
        except DataError as error:
            log.warning("no pictures of clips in TensorBoard: %s", error)


def log_evaluation(
    run: RunDir, step: Step, plan: Plan, predictions: Predictions, clock: Clock, baseline: RunDir | None,
    progress: TrainProgress,
) -> None:  # fmt: skip
    """Write an evaluation down, and how it and the time to it compare with the baseline's."""
    scores = predictions.scores()
    row = {
        "step": step.index + 1,
        "phase": step.phase.index,
        "epoch": (step.first_clip + step.shape.clips) / plan.videos,
        "train_seconds": clock.train_seconds,
        "data_seconds": clock.data_seconds,
        "eval_seconds": clock.other_seconds,
        **scores.row(),
        "mistakes": [] if predictions.multi_label else predictions.mistakes(),
    }
    run.append("evals.jsonl", row)
    scalars = {"val/top1": scores.top1, "val/top5": scores.top5, "val/loss": scores.loss}
    if scores.mean_ap is not None:
        scalars["val/mean_ap"] = scores.mean_ap
    gained, judged = "", f"val {100 * accuracy(row):.1f} %"
    if baseline is not None and run.writes:
        for key, name in (("train_seconds", "time"), ("step", "step")):
            theirs = best_until(baseline.rows("evals.jsonl"), key, row[key])
            if theirs is not None:
                scalars[f"compare/baseline_at_same_{name}"] = theirs
                judged += f", {baseline.name} {100 * theirs:.1f} % at this {name}"
        speedup = speedup_at_equal_accuracy(baseline.rows("evals.jsonl"), run.rows("evals.jsonl"))
        if speedup is not None:
            scalars["compare/speedup"] = speedup
            gained = f", {speedup:.2f}x faster than {baseline.name} at equal accuracy"
    progress.judged = f"  {judged}"
    run.scalars(step.index + 1, scalars)
    for shape, times in progress.take_times().items():
        run.histogram(step.index + 1, f"step_seconds/{shape}", np.array(times))
    phase, seconds = step.phase, clock.train_seconds
    log.info(
        f"step {step.index + 1}/{len(plan)}, epoch {row['epoch']:.1f}, phase {phase.index + 1}/{len(plan.phases)} "
        f"({phase.name}), lr {step.lr:.3g}: {_accuracy(scores)}, "
        f"{duration(seconds)} of training ({100 * clock.data_seconds / seconds:.0f} % waiting for data){gained}"
    )


def _accuracy(scores: Scores) -> str:
    mean_ap = "" if scores.mean_ap is None else f"mAP {100 * scores.mean_ap:.1f} %, "
    return f"{mean_ap}top-1 {100 * scores.top1:.1f} %, top-5 {100 * scores.top5:.1f} %"


def environment(recipe: Recipe, world: World) -> dict[str, Any]:
    """Versions, device and ranks: what a time depends on."""
    return {
        "mgtrain": __version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "av": av.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else _cpu_name(),
        "ranks": world.size,
        "threads": torch.get_num_threads(),
        "workers": worker_count(recipe, world),
        "git": _git_revision(),
    }


def _git_revision() -> str | None:
    """The commit of the folder that the run is started in, if git keeps one.

    Whether files have changed is not asked: for that git runs programs that the folder's own configuration names.
    """
    if shutil.which("git") is None:
        return None
    result = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else None


def _data_facts(videos: Videos) -> dict[str, Any]:
    return {"videos": len(videos), "fingerprint": videos.fingerprint, "left_out": dict(videos.left_out)}


def _cpu_name() -> str:
    lines = _lines(Path("/proc/cpuinfo"))
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _lines(path: Path) -> Iterator[str]:
    if path.is_file():
        yield from path.read_text(encoding="utf-8").splitlines()
