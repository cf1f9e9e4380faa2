"""The commands that compare and show runs: compare, report, watch."""

import time
from pathlib import Path
from typing import Annotated

from rich.live import Live
from typer import Argument, Option

from mgtrain.cli.options import Json, check_finite
from mgtrain.console import note, out, show
from mgtrain.errors import UsageError
from mgtrain.runs.folder import RunDir, find_run

THRESHOLDS = ("speedup", "clock", "steps", "accuracy", "top1")

Margin = Annotated[
    float, Option(min=0, max=100, help="Points by which an accuracy may fall without counting as lower.")
]


def compare(
    baseline: Annotated[str, Argument(metavar="BASELINE", help="The baseline: a folder, or a name under runs/.")],
    runs: Annotated[list[str], Argument(metavar="RUN...", help="Runs to compare: one, or several recipes and seeds.")],
    html: Annotated[Path | None, Option(help="Also write the report of `mgtrain report` to this file.")] = None,
    csv: Annotated[Path | None, Option(help="Write a table with a line for each run to this file.")] = None,
    fail_under: Annotated[
        str | None,
        Option(
            metavar="KEY=LEAST,...",
            help="Exit with 6 if the gain is smaller: speedup=3,clock=2,steps=3,accuracy=-0.5 (points).",
        ),
    ] = None,
    margin: Margin = 1.0,
    json_: Json = False,
) -> None:
    """Compare the cost and accuracy of a run with its baseline. Several runs are averaged over seeds and folds.

    Two runs on the same videos get the paired interval of their difference. Groups of runs are paired by seed and fold.

    Examples:  mgtrain compare demo_baseline demo_multigrid --fail-under speedup=2.5,accuracy=-2
    |  mgtrain compare b_0 b_1 b_2 m_0 m_1 m_2
    """
    from mgtrain.runs.compare import compare as compare_runs
    from mgtrain.runs.compare import demand, render
    from mgtrain.runs.groups import Outcome, compare_groups, grouped, render_groups, write_csv

    check_finite(margin=margin)
    wanted = parse_thresholds(fail_under)
    found = find_runs([baseline, *runs])
    if len(found) == 2:
        result = compare_runs(found[0], found[1], margin)
    elif wanted:
        raise UsageError(f"--fail-under: compares one run with its baseline, and {len(found)} runs are named; name two")
    else:
        early = [run for run in found[1:] if not run.rows("evals.jsonl")]
        found = [run for run in found if run not in early]
        result = compare_groups(grouped(found), margin)
        result["warnings"] += [f"{run.name} has not been evaluated yet and is not in the means" for run in early]
    show(json_, result, render(result) if "verdict" in result else render_groups(result))
    if csv:
        write_csv(map(Outcome.of, found), csv)
    if html:
        from mgtrain.engine.examples import example_frames
        from mgtrain.runs.report import write_report

        write_report(found, html, example_frames(found[-1]), margin)
    if wanted:
        demand(result, wanted)


def report(
    runs: Annotated[list[str], Argument(metavar="RUN...", help="Runs: folders or names under runs/, baseline first.")],
    to: Annotated[Path, Option(help="The HTML file to write.")] = Path("report.html"),
    frames: Annotated[bool, Option(help="Include pictures of the clips if the data is on this machine.")] = True,
    margin: Margin = 1.0,
) -> None:
    """Write an HTML report about the cost and accuracy of runs.

    Example:  mgtrain report demo_baseline demo_multigrid --to demo.html
    """
    check_finite(margin=margin)
    found = find_runs(runs)

    from mgtrain.engine.examples import example_frames
    from mgtrain.runs.report import write_report

    write_report(found, to, example_frames(found[-1]) if frames else [], margin)
    note(f"wrote {to}")


def watch(
    run: Annotated[str, Argument(metavar="RUN", help="A running or finished run.")],
    baseline: Annotated[str | None, Option(metavar="RUN", help="A finished run to compare with.")] = None,
    every: Annotated[float, Option(min=0.1, help="Seconds between updates.")] = 5.0,
    once: Annotated[bool, Option("--once", help="Print once and exit; the default without a terminal.")] = False,
    json_: Json = False,
) -> None:
    """Show the progress of a run from another terminal, until the run ends or stops.

    Example:  mgtrain watch demo_multigrid --baseline demo_baseline
    """
    from mgtrain.runs.watch import look, render

    check_finite(every=every)
    watched, rival = find_run(run), find_run(baseline) if baseline else None
    view = look(watched, rival)
    if json_:
        show(json_, {"schema": "mgtrain.watch/1", **view})
        return
    if once or not out.is_terminal:
        out.print(render(view))
        return
    with Live(render(view), console=out, auto_refresh=False) as live:
        while view["active"]:
            time.sleep(every)
            view = look(watched, rival)
            live.update(render(view), refresh=True)


def find_runs(names: list[str]) -> list[RunDir]:
    """The runs of these names; in groups, each may be there once."""
    found = [find_run(name) for name in names]
    for n, run in enumerate(found if len(found) > 2 else ()):
        if run.path.resolve() in [other.path.resolve() for other in found[:n]]:
            raise UsageError(f"{names[n]}: is named twice, but counts as one run; name each run once")
    return found


def parse_thresholds(text: str | None) -> dict[str, float]:
    """`speedup=3,top1=-0.5` as numbers by name."""
    wanted = {}
    for part in text.split(",") if text else ():
        key, _, value = part.partition("=")
        if key.strip() not in THRESHOLDS:
            raise UsageError(f"--fail-under {key.strip()}: allowed are {', '.join(THRESHOLDS)}")
        try:
            wanted[key.strip()] = float(value)
        except ValueError:
            raise UsageError(f"--fail-under {part}: write KEY=NUMBER, such as speedup=3") from None
        check_finite(fail_under=wanted[key.strip()])
    return wanted
