"""Runs as one HTML file: what was gained, how, and how to see it again. It needs nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from mgtrain import __version__
from mgtrain.console import duration
from mgtrain.errors import CheckpointError
from mgtrain.runs.compare import compare, guarded, multiply_adds_until, summarize, times
from mgtrain.runs.folder import RunDir, accuracy
from mgtrain.runs.report.figures import COLOURS, curves, schedule, time_split

MOST_CLASSES = 12  # that changed most, or are confused most


def write_report(runs: Sequence[RunDir], path: Path, frames: Sequence[dict[str, Any]] = ()) -> None:
    """Write what `mgtrain report` shows; the first run is the others' baseline.

    `frames` are pictures of clips, as `engine.examples.example_frames` gives them.

    Raises:
        CheckpointError: a run's logs are damaged, or the file cannot be written.
    """
    page = render_report(runs, frames)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
        temporary.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error}") from None


def render_report(runs: Sequence[RunDir], frames: Sequence[dict[str, Any]] = ()) -> str:
    """The page."""
    comparisons = [compare(runs[0], run) for run in runs[1:]]
    with guarded(*runs):
        described = [_describe(run, colour) for run, colour in zip(runs, _colours(len(runs)), strict=True)]
        figures = [figure for view in described for figure in (schedule(view), time_split(view))]
        context = {
            "version": __version__,
            "runs": described,
            "comparisons": comparisons,
            "rows": _table(described, comparisons),
            "curves": curves(described),
            "figures": figures,
            "classes": [_changes(described[0], view) for view in described[1:]],
            "frames": frames,
            "duration": duration,
        }
    environment = Environment(
        loader=PackageLoader("mgtrain.runs.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html.j2").render(context)


def _colours(count: int) -> list[str]:
    return [COLOURS[n % len(COLOURS)] for n in range(count)]


def _describe(run: RunDir, colour: str) -> dict[str, Any]:
    """All that the page tells of one run, as plain values."""
    evals, plan = run.rows("evals.jsonl"), run.read("plan.json")
    summary = summarize(run)
    work = multiply_adds_until(run, [row["step"] for row in evals])
    return {
        "name": run.name,
        "colour": colour,
        "summary": summary,
        "recipe": run.recipe().to_yaml(),
        "environment": run.read("env.json"),
        "data": {key: value for key, value in run.read("data.json").items() if key != "classes"},
        "classes": run.read("data.json")["classes"],
        "phases": plan["phases"],
        "split": _split(run, plan),
        "curve": [
            {
                "seconds": row["train_seconds"],
                "steps": row["step"],
                "epochs": row["epoch"],
                "multiply_adds": done,
                "gpu_hours": summary.gpu_hours * row["train_seconds"] / max(summary.train_seconds, 1e-9),
                "accuracy": accuracy(row),
                "loss": row["loss"],
            }
            for row, done in zip(evals, work, strict=True)
        ],
        "last": evals[-1],
    }


def _split(run: RunDir, plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Seconds of computing, of waiting for data and of evaluating, in each phase."""
    ends = {phase["index"]: phase["first_step"] + phase["steps"] for phase in plan["phases"]}
    rows = [*run.rows("steps.jsonl"), *run.rows("evals.jsonl")]
    found, before = [], (0.0, 0.0)
    for index, end in ends.items():
        mine = [row for row in rows if row["step"] <= end]
        if not any(row["phase"] == index for row in mine):
            continue
        now = max(row["train_seconds"] for row in mine), max(row["data_seconds"] for row in mine)
        waiting = now[1] - before[1]
        evaluating = sum(row["eval_seconds"] for row in run.rows("evals.jsonl") if row["phase"] == index)
        found.append(
            {"phase": index, "compute": now[0] - before[0] - waiting, "data": waiting, "evaluation": evaluating}
        )
        before = now
    return found


def _table(described: Sequence[dict[str, Any]], comparisons: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as in the paper: what a run cost, and what came out, with the gain over the baseline."""
    summaries = [view["summary"] for view in described]
    rows = [
        ("epochs", [f"{s.epochs:.1f}" for s in summaries], "epochs"),
        ("steps", [f"{s.steps:,}" for s in summaries], "steps"),
        ("clips", [f"{s.clips:,}" for s in summaries], "clips"),
        ("multiply-adds, forward", [f"{s.multiply_adds:.3g}" for s in summaries], "multiply_adds"),
        ("training time", [duration(s.train_seconds) for s in summaries], "train_seconds"),
        ("GPU-hours", [f"{s.gpu_hours:.3g}" for s in summaries], "gpu_hours"),
        ("waiting for data", [f"{100 * s.data_seconds / max(s.train_seconds, 1e-9):.0f} %" for s in summaries], None),
        ("evaluation, apart", [duration(s.eval_seconds) for s in summaries], None),
        (summaries[0].metric, [f"{100 * s.accuracy:.1f} %" for s in summaries], None),
        (f"best {summaries[0].metric}", [f"{100 * s.best_accuracy:.1f} %" for s in summaries], None),
        ("top-5", [f"{100 * s.top5:.1f} %" for s in summaries], None),
    ]

    def gain(comparison: dict[str, Any], key: str | None) -> str:
        ratio = comparison["speedups"].get(key)
        return "" if ratio is None else times(ratio)

    return [
        {"label": label, "values": values, "gains": ["", *(gain(c, key) for c in comparisons)]}
        for label, values, key in rows
    ]


def _changes(baseline: dict[str, Any], view: dict[str, Any]) -> dict[str, Any]:
    """The classes whose accuracy changed most from the baseline's to a run's."""

    def shares(last: dict[str, Any]) -> list[float | None]:
        if last.get("precision") is not None:
            precision: list[float | None] = last["precision"]
            return precision
        return [right / n if n else None for right, n in zip(last["correct"], last["counts"], strict=True)]

    rows = [
        {"name": name, "before": before, "after": after, "videos": videos}
        for name, before, after, videos in zip(
            view["classes"], shares(baseline["last"]), shares(view["last"]), view["last"]["counts"], strict=True
        )
        if before is not None and after is not None
    ] if view["classes"] == baseline["classes"] else []  # fmt: skip
    rows.sort(key=lambda row: -abs(row["after"] - row["before"]))
    mistakes = [
        {"class": view["classes"][label], "taken": view["classes"][taken], "videos": count}
        for label, taken, count in view["last"].get("mistakes", ())
    ]
    return {"name": view["name"], "rows": rows[:MOST_CLASSES], "of": len(rows), "mistakes": mistakes}
