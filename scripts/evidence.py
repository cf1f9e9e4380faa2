"""Write the studies' results into the tables of docs/explanation/evidence.md and the README.

    python scripts/evidence.py [--against clock_seconds|train_seconds|multiply_adds|step]

The script reads studies/*.yaml and studies/results/, and writes the lines between the marks of both pages,
docs/assets/demo-light.svg and docs/assets/demo-dark.svg. It does not train; `mgtrain study studies/NAME.yaml` does.
If other processes used the machine, draw against multiply-adds, because times are unreliable.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from mgtrain.runs.groups import COLUMNS, gain, table_rows, verdicts
from mgtrain.runs.report.figures import COLOURS, drawn
from mgtrain.runs.study.definition import Study, load_study, runs_of
from mgtrain.runs.study.results import Result, draw_curves, facts_of, known_result, summed_up

ROOT = Path(__file__).parent.parent
STUDIES, ASSETS = ROOT / "studies", ROOT / "docs/assets"
MARKS = "<!-- {}: scripts/evidence.py writes these lines -->\n", "<!-- end of {} -->\n"
INK = {"light": "#1b1f24", "dark": "#e6edf3"}
AXES = {
    "clock_seconds": ("minutes of wall-clock time", 60),
    "train_seconds": ("minutes of training", 60),
    "multiply_adds": ("tera-multiply-adds, forward", 1e12),
    "step": ("steps", 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--against", choices=AXES, default="train_seconds", help="x-axis of the README's picture")
    against = parser.parse_args().against
    rows = [["study", "compared", "top-1, points", "less training time", "less wall-clock time", "accuracy"]]
    sections, waiting = [], []
    for file in sorted(STUDIES.glob("*.yaml"), key=lambda file: (file.stem != "demo", file.stem)):
        study, results = load_study(file), found(file)
        if any(result.variant == next(iter(study.variants)) for result in results):
            compared = summed_up(study, results)
            rows += glance(study, file.stem, compared)
            sections.append(section(study, file.stem, results, compared))
        else:
            waiting.append(f"* `studies/{file.name}`: {study.question}")
    lines = "\n\n".join(["## All comparisons", table(rows), *sections]) + "\n"
    if waiting:
        lines += "\n## Not run yet\n\nThese studies have no results yet:\n\n" + "\n".join(waiting) + "\n"
    put(ROOT / "docs/explanation/evidence.md", "studies", lines)
    demo = STUDIES / "demo.yaml"
    results = found(demo)
    if not results:
        raise SystemExit(f"{demo}: no results yet; run `mgtrain study studies/demo.yaml --jobs 2` first")
    for theme, ink in INK.items():
        (ASSETS / f"demo-{theme}.svg").write_text(picture(load_study(demo), results, against, ink), encoding="utf-8")
    put(ROOT / "README.md", "demo", readme(load_study(demo), results, against))


def found(file: Path) -> list[Result]:
    """The results of a study's finished runs."""
    known = (
        known_result(run, STUDIES / "results" / file.stem / f"{run.name}.json")
        for run in runs_of(load_study(file), file)
    )
    return [result for result in known if result is not None]


def glance(study: Study, name: str, compared: dict[str, Any]) -> list[list[str]]:
    """A row for each comparison of a study with its first variant; † if its code was another one."""
    base, *others = compared["groups"]
    anchor = re.sub(r"[^\w -]", "", study.question).lower().replace(" ", "-")
    rows = []
    for group in others:
        change = group["difference"]
        mark = "" if group["commits"] == base["commits"] else " †"
        ends = "" if change["low"] is None else f" ({100 * change['low']:+.1f} to {100 * change['high']:+.1f})"
        rows.append([
            f"[{name}](#{anchor})",
            f"{group['name']} against {base['name']}",
            f"{100 * change['value']:+.1f}{ends}",
            *(gain(group, key) + mark for key in ("train_seconds", "clock_seconds")),
            re.split(r": | \(", group["judged"])[0],
        ])  # fmt: skip
    return rows


def section(study: Study, name: str, results: list[Result], compared: dict[str, Any]) -> str:
    """A study as Markdown."""
    parts = [f"## {study.question}", table([[*COLUMNS], *table_rows(compared)])]
    parts += [f"* {verdict}" for verdict in verdicts(compared)]
    if study.paper:
        parts.append(f"Published: {study.paper.rstrip('.')}.")
    if study.conclusion:
        parts.append(f"**Conclusion**: {study.conclusion.rstrip('.')}.")
    changes = [
        f"* {variant}: {words_of(chosen.recipe, *chosen.overrides)}"
        for variant, chosen in study.variants.items()
        if chosen.recipe or chosen.overrides
    ]
    facts = "; ".join(f"{key}: {', '.join(values)}" for key, values in facts_of(results).items())
    parts += [f"Note: {warning}." for warning in compared["warnings"]]
    parts += [f"All runs use {words_of(study.recipe, *study.overrides)}, except for:", "\n".join(changes)]
    parts.append(f"Made by `mgtrain study studies/{name}.yaml`; {facts}.")
    text = "\n\n".join(parts)
    return text.replace("\n\n* ", "\n* ").replace(" |\n* ", " |\n\n* ")


def words_of(*words: str | None) -> str:
    """A recipe and its overrides as code."""
    return " ".join(f"`{word}`" for word in words if word)


def table(rows: list[list[str]]) -> str:
    """A Markdown table, of which the first row is the head."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def picture(study: Study, results: list[Result], against: str, ink: str) -> str:
    """The demo's curves as an SVG file, with text in the colour `ink`."""
    label, unit = AXES[against]
    colours = dict(zip(study.variants, COLOURS, strict=False))

    def draw(axes: Axes) -> None:
        draw_curves(axes, results, colours, against, unit)
        axes.set(xlabel=label, ylim=(0, 102), ylabel=f"top-1 of {results[0].outcome.summary.videos} videos, %")

    svg = str(drawn("demo", words(study, results, against), draw, size=(6.4, 3.2)))
    svg = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" ', 1)
    return svg.replace("currentColor", ink) + "\n"


def words(study: Study, results: list[Result], against: str) -> str:
    """The picture's alternative text."""
    groups = summed_up(study, results)["groups"]
    ends = [f"{group['name']} ends at {100 * group['accuracy']['value']:.1f} %" for group in groups]
    return f"Top-1 accuracy of the demo against {AXES[against][0]}: {' and '.join(ends)}"


def readme(study: Study, results: list[Result], against: str) -> str:
    """The README's picture, table and verdict."""
    compared = summed_up(study, results)
    facts = facts_of(results)
    return (
        '<picture><source media="(prefers-color-scheme: dark)" srcset="docs/assets/demo-dark.svg">'
        f'<img src="docs/assets/demo-light.svg" alt="{words(study, results, against)}"></picture>\n\n'
        f"{table([[*COLUMNS], *table_rows(compared)])}\n\n{verdicts(compared)[0]}.\n\n"
        f"One core each of an {'; '.join(facts['device'])}, PyTorch {', '.join(facts['PyTorch'])}. "
        "[All studies](docs/explanation/evidence.md), [all numbers](studies/results/demo).\n"
    )


def put(page: Path, name: str, lines: str) -> None:
    """Write lines between the marks of a page."""
    start, end = (mark.format(name) for mark in MARKS)
    before, _, rest = page.read_text(encoding="utf-8").partition(start)
    page.write_text(before + start + lines + end + rest.partition(end)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
