"""The report's figures, as SVG with the page's text colour, readable on light and dark backgrounds."""

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from mgtrain.errors import UsageError
from mgtrain.runs.history import History
from mgtrain.schedule import Plan
from mgtrain.schedule.totals import RANGE

COLOURS = ("#4c86c6", "#d9772b", "#4f9a56", "#b0568f", "#8a7b3c", "#5a6fb0")  # contrast of 3:1 on white and on black
STYLES = ("-", "--", ":")
LONGEST = 60  # letters of a name in a legend
INK = "#010203"  # placeholder for the page's text colour
POINTS = 60  # of a phase, at which its learning rate is drawn
LABELLED = 0.05  # share of all steps from which on a phase has room for its label
PARTS = {  # of a phase's time: label, colour
    "compute": ("computing", "#4c86c6"),
    "data": ("waiting for data", "#d9772b"),
    "evaluation": ("evaluating", "#8a8a8a"),
}
STYLE: Any = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "text.color": INK, "axes.edgecolor": INK,
    "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "text.parse_math": False,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure with a title, and its data as a table for screen readers."""

    title: str
    svg: Markup
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def drawn(name: str, description: str, draw: Callable[[Axes], None], size: tuple[float, float] = (7.5, 3.2)) -> Markup:
    """The SVG element of what `draw` draws; `name` makes its ids different from other figures'."""
    with rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        draw(axes)
        text = io.StringIO()
        with warnings.catch_warnings():  # of glyphs that matplotlib's font lacks: the browser has others
            warnings.simplefilter("ignore", UserWarning)
            figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'^<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img" aria-label="{}">', svg, count=1)
    return Markup(svg.replace('aria-label="{}"', f'aria-label="{escape(description)}"', 1))


def curves(runs: Sequence[History], colours: Sequence[str]) -> list[Drawing]:
    """Accuracy against training time, wall-clock time, steps, epochs, multiply-adds and device-hours."""
    found, metric = [], runs[0].summary.metric
    known = [(run.name, colour, run.curve()) for run, colour in zip(runs, colours, strict=True)]
    for key, label, unit in (
        ("train_seconds", "minutes of training", 60),
        ("clock_seconds", "minutes of wall-clock time", 60),
        ("step", "steps", 1),
        ("epoch", "epochs", 1),
        ("multiply_adds", "tera-multiply-adds, forward", 1e12),
        ("gpu_hours", "device-hours", 1),
    ):
        lines = [
            (name, colour, [(point[key] / unit, 100 * point["accuracy"]) for point in curve])
            for name, colour, curve in known
        ]

        def draw(axes: Axes, lines: Any = lines, label: str = label) -> None:
            for n, (name, colour, points) in enumerate(lines):
                shown = re.sub("^_", "\u200b_", name)  # matplotlib hides labels that begin with _
                shown = shown if len(shown) <= LONGEST else f"{shown[:LONGEST]}…"
                style = STYLES[n // len(COLOURS) % len(STYLES)]  # where colours repeat
                axes.plot(*zip(*points, strict=True), style, color=colour, label=shown, marker="o", markersize=3)
            axes.set_xlabel(label)
            axes.set_ylabel(f"{metric}, %")
            axes.grid(alpha=0.2)
            axes.legend()

        rows = [[name, f"{x:.4g}", f"{y:.1f}"] for name, _, points in lines for x, y in points]
        ends = "; ".join(f"{name} ends at {points[-1][1]:.1f} %" for name, _, points in lines)
        title = f"{metric} against {label}"
        svg = drawn(f"curve-{key}", f"{title}: {ends}", draw)
        found.append(Drawing(title, svg, ["run", label, f"{metric}, %"], rows))
    return found


def schedule(run: History, colour: str) -> Drawing:
    """The shapes of the mini-batches and the learning rate over the steps."""
    phases, rows = run.plan_file["phases"], []
    for phase in phases:
        shapes = " · ".join(f"{s['clips']}x{s['frames']}x{s['crop']}²" for s in phase["shapes"])
        numbers = f"{phase['index'] + 1}", f"{phase['steps']:,}", shapes
        rows.append([*numbers, f"{phase['lr']:.4g}", f"{phase['end_epoch']:.2f}"])
    title = f"schedule of {run.name}"
    words = f"{title}: {len(phases)} phases, mini-batches of {rows[0][2]} to {rows[-1][2]}"
    svg = drawn(f"schedule-{colour}", words, lambda axes: _draw_schedule(axes, run.plan, colour))
    return Drawing(title, svg, ["phase", "steps", "alternating mini-batches", "learning rate", "to epoch"], rows)


def save_schedule(plan: Plan, path: Path) -> None:
    """Draw a plan on white to an SVG, PNG or PDF file. Raises `UsageError` if it cannot be written."""
    with rc_context({**STYLE, "svg.hashsalt": "schedule"}):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        _draw_schedule(figure.add_subplot(), plan, COLOURS[0])
        save_figure(figure, path, dpi=150, metadata={"Date": None} if path.suffix.lower() == ".svg" else {})


def save_figure(figure: Figure, path: Path, **options: Any) -> None:
    """Write a figure to a file. Raises `UsageError` if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, **options)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}; choose another place") from None


def _draw_schedule(axes: Axes, plan: Plan, colour: str) -> None:
    """Draw the clips of each phase's mini-batches, with the range of the short cycle shaded, and the learning rate."""
    rates, points = axes.twinx(), list[int]()
    for phase in plan.phases:
        first, last, cycle = phase.first_step, phase.end_step, len(phase.shapes)
        turns = np.linspace(0, (last - 1 - first) // cycle, POINTS).astype(int)
        points += [min(first + turn * cycle + cycle - 1, last - 1) for turn in turns.tolist()]
        clips = [shape.clips for shape in phase.shapes]
        axes.fill_between([first, last], min(clips), max(clips), color=colour, alpha=0.35, linewidth=0)
        axes.hlines(clips[-1], first, last, color=colour)
        if last - first > LABELLED * len(plan):
            size = f"{phase.shape.frames}x{phase.shape.crop}²"
            axes.annotate(size, ((first + last) / 2, clips[-1]), (0, -3), textcoords="offset points",
                          ha="center", va="top", fontsize=7)  # fmt: skip
    axes.set_yscale("log", base=2)
    axes.margins(y=0.12)
    values = [plan[point].lr for point in points]
    rates.plot(points, values, color=INK, linestyle="dotted")
    rates.set_yscale("log")
    rates.set_ylim(bottom=max(min((value for value in values if value > 0), default=0), max(values) / RANGE) / 1.2)
    for scale in (axes.yaxis, rates.yaxis):
        scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        scale.set_minor_formatter(NullFormatter())
    axes.set_xlabel("step")
    axes.set_ylabel("clips of a mini-batch")
    rates.set_ylabel("learning rate (dotted)")
    rates.spines["right"].set_visible(True)


def time_split(run: History, split: Sequence[dict[str, Any]], colour: str) -> Drawing:
    """The time of each phase: computing, waiting for data and evaluating."""
    names = [f"{part['phase'] + 1}" for part in split]

    def draw(axes: Axes) -> None:
        bottom = [0.0] * len(split)
        for key, (label, filling) in PARTS.items():
            heights = [part[key] / 60 for part in split]
            axes.bar(names, heights, bottom=bottom, color=filling, label=label)
            bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
        axes.set_xlabel("phase")
        axes.set_ylabel("minutes")
        axes.legend()

    rows = [[name, *(f"{part[key]:.1f}" for key in PARTS)] for name, part in zip(names, split, strict=True)]
    totals = ", ".join(f"{label} {sum(part[key] for part in split):.0f} s" for key, (label, _) in PARTS.items())
    title = f"time of {run.name}"
    svg = drawn(f"time-{colour}", f"{title}: {totals}", draw)
    return Drawing(title, svg, ["phase", *(f"{label}, s" for label, _ in PARTS.values())], rows)
