"""What several commands share: arguments, options, and how they are parsed."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Argument, Option

from mgtrain.console import note, start_logging
from mgtrain.data import open_splits
from mgtrain.errors import CheckpointError, UsageError
from mgtrain.processes.environment import is_launched
from mgtrain.runs.folder import find_run

if TYPE_CHECKING:
    from mgtrain.data.videos import Videos as Listed
    from mgtrain.processes.distributed import World
    from mgtrain.recipe import Data

# A rank must not import from the current folder, which `-m` and `-c` put on the path.
RANK = "import sys; sys.path = [path for path in sys.path if path]; from mgtrain.cli import main; main()"

RecipeArgument = Annotated[str, Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped recipe.")]
Overrides = Annotated[
    list[str] | None, Argument(metavar="[SECTION.KEY=VALUE]...", help="Changes to the recipe, such as optim.lr=0.05.")
]
Changes = Annotated[
    list[str] | None, Option("--set", metavar="SECTION.KEY=VALUE", help="A change to the recipe; repeatable.")
]
CheckpointArgument = Annotated[
    str, Argument(metavar="CHECKPOINT", help="A checkpoint file, or a run, which means its newest checkpoint.")
]
Json = Annotated[bool, Option("--json", help="Print the result as JSON.")]
Device = Annotated[Literal["cpu", "cuda"] | None, Option(help="Where to compute. Default: a GPU if present.")]
Procs = Annotated[
    int | None, Option(min=1, help="Processes to start on this machine. Default: one for each visible GPU.")
]
GroupBy = Annotated[
    str | None,
    Option(
        metavar="REGEX|none",
        help="The part of a path that names the video's source. Default: guess from the file names; none: no groups.",
    ),
]
Seed = Annotated[int, Option(min=0, max=2**32 - 1, help="Random seed.")]
Videos = Annotated[
    int | None, Option(min=1, max=10**9, help="Number of training videos. Default: as the data or recipe says.")
]


def opened_splits(data: Data) -> dict[str, Listed]:
    """The training and validation videos of a recipe, with remarks on how their lists were read."""
    splits = open_splits(data)
    for videos in splits.values():
        for remark in videos.remarks:
            note(remark)
    return splits


def check_finite(**options: float | None) -> None:
    """Refuse infinite and undefined numbers, which typer lets pass."""
    for option, value in options.items():
        if value is not None and not math.isfinite(value):
            raise UsageError(f"--{option.replace('_', '-')} {value}: must be a finite number")


def check_share(val: float | None) -> None:
    """Refuse a validation share that would leave one part empty."""
    if val is not None and not 0 < val < 1:
        raise UsageError(f"--val {val:g}: must be above 0 and below 1, such as 0.2")


def parse_levels(levels: str) -> tuple[int, ...]:
    """`256,160` as short sides, largest first."""
    try:
        sides = sorted({int(level) for level in levels.split(",")}, reverse=True)
    except ValueError:
        sides = []
    if not sides or not 16 <= sides[-1] <= sides[0] <= 10_000:
        raise UsageError(f"--levels {levels}: write short sides of 16 to 10000 pixels, such as 256,160")
    return tuple(sides)


def parse_size(option: str, text: str) -> int:
    """`2GiB` as bytes; units are of 1000 (`GB`) or 1024 (`GiB`).

    >>> parse_size("shards", "1.5 GiB"), parse_size("shards", "200MB")
    (1610612736, 200000000)
    """
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)\s*([kmgt])(i?)b", text.strip(), re.IGNORECASE | re.ASCII)
    if not match:
        raise UsageError(f"--{option} {text}: write a size with its unit, such as 2GiB or 500MB")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(unit.lower()))


def parse_views(views: str) -> tuple[int, int]:
    """`10x3` as clips in time and crops."""
    times, _, crops = views.partition("x")
    if not (times.isdecimal() and crops in ("1", "3") and int(times) > 0):
        raise UsageError(f"--views {views}: write clips in time x crops, with 1 or 3 crops, such as 1x1 or 10x3")
    return int(times), int(crops)


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


def checkpoint_path(checkpoint: str) -> Path:
    """The file of a checkpoint argument."""
    if Path(checkpoint).is_file():
        return Path(checkpoint)
    run = find_run(checkpoint)

    from mgtrain.runs.checkpoint import newest_whole

    if newest := newest_whole(run.checkpoints()):
        return newest
    raise CheckpointError(f"{run.path}: no checkpoint yet; train it with `mgtrain fit`")


@contextmanager
def connected(device: str | None, timeout_seconds: float = math.inf) -> Iterator[World]:
    """This process's place among the ranks, with logging to stderr started."""
    from mgtrain.processes.distributed import connect

    with connect(device, timeout_seconds) as world:
        start_logging(None, world.main, world.rank)
        yield world


def start_ranks(procs: int | None, device: str | None) -> bool:
    """Start this command once per rank, unless this process is one of them or the only one."""
    if is_launched():
        lacking = [key for key in ("RANK", "MASTER_ADDR", "MASTER_PORT") if key not in os.environ]
        if lacking and os.environ["WORLD_SIZE"] != "1":
            raise UsageError(f"WORLD_SIZE is set, but not {', '.join(lacking)}; set all, as torchrun does, or none")
        return False
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        raise UsageError(
            "srun has started several tasks without RANK, LOCAL_RANK and WORLD_SIZE; set them as preemptible.slurm in "
            "the documentation does, or start one task"
        )

    from mgtrain.processes.distributed import default_procs, launch

    wanted = procs or default_procs(device)
    if wanted == 1:
        return False
    if code := launch([sys.executable, "-c", RANK, *sys.argv[1:]], wanted):
        sys.exit(code)
    return True
