"""What one run gained over another, out of their run directories."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from mgtrain.console import duration
from mgtrain.errors import CheckpointError, ThresholdError, UsageError
from mgtrain.recipe import recipe_differences
from mgtrain.runs.folder import RunDir, accuracy, accuracy_name, is_number, speedup_at_equal_accuracy, time_to_accuracy
from mgtrain.schedule import make_plan

SCHEMA = "mgtrain.compare/2"
EVALUATED = ("step", "train_seconds", "data_seconds", "eval_seconds", "top1", "top5", "videos")
# Student's t, 97.5 %, for 1, 2, ... degrees of freedom; from 30 on it is the last
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
        2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 1.96)  # fmt: skip
DEVICE_KEYS = ("device", "ranks", "threads")  # times are only divided between runs that agree in these


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run cost and what came out."""

    name: str
    finished: bool
    steps: int
    epochs: float
    clips: int
    voxels: int
    multiply_adds: float  # of the forward passes
    train_seconds: float  # without evaluations and checkpoints
    gpu_hours: float  # of training, over all ranks, whether on GPUs or not
    data_seconds: float  # of these, spent waiting for data
    eval_seconds: float
    metric: str  # what the accuracy is: top-1, or mAP where videos have several labels
    accuracy: float  # after the last evaluation
    best_accuracy: float
    top1: float
    top5: float
    videos: int  # of the evaluation


def summarize(run: RunDir) -> Summary:
    """Add up a run's logs."""
    evals, plan_file = run.rows("evals.jsonl"), run.read("plan.json")
    if not evals:
        raise UsageError(f"{run.path}: no evaluation yet; wait until its first one, or continue it with --resume")
    last = evals[-1]
    if not all(is_number(row[key]) for row in evals for key in EVALUATED):
        raise CheckpointError(f"{run.path}: evals.jsonl is damaged; each of {', '.join(EVALUATED)} must be a number")
    plan = make_plan(run.recipe(), plan_file["videos"])
    steps = [plan[index].shape for index in range(last["step"])]
    clips = sum(shape.clips for shape in steps)
    return Summary(
        name=run.name,
        finished=last["step"] == len(plan),
        steps=last["step"],
        epochs=clips / plan.videos,
        clips=clips,
        voxels=sum(shape.voxels for shape in steps),
        multiply_adds=multiply_adds_until(run, [last["step"]])[0],
        train_seconds=last["train_seconds"],
        gpu_hours=last["train_seconds"] * run.read("env.json")["ranks"] / 3600,
        data_seconds=last["data_seconds"],
        eval_seconds=sum(row["eval_seconds"] for row in evals),
        metric=accuracy_name(last),
        accuracy=accuracy(last),
        best_accuracy=max(map(accuracy, evals)),
        top1=last["top1"],
        top5=last["top5"],
        videos=last["videos"],
    )


def multiply_adds_until(run: RunDir, ends: Sequence[int]) -> list[float]:
    """Of the forward passes of the first so many steps, for each of these numbers of steps."""
    plan_file = run.read("plan.json")
    plan = make_plan(run.recipe(), plan_file["videos"])
    per_clip = {(row["frames"], row["crop"]): row["multiply_adds"] for row in plan_file["flops_per_clip"]}
    sums = list(accumulate(s.shape.clips * per_clip[s.shape.frames, s.shape.crop] for s in plan[: max(ends)]))
    return [float(sums[end - 1]) for end in ends]


def compare(baseline: RunDir, run: RunDir) -> dict[str, Any]:
    """All that `mgtrain compare` says about a run and its baseline, as plain values (schema mgtrain.compare/2).

    Raises:
        CheckpointError: what one of them has logged is damaged.
    """
    with guarded(baseline, run):
        return _compare(baseline, run)


@contextmanager
def guarded(*runs: RunDir) -> Iterator[None]:
    """Report an error while reading runs' logs as damage to them."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{' or '.join(str(run.path) for run in runs)}: its logs are damaged ({type(error).__name__}: {error}); "
            "copy the run again, or repeat it"
        ) from None


def _compare(baseline: RunDir, run: RunDir) -> dict[str, Any]:
    theirs, ours = summarize(baseline), summarize(run)
    their_env, our_env = baseline.read("env.json"), run.read("env.json")
    other_device = [
        f"{key} {their_env[key]} and {our_env[key]}" for key in DEVICE_KEYS if their_env[key] != our_env[key]
    ]
    their_data, our_data = baseline.read("data.json"), run.read("data.json")
    differences = recipe_differences(baseline.recipe(), run.recipe())

    warnings = [
        f"{s.name} is unfinished: its numbers stop after {s.steps} steps" for s in (theirs, ours) if not s.finished
    ]
    if other_device:
        warnings.append(f"times are not divided, the runs were made on different devices: {'; '.join(other_device)}")
    if their_data != our_data:
        warnings.append("the runs saw different training or validation videos")
    unfair = [key for key in differences if key.split(".")[0] not in ("schedule", "hardware", "logging")]
    if unfair:
        warnings.append(f"the recipes differ in more than schedule: {', '.join(unfair)}")

    speedups: dict[str, float | None] = {
        key: getattr(theirs, key) / getattr(ours, key)
        for key in ("steps", "epochs", "clips", "voxels", "multiply_adds")
    }
    same = not other_device
    target = theirs.best_accuracy
    reached = time_to_accuracy(run.rows("evals.jsonl"), target)
    for key in ("train_seconds", "gpu_hours"):
        speedups[key] = getattr(theirs, key) / getattr(ours, key) if same else None
    speedups["at_equal_accuracy"] = (
        speedup_at_equal_accuracy(baseline.rows("evals.jsonl"), run.rows("evals.jsonl")) if same else None
    )
    result = {
        "schema": SCHEMA,
        "runs": [asdict(theirs), asdict(ours)],
        "speedups": speedups,
        "accuracy_difference": ours.accuracy - theirs.accuracy,
        "accuracy_noise": _noise(theirs, ours),
        "baseline_best": {
            "accuracy": target,
            "baseline_seconds": time_to_accuracy(baseline.rows("evals.jsonl"), target),
            "seconds": reached,
        },
        "recipe_differences": differences,
        "warnings": warnings,
    }
    return {**result, "verdict": _verdict(theirs, ours, result)}


def compare_groups(runs: Sequence[RunDir]) -> dict[str, Any]:
    """Several runs, those of one recipe together, whatever their seeds and lists of videos: schema mgtrain.groups/1.

    The first run's group is the baseline. Means, standard deviations and, of two runs and more, half the 95 % interval
    of the mean (Student's t).
    """
    with guarded(*runs):
        grouped: dict[str, list[RunDir]] = {}
        for run in runs:
            grouped.setdefault(_what_it_tries(run), []).append(run)
        groups = [_group(members) for members in grouped.values()]
        base = groups[0]
        devices = {tuple(run.read("env.json")[key] for key in DEVICE_KEYS) for run in runs}
        for group in groups:
            group["speedups"] = {
                key: base[key]["mean"] / group[key]["mean"]
                for key in ("steps", "multiply_adds", "train_seconds")
                if key != "train_seconds" or len(devices) == 1
            }
            group["accuracy_difference"] = group["accuracy"]["mean"] - base["accuracy"]["mean"]
        warnings = ["times are not divided, the runs were made on different devices"] if len(devices) > 1 else []
        return {"schema": "mgtrain.groups/1", "groups": groups, "warnings": warnings}


def render_groups(result: dict[str, Any]) -> Group:
    """The groups as a person reads them."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("recipe of", "runs", "metric", "mean", "± sd", "95 %", "change", "steps", "training time", "gain"):
        table.add_column(column, justify="left" if column == "recipe of" else "right")
    for n, group in enumerate(result["groups"]):
        accuracy, ratio = group["accuracy"], group["speedups"].get("train_seconds")
        table.add_row(
            Text(group["runs"][0]["name"]),
            str(len(group["runs"])),
            group["runs"][0]["metric"],
            f"{100 * accuracy['mean']:.1f} %",
            "" if accuracy["sd"] is None else f"{100 * accuracy['sd']:.1f}",
            "" if accuracy["interval"] is None else f"±{100 * accuracy['interval']:.1f}",
            f"{100 * group['accuracy_difference']:+.1f}" if n else "",
            times(group["speedups"]["steps"], "fewer") if n else "",
            duration(group["train_seconds"]["mean"]),
            times(ratio) if n and ratio else "",
        )
    return Group(*(Text(f"note: {warning}", style="yellow") for warning in result["warnings"]), table)


def _what_it_tries(run: RunDir) -> str:
    """The recipe without what sets one of several like runs apart."""
    recipe = run.recipe().model_dump(mode="json", exclude={"seed": True, "hardware": True, "logging": True})
    recipe["data"] = {key: value for key, value in recipe["data"].items() if key not in ("train", "val")}
    return json.dumps(recipe)


def _group(runs: Sequence[RunDir]) -> dict[str, Any]:
    summaries = [asdict(summarize(run)) for run in runs]
    keys = ("accuracy", "steps", "multiply_adds", "train_seconds")
    numbers = {key: _spread([summary[key] for summary in summaries]) for key in keys}
    return {"runs": summaries, "seeds": [run.recipe().seed for run in runs], **numbers}


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, standard deviation, and half the 95 % interval of the mean.

    >>> spread = _spread([1.0, 2.0, 3.0])
    >>> spread["mean"], spread["sd"], f"{spread['interval']:.3f}"
    (2.0, 1.0, '2.484')
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return {"mean": mean, "sd": None, "interval": None}
    sd = statistics.stdev(values)
    t = T_95[min(len(values) - 2, len(T_95) - 1)]
    return {"mean": mean, "sd": sd, "interval": t * sd / math.sqrt(len(values))}


def write_csv(runs: Sequence[RunDir], path: Path) -> None:
    """A line for each run: its summary, and its seed."""
    rows = [{**asdict(summarize(run)), "seed": run.recipe().seed} for run in runs]
    try:
        with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error}") from None


def demand(result: dict[str, Any], wanted: Mapping[str, float]) -> None:
    """Raises `ThresholdError` where a comparison of two runs has less than what is `wanted`.

    `speedup` is of training time, `steps` of steps, `accuracy` (or `top1`) the difference in points.
    """
    found = {
        "speedup": result["speedups"]["train_seconds"],
        "steps": result["speedups"]["steps"],
        "accuracy": 100 * result["accuracy_difference"],
        "top1": 100 * (result["runs"][1]["top1"] - result["runs"][0]["top1"]),
    }
    unknown = set(wanted) - set(found)
    if unknown:
        raise UsageError(f"--fail-under {min(unknown)}: allowed are {', '.join(found)}")
    for key, least in wanted.items():
        if found[key] is None:
            raise ThresholdError(f"{key} is not known: the runs were made on different devices")
        if found[key] < least:
            raise ThresholdError(f"{key} is {found[key]:.2f}, less than {least:g}")


def render(result: dict[str, Any]) -> Group:
    """The comparison as a person reads it: warnings, table, recipe differences, verdict."""
    theirs, ours = result["runs"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", theirs["name"], ours["name"], "gain"):
        table.add_column(column, justify="left" if not column else "right")

    def row(label: str, a: str, b: str, gain: str = "") -> None:
        table.add_row(label, Text(a), Text(b), gain)

    def gain(key: str) -> str:
        ratio = result["speedups"][key]
        return "different devices" if ratio is None else times(ratio)

    for label, key, form in (
        ("steps", "steps", "{:,}"),
        ("epochs", "epochs", "{:.1f}"),
        ("clips", "clips", "{:,}"),
        ("voxels", "voxels", "{:.3g}"),
        ("multiply-adds, forward", "multiply_adds", "{:.3g}"),
    ):
        row(label, form.format(theirs[key]), form.format(ours[key]), gain(key))
    row("training time", duration(theirs["train_seconds"]), duration(ours["train_seconds"]), gain("train_seconds"))
    row("  waiting for data", _share(theirs, "data_seconds"), _share(ours, "data_seconds"))
    row("GPU-hours", f"{theirs['gpu_hours']:.3g}", f"{ours['gpu_hours']:.3g}", gain("gpu_hours"))
    row("evaluation, apart", duration(theirs["eval_seconds"]), duration(ours["eval_seconds"]))
    for name, key in ((ours["metric"], "accuracy"), ("top-1", "top1"), ("top-5", "top5")):
        if key == "accuracy" or name != ours["metric"]:
            a, b = (100 * summary[key] for summary in (theirs, ours))
            row(name, f"{a:.1f} %", f"{b:.1f} %", f"{b - a:+.1f}")
    best = result["baseline_best"]
    seconds = "not reached" if best["seconds"] is None else duration(best["seconds"])
    factor = result["speedups"]["train_seconds"] and best["seconds"] and best["baseline_seconds"] / best["seconds"]
    row(
        f"time to {100 * best['accuracy']:.1f} % {ours['metric']}",
        duration(best["baseline_seconds"]),
        seconds,
        times(factor) if factor else "",
    )

    notes = [Text(f"note: {warning}", style="yellow") for warning in result["warnings"]]
    changed = [Text(f"  {key}: {_brief(a)} -> {_brief(b)}") for key, (a, b) in result["recipe_differences"].items()]
    return Group(*notes, table, Text("\nthe recipes differ in" if changed else "\nthe recipes are the same"), *changed,
                 Text(f"\n{result['verdict']}", style="bold"))  # fmt: skip


def _verdict(theirs: Summary, ours: Summary, result: dict[str, Any]) -> str:
    speedups, difference, noise = (
        result["speedups"],
        100 * result["accuracy_difference"],
        100 * result["accuracy_noise"],
    )
    time = f"{times(speedups['train_seconds'])} training time, " if speedups["train_seconds"] else ""
    steps = times(speedups["steps"], "fewer")
    judged = "within" if abs(difference) <= noise else "beyond"
    return (
        f"{ours.name} against {theirs.name}: {time}{steps} steps, "
        f"{ours.metric} {100 * ours.accuracy:.1f} % against {100 * theirs.accuracy:.1f} % "
        f"({difference:+.1f}, {judged} the noise of {ours.videos} videos, ±{noise:.1f})"
    )


def times(ratio: float, less: str = "less") -> str:
    """How many times less, or more: `2.50x less`."""
    return f"{ratio:.2f}x {less}" if ratio >= 1 else f"{1 / ratio:.2f}x more"


def _noise(a: Summary, b: Summary) -> float:
    """Half the 95 % interval of a difference of two accuracies, each over so many videos (one run each, no seeds)."""
    p = (a.accuracy + b.accuracy) / 2
    # Laplace's rule keeps the interval open at 0 and 1.
    p = (p * b.videos + 1) / (b.videos + 2)
    return 1.96 * math.sqrt(p * (1 - p) * (1 / max(1, a.videos) + 1 / max(1, b.videos)))


def _share(summary: dict[str, Any], key: str) -> str:
    return f"{duration(summary[key])} ({100 * summary[key] / max(summary['train_seconds'], 1e-9):.0f} %)"


def _brief(value: Any) -> str:
    return "(none)" if value is None else str(value)
