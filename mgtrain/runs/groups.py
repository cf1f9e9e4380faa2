"""Compare groups of runs, such as the seeds of two recipes: means, confidence intervals and verdicts."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from mgtrain.console import duration, table
from mgtrain.errors import CheckpointError, UsageError
from mgtrain.recipe import affects_results, recipe_differences
from mgtrain.runs.compare import (
    MARGIN,
    TIME_KEYS,
    changed,
    check_alike_scores,
    devices,
    other_versions,
    step_words,
    times,
    unfair_keys,
)
from mgtrain.runs.folder import RunDir
from mgtrain.runs.history import History, Summary, guarded
from mgtrain.runs.statistics import judge, mean, paired_means, ratio, welch

GROUPS = "mgtrain.groups/2"  # schema
NOT_ONLY_SCHEDULE = "does not only differ in schedule, but also in"
COSTS = ("steps", "epochs", "multiply_adds", "train_seconds", "clock_seconds")
COLUMNS = (
    "",
    "runs",
    "accuracy",
    "± sd",
    "95 %",
    "steps",
    "epochs",
    "training time",
    "gain",
    "wall-clock time",
    "gain",
)
FOLD_KEYS = ("data.train", "data.val")
SEED_KEYS = ("seed", *FOLD_KEYS)  # keys in which the runs of a group may differ


@dataclass(frozen=True, slots=True)
class Outcome:
    """The data of one run that a comparison of groups needs."""

    summary: Summary
    recipe: Mapping[str, Any]  # dotted key -> value
    env: Mapping[str, Any]  # `env.json`
    videos: Mapping[str, str] = field(default_factory=dict)  # fingerprints of "train" and "val"; empty if unknown

    @classmethod
    def of(cls, run: RunDir | History) -> Outcome:
        history = History.of(run)
        with guarded(history):
            videos = {part: str(history.data[part]["fingerprint"]) for part in ("train", "val")}
            return cls(history.summary, history.recipe.flat(), history.env, videos)


def grouped(runs: Iterable[RunDir | History]) -> dict[str, list[Outcome]]:
    """Group runs of the same recipe with any seeds and lists of videos; a group has the name of its first run."""
    found: dict[str, list[Outcome]] = {}
    for outcome in map(Outcome.of, runs):
        kept = {
            key: value
            for key, value in outcome.recipe.items()
            if (affects_results(key) or key in TIME_KEYS) and key not in SEED_KEYS
        }
        found.setdefault(json.dumps(kept, sort_keys=True), []).append(outcome)
    named: dict[str, list[Outcome]] = {}
    for members in found.values():
        name = next((member for member in members if member.summary.finished), members[0]).summary.name
        named[f"{name} ({len(named) + 1})" if name in named else name] = members  # runs in different folders
    return named


def compare_groups(groups: Mapping[str, Sequence[Outcome]], margin: float = MARGIN) -> dict[str, Any]:
    """Compare groups with the first one: plain values of the schema mgtrain.groups/2.

    Runs are paired by seed if both groups have the same ones; otherwise Welch's t compares the groups. With several
    folds, which differ more than seeds do, the seeds of a fold count as one run, and the folds are paired.
    Unfinished runs are skipped with a warning; `UsageError` if the first group has none finished, or if some runs have
    another kind of accuracy.
    """
    warnings, done = [], {}
    # A study's folds may be folders. Runs of other machines, which have other folders, are other groups.
    folders = any(len({outcome.recipe["data.root"] for outcome in members}) > 1 for members in groups.values())
    fold_keys = (*FOLD_KEYS, "data.root") if folders else FOLD_KEYS
    for name, members in groups.items():
        done[name] = [outcome for outcome in members if outcome.summary.finished]
        warnings += [f"{outcome.summary.name} changed {what}" for outcome in members for what in changed(outcome.env)]
        for summary in (outcome.summary for outcome in members if not outcome.summary.finished):
            warnings.append(f"{summary.name} is unfinished ({summary.steps:,} steps) and not in the means")
    base_name = next(iter(groups))
    base = done[base_name]
    if not base:
        raise UsageError(f"{base_name}: no run of this group is finished; compare two runs to see their progress")
    outcomes = [outcome for members in done.values() for outcome in members]
    check_alike_scores(outcome.summary for outcome in outcomes)
    same = len({device for outcome in outcomes for device in devices(outcome.env)}) == 1
    if not same:
        warnings.append("times are not compared, because the runs used different devices")
    warnings += other_versions(outcome.env for outcome in outcomes) if same else []
    videos: dict[tuple[Any, ...], set[str]] = {}
    for outcome in (outcome for outcome in outcomes if outcome.videos):
        videos.setdefault(_fold(outcome, fold_keys), set()).add(json.dumps(dict(outcome.videos), sort_keys=True))
    if any(len(found) > 1 for found in videos.values()):
        warnings.append("the runs have different training or validation videos, though their lists have the same names")
    rows = []
    for name, members in done.items():
        if not members:
            continue
        if len(members) == 1:
            warnings.append(f"{name}: one run does not show the spread between seeds; train more seeds")
        folds = [*_units(members, fold_keys, by_fold=True).values()]
        units = folds if len(folds) > 1 else [[outcome] for outcome in members]
        spread = {key: mean([mean(_values(unit, key)).value for unit in units]) for key in ("accuracy", *COSTS)}
        if len(members) > 1 and spread["accuracy"].sd == 0:
            warnings.append(f"{name}: {len(units)} equal accuracies do not show the spread; train more seeds")
        row: dict[str, Any] = {
            "name": name,
            "runs": [asdict(outcome.summary) for outcome in members],
            "seeds": [outcome.recipe["seed"] for outcome in members],
            **{key: asdict(value) for key, value in spread.items()},
        }
        if name != base_name:
            row |= _against(base, members, fold_keys, name, same, margin, warnings)
        rows.append(row)
    return {"schema": GROUPS, "margin": margin, "groups": rows, "warnings": warnings}


def _against(
    base: Sequence[Outcome],
    members: Sequence[Outcome],
    fold_keys: Sequence[str],
    name: str,
    same: bool,
    margin: float,
    warnings: list[str],
) -> dict[str, Any]:
    """Compare a group with the first one, paired if possible; adds to `warnings`."""
    differences = recipe_differences(base[0].recipe, members[0].recipe)
    if unfair := [key for key in unfair_keys(differences) if key not in SEED_KEYS]:
        warnings.append(f"{name}: {NOT_ONLY_SCHEDULE} {', '.join(unfair)}")
    if timed := [key for key in differences if key in TIME_KEYS]:
        warnings.append(f"{name}: differs in {', '.join(timed)}, which changes the times")
    folds = {_fold(outcome, fold_keys) for outcome in (*base, *members)}
    by_fold = len(folds) > 1
    units = [_units(outcomes, fold_keys, by_fold) for outcomes in (base, members)]
    shared = [unit for unit in units[0] if unit in units[1]]
    complete = all(len(of) == len(shared) for of in units)
    repeated = len(units[0]) < len(base) or len(units[1]) < len(members)  # several runs of a fold, or of a seed
    paired = bool(shared) if by_fold else len(shared) > 1 and complete and not repeated
    if paired and not complete:
        which = "1 fold is" if len(shared) == 1 else f"{len(shared)} folds are"
        warnings.append(f"{name}: only {which} in both groups; the others are ignored")

    def values(group: int, key: str) -> list[float]:
        if not by_fold and not paired:
            return _values((base, members)[group], key)
        return [mean(_values(units[group][unit], key)).value for unit in (shared if paired else units[group])]

    both = {*_units(base, fold_keys, by_fold=False)} & {*_units(members, fold_keys, by_fold=False)}
    change = (paired_means if paired else welch)(values(0, "accuracy"), values(1, "accuracy"))
    compared = [key for key in COSTS if same or not key.endswith("seconds")]
    return {
        "pairs": len(both) if paired and len(both) == len(base) == len(members) else None,
        "folds": (len(shared) if paired else len(folds)) if by_fold else None,
        "difference": asdict(change),
        "speedups": {key: asdict(ratio(values(0, key), values(1, key), paired)) for key in compared},
        "judged": judge(change.scaled(100), margin, "folds" if by_fold else "seeds"),
    }


def _units(outcomes: Sequence[Outcome], fold_keys: Sequence[str], by_fold: bool) -> dict[Any, list[Outcome]]:
    """The runs that count as one: those of each fold if there are several, because folds differ more than seeds."""
    units: dict[Any, list[Outcome]] = {}
    for outcome in outcomes:
        fold = _fold(outcome, fold_keys)
        units.setdefault(fold if by_fold else (outcome.recipe["seed"], *fold), []).append(outcome)
    return units


def _fold(outcome: Outcome, fold_keys: Sequence[str]) -> tuple[Any, ...]:
    """The lists of videos, and their folder if it is one of `fold_keys`."""
    return tuple(outcome.recipe[key] for key in fold_keys)


def _values(outcomes: Sequence[Outcome], key: str) -> list[float]:
    return [getattr(outcome.summary, key) for outcome in outcomes]


def render_groups(result: dict[str, Any]) -> Group:
    """The groups for the terminal: warnings, table, verdicts."""
    notes = [Text(f"note: {warning}", style="yellow") for warning in result["warnings"]]
    lines = [Text(verdict, style="bold") for verdict in verdicts(result)]
    return Group(*notes, table(COLUMNS, table_rows(result), left=1, wrap=True), *([Text("")] if lines else []), *lines)


def table_rows(result: dict[str, Any]) -> list[list[str]]:
    """The cells of `COLUMNS` for each group, with its gain over the first."""

    def ends(value: Mapping[str, Any]) -> str:
        low, high = value["low"], value["high"]
        return "" if low is None else f"{100 * max(0, low):.1f} to {100 * min(1, high):.1f}"

    return [
        [
            group["name"],
            str(len(group["runs"])),
            f"{100 * group['accuracy']['value']:.1f} % {group['runs'][0]['metric']}",
            f"{100 * group['accuracy']['sd']:.1f}" if group["accuracy"]["sd"] else "",
            ends(group["accuracy"]),
            f"{group['steps']['value']:,.0f}",
            f"{group['epochs']['value']:.1f}",
            duration(group["train_seconds"]["value"]),
            gain(group, "train_seconds"),
            duration(group["clock_seconds"]["value"]),
            gain(group, "clock_seconds"),
        ]
        for group in result["groups"]
    ]


def gain(group: Mapping[str, Any], key: str) -> str:
    """How many times less a group takes than the first one, with its interval, such as `3.67x (3.60 to 3.75)`."""
    found = group.get("speedups", {}).get(key)
    if found is None:
        return ""
    ends = "" if found["low"] is None else f" ({found['low']:.2f} to {found['high']:.2f})"
    return f"{found['value']:.2f}x{ends}"


def verdicts(result: dict[str, Any]) -> list[str]:
    """A sentence for each group except the first."""
    base, *others = result["groups"]
    lines = []
    for group in others:
        gains = group["speedups"]
        time = step_words(gains["steps"]["value"])
        if "train_seconds" in gains:
            training, clock = (
                times(gain["value"], ends=None if gain["low"] is None else (gain["low"], gain["high"]))
                for gain in (gains["train_seconds"], gains["clock_seconds"])
            )
            time = f"{training} training time, {clock} wall-clock time, {time}"
        sizes = len(base["runs"]), len(group["runs"])
        runs = "one run each" if sizes == (1, 1) else f"{sizes[0]} and {sizes[1]} runs"
        if group["pairs"]:
            runs = f"{group['pairs']} pairs of runs"
        if group["folds"] not in (None, group["pairs"]):
            runs += f" in {group['folds']} folds"
        metric = group["runs"][0]["metric"]
        lines.append(f"{group['name']} against {base['name']}: {time}; {metric}: {group['judged']}, {runs}")
    return lines


def write_csv(outcomes: Iterable[Outcome], path: Path) -> None:
    """Write a CSV file with a row for each run: its summary and its seed."""
    rows = [{**asdict(outcome.summary), "seed": outcome.recipe["seed"]} for outcome in outcomes]
    try:
        with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error}") from None
