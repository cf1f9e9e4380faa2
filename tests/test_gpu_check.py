"""The check of a GPU, tiny on a CPU, and on a GPU that computes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gpu_check
import gpu_sections
import nullgpu
import pytest
import torch
from gpu_check import OutOfTime, Report, Section, run
from gpu_runs import make_videos
from gpu_sections import Check, Row, row

from mgtrain.processes.distributed import World

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "gpu_check.py"


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `--make` writes."""
    folder = tmp_path_factory.mktemp("videos")
    make_videos(folder, toy=True)
    return folder


def started(folder: Path, *words: str, launcher: tuple[str, ...] = ()) -> tuple[list[Row], str]:
    """The check, tiny on a CPU: its rows, and what it prints."""
    command = [sys.executable, *launcher, str(SCRIPT), "--toy", "--device", "cpu", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=280)
    rows: list[Row] = json.loads((folder / "gpu_check.json").read_text())
    assert done.returncode == 0, (rows, done.stderr[-2000:])
    return rows, done.stdout


def of_section(rows: list[Row], section: int) -> dict[str, Row]:
    return {one["name"]: one for one in rows if one["section"] == section}


@pytest.mark.slow
def test_the_machine_and_its_loader_are_measured(tmp_path: Path, videos: Path) -> None:
    rows, printed = started(tmp_path, "--data", str(videos), "--sections", "1", "4", "10")
    machine, norms, loads = (of_section(rows, n) for n in (1, 4, 10))
    assert machine["product in fp32"]["tflops"] > 0
    assert machine["copy on the device"]["gbytes_per_second"] > 0
    assert [name for name in norms if name != "took"] == [
        f"{kind}, {groups} groups" for kind in ("wide", "narrow") for groups in (1, 2, 4, 8, 64)
    ]
    assert norms["wide, 2 groups"].keys() >= {"plain_4d", "by_groups_5d", "flattened"}
    assert all(one["clips_per_second"] > 0 for name, one in loads.items() if name != "took")
    assert printed.splitlines()[-1] == f"{len(rows)} rows in gpu_check.json: all is well"


@pytest.mark.slow
def test_every_section_runs_on_a_cpu(tmp_path: Path, videos: Path) -> None:
    rows, _ = started(tmp_path, "--data", str(videos), "--sections", *map(str, (2, 3, 5, 6, 7, 9, 11)))
    assert {one["section"] for one in rows} == {2, 3, 5, 6, 7, 9, 11}
    assert len(of_section(rows, 3)) == 8 + 2
    assert of_section(rows, 6)["slowfast_r50 fp32, in passes"]["error"] < 1e-5
    assert of_section(rows, 9)["losses"]["largest_error"] == 0
    assert of_section(rows, 11)["speedup of the whole plan"]["times"] > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch._dynamo's own
def test_compiled_steps_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, dynamic, mode: plain(self, backend="aot_eager"))
    torch._dynamo.reset()
    names = [one["name"] for one in gpu_sections.compiling(Check(World(), toy=True))]
    assert names == [
        f"{mode}, {groups} groups{done}"
        for mode in ("default", "graphs")
        for groups in (1, 8)
        for done in (", compiled", "")
    ]


@pytest.mark.slow
def test_two_ranks_are_checked_together(tmp_path: Path, videos: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    rows, printed = started(
        tmp_path, "--ranks", "--data", str(videos), "--sections", "1", "3", "6", "11", launcher=torchrun
    )
    assert {one["section"] for one in rows} == {3, 6, 11}
    for name in ("slowfast_r50 fp32", "BatchNorm over 2 ranks"):
        assert of_section(rows, 6)[name]["error"] < 1e-4  # two ranks together are one
    assert printed.count("all is well") == 1


@pytest.mark.slow
@pytest.mark.skipif(nullgpu.why_not() is not None, reason=str(nullgpu.why_not()))
def test_what_a_gpu_is_asked_is_all_there(null_gpu: Callable[..., str], tmp_path: Path) -> None:
    program = "import nullgpu; nullgpu.set_up(); import sys; sys.path.insert(0, sys.argv.pop()); import gpu_check; "
    words = ("--toy", "--out", str(tmp_path / "rows.json"), "--sections", "1", "2", "3", "4", "7", str(SCRIPT.parent))
    null_gpu(program + "\ntry: gpu_check.main()\nexcept SystemExit: pass", *words)
    rows: list[Row] = json.loads((tmp_path / "rows.json").read_text())
    assert [one for one in rows if one["name"] in ("failed", "cut")] == []
    assert of_section(rows, 0).keys() == {"tiny, fp32", "tiny, bf16", "SlowFast", "took"}
    assert {one["good"] for name, one in of_section(rows, 2).items() if name != "took"} == {True}
    assert "kernels" in of_section(rows, 4)["wide, 8 groups"]
    assert all(one["good"] for name, one in of_section(rows, 7).items() if name != "took")


@pytest.mark.slow
@pytest.mark.skipif(nullgpu.why_not() is not None, reason=str(nullgpu.why_not()))
def test_a_step_that_waits_is_named(null_gpu: Callable[..., str]) -> None:
    program = """
import nullgpu, sys, torch
sys.path.insert(0, sys.argv.pop())
nullgpu.set_up()
import gpu_sections as sections
from mgtrain.processes.distributed import World
trained = sections.train_step

def waiting(*given):
    result = trained(*given)
    result.loss.item()
    return result

sections.train_step = waiting
for row in sections.waits(sections.Check(World(device=torch.device("cuda", 0)), toy=True)):
    print(row["good"], "synchronizing" in row["waits"])
"""
    assert set(null_gpu(program, str(SCRIPT.parent)).splitlines()) == {"False True"}


@pytest.fixture
def sections(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Row]]:
    """Runs made-up sections; what is reported."""

    def report(*made: Section, file: Path | None = None, only: list[int] | None = None) -> list[Row]:
        monkeypatch.setattr(gpu_check, "SECTIONS", made)
        found = Report(file, shown=file is not None)
        run(Check(World(), toy=True), only, found)
        return found.rows

    return report


def good(check: Check) -> Iterator[Row]:
    """Fine"""
    yield row("fine", True, number=1.0)


def slow(check: Check) -> Iterator[Row]:
    """Slow"""
    yield row("quick")
    try:
        time.sleep(60)
    except Exception:  # as a library might, to go on with something else
        yield row("never")


def many(check: Check) -> Iterator[Row]:
    """Many rows"""
    for n in range(1000):
        time.sleep(0.01)
        yield row(str(n))


def faulty(check: Check) -> Iterator[Row]:
    """Faulty"""
    yield row("before")
    raise ValueError("no\nsuch thing")


def test_a_section_that_fails_or_takes_too_long_leaves_its_rows_and_the_others(
    sections: Callable[..., list[Row]],
) -> None:
    start = time.monotonic()
    rows = sections(Section(slow, 0.2), Section(faulty, 5), Section(many, 0.1), Section(good, 5))
    assert time.monotonic() - start < 30
    names = [(one["section"], one["name"]) for one in rows if not one["name"].isdigit()]
    assert names == [(1, "quick"), (1, "cut"), (1, "took"), (2, "before"), (2, "failed"), (2, "took"), (3, "cut"),
                     (3, "took"), (4, "fine"), (4, "took")]  # fmt: skip
    failed = of_section(rows, 2)["failed"]
    assert failed["error"] == "ValueError: no such thing"
    assert failed["at"].startswith("test_gpu_check.py:")
    assert [one["name"] for one in rows if one.get("good") is False] == ["cut", "failed", "cut"]


def test_a_call_that_does_not_return_ends_the_check_and_a_lost_gpu_its_sections(
    sections: Callable[..., list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(gpu_check.faulthandler, "dump_traceback_later", lambda *a, **b: asked.append((a, b)))
    monkeypatch.setattr(gpu_check.faulthandler, "cancel_dump_traceback_later", lambda: asked.append("cancelled"))
    sections(Section(good, 5))
    assert asked == [((5 + gpu_check.SECONDS_OF_PATIENCE,), {"file": sys.__stderr__, "exit": True}), "cancelled"]

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with")

    monkeypatch.setattr(gpu_check, "clean_up", lost)
    rows = sections(Section(good, 5), Section(good, 5))
    assert [(one["section"], one["name"]) for one in rows] == [(1, "fine"), (1, "took"), (1, "GPU lost")]
    assert rows[-1]["good"] is False


def test_rows_are_written_as_they_come(
    sections: Callable[..., list[Row]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, seen = tmp_path / "rows.json", []

    def looks(check: Check) -> Iterator[Row]:
        """Looks at what is there"""
        yield row("first", rate=1234.5678)
        seen.extend(json.loads(file.read_text()))
        yield row("second", False)

    rows = sections(Section(good, 5), Section(looks, 5), file=file, only=[2])
    assert seen == rows[:1]
    assert json.loads(file.read_text()) == rows
    assert capsys.readouterr().out.splitlines()[1:4] == [
        "2. Looks at what is there", "   first                        rate 1235", "!! second                       ",
    ]  # fmt: skip


def test_a_fault_ends_in_exit_code_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for made, code in ((good, False), (faulty, True)):
        monkeypatch.setattr(gpu_check, "SECTIONS", (Section(made, 5),))
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cpu"])
        with pytest.raises(SystemExit) as ended:
            gpu_check.main()
        assert ended.value.code is code


def test_all_sections_take_less_than_seven_minutes() -> None:
    assert sum(section.seconds for section in (gpu_check.FIRST, *gpu_check.SECTIONS)) <= 420
    assert len(gpu_check.SECTIONS) == 11
    assert not issubclass(OutOfTime, Exception)
