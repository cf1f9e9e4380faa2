"""What a person sees: logs and progress on stderr, results on stdout.

Names of classes, videos and runs come from others. So nothing that is printed or logged here is taken for markup, and
whatever a terminal would act on is shown as its number: see `harmless`.
"""

from __future__ import annotations

import logging
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from mgtrain.grid import Shape
from mgtrain.schedule import Plan, Step

# Control characters but the tab and the line feed; line and paragraph separators; marks, overrides and isolates that
# turn the direction of reading; bytes that are no UTF-8.
ACTIVE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def harmless(text: str) -> str:
    """The text with its number in place of each character that a terminal, or a reader of a log, would act on.

    The numbers are as JSON writes them, so JSON stays what it was.

    >>> print(harmless("top-1 of \x1b[2Jcat\u202e: 7²"))
    top-1 of \\u001b[2Jcat\\u202e: 7²
    """
    return ACTIVE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class HarmlessConsole(Console):
    """A console that prints text as it is meant: no markup, no emoji codes, nothing that a terminal acts on."""

    def __init__(self, stderr: bool = False, soft_wrap: bool = False, width: int | None = None) -> None:
        super().__init__(stderr=stderr, soft_wrap=soft_wrap, width=width, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """Strings come by here before they are measured, so that what is shown gets its room."""
        return super().render_str(harmless(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Everything that is printed comes by here; what rich itself says to the terminal is marked as control."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else harmless(text), style, control)


class HarmlessFormatter(logging.Formatter):
    """A formatter of log lines whose messages are one line and harmless each; tracebacks keep their lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line, without a traceback."""
        record.message = record.message.replace("\n", r"\n")
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        """The line, and the traceback if there is one."""
        return harmless(super().format(record))


class RunLog(logging.FileHandler):
    """A log file in a folder that somebody else makes; lines that come earlier wait for it."""

    def __init__(self, file: Path) -> None:
        super().__init__(file, encoding="utf-8", delay=True)
        self._folder, self._early = file.parent, list[logging.LogRecord]()

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line, or keep it until there is a folder."""
        self._early.append(record)
        if self._folder.is_dir():
            for waiting in self._early:
                super().emit(waiting)
            self._early.clear()


out = HarmlessConsole(soft_wrap=True, width=None if sys.stdout.isatty() else 200)
err = HarmlessConsole(stderr=True)


def start_logging(file: Path | None, main: bool, rank: int = 0) -> None:
    """Send the package's log to stderr (warnings only, except on the main rank) and to a file, once it has a folder."""
    log = logging.getLogger("mgtrain")
    for old in log.handlers[:]:
        log.removeHandler(old)
        old.close()
    log.setLevel(logging.INFO)
    log.propagate = False
    handler: logging.Handler = RichHandler(
        console=err, show_path=False, show_time=False, show_level=False, markup=False
    )
    if not err.is_terminal:
        handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(HarmlessFormatter("%(message)s" if main else f"rank {rank}: %(message)s"))
    handler.setLevel(logging.INFO if main else logging.WARNING)
    log.addHandler(handler)
    if main and file is not None:
        to_file = RunLog(file)
        to_file.setFormatter(HarmlessFormatter("%(asctime)s %(message)s"))
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
        self.judged = ""  # what the last evaluation said
        self._times: dict[Shape, list[float]] = defaultdict(list)  # seconds of the steps since `take_times`
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
        self._times[step.shape].append(seconds)

    def take_times(self) -> dict[Shape, list[float]]:
        """Seconds of each step since the last call, by shape."""
        taken, self._times = self._times, defaultdict(list)
        return taken

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
                f"data wait {100 * waiting:.0f} %{self.judged}"
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


BLOCKS = "▁▂▃▄▅▆▇█"
COLUMNS = 72  # of a drawn schedule


def schedule_drawing(plan: Plan) -> str:
    """The long cycle and the learning rate over the steps of a run, a line for each, their heights on a log scale."""
    steps = [plan[round(n * (len(plan) - 1) / (COLUMNS - 1))] for n in range(COLUMNS)]
    rows = (
        ("clips", [step.phase.shape.clips for step in steps], "d"),
        ("frames", [step.phase.shape.frames for step in steps], "d"),
        ("crop", [step.phase.shape.crop for step in steps], "d"),
        ("lr", [step.lr for step in steps], ".3g"),
    )
    lines = []
    for name, values, form in rows:
        low, high = min(values), max(values)
        span = math.log(high / low) if 0 < low < high else 1.0
        heights = (round((len(BLOCKS) - 1) * math.log(value / low) / span) if low > 0 else 0 for value in values)
        bars = "".join(BLOCKS[height] for height in heights)
        lines.append(f"{name:7}{bars}  {low:{form}}" + (f" to {high:{form}}" if high > low else ""))
    return "\n".join(lines)


def counts_table(first: str, rows: Mapping[str, Mapping[str, int]]) -> Table:
    """Counts by row and column, under the columns' names; `first` says what the rows are."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(first, no_wrap=True)
    for column in next(iter(rows.values())):
        table.add_column(column.replace("_", " "), justify="right", no_wrap=True)
    for name, counts in rows.items():
        table.add_row(name, *(f"{count:,}" for count in counts.values()))
    return table
