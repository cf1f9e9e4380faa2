"""What several commands share: arguments, options, the checks that typer leaves out, and the start of ranks."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Argument, Option

from mgtrain.console import start_logging
from mgtrain.errors import UsageError
from mgtrain.processes.environment import LAUNCHER, is_launched

if TYPE_CHECKING:
    from mgtrain.processes.distributed import World

# A rank must not import from the current folder, which `-m` and `-c` put on the path.
RANK = "import sys; sys.path = [path for path in sys.path if path]; from mgtrain.cli import main; main()"

RecipeArgument = Annotated[str, Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped recipe.")]
Overrides = Annotated[
    list[str] | None, Argument(metavar="[SECTION.KEY=VALUE]...", help="Changes to the recipe, such as optim.lr=0.05.")
]
Json = Annotated[bool, Option("--json", help="Print the result as JSON.")]
Device = Annotated[Literal["cpu", "cuda"] | None, Option(help="Where to compute. Default: a GPU if present.")]
Procs = Annotated[int | None, Option(min=1, help="Processes to start on this machine. Default: one per visible GPU.")]
GroupBy = Annotated[
    str | None,
    Option(
        metavar="REGEX|none",
        help=("The part of a path that names the video's source. Default: guess from the file names; none: no groups."),
    ),
]
VideoCount = Annotated[
    int | None, Option(min=1, max=10**9, help="Number of training videos. Default: as the data or recipe says.")
]
Seed = Annotated[int, Option(min=0, max=2**32 - 1, help="Random seed.")]


def check_finite(**options: float | None) -> None:
    """Refuse infinite and undefined numbers, which typer lets pass."""
    for option, value in options.items():
        if value is not None and not math.isfinite(value):
            raise UsageError(f"--{option.replace('_', '-')} {value}: must be a finite number")


def check_share(val: float | None) -> None:
    """Refuse a validation share that would leave one part empty."""
    if val is not None and not 0 < val < 1:
        raise UsageError(f"--val {val:g}: must be above 0 and below 1, such as 0.2")


@contextmanager
def connected(device: str | None, timeout_seconds: float = math.inf) -> Iterator[World]:
    """This process's place among the ranks, with logging to stderr started."""
    from mgtrain.processes.distributed import connect

    with connect(device, timeout_seconds) as world:
        start_logging(None, world.rank)
        yield world


def start_ranks(procs: int | None, device: str | None) -> bool:
    """Start this command once per rank, unless this process is one of them or the only one."""
    if is_launched():
        lacking = [key for key in ("RANK", "MASTER_ADDR", "MASTER_PORT") if key not in os.environ]
        if lacking and os.environ["WORLD_SIZE"] != "1":
            raise UsageError(f"WORLD_SIZE is set, but not {', '.join(lacking)}; set all, as torchrun does, or none")
        if procs and LAUNCHER not in os.environ:
            raise UsageError(
                f"--procs {procs}: WORLD_SIZE is set, as by torchrun, so this is one of the processes; leave out "
                "--procs, or unset WORLD_SIZE"
            )
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
