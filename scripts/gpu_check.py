#!/usr/bin/env python
"""Check and measure mgtrain on a GPU in under seven minutes, the most valuable checks first.

    python scripts/gpu_check.py --out gpu_check.json

Each section has a deadline (seven minutes in all), and its rows are printed and written as they come, so a check that
is interrupted keeps its results. Exit code 0: all is well; 1: a row is marked `!!`, or a section failed or was cut at
its deadline.
`--sections 3 4` runs only these; without a GPU, or with `--toy`, all sizes are tiny. Sections 2, 3, 6 and 11 also run
on several GPUs, with 8 clips on each:

    torchrun --nproc-per-node 8 scripts/gpu_check.py --ranks

A machine without a network needs torch, torchvision and the other packages that `setup.cfg` requires. Elsewhere, first
download the wheels that it lacks, for its version of Python (with more platforms, pip finds more wheels), and make
videos for sections 10 and 11:

    pip download --no-deps --only-binary=:all: --python-version 3.12 -d wheels \\
        --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \\
        av pydantic pydantic-core annotated-types typing-inspection ruamel.yaml
    python scripts/gpu_check.py --make videos

Then, on that machine, in a copy of this repository:

    pip install --no-index --no-deps --target /tmp/site wheels/*.whl
    PYTHONPATH=.:/tmp/site python scripts/gpu_check.py --data videos --out gpu_check.json

`--pyslowfast CHECKOUT` times PySlowFast in section 5. It needs the folders `slowfast` and `configs` of PySlowFast's
repository, and these wheels, some of which you have to build (`pip wheel --no-deps -w wheels`): fvcore, iopath, yacs,
simplejson, portalocker, tabulate, termcolor, parameterized, pyyaml, tqdm and pytorchvideo.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_runs import end_to_end, loading, losses, make_videos, memory, resuming
from gpu_sections import Check, Row, compiling, first_steps, machine, normalization, peers, shapes, waits

from mgtrain.processes.distributed import World, connect

SECONDS_OF_HANGING = 180.0  # after which the watchdog ends ranks, because with several one may wait for another
SECONDS_OF_PATIENCE = 45.0  # after a section's deadline, until a process that does not react is ended
DIGITS = 4  # to show


@dataclass(frozen=True)
class Section:
    """A part of the check."""

    run: Callable[[Check], Iterator[Row]]
    seconds: float  # until it is cut; 420 in all
    ranks: bool = False  # whether it also runs on several


FIRST = Section(first_steps, 75, ranks=True)  # 0, on a GPU only, whichever sections are wanted
SECTIONS = (
    Section(machine, 15), Section(waits, 20, ranks=True), Section(shapes, 100, ranks=True), Section(normalization, 20),
    Section(peers, 30), Section(losses, 25, ranks=True), Section(memory, 25), Section(compiling, 35),
    Section(resuming, 15), Section(loading, 20), Section(end_to_end, 40, ranks=True),
)  # fmt: skip


class OutOfTime(BaseException):
    """A section's deadline has passed. Not an `Exception`, because interrupted code might catch and handle that."""


class Report:
    """Rows, printed as they come and written to a file that is complete at any time, by the first rank only."""

    def __init__(self, file: Path | None, shown: bool) -> None:
        self.file, self.shown = file if shown else None, shown
        self.rows: list[Row] = []

    def add(self, section: int, row: Row) -> None:
        """Add a row of a section: `name`, `good` (None: nothing to judge) and the findings."""
        self.rows.append({"section": section, **row})
        if self.shown:
            found = "   ".join(f"{key} {shown(value)}" for key, value in row.items() if key not in ("name", "good"))
            print(f"{'!!' if row.get('good') is False else '  '} {row['name']:28} {found}", flush=True)
        if self.file:
            beside = self.file.with_name(f"{self.file.name}.part")
            beside.write_text(json.dumps(self.rows, indent=1, default=str) + "\n", encoding="utf-8")
            beside.replace(self.file)

    @property
    def bad(self) -> list[str]:
        """The names of the rows that are not good."""
        return [f"{row['section']} {row['name']}" for row in self.rows if row.get("good") is False]


def shown(value: Any) -> str:
    """A value, rounded to a few digits.

    >>> shown(1234.5678), shown(0.00012345), shown("fp32"), shown([1, 2])
    ('1235', '0.0001234', 'fp32', '[1, 2]')
    """
    return f"{value:.{DIGITS}g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_check.json"), help="default: %(default)s")
    parser.add_argument("--sections", type=int, nargs="+", choices=range(1, len(SECTIONS) + 1), metavar="N")
    parser.add_argument("--data", type=Path, help="folder that --make wrote; without it, a few videos are made")
    parser.add_argument("--make", type=Path, metavar="FOLDER", help="write the videos for --data, and stop")
    parser.add_argument("--pyslowfast", type=Path, metavar="CHECKOUT", help="time this PySlowFast in section 5")
    parser.add_argument("--toy", action="store_true", help="use tiny sizes, as without a GPU")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU if there is one")
    parser.add_argument("--ranks", action="store_true", help="required if torchrun starts this script")
    options = parser.parse_args()
    if options.make:
        make_videos(options.make, toy=options.toy)
        return
    with connect(options.device, SECONDS_OF_HANGING if options.ranks else float("inf")) as world:
        toy = options.toy or world.device.type == "cpu"
        if world.device.type == "cpu":
            torch.set_num_threads(1)  # enough for tiny sizes
        report = Report(options.out, world.main)
        run(Check(world, toy, options.data, options.pyslowfast), options.sections, report)
    if world.main:
        verdict = f"look at {', '.join(report.bad)}" if report.bad else "all is well"
        print(f"{len(report.rows)} rows in {options.out}: {verdict}")
    sys.exit(bool(report.bad))


def run(check: Check, wanted: Iterable[int] | None, report: Report) -> None:
    """Run the sections, each until its deadline; an error in one does not stop the others."""
    for number, section in enumerate((FIRST, *SECTIONS)):
        left_out = (wanted and number not in wanted) if number else not check.gpu
        if left_out or (check.world.size > 1 and not section.ranks):
            continue
        if report.shown:
            print(f"\n{number}. {(section.run.__doc__ or '').splitlines()[0]}", flush=True)
        start = time.monotonic()
        try:
            with alarm(section.seconds) if check.world.size == 1 else nullcontext():
                for row in in_time(section.run(check), section.seconds, check.world):
                    report.add(number, row)
        except OutOfTime:
            report.add(number, {"name": "cut", "good": False, "seconds": section.seconds})
        except Exception as error:
            lines = traceback.extract_tb(error.__traceback__)
            where = " < ".join(f"{Path(line.filename).name}:{line.lineno}" for line in reversed(lines[-4:]))
            said = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            report.add(number, {"name": "failed", "good": False, "error": said, "at": where})
        report.add(number, {"name": "took", "seconds": time.monotonic() - start})
        try:
            clean_up()
        except RuntimeError as error:  # of a kernel: this process cannot use the GPU any more
            report.add(number, {"name": "GPU lost", "good": False, "error": " ".join(str(error).split())[:500]})
            return


def in_time(rows: Iterator[Row], seconds: float, world: World) -> Iterator[Row]:
    """Yield rows for so many seconds; all ranks stop after the same row."""
    start = time.monotonic()
    for row in rows:
        yield row
        world.watchdog.beat()
        if world.from_main(time.monotonic() - start > seconds):
            raise OutOfTime


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the main thread after so many seconds within the block, whatever Python code is running.

    Where that does not help, because a call of the GPU's driver does not return, end the process; rows are written.
    """

    def ring(*_: object) -> None:
        raise OutOfTime

    before: Callable[..., Any] | int | None = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(seconds + SECONDS_OF_PATIENCE, file=sys.__stderr__, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def clean_up() -> None:
    """Free the memory that a section used, and reset its settings, before the next one."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
