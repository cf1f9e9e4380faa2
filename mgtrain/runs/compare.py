"""Compare a run with its baseline: costs, accuracy and a verdict."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Group
from rich.text import Text

from mgtrain.console import duration, table
from mgtrain.errors import ThresholdError, UsageError
from mgtrain.recipe import affects_results, recipe_differences
from mgtrain.runs.folder import RunDir
from mgtrain.runs.history import History, Summary, guarded, speedup_at_equal_accuracy, time_to_accuracy
from mgtrain.runs.statistics import Interval, Z, judge, mcnemar, paired_shares, unpaired_shares

MARGIN = 1.0  # points of accuracy by which a run may be lower and still count as not lower
DEVICE_KEYS = ("device", "ranks", "threads")  # runs with the same values have comparable times
VERSION_KEYS = ("mgtrain", "torch")
TIMES = ("train_seconds", "clock_seconds", "gpu_hours")
# Keys that change times but no result beyond rounding, and that a run does not set by itself, as it does memory's.
TIME_KEYS = (
    "evaluation.times",
    *(f"hardware.{key}" for key in ("channels_last", "compile", "deterministic", "tf32", "workers")),
)


def compare(baseline: RunDir | History, run: RunDir | History, margin: float = MARGIN) -> dict[str, Any]:
    """Compare a run with its baseline, as plain values. Raises `CheckpointError` if the logs of one are damaged."""
    with guarded(baseline, run):
        return _compare(History.of(baseline), History.of(run), margin)


def _compare(baseline: History, run: History, margin: float) -> dict[str, Any]:
    theirs, ours = baseline.summary, run.summary
    check_alike_scores((theirs, ours))
    first, second = devices(baseline.env)[0], devices(run.env)[0]
    other_device = [f"{key} {a} and {b}" for key, a, b in zip(DEVICE_KEYS, first, second, strict=True) if a != b]
    other_device += [
        f"{history.name} ran on {', then on '.join(' x '.join(map(str, part)) for part in parts)}"
        for history in (baseline, run)
        if len(parts := devices(history.env)) > 1
    ]
    differences = recipe_differences(baseline.recipe.flat(), run.recipe.flat())
    warnings = [
        f"{summary.name} is unfinished: its numbers are those after {summary.steps} steps"
        for summary in (theirs, ours)
        if not summary.finished
    ]
    warnings += [f"{history.name} changed {what}" for history in (baseline, run) for what in changed(history.env)]
    if other_device:
        warnings.append(f"times are not compared, because the runs used different devices: {'; '.join(other_device)}")
    warnings += [] if other_device else other_versions((baseline.env, run.env))
    if baseline.data != run.data:
        warnings.append("the runs have different training or validation videos")
    if unfair := unfair_keys(differences):
        warnings.append(f"the recipes do not only differ in schedule, but also in {', '.join(unfair)}")
    if timed := [key for key in differences if key in TIME_KEYS]:
        warnings.append(f"the recipes differ in {', '.join(timed)}, which changes the times")
    if old := [history.name for history in (baseline, run) if not history.knows_clock]:
        warnings.append(
            f"{' and '.join(old)}: from an earlier version, so the wall-clock time excludes start-up and checkpoints"
        )

    done = theirs.finished and ours.finished  # otherwise the ratio of their costs says nothing
    speedups: dict[str, float | None] = {
        key: getattr(theirs, key) / getattr(ours, key) if done and not (other_device and key in TIMES) else None
        for key in ("steps", "epochs", "clips", "voxels", "multiply_adds", *TIMES)
    }
    speedups["at_equal_accuracy"] = None if other_device else speedup_at_equal_accuracy(baseline.evals, run.evals)
    target, (found, test) = theirs.best_accuracy, accuracy_test(baseline, run)
    result = {
        "schema": "mgtrain.compare/3",
        "runs": [asdict(theirs), asdict(ours)],
        "speedups": speedups,
        "accuracy_difference": found.value,
        "accuracy_interval": [found.low, found.high],
        **test,
        "margin": margin,
        "judged": judge(found.scaled(100), margin),
        "baseline_best": {
            "accuracy": target,
            "baseline_seconds": time_to_accuracy(baseline.evals, target),
            "seconds": time_to_accuracy(run.evals, target),
        },
        "recipe_differences": differences,
        "warnings": warnings,
    }
    return {**result, "verdict": _verdict(theirs, ours, result)}


def check_alike_scores(runs: Iterable[Summary]) -> None:
    """Raise `UsageError` if some runs have another kind of accuracy than the first one."""
    first, *others = runs
    if odd := next((other for other in others if other.metric != first.metric), None):
        raise UsageError(
            f"{first.name} is scored by {first.metric}, {odd.name} by {odd.metric}; compare runs with the same score"
        )


def devices(env: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """The values of `DEVICE_KEYS` that a run has had, in order: more than one if it was resumed elsewhere."""
    return [tuple(values) for values in env.get("devices", ())] or [tuple(env[key] for key in DEVICE_KEYS)]


def changed(env: Mapping[str, Any]) -> list[str]:
    """What changed while a run trained; its costs are computed as if it had always had its last recipe."""
    return [str(what) for what in env.get("changed", ())]


def other_versions(environments: Iterable[Mapping[str, Any]]) -> list[str]:
    """A warning if runs were trained with different versions, from their `env.json`."""
    versions = sorted({", ".join(f"{key} {env.get(key, 'unknown')}" for key in VERSION_KEYS) for env in environments})
    return [f"different versions may change the times: {'; '.join(versions)}"] if len(versions) > 1 else []


def accuracy_test(baseline: History, run: History) -> tuple[Interval, dict[str, Any]]:
    """The difference in accuracy with its interval, and for top-1 of the same videos a paired test.

    A paired difference is that of the videos which both runs could read. The interval of mean average precision takes
    the runs' errors for independent, so it is too wide for the same videos.
    """
    theirs, ours = baseline.summary, run.summary
    if ours.metric != "top-1":
        errors: list[Any] = [history.evals[-1].get("mean_ap_sd") for history in (baseline, run)]
        change = ours.accuracy - theirs.accuracy
        half = Z * math.hypot(*errors) if all(errors) else None  # an error of 0: resampling shows no spread
        ends = (None, None) if half is None else (change - half, change + half)
        return Interval(change, *ends), {"only_one_right": None, "mcnemar": None, "same_videos": None}
    a, b, only, same = baseline.right(), run.right(), None, None
    if a is not None and b is not None and baseline.data["val"]["fingerprint"] == run.data["val"]["fingerprint"]:
        known = (a >= 0) & (b >= 0)
        a, b, same = a[known] == 1, b[known] == 1, int(known.sum())
        only = int((a & ~b).sum()), int((b & ~a).sum())
        found = paired_shares(int((a & b).sum()), *only, int((~a & ~b).sum()))
    else:
        first, second = (round(summary.top1 * summary.videos) for summary in (theirs, ours))
        found = unpaired_shares(first, theirs.videos, second, ours.videos)
    return found, {"only_one_right": only and list(only), "mcnemar": only and mcnemar(*only), "same_videos": same}


def unfair_keys(keys: Iterable[str]) -> list[str]:
    """Those of the keys in which recipes differ that a comparison of schedules should not vary."""
    return [key for key in keys if affects_results(key) and key.partition(".")[0] != "schedule"]


def demand(result: dict[str, Any], wanted: Mapping[str, float]) -> None:
    """Raise `ThresholdError` if a comparison of two runs does not reach the `wanted` minima.

    `speedup` is the ratio of training times, `clock` of wall-clock times, `steps` of numbers of steps; `accuracy` (or
    `top1`) is the difference in points.
    """
    found = {
        "speedup": result["speedups"]["train_seconds"],
        "clock": result["speedups"]["clock_seconds"],
        "steps": result["speedups"]["steps"],
        "accuracy": 100 * result["accuracy_difference"],
        "top1": 100 * (result["runs"][1]["top1"] - result["runs"][0]["top1"]),
    }
    if early := [run["name"] for run in result["runs"] if not run["finished"]]:
        raise ThresholdError(f"{early[0]} is unfinished, so its gain is not known")
    for key, least in wanted.items():
        if found[key] is None:
            raise ThresholdError(f"{key} is not known, because the runs used different devices")
        if round(found[key], 9) < least:  # 0.5 points of 200 videos are not quite so as a difference of floats
            raise ThresholdError(f"{key} is {found[key]:.2f}, less than {least:g}")


COST_ROWS = (  # the rows of each table of costs: label, key of `Summary`, format
    ("steps", "steps", "{:,}"),
    ("epochs", "epochs", "{:.1f}"),
    ("clips", "clips", "{:,}"),
    ("voxels", "voxels", "{:.3g}"),
    ("multiply-adds, forward", "multiply_adds", "{:.3g}"),
    ("training time", "train_seconds", "time"),
    ("  waiting for data", "data_seconds", "share"),
    ("device-hours", "gpu_hours", "{:.3g}"),
    ("evaluations", "evaluations", "{:,}"),
    ("  time of evaluations", "eval_seconds", "time"),
    ("wall-clock time", "clock_seconds", "time"),
)


def shown_cost(summary: Mapping[str, Any], key: str, form: str) -> str:
    """One of the `COST_ROWS` of a run, formatted."""
    value = summary[key]
    if form == "share":
        return f"{duration(value)} ({100 * value / max(summary['train_seconds'], 1e-9):.0f} %)"
    return duration(value) if form == "time" else form.format(value)


def render(result: dict[str, Any]) -> Group:
    """The comparison for the terminal: warnings, table, differences of the recipes, verdict."""
    theirs, ours = result["runs"]
    why = "different devices" if theirs["finished"] and ours["finished"] else "unfinished"
    gains = {key: why if x is None else times(x) for key, x in result["speedups"].items()}
    rows = [
        (label, shown_cost(theirs, key, form), shown_cost(ours, key, form), gains.get(key, ""))
        for label, key, form in COST_ROWS
    ]
    scores = ((ours["metric"], "accuracy"), ("top-1", "top1"), ("mean class", "mean_class"), ("top-5", "top5"))
    for name, key in scores:
        known = theirs[key] is not None and ours[key] is not None
        if known and (key == "accuracy" or name != ours["metric"]):
            a, b = (100 * summary[key] for summary in (theirs, ours))
            rows.append((name, f"{a:.1f} %", f"{b:.1f} %", f"{b - a:+.1f}"))
    losses = [summary["train_loss"] for summary in (theirs, ours)]
    if None not in losses:
        rows.append(("training loss at the end", f"{losses[0]:.3f}", f"{losses[1]:.3f}", ""))
    if result["only_one_right"] is not None:
        first, second = (f"{count:,}" for count in result["only_one_right"])
        rows.append(("  videos that only this run gets right", first, second, f"p = {result['mcnemar']:.2g}"))
    best = result["baseline_best"]
    seconds = "not reached" if best["seconds"] is None else duration(best["seconds"])
    factor = result["speedups"]["at_equal_accuracy"] and best["seconds"] and best["baseline_seconds"] / best["seconds"]
    label = f"time to {100 * best['accuracy']:.1f} % {ours['metric']}"
    rows.append((label, duration(best["baseline_seconds"]), seconds, times(factor) if factor else ""))

    costs = table(("", theirs["name"], ours["name"], "gain"), rows, left=1, wrap=True)
    notes = [Text(f"note: {warning}", style="yellow") for warning in result["warnings"]]
    changed = [
        Text(f"  {key}: {' -> '.join('(none)' if value is None else str(value) for value in values)}")
        for key, values in result["recipe_differences"].items()
    ]
    return Group(*notes, costs, Text("\nthe recipes differ in" if changed else "\nthe recipes are the same"), *changed,
                 Text(f"\n{result['verdict']}", style="bold"))  # fmt: skip


def _verdict(theirs: Summary, ours: Summary, result: dict[str, Any]) -> str:
    gains, videos = result["speedups"], f"{ours.videos:,} videos"
    cost = ""
    if gains["train_seconds"]:
        cost = f"{times(gains['train_seconds'])} training time, {times(gains['clock_seconds'])} wall-clock time, "
    if gains["steps"]:
        cost += f"{step_words(gains['steps'])}; "
    if result["same_videos"] is not None:
        videos = f"the same {result['same_videos']:,} videos"
    so_far = "" if theirs.finished and ours.finished else "so far (unfinished): "
    return (
        f"{so_far}{ours.name} against {theirs.name}: {cost}"
        f"{ours.metric} {100 * ours.accuracy:.1f} % against {100 * theirs.accuracy:.1f} %, {result['judged']}, "
        f"one run each on {videos}; other seeds may differ"
    )


def step_words(ratio: float) -> str:
    """A ratio of numbers of steps in words."""
    return "as many steps" if ratio == 1 else f"{times(ratio, 'fewer')} steps"


def times(ratio: float, less: str = "less", ends: tuple[float, float] | None = None) -> str:
    """A ratio in words, with the ends of its interval, such as `2.50x (2.40 to 2.60) less` or `1.20x more`."""
    if ratio < 1:
        ratio, less, ends = 1 / ratio, "more", (1 / ends[1], 1 / ends[0]) if ends else None
    return f"{ratio:.2f}x {f'({ends[0]:.2f} to {ends[1]:.2f}) ' if ends else ''}{less}"
