"""The processor: its name, its instruction sets, its cores and how busy they are."""

import ctypes
import os
import platform
import time
from contextlib import suppress
from pathlib import Path

STAT = Path("/proc/stat")  # Linux's
CPUINFO = Path("/proc/cpuinfo")
PRODUCTS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
CROWDED = 0.2  # share of the cores that other processes use
# M_MMAP_MAX: all allocations come from the heap. M_TRIM_THRESHOLD: the heap never shrinks.
MALLOC_OPTIONS = {-4: 0, -1: -1}


def usable_cores() -> int:
    """The number of cores that this process may use."""
    return len(which_cores())


def which_cores() -> set[int]:
    """The numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def cpu_name() -> str:
    """The processor's name, family and model, such as `Intel(R) Xeon(R) Processor, family 6, model 143`."""
    pairs = (line.partition(":") for line in _cpuinfo().splitlines())
    known = {key.strip(): value.strip() for key, _, value in pairs}
    if "model name" in known:
        return f"{known['model name']}, family {known.get('cpu family', '?')}, model {known.get('model', '?')}"
    return platform.processor() or platform.machine()


def instructions() -> str:
    """The processor's instruction sets for matrix products, such as `avx2 avx512f amx_bf16`."""
    flags = set(_cpuinfo().split())
    return " ".join(name for name in PRODUCTS if name in flags)


def has_bf16() -> bool:
    """Whether the processor has instructions for bfloat16 products."""
    return "bf16" in instructions()


def busy_cores(seconds: float = 0.5) -> float | None:
    """The number of usable cores that other processes keep busy, measured for `seconds`; None if it is not known."""
    with suppress(OSError, ValueError, IndexError):
        before = _idle()
        start = time.perf_counter()
        time.sleep(seconds)
        after, waited = _idle(), time.perf_counter() - start
        ticks = waited * os.sysconf("SC_CLK_TCK")
        return sum(min(1.0, max(0.0, 1 - (after[core] - before[core]) / ticks)) for core in before)
    return None


def crowded(busy: float | None) -> bool:
    """Whether other processes keep so many cores busy that timings are unreliable."""
    return busy is not None and busy > CROWDED * usable_cores()


def keep_freed_memory() -> bool:
    """Make the C library keep freed memory for the next step; returns whether it does.

    A step on a CPU allocates and frees hundreds of megabytes. If the memory returns to the system, the kernel clears
    every page when the next step allocates it, which takes up to half of a step's time. The price is some 3 to 15 %
    more memory, since freed blocks lie between used ones.
    """
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        accepted: int = sum(library.mallopt(key, value) for key, value in MALLOC_OPTIONS.items())
        return accepted == len(MALLOC_OPTIONS)
    return False


def _cpuinfo() -> str:
    """Linux's description of the first core, or nothing."""
    with suppress(OSError):
        return CPUINFO.read_text().partition("\n\n")[0]
    return ""


def _idle() -> dict[str, int]:
    """Ticks that each usable core has been idle or has waited for a disk."""
    wanted = {f"cpu{core}" for core in which_cores()}
    rows = [line.split() for line in STAT.read_text(encoding="ascii").splitlines()]
    return {row[0]: int(row[4]) + int(row[5]) for row in rows if row[0] in wanted}
