"""The results of a study's runs: a small JSON file for each, and a page that compares them."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from pydantic import TypeAdapter, ValidationError

from mgtrain import __version__
from mgtrain.console import duration
from mgtrain.data import open_splits
from mgtrain.data.videos import few
from mgtrain.errors import CheckpointError, DataError
from mgtrain.recipe import Data, Recipe, affects_results, changed_keys, recipe_differences
from mgtrain.recipe.load import RETIRED
from mgtrain.runs.compare import DEVICE_KEYS, TIME_KEYS, devices
from mgtrain.runs.folder import RunDir
from mgtrain.runs.groups import (
    COLUMNS,
    FOLD_KEYS,
    NOT_ONLY_SCHEDULE,
    Outcome,
    compare_groups,
    table_rows,
    verdicts,
)
from mgtrain.runs.history import History, Summary, guarded
from mgtrain.runs.report import render_page, write_text
from mgtrain.runs.report.figures import COLOURS, drawn
from mgtrain.runs.study.definition import Run, Study

SCHEMA = "mgtrain.result/1"
FACTS = {*DEVICE_KEYS, "torch", "mgtrain", "git"}
PLACES = ("data.root", "data.prepared")  # keys that may differ between a result and its study


@dataclass(frozen=True, slots=True)
class Result:
    variant: str
    outcome: Outcome
    curve: Sequence[Mapping[str, float]]  # step, seconds and accuracy of each evaluation


CURVE = TypeAdapter(list[dict[str, float]])
CURVE_KEYS = ("step", "train_seconds", "clock_seconds", "multiply_adds", "accuracy")
SUMMARY = TypeAdapter(Summary)
FLAT = TypeAdapter(dict[str, Any])


def keep_result(run: Run, folder: RunDir, file: Path) -> None:
    """Write a finished run's result."""
    history = History(folder)
    with guarded(history):
        outcome = Outcome.of(history)
        curve = [{key: round(row[key], 4) for key in CURVE_KEYS} for row in history.curve()]
    value = {
        "schema": SCHEMA,
        "variant": run.variant,
        "summary": asdict(outcome.summary),
        "curve": curve,
        "environment": dict(outcome.env),
        "recipe": dict(outcome.recipe),
        "videos": dict(outcome.videos),
    }
    write_text(file, json.dumps(value, indent=1) + "\n")


def read_result(file: Path) -> Result:
    """Read a result's file. Raises `CheckpointError` if it is damaged or not a result."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        if value["schema"] != SCHEMA:
            raise ValueError(f"its schema is {value['schema']}, not {SCHEMA}")
        if lacking := FACTS - value["environment"].keys():
            raise ValueError(f"its environment lacks {min(lacking)}")
        summary = SUMMARY.validate_python(value["summary"])
        if not min(summary.steps, summary.train_seconds, summary.clock_seconds) > 0:
            raise ValueError("its run took no time")
        devices(value["environment"])
        videos = {part: str(found) for part, found in value.get("videos", {}).items()}  # earlier versions have none
        outcome = Outcome(summary, FLAT.validate_python(value["recipe"]), value["environment"], videos)
        curve = [{key: row[key] for key in CURVE_KEYS} for row in CURVE.validate_python(value["curve"])]
        return Result(str(value["variant"]), outcome, curve)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        what = str(error).replace("\n", " ")
        raise CheckpointError(f"{file}: not a readable result ({what}); remove it to repeat the run") from None


def known_result(run: Run, file: Path) -> Result | None:
    """The result of a run, or None. Raises `CheckpointError` if it is damaged, or of another recipe."""
    if not file.is_file():
        return None
    result = read_result(file)
    if changed := _recipe_changes(run, result):
        raise CheckpointError(f"{file}: {changed}")
    now = run.recipe.flat()
    here = {**result.outcome.recipe, **{key: now[key] for key in PLACES}}
    # The variant may have been renamed in case or punctuation.
    return replace(result, variant=run.variant, outcome=replace(result.outcome, recipe=here))


def check_results(runs: Iterable[Run], kept: Path, folder: Path) -> None:
    """Raise `CheckpointError` if a result in `kept` is damaged, or of another recipe or other videos than its run's.

    Videos that are not here cannot be compared. `folder` has the runs.
    """
    changed: dict[str, str] = {}
    videos: dict[str, Mapping[str, str]] = {}  # fingerprints of each distinct section `data`
    for run in runs:
        if not (file := kept / f"{run.name}.json").is_file():
            continue
        result, data = read_result(file), run.recipe.data.model_dump_json()
        if data not in videos:
            videos[data] = _fingerprints(run.recipe.data)
        if what := _recipe_changes(run, result):
            changed[run.name] = what
        elif videos[data] and result.outcome.videos and videos[data] != result.outcome.videos:
            changed[run.name] = "the study's videos have changed since"
    if changed:
        (name, what), *others = changed.items()
        more = f" (as for {few([*dict(others)])})" if others else ""
        raise CheckpointError(
            f"{kept / name}.json: {what}{more}; to train again, remove the file and {folder / name}; or rename the "
            "variant"
        )


def _recipe_changes(run: Run, result: Result) -> str:
    before, now = completed(result.outcome.recipe), run.recipe.flat()
    timed = {key: value for key, value in recipe_differences(before, now).items() if key in TIME_KEYS}
    changed = [*changed_keys(before, now, PLACES), *(f"{key} {a} -> {b}" for key, (a, b) in timed.items())]
    return f"the study's recipe has changed since: {'; '.join(changed)}" if changed else ""


def _fingerprints(data: Data) -> Mapping[str, str]:
    """Those of the videos of each split; none if the videos are not here."""
    try:
        return {split: videos.fingerprint for split, videos in open_splits(data).items()}
    except DataError:
        return {}


def completed(flat: Mapping[str, Any]) -> Mapping[str, Any]:
    """A recipe of an earlier version with the defaults of newer keys, and without retired ones."""
    tree: dict[str, Any] = {}
    for dotted, value in flat.items():
        *sections, key = dotted.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        if dotted not in RETIRED:
            node[key] = value
    try:
        return Recipe.model_validate_json(json.dumps(tree), strict=True).flat()
    except (ValidationError, AttributeError, TypeError):
        return flat  # not a valid recipe


def summed_up(study: Study, results: Sequence[Result]) -> dict[str, Any]:
    """The comparison of the variants in the study's order: plain values of the schema mgtrain.groups/2."""
    groups = {name: [r.outcome for r in results if r.variant == name] for name in study.variants}
    compared = compare_groups({name: found for name, found in groups.items() if found}, study.margin)
    if lacking := [name for name, found in groups.items() if not found]:
        compared["warnings"].insert(0, f"no result yet: {', '.join(lacking)}")
    # The variants of a study differ on purpose.
    compared["warnings"] = [warning for warning in compared["warnings"] if NOT_ONLY_SCHEDULE not in warning]
    compared["warnings"] += _lacking_runs(groups, ("seed", *FOLD_KEYS, "data.root") if study.folds else ("seed",))
    for group in compared["groups"]:
        group["commits"] = _commits(groups[group["name"]])
    base, *others = compared["groups"]
    for at in sorted({group["commits"] for group in others} - {base["commits"]}):
        names = "; ".join(group["name"] for group in others if group["commits"] == at)
        compared["warnings"].append(
            f"{names}: trained at another commit ({at}) than {base['name']} ({base['commits']}), which may change the "
            "times"
        )
    return compared


def _commits(outcomes: Sequence[Outcome]) -> str:
    return ", ".join(sorted({str(outcome.env["git"] or "unknown") for outcome in outcomes}))


def _lacking_runs(groups: Mapping[str, Sequence[Outcome]], keys: Sequence[str]) -> list[str]:
    """A warning for each variant that lacks runs which others have: they may have failed.

    `keys` are those of the seed and of the fold in a recipe.
    """
    runs = {name: {tuple(outcome.recipe[key] for key in keys) for outcome in found} for name, found in groups.items()}
    wanted = sorted(set().union(*runs.values()))
    warnings = []
    for name, found in runs.items():
        if found and (lacking := [run for run in wanted if run not in found]):
            seeds = ", ".join(map(str, dict.fromkeys(seed for seed, *_ in lacking)))
            what = f"{len(lacking)} runs" if len(lacking) > 1 else "1 run"
            warnings.append(f"{name}: no result of {what} (seed {seeds}); if one failed, the comparison hides that")
    return warnings


def changes_of(results: Sequence[Result], name: str, base: str) -> str:
    """The differences of a variant's recipe from that of the variant `base`, as overrides."""
    ours, theirs = (next(r.outcome.recipe for r in results if r.variant == variant) for variant in (name, base))
    changes = [key for key in recipe_differences(theirs, ours) if affects_results(key) and key in ours]
    return " ".join(f"{key}={json.dumps(ours[key])}" for key in changes)


def facts_of(results: Sequence[Result]) -> dict[str, list[str]]:
    """Devices, versions and commits of the runs, and their total time."""
    env = [result.outcome.env for result in results]
    seconds = sum(result.outcome.summary.clock_seconds for result in results)

    def each(*keys: str) -> list[str]:
        return sorted({" ".join(str(e[key]) for key in keys) for e in env})

    return {
        "device": each("device"),
        "processes and threads of a run": [" x ".join(pair.split()) for pair in each("ranks", "threads")],
        "PyTorch": each("torch"),
        "mgtrain": each("mgtrain"),
        "commits": [_commits([result.outcome for result in results])],
        "runs": [f"{len(results)} runs, {duration(seconds)} in all"],
    }


def draw_curves(axes: Axes, results: Sequence[Result], colours: Mapping[str, str], key: str, unit: float) -> None:
    """Draw the accuracy of every run against a key of its curve, in units of `unit`."""
    for variant, colour in colours.items():
        for n, result in enumerate(result for result in results if result.variant == variant):
            x, y = ([point[of] / per for point in result.curve] for of, per in ((key, unit), ("accuracy", 0.01)))
            axes.plot(x, y, color=colour, label=variant if n == 0 else None, alpha=0.8, linewidth=1.2)
            axes.plot(x[-1:], y[-1:], color=colour, marker="o", markersize=4)
    axes.set_ylabel(f"{results[0].outcome.summary.metric}, %")
    axes.set_xlim(0, None)
    axes.grid(alpha=0.2)
    axes.legend(fontsize=8, loc="lower right")


def write_study_page(study: Study, file: Path, results: Sequence[Result], path: Path) -> None:
    """Write the study in `file` as one HTML file: question, table, verdicts, curves, differences of the recipes."""
    compared = summed_up(study, results)
    variants = [group["name"] for group in compared["groups"]]
    colours = {variant: COLOURS[n % len(COLOURS)] for n, variant in enumerate(variants)}
    title = "accuracy against wall-clock time, a line for each run"

    def draw(axes: Axes) -> None:
        draw_curves(axes, results, colours, "clock_seconds", 60)
        axes.set_xlabel("minutes of wall-clock time")

    page = render_page(
        "study.html.j2",
        version=__version__,
        name=file.stem,
        file=file,
        study=study,
        complete=len(results) == len(study.variants) * len(study.seeds) * max(1, len(study.folds)),
        columns=COLUMNS,
        rows=table_rows(compared),
        colours=[colours[variant] for variant in variants],
        verdicts=verdicts(compared),
        warnings=compared["warnings"],
        figure={"title": title, "svg": drawn(f"study-{file.stem}", title, draw)},
        changes=[(variant, changes_of(results, variant, variants[0])) for variant in variants],
        runs=[
            [r.outcome.summary.name, r.variant, f"{100 * r.outcome.summary.accuracy:.1f} %",
             duration(r.outcome.summary.train_seconds), duration(r.outcome.summary.clock_seconds)]
            for r in results
        ],
        facts=facts_of(results),
    )  # fmt: skip
    write_text(path, page)
