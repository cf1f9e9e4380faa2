"""What a person sees: logs and progress on stderr, results on stdout.

Names of classes, videos and runs come from others, so nothing here is read as markup or acted on by a terminal.
"""

import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, OverflowMethod, RenderableType
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

# Control characters but the tab and the line feed; line and paragraph separators; marks, overrides and isolates that
# change the direction of reading; bytes that are not UTF-8.
ACTIVE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def harmless(text: str) -> str:
    """Replace each character that a terminal or a log viewer would act on by its number, as JSON writes it.

    >>> print(harmless("top-1 of \x1b[2Jcat\u202e: 7²"))
    top-1 of \\u001b[2Jcat\\u202e: 7²
    """
    return ACTIVE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class HarmlessConsole(Console):
    """A console that prints plain text: no markup, no emoji codes, nothing that a terminal acts on."""

    def __init__(self, stderr: bool = False, soft_wrap: bool = False, width: int | None = None) -> None:
        super().__init__(stderr=stderr, soft_wrap=soft_wrap, width=width, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """Make strings harmless before they are measured, so that they get enough room."""
        return super().render_str(harmless(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Make everything that is printed harmless, except rich's own control codes."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else harmless(text), style, control)


class HarmlessFormatter(logging.Formatter):
    """A log formatter that makes each message one harmless line; tracebacks keep their lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = record.message.replace("\n", r"\n")
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        return harmless(super().format(record))


ShowProgress = Callable[[str, int, int], None]  # takes what is being done, how many are done, and of how many

out = HarmlessConsole(soft_wrap=True, width=None if sys.stdout.isatty() else 200)
err = HarmlessConsole(stderr=True)


def note(text: str, style: str | None = None) -> None:
    """Print a line to stderr."""
    err.print(text, style=style, soft_wrap=True)


def show(json_: bool, data: Mapping[str, Any], *text: RenderableType) -> None:
    """Print a result to stdout: `data` as JSON, or `text` for a reader."""
    if json_:
        out.print_json(data=data)
    else:
        for part in text:
            out.print(part)


def warn(text: str) -> None:
    """Print to stderr what may be wrong; the command continues."""
    note(f"warning: {text}", "yellow")


def start_logging(file: Path | None, rank: int = 0) -> None:
    """Log to stderr, and on rank 0 to a file while its folder exists; other ranks show only warnings."""
    log = logging.getLogger("mgtrain")
    for old in log.handlers[:]:
        log.removeHandler(old)
        old.close()
    log.setLevel(logging.INFO)
    log.propagate = False
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if err.is_terminal:
        handler = RichHandler(console=err, show_path=False, show_time=False, show_level=False, markup=False)
    handler.setFormatter(HarmlessFormatter(f"rank {rank}: %(message)s" if rank else "%(message)s"))
    handler.setLevel(logging.WARNING if rank else logging.INFO)
    log.addHandler(handler)
    if file is not None and not rank:
        to_file = logging.FileHandler(file, encoding="utf-8", delay=True)
        to_file.addFilter(lambda _: file.parent.is_dir())  # a failed start removes the folder
        to_file.setFormatter(HarmlessFormatter("%(asctime)s %(message)s"))
        log.addHandler(to_file)


def duration(seconds: float) -> str:
    """Seconds for a reader.

    >>> duration(7), duration(75), duration(3 * 3600 + 120)
    ('7.0 s', '1:15 min', '3:02 h')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    large, unit = (seconds, "min") if seconds < 3600 else (seconds / 60, "h")
    return f"{int(large // 60)}:{int(large % 60):02d} {unit}"


@contextmanager
def progress() -> Iterator[ShowProgress]:
    """Show a progress bar on the terminal, and give the function that moves it."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=err, disable=not err.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def no_progress(what: str, done: int, total: int) -> None:
    """A `ShowProgress` that shows nothing."""


def table(
    names: Sequence[str], rows: Iterable[Sequence[str]], left: int = 0, gap: int = 2, wrap: bool = False
) -> Table:
    """A table under a row of names; the first `left` columns are aligned left, the others right."""
    made = Table(box=None, pad_edge=False, padding=(0, gap - gap // 2, 0, gap // 2), header_style="bold")
    for n, name in enumerate(names):
        overflow: OverflowMethod = "fold" if wrap else "ellipsis"
        made.add_column(name, justify="left" if n < left else "right", no_wrap=not wrap, overflow=overflow)
    for row in rows:
        made.add_row(*row)
    return made


def counts_table(first: str, rows: Mapping[str, Mapping[str, int]]) -> Table:
    """A table of counts by row and column; `first` is the title of the row names."""
    columns = (column.replace("_", " ") for column in next(iter(rows.values())))
    counts = ((name, *(f"{count:,}" for count in row.values())) for name, row in rows.items())
    return table((first, *columns), counts, left=1)
