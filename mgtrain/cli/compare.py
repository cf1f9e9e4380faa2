"""The commands that compare and show runs: compare, study, report, watch."""

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.live import Live
from typer import Argument, Option

from mgtrain.cli.options import RANK, Device, Json, check_finite, connected
from mgtrain.console import duration, note, out, progress, show
from mgtrain.errors import UsageError
from mgtrain.runs.folder import RUNS, RunDir, find_run
from mgtrain.runs.study.definition import Run, load_study, runs_of
from mgtrain.runs.study.jobs import pinned, shares_of_cores, train_all


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
    margin: Annotated[
        float, Option(min=0, max=100, help="Points by which an accuracy may fall without counting as lower.")
    ] = 1.0,
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
    found = [find_run(name) for name in (baseline, *runs)]
    if len(found) == 2:
        result = compare_runs(found[0], found[1], margin)
    elif wanted:
        raise UsageError("--fail-under: needs a baseline and exactly one run")
    else:
        result = compare_groups(grouped(found), margin)
    show(json_, result, render(result) if len(found) == 2 else render_groups(result))
    if csv:
        write_csv(map(Outcome.of, found), csv)
    if html:
        from mgtrain.engine.examples import example_frames
        from mgtrain.runs.report import write_report

        write_report(found, html, example_frames(found[-1]))
    if wanted:
        demand(result, wanted)


def study(
    file: Annotated[Path, Argument(metavar="STUDY", help="A YAML file, such as studies/demo.yaml.")],
    jobs: Annotated[int, Option(min=1, max=1000, help="Runs at the same time, each pinned to a share of cores.")] = 1,
    runs: Annotated[Path | None, Option(help="Folder of the runs. Default: runs/<name of the study>.")] = None,
    results: Annotated[
        Path | None, Option(help="Folder of the results and the page. Default: results/<name> beside the file.")
    ] = None,
    only: Annotated[list[str] | None, Option(metavar="VARIANT", help="Train only this variant; repeatable.")] = None,
    seeds: Annotated[int | None, Option(min=1, metavar="COUNT", help="Train only this many seeds now.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Only measure steps and estimate each variant's hours.")] = False,
    measure: Annotated[
        float, Option(min=0.01, metavar="SECONDS", help="Time to measure loading for each shape, with --dry-run.")
    ] = 1.0,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Train variants of a recipe with several seeds or folds, and compare them. Repeat the command to resume.

    Every finished run writes a small JSON file and is not trained again. Variants take turns.

    Examples:  mgtrain study studies/demo.yaml --dry-run  |  mgtrain study studies/demo.yaml --jobs 2
    """
    from mgtrain.runs.groups import render_groups
    from mgtrain.runs.study.results import keep_result, known_result, summed_up, write_study_page

    check_finite(measure=measure)
    asked = load_study(file)
    for name in set(only or ()) - set(asked.variants):
        raise UsageError(f"--only {name}: no such variant; allowed: {', '.join(asked.variants)}")
    all_runs = runs_of(asked, file)
    folder, kept = runs or RUNS / file.stem, results or file.parent / "results" / file.stem
    files = {run.name: kept / f"{run.name}.json" for run in all_runs}
    unknown = [run for run in all_runs if known_result(run, files[run.name]) is None]
    now = asked.seeds[:seeds]
    left = [run for run in unknown if run.recipe.seed in now and (not only or run.variant in only)]
    if dry_run:
        with pinned(shares_of_cores(jobs)[0] if jobs > 1 else ()):
            _forecast(left, len(all_runs), jobs, measure, device, json_)
        return
    note(f"{file}: {len(left)} of {len(all_runs)} runs to train, in {folder}; results in {kept}")
    words = ["--device", device] if device else []

    def keep(run: Run) -> None:
        keep_result(run, RunDir(folder / run.name), files[run.name])

    failed: list[tuple[Run, int]] = []
    if left:
        with RunDir(folder).locked():
            failed = train_all(left, folder, [sys.executable, "-c", RANK], jobs, words, keep)
    found = [result for run in all_runs if (result := known_result(run, files[run.name]))]
    if any(result.variant == next(iter(asked.variants)) for result in found):
        compared = summed_up(asked, found)
        write_study_page(asked, file, found, kept / "index.html")
        show(json_, compared, render_groups(compared))
        note(f"wrote {kept / 'index.html'}")
    if failed:
        names = ", ".join(run.name for run, _ in failed)
        note(f"mgtrain: {len(failed)} of {len(left)} runs failed: {names}; see output.txt in their folders", "red")
        raise typer.Exit(max(1, failed[0][1]))


def report(
    runs: Annotated[list[str], Argument(metavar="RUN...", help="Runs: folders or names under runs/, baseline first.")],
    to: Annotated[Path, Option(help="The HTML file to write.")] = Path("report.html"),
    frames: Annotated[bool, Option(help="Include pictures of the clips if the data is on this machine.")] = True,
) -> None:
    """Write an HTML report about the cost and accuracy of runs.

    Example:  mgtrain report demo_baseline demo_multigrid --to demo.html
    """
    found = [find_run(run) for run in runs]

    from mgtrain.engine.examples import example_frames
    from mgtrain.runs.report import write_report

    write_report(found, to, example_frames(found[-1]) if frames else [])
    note(f"wrote {to}")


def watch(
    run: Annotated[str, Argument(metavar="RUN", help="A running or finished run.")],
    baseline: Annotated[str | None, Option(metavar="RUN", help="A finished run to compare with.")] = None,
    every: Annotated[float, Option(min=0.1, help="Seconds between updates.")] = 5.0,
    once: Annotated[bool, Option("--once", help="Print once and exit; the default without a terminal.")] = False,
    json_: Json = False,
) -> None:
    """Show the progress of a run from another terminal, until the run ends.

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
        while not view["finished"]:
            time.sleep(every)
            view = look(watched, rival)
            live.update(render(view), refresh=True)


def parse_thresholds(text: str | None) -> dict[str, float]:
    """`speedup=3,top1=-0.5` as numbers by name."""
    wanted = {}
    for part in text.split(",") if text else ():
        key, _, value = part.partition("=")
        try:
            wanted[key.strip()] = float(value)
        except ValueError:
            raise UsageError(f"--fail-under {part}: write KEY=NUMBER, such as speedup=3") from None
        check_finite(fail_under=wanted[key.strip()])
    return wanted


def _forecast(left: list[Run], total: int, jobs: int, seconds: float, device: str | None, json_: bool) -> None:
    """Estimate the time of the remaining runs from measurements of one run of each variant."""
    from mgtrain.engine.start import open_data
    from mgtrain.preflight.forecast import forecast

    variants: dict[str, list[Run]] = {}
    for run in left:
        variants.setdefault(run.variant, []).append(run)
    rows: list[dict[str, Any]] = []
    with connected(device) as world, progress() as shown:
        for variant, runs in variants.items():
            train, val = open_data(runs[0].recipe)
            here = forecast(runs[0].recipe, train, val, world, seconds, shown)["plan"]
            rows.append({"variant": variant, "runs": len(runs), "seconds_each": here["clock_seconds"]})
    whole = sum(row["runs"] * row["seconds_each"] for row in rows) / jobs
    show(
        json_,
        {"schema": "mgtrain.study_forecast/1", "variants": rows, "jobs": jobs, "seconds": whole},
        *(f"{row['variant']:30} {row['runs']:3} runs of {duration(row['seconds_each'])} by the clock" for row in rows),
        f"{len(left)} of {total} runs to train, {jobs} at a time: about {duration(whole)}",
    )
