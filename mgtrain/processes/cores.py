"""The cores there are, and who uses them."""

from __future__ import annotations

import ctypes
import os
import time
from contextlib import suppress
from pathlib import Path

STAT = Path("/proc/stat")  # Linux's
MUCH = 0.2  # share of the cores
# M_MMAP_THRESHOLD, at its largest: below it memory comes from the heap; M_TRIM_THRESHOLD: and the heap never shrinks.
KEEPING = {-3: 32 << 20, -1: 2**31 - 1}


def usable_cores() -> int:
    """The cores that this process may use."""
    return len(_usable()) or os.cpu_count() or 1


def busy_cores(seconds: float = 0.5) -> float | None:
    """How many of the usable cores are at work while this process waits so long; None where the system does not say."""
    with suppress(OSError, ValueError, IndexError):
        before = _idle()
        start = time.perf_counter()
        time.sleep(seconds)
        after, waited = _idle(), time.perf_counter() - start
        ticks = waited * os.sysconf("SC_CLK_TCK")
        return sum(min(1.0, max(0.0, 1 - (after[core] - before[core]) / ticks)) for core in before)
    return None


def crowded(busy: float | None) -> bool:
    """Whether others are at work on so many of the cores that a measurement says little."""
    return busy is not None and busy > MUCH * usable_cores()


def keep_freed_memory() -> bool:
    """Let the C library keep what a step frees, for the next step; whether it can.

    A step of a CPU allocates and frees hundreds of megabytes. Given back to the system they have to be cleared page by
    page when the next step asks for them: up to half of a step's time. glibc decides by what a process happens to free
    first; here it is decided.
    """
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        taken: int = sum(library.mallopt(key, value) for key, value in KEEPING.items())
        return taken == len(KEEPING)
    return False


def _usable() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def _idle() -> dict[str, int]:
    """Ticks for which each usable core has been idle or has waited for a disk."""
    wanted = {f"cpu{core}" for core in _usable()}
    rows = [line.split() for line in STAT.read_text(encoding="ascii").splitlines()]
    return {row[0]: int(row[4]) + int(row[5]) for row in rows if row[0] in wanted}
