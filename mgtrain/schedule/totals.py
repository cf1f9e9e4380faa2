"""The plan of a recipe beside the plan of its baseline: steps of each shape, totals and ratios."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict

from mgtrain.grid import Shape
from mgtrain.recipe import Recipe
from mgtrain.schedule import Plan, baseline_recipe, make_plan


def make_plans(recipe: Recipe, videos: int) -> dict[str, Plan]:
    """The `plan` of a recipe and the plan of its `baseline`."""
    return {"plan": make_plan(recipe, videos), "baseline": make_plan(baseline_recipe(recipe), videos)}


def steps_of_shapes(plan: Plan) -> Counter[Shape]:
    """The number of steps of each shape."""
    counts: Counter[Shape] = Counter()
    for phase in plan.phases:
        for turn, shape in enumerate(phase.shapes):
            counts[shape] += len(range(turn, phase.steps, len(phase.shapes)))
    return +counts


def compare_totals(plan: Plan, baseline: Plan, **more: tuple[float, float]) -> dict[str, dict[str, float]]:
    """`totals` of the plan and of the `baseline`, and their `ratios`; `more` totals are given as pairs of the two."""
    totals: dict[str, float] = asdict(plan.totals()) | {key: pair[0] for key, pair in more.items()}
    rival: dict[str, float] = asdict(baseline.totals()) | {key: pair[1] for key, pair in more.items()}
    return {"totals": totals, "baseline": rival, "ratios": {key: totals[key] / rival[key] for key in totals}}


def render_totals(compared: dict[str, dict[str, float]]) -> str:
    """A line for each total, as a person reads it."""
    lines = []
    for key, value in compared["totals"].items():
        ratio, digits = compared["ratios"][key], 1 if key == "epochs" else 0
        times = f"1/{1 / ratio:.3f} of" if ratio < 1 else f"{ratio:.3f}x"
        shown, of = (f"{n:,.{digits}f}" if value < 1e15 else f"{n:.4g}" for n in (value, compared["baseline"][key]))
        lines.append(f"{key.replace('_', '-'):13} {shown:>22}   {times} the baseline's {of}")
    return "\n".join(lines)
