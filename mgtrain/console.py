"""What a person sees: logs and progress on stderr, results on stdout.

Names of classes, videos and runs come from others. So nothing that is printed or logged here is taken for markup, and
whatever a terminal would act on is shown as its number: see `harmless`.
"""

from __future__ import annotations

import logging
import re
import sys
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


ShowProgress = Callable[[str, int, int], None]  # takes what is being done, how many are done, and of how many

out = HarmlessConsole(soft_wrap=True, width=None if sys.stdout.isatty() else 200)
err = HarmlessConsole(stderr=True)


def note(text: str, style: str | None = None) -> None:
    """Say something on stderr, in one line."""
    err.print(text, style=style, soft_wrap=True)


def warn(text: str) -> None:
    """Say on stderr what may be wrong, though the command continues."""
    note(f"warning: {text}", "yellow")


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
def progress() -> Iterator[ShowProgress]:
    """Show a progress bar on the terminal, and give the function that moves it."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=err, disable=not err.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def no_progress(what: str, done: int, total: int) -> None:
    """A `ShowProgress` that shows nothing."""


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


def counts_table(first: str, rows: Mapping[str, Mapping[str, int]]) -> Table:
    """Counts by row and column, under the columns' names; `first` says what the rows are."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(first, no_wrap=True)
    for column in next(iter(rows.values())):
        table.add_column(column.replace("_", " "), justify="right", no_wrap=True)
    for name, counts in rows.items():
        table.add_row(name, *(f"{count:,}" for count in counts.values()))
    return table
