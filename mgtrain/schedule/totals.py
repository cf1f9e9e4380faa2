"""Compare the plan of a recipe with the plan of its baseline: steps of each shape, totals and ratios."""

from collections import Counter
from dataclasses import asdict

from mgtrain.grid import Shape
from mgtrain.recipe import Recipe
from mgtrain.schedule import Plan, baseline_recipe, make_plan


def make_plans(recipe: Recipe, videos: int) -> dict[str, Plan]:
    """The plans of a recipe and of its baseline, as `plan` and `baseline`."""
    return {"plan": make_plan(recipe, videos), "baseline": make_plan(baseline_recipe(recipe), videos)}


def steps_of_shapes(plan: Plan) -> Counter[Shape]:
    """The number of steps of each shape."""
    counts: Counter[Shape] = Counter()
    for phase in plan.phases:
        for turn, shape in enumerate(phase.shapes):
            counts[shape] += len(range(turn, phase.steps, len(phase.shapes)))
    return +counts


def compare_totals(plan: Plan, baseline: Plan) -> dict[str, dict[str, float]]:
    """`totals` of the plan and of the `baseline`, and their `ratios`."""
    totals: dict[str, float] = asdict(plan.totals())
    rival: dict[str, float] = asdict(baseline.totals())
    return {"totals": totals, "baseline": rival, "ratios": {key: totals[key] / rival[key] for key in totals}}


def render_totals(compared: dict[str, dict[str, float]]) -> str:
    """A line of text for each total."""
    return "\n".join(render_total(key, value, compared["baseline"][key]) for key, value in compared["totals"].items())


def render_total(name: str, value: float, baseline: float) -> str:
    """A line of text for one total and its ratio to the baseline's."""
    ratio, digits = value / baseline, 1 if name == "epochs" else 0
    times = f"1/{1 / ratio:.3f} of" if ratio < 1 else f"{ratio:.3f}x"
    shown, of = (f"{n:,.{digits}f}" if value < 1e15 else f"{n:.4g}" for n in (value, baseline))
    return f"{name.replace('_', '-'):13} {shown:>22}   {times} the baseline's {of}"
