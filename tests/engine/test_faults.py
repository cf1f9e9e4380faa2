"""Faults put in on purpose: what was saved stays, every rank ends, and the message says why."""

from __future__ import annotations

import fcntl
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_fit import EVERY_STEP, PHASE_ENDS, assert_same_end
from warm import Start, Warm

import mgtrain.engine.fit
import mgtrain.engine.start
import mgtrain.engine.step
from mgtrain.clips.order import Order, step_requests
from mgtrain.engine.checks import make_model
from mgtrain.engine.finite import check_scale, note_skipped
from mgtrain.engine.fit import fit
from mgtrain.engine.step import StepResult, train_step
from mgtrain.engine.update.optim import make_optimizer
from mgtrain.errors import CheckpointError, NonFiniteError, StoppedError
from mgtrain.models.norm import GroupBatchNorm3d, group_slots
from mgtrain.processes.distributed import World
from mgtrain.processes.signals import StopRequest
from mgtrain.recipe import Recipe
from mgtrain.runs.checkpoint import not_finite, read_info, verify
from mgtrain.runs.folder import RunDir
from mgtrain.schedule import Step, make_plan

FIT = ("-m", "mgtrain", "fit", "tiny.yaml", "--device", "cpu")
LONG = ("schedule={name: baseline}", "optim.stages=[2000]")
OFTEN = ("evaluation.times=1", "logging.checkpoint_steps=1")
BAD = 4  # the index of the step in which a fault is put


@pytest.fixture
def folder(tiny_text: str, tmp_path: Path) -> Path:
    """A folder with the tiny recipe in it."""
    (tmp_path / "tiny.yaml").write_text(tiny_text)
    return tmp_path


def end(process: Warm | subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for a process; its exit code and what it said to stderr."""
    _, errors = process.communicate(timeout=240)
    assert process.returncode is not None
    return process.returncode, errors


def begin(folder: Path, *words: object, **options: Any) -> Warm:
    """Start `mgtrain fit`."""
    return Warm([*FIT, *words], folder, **options)


def begin_really(folder: Path, *words: object) -> subprocess.Popen[str]:
    """The same in a Python that is started, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, *FIT, *map(str, words)], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def faulty(folder: Path, code: str) -> str:
    """A program that runs some Python code, and then is `mgtrain`."""
    (folder / "faulty.py").write_text(f"{code}\nfrom mgtrain.cli import main\nmain()\n")
    return "faulty.py"


def begin_faulty(folder: Path, code: str, *words: object) -> Warm:
    """Start `mgtrain fit` on two ranks, each of which runs some Python code first."""
    command = [sys.executable, faulty(folder, code), *FIT[2:], *map(str, words)]
    launcher = f"import mgtrain.processes.distributed as d, sys\nsys.exit(d.launch({command}, 2))"
    return Warm(["-c", launcher], folder)


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def wait_for_step(run: RunDir, step: int) -> None:
    wait_until(lambda: any(row["step"] >= step for row in run.rows("steps.jsonl")), "the run does not get on")


def ranks_of(process: Warm | subprocess.Popen[str]) -> list[int]:
    """The processes that a launcher has started."""
    return workers_of(process.pid)


def workers_of(process: int | None) -> list[int]:
    """The processes that a process has started."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()]
    return sorted(pid for pid, parent in pairs if parent == process)


@pytest.mark.parametrize(
    ("asked", "start"),
    [
        (signal.SIGTERM, begin),
        (signal.SIGINT, begin),
        (signal.SIGHUP, begin),
        pytest.param(signal.SIGUSR1, begin, marks=pytest.mark.slow),  # the quick test of two ranks sends it
        pytest.param(signal.SIGTERM, begin_really, marks=pytest.mark.slow),
    ],
)
def test_asked_to_stop_a_run_saves_and_says_that_it_can_go_on(
    folder: Path, asked: signal.Signals, start: Callable[..., Warm | subprocess.Popen[str]]
) -> None:
    run = RunDir(folder / "runs/tiny")
    process = start(folder, *LONG)
    wait_for_step(run, 2)
    process.send_signal(asked)
    status, errors = end(process)
    assert status == 75, errors
    assert "saved; continue with --resume" in errors
    assert "Traceback" not in errors
    saved = read_info(run.checkpoints()[-1]).step
    assert saved == run.rows("steps.jsonl")[-1]["step"]


@pytest.mark.slow  # the next test signals all processes, too
def test_a_signal_to_the_process_group_lets_a_run_with_loader_processes_save(folder: Path) -> None:
    process = begin_really(folder, *LONG, "hardware.workers=2")
    run = RunDir(folder / "runs/tiny")
    wait_for_step(run, 2)
    os.killpg(process.pid, signal.SIGTERM)  # as `timeout` does
    status, errors = end(process)
    assert status == 75, errors
    assert read_info(run.checkpoints()[-1]).step == run.rows("steps.jsonl")[-1]["step"]


def test_a_signal_to_all_processes_lets_a_run_with_loader_processes_save(folder: Path) -> None:
    process = begin_really(folder, *LONG, "hardware.workers=2")
    run = RunDir(folder / "runs/tiny")
    wait_for_step(run, 2)
    server = next(pid for pid in ranks_of(process) if workers_of(pid))
    asked = workers_of(server)
    assert len(asked) == 2
    subprocess.run(["kill", "-TERM", *map(str, asked)], check=True)  # first, so that the run still trains
    before = run.rows("steps.jsonl")[-1]["step"]
    wait_for_step(run, before + 3)
    subprocess.run(["kill", "-TERM", *map(str, (process.pid, server, *asked))], check=True)  # as a batch system does
    status, errors = end(process)
    assert status == 75, errors
    assert read_info(run.checkpoints()[-1]).step == run.rows("steps.jsonl")[-1]["step"]
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in asked), "the loader processes end")


def test_a_run_stops_where_nobody_reads_its_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> int:
        raise BrokenPipeError

    ended: list[int] = []
    monkeypatch.setattr("os.write", gone)
    monkeypatch.setattr("os._exit", ended.append)
    with StopRequest() as asked:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert (asked.signal, ended) == ("SIGTERM", [])
        signal.raise_signal(signal.SIGINT)
        assert ended == [130]


def test_a_run_whose_terminal_is_closed_saves(folder: Path) -> None:
    controller, terminal = os.openpty()
    command = [sys.executable, *FIT, *LONG, "hardware.workers=2"]
    process = subprocess.Popen(
        command, cwd=folder, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(terminal)
    run = RunDir(folder / "runs/tiny")

    def reached() -> bool:
        while select.select([controller], [], [], 0)[0]:  # so that the run does not wait for its reader
            os.read(controller, 4096)
        return len(run.rows("steps.jsonl")) >= 2

    wait_until(reached, "two steps")
    os.close(controller)  # the system sends SIGHUP
    assert process.wait(timeout=60) == 75
    assert read_info(run.checkpoints()[-1]).step == run.rows("steps.jsonl")[-1]["step"]


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as asked:
            signal.raise_signal(signal.SIGHUP)
            assert asked.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_one_rank_asked_to_stop_stops_all_at_one_step_and_they_go_on_bit_for_bit(folder: Path) -> None:
    words = ("--procs", 2, "evaluation.recalibration_batches=0", "optim.stages=[3, 1]")  # running averages count
    assert end(begin(folder, "--name", "straight", *words))[0] == 0
    code = (
        "import pathlib, time, mgtrain.engine.fit as f\nstep = f.train_step\n"
        "def train_step(*a):\n    while a[5].index == 1 and not pathlib.Path('asked').exists(): time.sleep(0.02)\n"
        "    return step(*a)\nf.train_step = train_step"
    )
    process = begin_faulty(folder, code, *words[2:])
    run = RunDir(folder / "runs/tiny")
    wait_for_step(run, 1)
    os.kill(ranks_of(process)[1], signal.SIGUSR1)
    (folder / "asked").touch()
    status, errors = end(process)
    assert status == 75, errors
    stopped = read_info(run.checkpoints()[-1]).step
    assert stopped == run.rows("steps.jsonl")[-1]["step"] < len(make_plan(run.recipe(), 24))
    assert end(begin(folder, *words, "--resume"))[0] == 0
    ours, theirs = (load_file(r.checkpoints()[-1]) for r in (run, RunDir(folder / "runs/straight")))
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_interrupted_twice_all_ranks_leave_at_once(folder: Path) -> None:
    endless = (
        "import os, pathlib, time, mgtrain.engine.record as r\n"
        "r.Record.step = lambda *_: (pathlib.Path('in_step_' + os.environ['RANK']).touch(), time.sleep(600))"
    )
    process = begin_faulty(folder, endless, *LONG)
    wait_until(lambda: len(list(folder.glob("in_step_*"))) == 2, "no step has come")
    process.send_signal(signal.SIGINT)
    wait_until(
        lambda: process.errors().count("SIGINT: will save and stop after the next step") == 2, "the ranks are not asked"
    )
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert end(process)[0] == 130  # long before the steps are over


def test_a_second_run_in_a_run_directory_is_refused(folder: Path) -> None:
    first = begin(folder, *LONG)
    wait_for_step(RunDir(folder / "runs/tiny"), 1)
    impatient = "import mgtrain.cli, mgtrain.runs.folder as f\nf.LOCK_SECONDS = 0.5\nmgtrain.cli.main()"
    second = Warm(["-c", impatient, *FIT[2:], *LONG, "--resume"], folder)
    status, errors = end(second)
    first.kill()
    assert status == 4
    assert errors.startswith("mgtrain: runs/tiny: another process is training in this run directory; ")
    end(first)
    third = begin(folder, *LONG, "--resume")  # the lock is gone with the process that held it
    wait_for_step(RunDir(folder / "runs/tiny"), 3)
    third.kill()
    end(third)


def test_a_rank_that_fails_ends_the_others_and_its_traceback_comes_first(folder: Path) -> None:
    code = (
        "import os, mgtrain.engine.fit as f\nstep = f.train_step\n"
        "def train_step(*a):\n    if os.environ['RANK'] == '1' and a[5].index == 3: raise ValueError('boom')\n"
        "    return step(*a)\nf.train_step = train_step"
    )
    status, errors = end(begin_faulty(folder, code))
    assert status == 1, errors
    assert errors.index("ValueError: boom") < errors.index("rank 0 of 2 lost its connection to another rank; see that")
    assert errors.count("Traceback") == 1


def test_a_rank_that_is_killed_ends_the_others(folder: Path) -> None:
    process = begin(folder, "--procs", 2, *LONG)
    wait_for_step(RunDir(folder / "runs/tiny"), 1)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    status, errors = end(process)
    assert status == 128 + signal.SIGKILL, errors
    assert "rank 0 of 2 lost its connection to another rank" in errors
    assert "mgtrain: rank 1 was ended by SIGKILL; the system does so if memory runs out" in errors


def family_of(pid: int) -> list[int]:
    """A process and those that it has started, and they in turn."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()]
    family = [pid]
    for member in family:
        family += [child for child, parent in pairs if parent == member]
    return family


def alive(pid: int) -> bool:
    listed = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(listed.strip()) and not listed.startswith("Z")


def test_loader_processes_end_with_a_run_that_is_killed(folder: Path) -> None:
    process = begin(folder, *LONG, "hardware.workers=2", start_new_session=True)
    wait_for_step(RunDir(folder / "runs/tiny"), 1)
    family = family_of(process.pid)
    assert len(family) >= 4  # the run, the server of its workers, and these
    process.kill()
    end(process)
    wait_until(lambda: not any(map(alive, family)), "a process is left")


@pytest.mark.parametrize(
    ("start", "seconds"),
    [
        (begin, 0.0),
        (begin, None),  # after a step
        # While the ranks import torch:
        *(pytest.param(begin_really, seconds, marks=pytest.mark.slow) for seconds in (0.0, 1.0, 2.0, 3.0)),
    ],
)
def test_ranks_end_whenever_their_launcher_is_killed(
    folder: Path, start: Callable[..., Warm | subprocess.Popen[str]], seconds: float | None
) -> None:
    process = start(folder, "--procs", 2, *LONG)
    wait_until(lambda: len(ranks_of(process)) == 2, "no ranks are started")
    ranks = ranks_of(process)
    if seconds is None:
        wait_for_step(RunDir(folder / "runs/tiny"), 1)
    else:
        time.sleep(seconds)
    process.kill()
    end(process)
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks), "a rank is left")


@pytest.mark.slow
def test_a_rank_that_hangs_is_found_and_names_the_video(folder: Path) -> None:
    code = (
        "import os, time, mgtrain.clips.decode as d\nenter = d.VideoFile.__enter__\n"
        "def hang(self):\n    if os.environ['RANK'] == '1' and 'left_3' in str(self.path): time.sleep(600)\n"
        "    return enter(self)\nd.VideoFile.__enter__ = hang"
    )
    status, errors = end(begin_faulty(folder, code, "faults.timeout_seconds=8"))
    assert status == 1, errors
    assert re.search(r"mgtrain: rank 1 ends: no progress for \d+ s \(faults\.timeout_seconds\), while ", errors)
    assert "left_3.mp4; the stacks are above; run again with --resume" in errors
    assert "in hang" in errors


@pytest.mark.slow
def test_torchruns_restarts_resume_by_themselves(folder: Path) -> None:
    code = (
        "import os, mgtrain.engine.fit as f\nstep = f.train_step\n"
        "def train_step(*a):\n    if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and a[5].index == 3: os._exit(9)\n"
        "    return step(*a)\nf.train_step = train_step"
    )
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1")
    short = ("schedule={name: baseline}", "optim.stages=[1]", "optim.warmup_epochs=0", *OFTEN)
    command = [sys.executable, *torchrun, faulty(folder, code), *FIT[2:], *short]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "resumed after step 3" in done.stderr
    assert [row["step"] for row in RunDir(folder / "runs/tiny").rows("steps.jsonl")] == [*range(1, 7)]


def test_ranks_whose_machines_count_restarts_differently_resume_together(folder: Path) -> None:
    short = ("schedule={name: baseline}", "optim.stages=[1]", "optim.warmup_epochs=0", *OFTEN)
    dies = (
        "import os, mgtrain.engine.fit as f\nstep = f.train_step\n"
        "def train_step(*a):\n    if a[5].index == 3: os._exit(9)\n    return step(*a)\nf.train_step = train_step"
    )
    assert end(begin_faulty(folder, dies, *short))[0] == 9
    restarts = "import os\nos.environ |= {{'TORCHELASTIC_MAX_RESTARTS': '1', 'TORCHELASTIC_RESTART_COUNT': {}}}"
    status, errors = end(begin_faulty(folder, restarts.format("'0'"), *short))
    assert status == 2, errors
    assert "runs/tiny: holds a run already; add --resume to continue it" in errors
    status, errors = end(begin_faulty(folder, restarts.format("os.environ['RANK']"), *short))
    assert status == 0, errors
    assert "resumed after step 3" in errors
    status, errors = end(begin_faulty(folder, restarts.format("os.environ['RANK']"), *short))
    assert status == 0, errors
    assert "runs/tiny: this run is finished; nothing is left to train" in errors


@pytest.mark.parametrize("step", [pytest.param(11, marks=pytest.mark.slow), 17])  # in the last evaluation, and earlier
def test_a_run_asked_to_stop_in_an_evaluation_stops_there_and_goes_on_bit_for_bit(
    tiny: Callable[..., Recipe], straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    evaluate = mgtrain.engine.fit.evaluate

    def asked(*arguments: Any) -> Any:
        if RunDir(tmp_path / "cut").rows("steps.jsonl")[-1]["step"] == step:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("mgtrain.engine.fit.evaluate", asked)
        with pytest.raises(StoppedError, match="stopped by a signal; continue with --resume"):
            fit(tiny(*EVERY_STEP), RunDir(tmp_path / "cut"), World())
    logged = [row["step"] for row in RunDir(tmp_path / "cut").rows("evals.jsonl")]
    assert logged == [end for end in PHASE_ENDS if end < step]
    fit(tiny(*EVERY_STEP), RunDir(tmp_path / "cut"), World(), resume=True)
    assert_same_end(tmp_path / "cut", straight)


def test_a_run_asked_to_stop_while_it_starts_stops_there(
    tiny: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mgtrain.engine.start.tune", lambda *_: signal.raise_signal(signal.SIGUSR1))
    with pytest.raises(StoppedError, match="stopped by a signal; continue with --resume"):
        fit(tiny(), RunDir(tmp_path / "run"), World())
    with StopRequest() as request:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(StoppedError), request.at_once():
            raise AssertionError("it goes on")
    with StopRequest() as request, pytest.raises(StoppedError), request.at_once(), suppress(StoppedError):
        signal.raise_signal(signal.SIGTERM)  # and somebody's code catches the error


@pytest.fixture
def bad_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """One clip of step `BAD` is not a number."""
    augmented = mgtrain.engine.step.augmented

    def spoilt(*arguments: Any) -> Any:
        x, targets = augmented(*arguments)
        if arguments[3].index == BAD:
            x[0, 0, 0, 0, 0] = float("nan")
        return x, targets

    monkeypatch.setattr(mgtrain.engine.step, "augmented", spoilt)


@pytest.mark.usefixtures("bad_step")
def test_a_step_that_is_not_finite_stops_the_run_before_its_update(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    recipe = tiny("logging.steps=100", "logging.checkpoint_steps=100")  # looked at late: at the end of the phase
    with pytest.raises(NonFiniteError) as caught:
        fit(recipe, run, World())
    assert caught.value.exit_code == 5
    plan, written = make_plan(recipe, 24), run.read("non_finite.json")
    step = plan[BAD]
    message = str(caught.value)
    assert message.startswith(
        f"the loss or the gradient of step {BAD + 1} is not finite (phase 2, {step.shape}, lr 0.008"
    )
    assert f"the last checkpoint is {run.checkpoint_path(3)}" in message
    assert [row["step"] for row in written["steps"]] == [BAD + 1]
    assert len(written["steps"][0]["videos"]) == step.shape.clips
    train = mgtrain.engine.start.open_data(recipe)[0]
    names = [train.name(request.video) for request in step_requests(step, Order.of(train, recipe))]
    assert written["steps"][0]["videos"] == names
    assert names[0] in message
    assert [verify(path).step for path in run.checkpoints()] == [3]  # nothing of the step was saved


def weights_before_each_step(monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[str, torch.Tensor]]:
    """Filled with copies of the parameters and momentum buffers at the start of each step."""
    train_step, seen = mgtrain.engine.fit.train_step, {}

    def look(model: torch.nn.Module, optimizer: torch.optim.Optimizer, *rest: Any) -> StepResult:
        step: Step = next(argument for argument in rest if isinstance(argument, Step))
        named = dict(model.named_parameters())
        seen[step.index] = {name: p.detach().clone() for name, p in named.items()}
        seen[step.index] |= {f"m.{n}": optimizer.state[p]["momentum_buffer"].clone() for n, p in named.items()}
        return train_step(model, optimizer, *rest)

    monkeypatch.setattr(mgtrain.engine.fit, "train_step", look)
    return seen


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.usefixtures("bad_step")
def test_it_is_left_out_where_the_recipe_says_so(
    tiny: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = weights_before_each_step(monkeypatch)
    run = RunDir(tmp_path / "run")
    fit(tiny("faults.non_finite=skip", "evaluation.recalibration_batches=0"), run, World())
    assert same(seen[BAD], seen[BAD + 1])
    assert not same(seen[BAD + 1], seen[BAD + 2])
    assert [row["loss"] is None for row in run.rows("steps.jsonl")] == [index == BAD for index in range(17)]
    assert read_info(run.checkpoints()[-1]).left_out == 1
    for path in run.checkpoints():  # the clip has been through all BatchNorms, whose running statistics forget it, too
        assert not_finite(load_file(path)) == ""


def test_a_step_that_is_left_out_leaves_the_running_statistics_as_they_were(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny("batch.bn_clips=2")
    plan, model = make_plan(recipe, 24), make_model(recipe)
    step, optimizer, scaler = plan[0], make_optimizer(model, recipe.optim), torch.amp.GradScaler("cpu", enabled=False)
    shape = step.shape
    clips = torch.randint(0, 256, (shape.clips, 3, shape.frames, shape.crop, shape.crop), dtype=torch.uint8)
    labels, slots = torch.zeros(shape.clips, dtype=torch.int64), lambda: [t.clone() for t in group_slots(model)]
    train_step(model, optimizer, scaler, clips, labels, step, recipe, World())
    before, bias = slots(), model.head.linear.bias  # type: ignore[union-attr]
    kept = bias.detach().clone()
    bias.data[0] = float("inf")  # so that only the loss is not finite
    assert train_step(model, optimizer, scaler, clips, labels, step, recipe, World()).bad == 1
    assert all(map(torch.equal, before, slots()))
    bias.data.copy_(kept)
    assert train_step(model, optimizer, scaler, clips, labels, step, recipe, World()).bad == 0
    assert not any(map(torch.equal, before, slots()))
    assert len(before) == 2 * sum(isinstance(m, GroupBatchNorm3d) for m in model.modules()) > 0


@pytest.mark.usefixtures("bad_step")
def test_the_first_step_of_all_can_be_left_out(
    tiny: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "BAD", 0)  # there is no momentum yet
    seen = weights_before_each_step(monkeypatch)
    fit(tiny("faults.non_finite=skip", "optim.stages=[2, 1]", "evaluation.times=1"), RunDir(tmp_path / "run"), World())
    assert same(seen[0], seen[1])
    assert all(not value.any() for name, value in seen[1].items() if name.startswith("m."))


@pytest.mark.usefixtures("bad_step")
def test_it_is_rolled_back_to_the_newest_checkpoint_where_the_recipe_says_so(
    tiny: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = weights_before_each_step(monkeypatch)
    fit(tiny("faults.non_finite=rollback"), RunDir(tmp_path / "run"), World())
    assert same(seen[BAD + 1], seen[3])  # the first phase, of 3 steps, ended with a checkpoint
    assert not same(seen[BAD], seen[3])


@pytest.mark.usefixtures("bad_step")
def test_a_run_killed_after_a_step_was_left_out_is_the_run_that_was_not(
    tiny: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = tiny("faults.non_finite=rollback", "logging.checkpoint_steps=1", "logging.keep_checkpoints=100")
    straight, cut = RunDir(tmp_path / "straight"), RunDir(tmp_path / "cut")
    fit(recipe, straight, World())
    shutil.copytree(straight.path, cut.path)
    for path in cut.checkpoints():
        if read_info(path).step > 9:
            path.unlink()
    fit(recipe, cut, World(), resume=True)
    ours, theirs = (load_file(run.checkpoints()[-1]) for run in (cut, straight))
    assert same(ours, theirs)
    assert read_info(cut.checkpoints()[-1]).left_out == read_info(straight.checkpoints()[-1]).left_out == 1


def test_fp16_gradients_that_no_scale_makes_finite_stop_the_run(tiny: Callable[..., Recipe]) -> None:
    step = make_plan(tiny(), 24)[BAD]
    for scale, enabled in ((8.0, True), (2.0**-20, False)):
        check_scale(torch.amp.GradScaler("cpu", enabled=enabled, init_scale=scale), step)
    with pytest.raises(NonFiniteError, match=f"at step {BAD + 1}, no scale of the loss makes fp16's gradients finite"):
        check_scale(torch.amp.GradScaler("cpu", init_scale=2.0**-20), step)


def test_too_many_steps_left_out_stop_the_run(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    faults = ("faults.non_finite=skip", "faults.non_finite_steps=1")
    recipe = tiny(*faults, "optim.lr=1e30", "optim.warmup_epochs=0", "logging.steps=1")
    with pytest.raises(NonFiniteError, match=r"2 such steps are more than faults\.non_finite_steps 1"):
        fit(recipe, run, World())
    steps = [row["step"] for row in run.read("non_finite.json")["steps"]]
    assert len(steps) == 2, "the file has the videos of all such steps, not only of the last report"
    note_skipped(run, [{"step": steps[1], "lr": 0.0, "shape": "", "videos": []}])  # a resumed run repeats it
    assert [row["step"] for row in run.read("non_finite.json")["steps"]] == steps


def test_all_ranks_notice_what_one_of_them_has(folder: Path) -> None:
    code = (
        "import os, torch, mgtrain.engine.step as s\naugmented = s.augmented\n"
        "def spoilt(*a):\n    x, y = augmented(*a)\n"
        "    if os.environ['RANK'] == '1' and a[3].index == 4: x[0] = float('nan')\n"
        "    return x, y\ns.augmented = spoilt"
    )
    status, errors = end(begin_faulty(folder, code))
    assert status == 5, errors
    assert "the loss or the gradient of step 5 is not finite" in errors
    assert "Traceback" not in errors


def test_a_damaged_checkpoint_is_named_and_passed_over(
    tiny: Callable[..., Recipe], straight: Path, tmp_path: Path
) -> None:
    recipe = tiny("logging.checkpoint_steps=1", "logging.keep_checkpoints=3")
    run = RunDir(Path(shutil.copytree(straight, tmp_path / "run")))
    torn, altered = run.checkpoints()[-1], run.checkpoints()[-2]
    torn.write_bytes(torn.read_bytes()[:-1])
    altered.write_bytes(altered.read_bytes()[:-1] + b"?")
    fit(recipe, run, World(), resume=True)
    assert torn.with_suffix(".damaged").exists()
    assert altered.with_suffix(".damaged").exists()
    assert same(load_file(run.checkpoints()[-1]), load_file(RunDir(straight).checkpoints()[-1]))
    for path in run.checkpoints():
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"all \d+ checkpoints are damaged"):
        fit(recipe, run, World(), resume=True)


def test_a_full_disk_leaves_the_checkpoints_that_there_are(folder: Path, straight: Path) -> None:
    run = RunDir(Path(shutil.copytree(straight, folder / "runs/tiny")))
    run.checkpoints()[-1].unlink()
    whole = run.checkpoints()[-1]
    limit = whole.stat().st_size // 2
    status, errors = end(begin(folder, "--resume", "logging.checkpoint_steps=1", largest_file=limit))
    assert status == 4, errors
    last = errors.splitlines()[-1]
    assert "cannot be written: " in last
    assert "File too large" in last
    assert "Traceback" not in errors
    assert verify(whole).step == 16
    assert not list((run.path / "checkpoints").glob(".*"))


def test_checkpoints_can_be_looked_at_and_verified(mgtrain: Start, straight: Path, tmp_path: Path) -> None:
    run = RunDir(Path(shutil.copytree(straight, tmp_path / "runs/tiny")))
    for path in run.checkpoints()[:-4]:
        path.unlink()
    looked = json.loads(mgtrain(tmp_path, "ckpt", "inspect", "tiny", "--json").stdout)
    assert (looked["schema"], looked["step"], looked["classes"]) == ("mgtrain.ckpt_inspect/1", 17, 4)
    assert looked["numbers"]["optimizer"] > 10_000
    assert looked["evaluated"]
    assert mgtrain(tmp_path, "ckpt", "verify", "tiny").returncode == 0
    path = run.checkpoints()[0]
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    done = mgtrain(tmp_path, "ckpt", "verify", "tiny")
    assert done.returncode == 4
    assert f"{path.name}: damaged: its checksum does not match its contents; use an earlier one" in done.stdout
    assert done.stderr == "mgtrain: 1 of 4 checkpoints are damaged; --resume skips them\n"


@pytest.mark.slow
def test_the_slurm_script_starts_the_ranks_and_puts_a_stopped_job_back(folder: Path) -> None:
    script = Path(__file__).parent.parent.parent / "docs/how-to/preemptible.slurm"
    stubs = folder / "bin"
    stubs.mkdir()
    (stubs / "mgtrain").write_text(f'#!/bin/bash\nexec {sys.executable} -m mgtrain "$@"\n')
    (stubs / "scontrol").write_text('#!/bin/bash\n[ "$1" = show ] && echo localhost || echo "$@" >> asked\n')
    (stubs / "srun").write_text(  # two tasks; the exit code is the larger one, as srun's
        "#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\n"
        'for i in 0 1; do SLURM_NTASKS=2 SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids+=($!); echo $! > task$i; done\n'
        "code=0; for pid in ${pids[@]}; do wait $pid; c=$?; [ $c -gt $code ] && code=$c; done; exit $code\n"
    )
    for stub in stubs.iterdir():
        stub.chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "localhost", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_ID": "7"}
    job = subprocess.Popen(
        ["bash", str(script), "tiny.yaml", "--device", "cpu", *LONG],
        cwd=folder, env=os.environ | slurm | {"PATH": f"{stubs}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for_step(RunDir(folder / "runs/tiny"), 1)
    os.kill(int((folder / "task1").read_text()), signal.SIGUSR1)
    status, errors = end(job)
    assert status == 75, errors
    assert (folder / "asked").read_text() == "requeue 7\n"
