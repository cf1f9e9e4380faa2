from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mgtrain.processes.isolated import Lost, isolated


def behave(what: str) -> str:
    match what:
        case "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os._exit(3)
        case "hang":
            time.sleep(100)
        case "fill":
            bytearray(1 << 30)
        case "raise":
            raise KeyError("what went wrong")
    return f"{what} done"


def test_every_item_has_its_result_whatever_the_others_do():
    items = ["a", "crash", "b", "hang", "exit", "c", "crash", "d"]
    got = list(isolated(behave, items, workers=2, seconds=0.5))
    assert sorted(item for item, _ in got) == sorted(items)
    assert {item: result for item, result in got if not isinstance(result, Lost)} == {x: f"{x} done" for x in "abcd"}
    assert {item: result for item, result in got if isinstance(result, Lost)} == {
        "crash": Lost("crash", "killed by SIGKILL"),
        "exit": Lost("crash", "ended with exit code 3"),
        "hang": Lost("timeout", "takes more than 0.5 s"),
    }


def test_what_the_function_raises_is_raised_and_ends_the_processes():
    with pytest.raises(KeyError, match="what went wrong"):
        list(isolated(behave, ["a", "raise", "hang"], workers=2))


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_memory_has_a_limit():
    with pytest.raises(MemoryError):
        list(isolated(behave, ["a", "fill"], workers=1, memory=1 << 28))


def test_items_are_taken_as_they_are_needed():
    taken = []

    def items():
        for n in range(100):
            taken.append(n)
            yield str(n)

    results = isolated(behave, items(), workers=2)
    for _ in range(3):
        next(results)
    results.close()
    assert len(taken) <= 5


def test_processes_may_tidy_up_when_the_work_is_stopped(tmp_path: Path):
    def work(name: str) -> None:
        if name == "first":
            while not (tmp_path / "begun").exists():
                time.sleep(0.01)
            return
        try:
            (tmp_path / "begun").touch()
            time.sleep(100)
        finally:
            (tmp_path / "tidied up").touch()

    results = isolated(work, ["first", "second"], workers=2)
    assert next(results) == ("first", None)
    results.close()
    assert (tmp_path / "tidied up").exists()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_idle_processes_end_with_the_one_that_started_them():
    code = (
        "import os, signal\nfrom mgtrain.processes import isolated as m\nm.ORPHAN_SECONDS = 0.1\n"
        "results = m.isolated(lambda _: os.getpid(), [0, 1], 1)\nprint(next(results)[1], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    pid = int(done.stdout)
    until = time.monotonic() + 60
    while is_running(pid):
        assert time.monotonic() < until
        time.sleep(0.02)
