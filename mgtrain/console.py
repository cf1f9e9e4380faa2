"""What a person sees: logs and progress on stderr, results on stdout."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mgtrain.grid import Shape
from mgtrain.schedule import Plan, Step

out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)
err = Console(stderr=True, highlight=False)


def start_logging(file: Path | None, main: bool, rank: int = 0) -> None:
    """Send the package's log to stderr (warnings only, except on the main rank) and to a file."""
    log = logging.getLogger("mgtrain")
    log.handlers.clear()
    log.setLevel(logging.INFO)
    log.propagate = False
    handler: logging.Handler = RichHandler(
        console=err, show_path=False, show_time=False, show_level=False, markup=False
    )
    if not err.is_terminal:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s" if main else f"rank {rank}: %(message)s"))
    handler.setLevel(logging.INFO if main else logging.WARNING)
    log.addHandler(handler)
    if main and file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        to_file = logging.FileHandler(file, encoding="utf-8")
        to_file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(to_file)


def duration(seconds: float) -> str:
    """Seconds as people say them.

    >>> duration(7), duration(75), duration(3 * 3600 + 120)
    ('7.0 s', '1:15 min', '3:02 h')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)}:{int(seconds % 60):02d} min"
    return f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d} h"


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A line on the terminal: call what it gives with what is being done, how many are done, and of how many."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=err, disable=not err.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def size(count: float) -> str:
    """Bytes as people say them.

    >>> size(900), size(23_400_000), size(1.5e12)
    ('900 B', '23.4 MB', '1.5 TB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


class TrainProgress:
    """The line at the bottom of the terminal: where the run is in its cycles, how it does, when it ends."""

    def __init__(self, plan: Plan, start: int, shown: bool) -> None:
        self.plan = plan
        self._speed: dict[Shape, float] = {}  # seconds of a step, by shape, smoothed
        self._progress = Progress(
            TextColumn("{task.fields[phase]}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[eta]}"),
            console=err,
            disable=not (shown and err.is_terminal),
            transient=True,
        )
        self._task = self._progress.add_task("", total=len(plan), completed=start, phase="", facts="", eta="")

    def __enter__(self) -> TrainProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def time(self, step: Step, seconds: float) -> None:
        """Take in how long a step took."""
        old = self._speed.get(step.shape, seconds)
        self._speed[step.shape] = 0.8 * old + 0.2 * seconds

    def show(self, step: Step, loss: float, top1: float, waiting: float) -> None:
        """Show the state after `step`; `waiting` is the share of the time spent waiting for data."""
        phase, seconds = step.phase, self._speed.get(step.shape)
        clips_per_second = f"{step.shape.clips / seconds:.0f} clips/s" if seconds else ""
        self._progress.update(
            self._task,
            completed=step.index + 1,
            phase=f"phase {phase.index + 1}/{len(self.plan.phases)}  {step.shape}",
            facts=(
                f"lr {step.lr:.3g}  loss {loss:.3f}  top-1 {100 * top1:.0f} %  {clips_per_second}  "
                f"data wait {100 * waiting:.0f} %"
            ),
            eta=f"{duration(self.remaining(step.index + 1))} left",
        )

    def remaining(self, done: int) -> float:
        """Seconds until the end: the coming shapes at their measured speed, unmeasured ones at that of the others."""
        if not self._speed:
            return 0.0
        per_voxel = sum(s / shape.voxels for shape, s in self._speed.items()) / len(self._speed)
        seconds = 0.0
        for phase in self.plan.phases:
            left = phase.end_step - max(done, phase.first_step)
            if left > 0:
                cycle = [self._speed.get(shape, per_voxel * shape.voxels) for shape in phase.shapes]
                seconds += left * sum(cycle) / len(cycle)
        return seconds


def plan_table(plan: Plan, gpus: int | None) -> Table:
    """The phases of a plan, a row for each."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for column in ("phase", "clips", "frames", "crop", "steps", "to epoch", "lr", "stride", "bn clips"):
        table.add_column(column, justify="right", no_wrap=True)
    if gpus:
        table.add_column(f"clips/GPU of {gpus}", justify="right", no_wrap=True)
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
            "/".join(str(shape.clips // phase.bn_groups) for shape in phase.shapes),
        ]
        table.add_row(*row, *(["/".join(str(shape.clips // gpus) for shape in phase.shapes)] if gpus else []))
    return table


def counts_table(first: str, rows: Mapping[str, Mapping[str, int]]) -> Table:
    """Counts by row and column, under the columns' names; `first` says what the rows are."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(first, no_wrap=True)
    for column in next(iter(rows.values())):
        table.add_column(column.replace("_", " "), justify="right", no_wrap=True)
    for name, counts in rows.items():
        table.add_row(escape(name), *(f"{count:,}" for count in counts.values()))
    return table
