"""The command study."""

import heapq
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from mgtrain.cli.options import RANK, Device, Json, check_finite, connected
from mgtrain.console import duration, note, progress, show
from mgtrain.errors import UsageError
from mgtrain.runs.folder import RUNS, RunDir
from mgtrain.runs.study.definition import Run, load_study, runs_of
from mgtrain.runs.study.jobs import pinned, shares_of_cores, train_all
from mgtrain.schedule.totals import make_plans


def study(
    file: Annotated[Path, Argument(metavar="STUDY", help="A YAML file with variants and seeds.")],
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

    Examples:  mgtrain study mine.yaml --dry-run  |  mgtrain study mine.yaml --jobs 2
    """
    from mgtrain.runs.groups import GROUPS, render_groups
    from mgtrain.runs.study.results import check_results, keep_result, known_result, summed_up, write_study_page

    check_finite(measure=measure)
    asked = load_study(file)
    for name in set(only or ()) - set(asked.variants):
        raise UsageError(f"--only {name}: no such variant; allowed: {', '.join(asked.variants)}")
    all_runs = runs_of(asked, file)
    folder, kept = runs or RUNS / file.stem, results or file.parent / "results" / file.stem
    files = {run.name: kept / f"{run.name}.json" for run in all_runs}
    check_results(all_runs, kept, folder)
    now = asked.seeds[:seeds]
    left = [
        run
        for run in all_runs
        if run.recipe.seed in now and (not only or run.variant in only) and not files[run.name].is_file()
    ]
    if dry_run:
        with pinned(shares_of_cores(jobs)[0] if jobs > 1 else ()):
            _forecast(left, len(all_runs), jobs, measure, device, json_)
        return
    note(f"{file}: {len(left)} of {len(all_runs)} runs to train, in {folder}; results in {kept}")
    if not left:
        note("nothing is trained, because all results are there; give another folder with --results to train here")
    kept.mkdir(parents=True, exist_ok=True)
    if not os.access(kept, os.W_OK):
        raise UsageError(f"{kept}: cannot be written; give another folder with --results")
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
    else:
        first = next(iter(asked.variants))
        warnings = [f"nothing to compare yet: {first}, with which the others are compared, has no result"]
        show(json_, {"schema": GROUPS, "margin": asked.margin, "groups": [], "warnings": warnings}, *warnings)
    if failed:
        names = ", ".join(run.name for run, _ in failed)
        note(f"mgtrain: {len(failed)} of {len(left)} runs failed: {names}; see output.txt in their folders", "red")
        raise typer.Exit(max(1, failed[0][1]))


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
            plans = make_plans(runs[0].recipe, len(train))
            here = forecast(runs[0].recipe, plans, train, val, world, seconds, shown)["plan"]
            rows.append({"variant": variant, "runs": len(runs), "seconds_each": here["clock_seconds"]})
    each = {row["variant"]: row["seconds_each"] for row in rows}
    ends = [0.0] * jobs  # of the runs so far, which start in order as soon as there is room
    for run in left:
        heapq.heapreplace(ends, ends[0] + each[run.variant])
    whole = max(ends)
    show(
        json_,
        {"schema": "mgtrain.study_forecast/1", "variants": rows, "jobs": jobs, "seconds": whole},
        *(
            f"{row['variant']:30} {row['runs']:3} runs of {duration(row['seconds_each'])} of wall-clock time"
            for row in rows
        ),
        f"{len(left)} of {total} runs to train, {jobs} at a time: about {duration(whole)}",
    )
