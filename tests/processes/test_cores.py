"""Who uses the cores."""

from __future__ import annotations

import multiprocessing
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from mgtrain.processes import cores as machine
from mgtrain.processes.cores import busy_cores, crowded, usable_cores


def _work() -> None:
    while True:
        pass


@pytest.mark.skipif(not machine.STAT.exists(), reason="Linux's")
def test_a_process_at_work_is_seen() -> None:
    worker = multiprocessing.get_context("spawn").Process(target=_work, daemon=True)
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})  # of this process and the worker, which would else share a core with others
    try:
        worker.start()
        assert usable_cores() == 1
        assert any((busy_cores(0.3) or 0) > 0.9 for _ in range(10))
        assert crowded(0.9)
    finally:
        worker.kill()
        os.sched_setaffinity(0, before)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's")
def test_freed_memory_is_kept() -> None:
    program = (
        "import numpy, resource, sys\nfrom mgtrain.processes.cores import keep_freed_memory\n"
        "if sys.argv[1] == 'kept': assert keep_freed_memory()\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "def step(): [numpy.ones(5 << 20) for _ in range(4)]\n"  # 40 MiB each, more than any M_MMAP_THRESHOLD
        "step(); before = faults(); step(); print(faults() - before)"
    )
    faults = {
        how: int(
            subprocess.run([sys.executable, "-c", program, how], capture_output=True, text=True, check=True).stdout
        )
        for how in ("kept", "given back")
    }
    assert faults["kept"] < 100
    assert faults["given back"] > faults["kept"]


def test_where_the_system_does_not_say_nothing_is_crowded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "STAT", tmp_path / "none")
    assert busy_cores(0.0) is None
    assert not crowded(None)
    assert not crowded(0.0)


def test_idle_cores_are_not_busy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ticks = iter([{"cpu0": 100}, {"cpu0": 10_000}])
    monkeypatch.setattr(machine, "_idle", lambda: next(ticks))
    assert busy_cores(0.01) == 0.0
