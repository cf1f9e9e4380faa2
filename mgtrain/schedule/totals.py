"""A plan for the terminal: table, drawing, and totals beside those of its baseline."""

import math
from collections import Counter
from dataclasses import asdict

from rich.table import Table

from mgtrain.console import table
from mgtrain.grid import Shape
from mgtrain.recipe import Recipe
from mgtrain.schedule import Plan, baseline_recipe, make_plan

BLOCKS = "▁▂▃▄▅▆▇█"
COLUMNS = 72  # of a drawing
RANGE = 100_000  # of the learning rates in a drawing: smaller ones are drawn as its least


def make_plans(recipe: Recipe, videos: int) -> dict[str, Plan]:
    """The plans of a recipe and of its baseline, as `plan` and `baseline`."""
    return {"plan": make_plan(recipe, videos), "baseline": make_plan(baseline_recipe(recipe), videos)}


def steps_of_shapes(plan: Plan) -> Counter[Shape]:
    """The number of steps of each shape."""
    counts: Counter[Shape] = Counter()
    for (shape, _), (_, steps) in plan.kinds().items():
        counts[shape] += steps
    return counts


def compare_totals(plan: Plan, baseline: Plan) -> dict[str, dict[str, float]]:
    """`totals` of the plan and of the `baseline`, and their `ratios`."""
    totals, rival = asdict(plan.totals()), asdict(baseline.totals())
    return {"totals": totals, "baseline": rival, "ratios": {key: totals[key] / rival[key] for key in totals}}


def render_total(name: str, value: float, baseline: float) -> str:
    """A line of text for one total and its ratio to the baseline's."""
    ratio, digits = value / baseline, 1 if name == "epochs" else 0
    times = f"1/{1 / ratio:.3f} of" if ratio < 1 else f"{ratio:.3f}x"
    shown, of = (f"{n:,.{digits}f}" if value < 1e15 else f"{n:.4g}" for n in (value, baseline))
    return f"{name.replace('_', '-'):13} {shown:>22}   {times} the baseline's {of}"


def plan_table(plan: Plan, gpus: int | None) -> Table:
    """The phases of a plan, one per row; with `gpus`, also the clips per GPU."""
    names = ["phase", "clips", "frames", "crop", "steps", "to epoch", "lr", "stride", "bn clips"]
    names += [f"clips/GPU of {gpus}"] if gpus else []
    rows = []
    for phase in plan.phases:
        low, high = phase.grids[-1].stride
        row = [
            str(phase.index + 1),
            "/".join(str(shape.clips) for shape in phase.shapes),
            str(phase.shape.frames),
            "/".join(str(shape.crop) for shape in phase.shapes),
            f"{phase.steps:,}",
            f"{phase.end_clip / plan.videos:.2f}",
            f"{plan.phase_lr(phase):.4g}",
            str(low) if low == high else f"{low}..{high}",
            "/".join(str(shape.clips // groups) for shape, groups in phase.batches()),
        ]
        rows.append(row + (["/".join(str(shape.clips // gpus) for shape in phase.shapes)] if gpus else []))
    return table(names, rows, gap=1)


def schedule_drawing(plan: Plan) -> str:
    """Clips, frames, crop and learning rate over the steps of a run, each a line of bars on a log scale."""
    steps = [plan[round(n * (len(plan) - 1) / (COLUMNS - 1))] for n in range(COLUMNS)]
    shapes = [step.phase.shape for step in steps]
    rows = {name: [getattr(shape, name) for shape in shapes] for name in ("clips", "frames", "crop")}
    rows["lr"] = [step.lr for step in steps]
    lines = []
    for name, values in rows.items():
        form = ".3g" if name == "lr" else "d"
        low, high = min(values), max(values)
        least = max(min((value for value in values if value > 0), default=1.0), high / RANGE)  # warm-up may start at 0
        span = math.log(high / least) if least < high else 1.0
        heights = (round((len(BLOCKS) - 1) * math.log(max(value, least) / least) / span) for value in values)
        bars = "".join(BLOCKS[height] for height in heights)
        lines.append(f"{name:7}{bars}  {low:{form}}" + (f" to {high:{form}}" if high > low else ""))
    return "\n".join(lines)
