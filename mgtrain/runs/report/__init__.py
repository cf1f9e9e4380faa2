"""A report of runs as one self-contained HTML file: costs, accuracy, figures, and how to reproduce them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from mgtrain import __version__
from mgtrain.errors import CheckpointError
from mgtrain.processes.files import write_whole
from mgtrain.recipe import recipe_differences
from mgtrain.runs.compare import COST_ROWS, MARGIN, compare, shown_cost, times
from mgtrain.runs.folder import RunDir
from mgtrain.runs.groups import SEED_KEYS, Outcome, compare_groups, grouped, verdicts
from mgtrain.runs.history import History, guarded
from mgtrain.runs.report.figures import COLOURS, curves, schedule, time_split
from mgtrain.runs.scores import Scores

MOST_CLASSES = 12  # in the table of classes whose accuracy changed most


def write_report(
    runs: Sequence[RunDir], path: Path, frames: Sequence[dict[str, Any]] = (), margin: float = MARGIN
) -> None:
    """Write a report, or raise `CheckpointError`. The first run is the baseline; `frames` are of `example_frames`."""
    write_text(path, render_report(runs, frames, margin))


def render_report(runs: Sequence[RunDir], frames: Sequence[dict[str, Any]] = (), margin: float = MARGIN) -> str:
    histories = [History(run) for run in runs]
    colours = [COLOURS[n % len(COLOURS)] for n in range(len(histories))]
    comparisons = [compare(histories[0], history, margin) for history in histories[1:]]
    groups = grouped(histories)
    several = any(len(members) > 1 for members in groups.values()) and len(groups) > 1
    together = (
        compare_groups(groups, margin) if several and all(c["runs"][0]["finished"] for c in comparisons) else None
    )
    with guarded(*runs):
        context = {
            "version": __version__,
            "runs": histories,
            "colours": colours,
            "comparisons": comparisons,
            "together": {"verdicts": verdicts(together), "warnings": together["warnings"]} if together else None,
            "differences": _differences(histories[0], groups if together else {}, comparisons),
            "rows": _table(histories, comparisons),
            "curves": curves(histories, colours),
            "figures": [
                figure
                for run, colour in zip(histories, colours, strict=True)
                for figure in (schedule(run, colour), time_split(run, _split(run), colour))
            ],
            "classes": [_changes(histories[0], run) for run in histories],
            "frames": frames,
        }
    return render_page("report.html.j2", **context)


def render_page(template: str, **context: Any) -> str:
    """The page of a template; values are escaped."""
    environment = Environment(
        loader=PackageLoader("mgtrain.runs.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(template).render(context)


def write_text(path: Path, page: str) -> None:
    """Write a file atomically. Raises `CheckpointError` if that fails."""
    try:
        write_whole(path, page.encode(errors="backslashreplace"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error}") from None


def _split(run: History) -> list[dict[str, Any]]:
    """Seconds of computing, of waiting for data and of evaluating in each phase."""
    rows = [*run.steps, *run.evals]
    found, train, data = [], 0.0, 0.0
    for phase in run.plan_file["phases"]:
        index = phase["index"]
        mine = [row for row in rows if row["step"] <= phase["first_step"] + phase["steps"]]
        if not any(row["phase"] == index for row in mine):
            continue
        before = train, data
        train, data = (max(row[key] for row in mine) for key in ("train_seconds", "data_seconds"))
        waiting = data - before[1]
        evaluating = sum(row["eval_seconds"] for row in run.evals if row["phase"] == index)
        computing = train - before[0] - waiting
        found.append({"phase": index, "compute": computing, "data": waiting, "evaluation": evaluating})
    return found


def _differences(
    baseline: History, groups: Mapping[str, Sequence[Outcome]], comparisons: Sequence[dict[str, Any]]
) -> dict[str, Mapping[str, tuple[Any, Any]]]:
    """The keys in which each other recipe differs from the baseline's: of groups, by their first run."""
    if not groups:
        return {comparison["runs"][1]["name"]: comparison["recipe_differences"] for comparison in comparisons}
    return {
        members[0].summary.name: {
            key: values
            for key, values in recipe_differences(baseline.recipe.flat(), members[0].recipe).items()
            if key not in SEED_KEYS
        }
        for members in groups.values()
    }


def _table(runs: Sequence[History], comparisons: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the table of costs and results, with gains over the baseline."""
    summaries = [run.summary for run in runs]
    metric = summaries[0].metric
    rows = [(label, [shown_cost(asdict(s), key, form) for s in summaries], key) for label, key, form in COST_ROWS]
    results = {metric: "accuracy", f"best {metric}": "best_accuracy", "mean class": "mean_class", "top-5": "top5"}
    for label, key in results.items():
        shares = [getattr(summary, key) for summary in summaries]
        if any(share is not None for share in shares):
            rows.append((label, ["" if share is None else f"{100 * share:.1f} %" for share in shares], key))

    def gain(comparison: dict[str, Any], key: str) -> str:
        ratio = comparison["speedups"].get(key)
        return "" if ratio is None else times(ratio)

    return [
        {"label": label, "values": values, "gains": ["", *(gain(c, key) for c in comparisons)]}
        for label, values, key in rows
    ]


def _changes(baseline: History, run: History) -> dict[str, Any]:
    """The classes whose accuracy differs most from the baseline's, and the most frequent mistakes."""
    classes, last = run.data["classes"], run.evals[-1]
    before, after = (Scores.of(row).per_class() for row in (baseline.evals[-1], last))
    rows = [
        {"name": name, "before": a, "after": b, "videos": videos}
        for name, a, b, videos in zip(classes, before, after, last["counts"], strict=True)
        if a is not None and b is not None
    ] if run is not baseline and classes == baseline.data["classes"] else []  # fmt: skip
    rows.sort(key=lambda row: -abs(row["after"] - row["before"]))
    mistakes = [
        {"class": classes[label], "predicted": classes[predicted], "videos": count}
        for label, predicted, count in last.get("mistakes", ())
    ]
    return {"name": run.name, "rows": rows[:MOST_CLASSES], "of": len(rows), "mistakes": mistakes}
