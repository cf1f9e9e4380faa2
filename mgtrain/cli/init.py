"""`mgtrain init`: from a folder of videos to recipes that run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from mgtrain.cli.data import Seed
from mgtrain.cli.options import DeviceOption, Json, check_finite
from mgtrain.console import err, out
from mgtrain.errors import UsageError
from mgtrain.processes.cores import usable_cores

SAMPLE = 200  # videos that are opened
SHARE = 0.2  # of the videos, for validation


def init(
    data: Annotated[Path, typer.Option(help="A folder of videos, or a list of `path label` lines.")],
    to: Annotated[Path, typer.Option(help="Folder for the recipes, the lists and classes.txt.")] = Path(),
    name: Annotated[str | None, typer.Option(help="Of the recipes. Default: the folder's.")] = None,
    val: Annotated[float, typer.Option(help="Share of the videos for validation, where nothing splits them.")] = SHARE,
    group_by: Annotated[
        str | None,
        typer.Option(metavar="REGEX|none", help="What in the paths tells the source. Default: what the names show."),
    ] = None,
    hours: Annotated[
        float | None, typer.Option(min=0.01, help="For the baseline's training. Default: 1 on a CPU, 12 on GPUs.")
    ] = None,
    root: Annotated[Path | None, typer.Option(help="The folder that a list's paths are relative to.")] = None,
    seed: Seed = 0,
    device: DeviceOption = None,
    json_: Json = False,
) -> None:
    """Look at your videos, split them without leakage, and write a baseline and a multigrid recipe for this machine.

    Examples:  mgtrain init --data clips --to work  |  mgtrain init --data clips --group-by 'person\\d+' --hours 8
    """
    check_finite("--hours", hours)
    if not 0 < val < 1:
        raise UsageError(f"--val {val:g}: has to be above 0 and below 1, such as 0.2")

    from mgtrain.console import progress
    from mgtrain.data.found import find_videos, make_parts
    from mgtrain.data.index import make_index
    from mgtrain.data.listfile import write_lists
    from mgtrain.preflight.init import Found, propose
    from mgtrain.preflight.stats import make_stats
    from mgtrain.processes.distributed import connect, default_procs
    from mgtrain.recipe import Clip

    found = find_videos(data, root)
    stem = name or os.path.basename(os.path.abspath(data)).partition(".")[0]
    recipes = {kind: to / f"{stem}_{kind}.yaml" for kind in ("baseline", "multigrid")}
    there = next((file for file in recipes.values() if file.exists()), None)
    if there:
        raise UsageError(f"{there}: is there already; give another --name or --to")
    with progress() as show:
        index = make_index(found, progress=show)
        for finding in index.findings:
            err.print(f"{'warning: ' if finding.warns else ''}{finding}", soft_wrap=True)
        parts = make_parts(found, index, val=val, group_by=group_by, seed=seed)
        train, held_out = parts.splits["train"], parts.splits["val"]
        looked = make_stats(
            train, Clip(frames=1, stride=1, crop=8, short_side=(8, 8)), sample=SAMPLE, seed=seed,
            workers=min(16, usable_cores()), progress=show,
        )  # fmt: skip
        for cause in looked.broken:
            err.print(f"warning: {cause}", style="yellow", soft_wrap=True)
        files = {part: os.path.abspath(to / f"{part}.csv") for part in parts.splits}
        gpus = default_procs(device.value if device else None)
        with connect(device.value if device else None) as world:
            seconds, short_sides = looked.column("seconds"), looked.column("short_side")
            proposal = propose(Found(train, held_out, files, seconds, short_sides), world, gpus, hours)
    written = write_lists(to, {part: (videos, range(len(videos))) for part, videos in parts.splits.items()})
    for kind, file in recipes.items():
        file.write_text(proposal.texts[kind], encoding="utf-8")
    written += recipes.values()
    counts = {part: len(videos) for part, videos in parts.splits.items()}
    if json_:
        result = {
            "schema": "mgtrain.init/1", "root": train.root, "files": [str(file) for file in written],
            "videos": counts, "classes": len(train.classes), "split_by": parts.rule,
            "groups": parts.groups, "baseline_seconds": proposal.seconds,
        }  # fmt: skip
        out.print_json(json.dumps(result))
        return
    recipe, baseline, multigrid = proposal.recipe, *recipes.values()
    for key, text in (
        ("videos", f"{counts['train']:,} to train, {counts['val']:,} to validate, of {len(train.classes)} classes"),
        ("split by", parts.rule),
        ("baseline", f"{recipe.model.name}, clips of {recipe.clip.frames} frames of {recipe.clip.crop}², "
                     f"{sum(recipe.optim.stages):g} epochs: about {proposal.seconds / 3600:.1f} h of training here"),
        ("wrote", ", ".join(map(str, written))),
        ("next", f"mgtrain plan {multigrid} --measure 2"),
        ("", f"mgtrain fit {baseline}"),
        ("", f"mgtrain fit {multigrid} --baseline {baseline.stem}"),
        ("", f"mgtrain compare {baseline.stem} {multigrid.stem} --html report.html"),
    ):  # fmt: skip
        out.print(f"{key:9} {text}", markup=False, soft_wrap=True)
    if len(looked.broken):
        out.print(f"          first: mgtrain data check {multigrid}, {len(looked.broken)} videos could not be opened")
