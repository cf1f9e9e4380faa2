"""Runs on several ranks, really started: the same clips and the same losses as on one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed
import warm
from safetensors.torch import load_file
from warm import Start

from mgtrain.cli.fit import _check_shared
from mgtrain.cli.trained import evaluate
from mgtrain.data import open_splits
from mgtrain.engine.checks import check_alike, make_model
from mgtrain.engine.fit import fit
from mgtrain.engine.recalibrate import recalibrate
from mgtrain.errors import DataError, MissingCapabilityError, PlanError, RanksLostError, StoppedError, UsageError
from mgtrain.processes.distributed import (
    World,
    _of_these_ranks,
    _own_gpu,
    _refuse_other_devices,
    _refuse_shared_gpu,
    _share_of_cores,
    _wait_for,
    connect,
    launch,
    replicate,
    unwrap,
)
from mgtrain.processes.environment import launcher
from mgtrain.processes.watchdog import Watchdog
from mgtrain.recipe import Recipe
from mgtrain.runs.folder import RunDir
from mgtrain.schedule import make_plan

# A ReLU whose input is zero but for rounding lets a gradient through on one rank and not on two; that the loss shows it
# little, learning rates are a tenth of the tiny recipe's.
GENTLE = ("optim.lr=0.0002", "optim.warmup_lr=0.0001")
EVERY_STEP = (*GENTLE, "logging.checkpoint_steps=1", "logging.keep_checkpoints=100")
AUGMENTED = (
    *GENTLE, "augment.contrast=0.4", "augment.saturation=0.4", "augment.erase=0.5", "augment.rand_augment=2",
    "augment.mixup=0.8", "augment.cutmix=1", "data.mirrored=[[left, right]]", "optim.stages=[2, 1]",
    "evaluation.times=2",
)  # fmt: skip
# With AdamW, rounding decides the direction of a weight whose gradients are next to nothing, unless eps is larger.
ADAMW = (
    *GENTLE, "optim.name=adamw", "optim.eps=0.001", "optim.clip_norm=0.1", "optim.ema=0.9", "optim.layer_decay=0.9",
    "schedule.bn_groups=both", "optim.stages=[4, 2]", "evaluation.times=2",
)  # fmt: skip
FIT = ("fit", "tiny.yaml", "--device", "cpu")
FIRST = 4  # steps, in which a mistake shows


@pytest.fixture(scope="module")
def alone(tiny: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """The tiny recipe's run on one rank."""
    run = RunDir(tmp_path_factory.mktemp("runs") / "alone")
    fit(tiny(*EVERY_STEP), run, World())
    return run


@pytest.fixture(scope="module")
def pair(mgtrain: Start, tiny_text: str, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """The same on two ranks."""
    folder = tmp_path_factory.mktemp("pair")
    (folder / "tiny.yaml").write_text(tiny_text)
    done = mgtrain(folder, *FIT, "--procs", 2, *EVERY_STEP)
    assert done.returncode == 0, done.stderr
    return RunDir(folder / "runs/tiny")


def losses(run: RunDir) -> list[float]:
    return [row["loss"] for row in run.rows("steps.jsonl")]


def first_losses(recipe: Recipe, run: RunDir, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The losses of the first `FIRST` steps, after which the run is stopped."""
    steps = iter(range(1, 1000))
    monkeypatch.setattr("mgtrain.engine.fit.Agreement", lambda world: lambda yes: next(steps) == FIRST)
    with pytest.raises(StoppedError):
        fit(recipe, run, World())
    return losses(run)


def rounding(step: int) -> float:
    """How far a loss may be, relatively, from that on one rank: numbers are added up in another order.

    Where this was measured the first ten steps differ by 3e-7 at most. Then an input of a ReLU that is zero but for
    rounding may let a gradient through here and not there: 1.2e-5 at step 13. A mistake shows in the first steps, as
    `test_a_small_mistake_would_be_seen` says.
    """
    return 2e-6 if step <= 4 else 2e-6 + (step - 4) * 7.5e-6


def expected(losses: list[float]) -> list[Any]:
    """The losses from the first step on, as they have to be but for rounding."""
    return [pytest.approx(loss, rel=rounding(step)) for step, loss in enumerate(losses, 1)]


def test_a_world_of_one_exchanges_nothing() -> None:
    world, x = World(), torch.arange(3.0)
    assert world.main
    assert torch.equal(world.sum(x), x)
    assert torch.equal(world.gather(x), x[None])
    model = torch.nn.Linear(2, 2)
    assert replicate(model, world) is model
    assert unwrap(model) is model


@pytest.mark.parametrize(
    ("given", "watched"),
    [
        ({"MGTRAIN_LAUNCHER": "7"}, 7),
        ({"TORCHELASTIC_RUN_ID": "none"}, os.getppid()),
        ({"RANK": "0", "WORLD_SIZE": "2"}, None),  # the shell in which somebody types may end
    ],
)
def test_the_launcher_is_watched_and_not_a_shell(
    given: dict[str, str], watched: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MGTRAIN_LAUNCHER", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert launcher() == watched


def test_ranks_that_cannot_share_a_recalibration_are_refused(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny()
    model = make_model(recipe)
    with pytest.raises(PlanError, match="recalibration has batches of 4 clips, which 3 GPUs cannot share equally"):
        recalibrate(model, open_splits(recipe.data)["train"], 1, recipe, World(size=3))


def test_a_rank_that_does_not_see_the_runs_folder_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_check_shared.__globals__, "SECONDS_TO_APPEAR", 0.1)  # `fit` is also the command's name
    _check_shared(RunDir(tmp_path), World())
    with pytest.raises(UsageError, match="other ranks do not see it; with --name, choose one on a file system that"):
        _check_shared(RunDir(tmp_path / "elsewhere"), World())


def test_an_evaluation_of_other_files_than_rank_0s_is_refused(alone: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(World, "from_main", lambda self, value: value if value.endswith(".safetensors") else "another")
    with pytest.raises(DataError, match=r"rank 0 has another .*, or other videos, than rank 0; all machines need the"):
        evaluate(str(alone.path), views="1x1", device="cpu")


def assert_trained_alike(together: RunDir, alone: RunDir, ranks: int) -> None:
    assert together.read("env.json")["ranks"] == ranks
    assert together.read("plan.json") == alone.read("plan.json")
    assert losses(together) == expected(losses(alone))
    for ours, theirs in zip(together.rows("evals.jsonl"), alone.rows("evals.jsonl"), strict=True):
        assert (ours["step"], ours["videos"], ours["counts"]) == (theirs["step"], 12, theirs["counts"])
        assert ours["correct"] == theirs["correct"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=rounding(theirs["step"]))


def cut(run: RunDir, folder: Path, step: int) -> RunDir:
    """A copy of a run as it was when it was killed a little after its checkpoint of `step`."""
    copy = RunDir(Path(shutil.copytree(run.path, folder / "runs/tiny")))
    for path in copy.checkpoints():
        if path > copy.checkpoint_path(step):
            path.unlink()
    return copy


def test_two_ranks_train_as_one_does(pair: RunDir, alone: RunDir) -> None:
    assert_trained_alike(pair, alone, ranks=2)


@pytest.mark.slow
def test_four_ranks_train_as_one_does(mgtrain: Start, tiny_text: str, alone: RunDir, tmp_path: Path) -> None:
    plan = make_plan(alone.recipe(), 24)
    assert {phase.bn_groups for phase in plan.phases} == {8, 4, 2, 1}  # so a group spans 1, 2 or 4 of the ranks
    (tmp_path / "tiny.yaml").write_text(tiny_text)
    done = mgtrain(tmp_path, *FIT, *GENTLE, "--procs", 4)
    assert done.returncode == 0, done.stderr
    assert_trained_alike(RunDir(tmp_path / "runs/tiny"), alone, ranks=4)


@pytest.mark.parametrize("mistake", ["optim.lr=0.0002002", "batch.bn_clips=2"])
def test_a_small_mistake_would_be_seen(
    tiny: Callable[..., Recipe], alone: RunDir, tmp_path: Path, mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A learning rate that is 0.1 % off; BatchNorm groups of another size.
    mistaken = first_losses(tiny(*GENTLE, mistake), RunDir(tmp_path / "mistaken"), monkeypatch)
    assert mistaken != expected(losses(alone)[:FIRST])


@pytest.fixture
def both(
    mgtrain: Start, tiny: Callable[..., Recipe], tiny_text: str, tmp_path: Path
) -> Callable[..., tuple[RunDir, RunDir]]:
    """Trains with overrides on two ranks and on one; asserts that they train alike."""

    def train(*overrides: str) -> tuple[RunDir, RunDir]:
        (tmp_path / "tiny.yaml").write_text(tiny_text)
        done = mgtrain(tmp_path, *FIT, *overrides, "--procs", 2)
        assert done.returncode == 0, done.stderr
        together, alone = RunDir(tmp_path / "runs/tiny"), RunDir(tmp_path / "alone")
        fit(tiny(*overrides), alone, World())
        assert_trained_alike(together, alone, ranks=2)
        return together, alone

    return train


def test_two_ranks_augment_as_one_does(both: Callable[..., tuple[RunDir, RunDir]]) -> None:
    both(*AUGMENTED)


def test_two_ranks_clip_and_average_with_adamw_and_equal_groups_as_one_does(
    both: Callable[..., tuple[RunDir, RunDir]], tiny: Callable[..., Recipe], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    together, alone = both(*ADAMW)
    ours, theirs = (load_file(run.checkpoints()[-1]) for run in (together, alone))
    averaged = [name for name in theirs if name.startswith("ema.")]
    assert len(averaged) > 10
    for name in averaged:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=2e-6)
    unclipped = first_losses(tiny(*ADAMW, "optim.clip_norm=null"), RunDir(tmp_path / "unclipped"), monkeypatch)
    assert unclipped != expected(losses(alone)[:FIRST])  # so clipping is seen


@pytest.mark.slow  # in the quick tests torchrun starts, and restarts, the ranks of test_faults
def test_torchrun_starts_the_ranks_as_well(mgtrain: Start, tiny_text: str, alone: RunDir, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(tiny_text)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = mgtrain(tmp_path, *FIT, *GENTLE, launcher=torchrun)
    assert done.returncode == 0, done.stderr
    assert_trained_alike(RunDir(tmp_path / "runs/tiny"), alone, ranks=2)


def test_two_ranks_cut_and_resumed_are_two_ranks_straight_through(
    mgtrain: Start, tiny_text: str, pair: RunDir, tmp_path: Path
) -> None:
    (tmp_path / "tiny.yaml").write_text(tiny_text)
    resumed = cut(pair, tmp_path, step=7)  # in the middle of a phase
    done = mgtrain(tmp_path, *FIT, "--procs", 2, "--resume", *EVERY_STEP)
    assert done.returncode == 0, done.stderr
    assert losses(resumed) == losses(pair)
    ours, theirs = (load_file(run.checkpoints()[-1]) for run in (resumed, pair))
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_four_ranks_cut_and_resumed_are_four_ranks_straight_through(
    mgtrain: Start, tiny_text: str, tmp_path: Path
) -> None:
    # Sums of more than two numbers depend on their order, which depends on how DDP arranges its buckets.
    for name in ("straight", "resumed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tiny.yaml").write_text(tiny_text)
    words = (*FIT, "--procs", 4, *EVERY_STEP, "optim.stages=[1, 0.5]", "optim.warmup_epochs=0", "evaluation.times=1")
    assert mgtrain(tmp_path / "straight", *words).returncode == 0
    straight = RunDir(tmp_path / "straight/runs/tiny")
    resumed = cut(straight, tmp_path / "resumed", step=2)
    done = mgtrain(tmp_path / "resumed", *words, "--resume")
    assert done.returncode == 0, done.stderr
    assert len(losses(straight)) > 3
    assert losses(resumed) == losses(straight)
    ours, theirs = (load_file(run.checkpoints()[-1]) for run in (resumed, straight))
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_a_run_may_go_on_with_another_number_of_ranks(
    tiny: Callable[..., Recipe], pair: RunDir, alone: RunDir, tmp_path: Path
) -> None:
    resumed = cut(pair, tmp_path, step=7)
    fit(tiny(*EVERY_STEP), resumed, World(), resume=True)
    assert losses(resumed)[:7] == losses(pair)[:7]
    assert losses(resumed) == expected(losses(alone))


@pytest.mark.slow
def test_one_ranks_run_may_go_on_with_four(mgtrain: Start, tiny_text: str, alone: RunDir, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(tiny_text)
    resumed = cut(alone, tmp_path, step=7)  # two BatchNorm groups in a phase of two: four ranks share them
    done = mgtrain(tmp_path, *FIT, "--procs", 4, "--resume", *EVERY_STEP)
    assert done.returncode == 0, done.stderr
    assert losses(resumed)[:7] == losses(alone)[:7]
    assert losses(resumed) == expected(losses(alone))


def test_two_ranks_count_an_odd_number_of_videos_once_each_and_write_the_same_table(
    mgtrain: Start, motions: Path, alone: RunDir, tmp_path: Path
) -> None:
    lines = (motions / "val.csv").read_text().splitlines()
    (tmp_path / "odd.csv").write_text("\n".join(f"{motions}/{line}" for line in lines[:-1]))
    words = ("eval", alone.path, f"data.val={tmp_path / 'odd.csv'}", "--device", "cpu", "--views", "2x1", "--json")
    one, two = (mgtrain(tmp_path, *words, "--procs", procs, "--csv", f"scores_{procs}.csv") for procs in (1, 2))
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    ours: dict[str, Any] = json.loads(two.stdout)
    theirs: dict[str, Any] = json.loads(one.stdout)
    assert ours["videos"] == 11
    assert ours.pop("loss") == pytest.approx(theirs.pop("loss"), rel=rounding(1))
    assert ours.pop("calibration_error") == pytest.approx(theirs.pop("calibration_error"), rel=1e-5)
    known, others = (
        [(n, key, value) for n, row in enumerate(scores.pop("calibration")) for key, value in row.items() if value]
        for scores in (ours, theirs)
    )
    assert [where for *where, _ in known] == [where for *where, _ in others]
    assert [value for *_, value in known] == pytest.approx([value for *_, value in others], rel=1e-5)
    assert ours == theirs
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd.csv", "scores_1.csv", "scores_2.csv"]
    tables = [(tmp_path / f"scores_{procs}.csv").read_text().splitlines() for procs in (1, 2)]
    assert [len(table) for table in tables] == [12, 12]
    assert tables[0][0] == tables[1][0] == "path,label,predicted,left,right,up,down"
    for one_row, two_row in zip(*([line.split(",") for line in table[1:]] for table in tables), strict=True):
        assert one_row[:3] == two_row[:3]
        assert [*map(float, one_row[3:])] == pytest.approx([*map(float, two_row[3:])], rel=1e-5)


def test_the_first_failure_of_a_rank_is_the_exit_code() -> None:
    command = "import os, sys; sys.exit(3 if os.environ['RANK'] == '1' else 0)"
    assert launch(["python", "-c", command], procs=2) == 3


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_waits_for_one_that_failed_is_ended(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgtrain.processes.distributed.SECONDS_TO_END", 0.5)
    command = f"import os, sys, time; sys.exit(3) if os.environ['RANK'] == '{rank}' else time.sleep(600)"
    assert launch([sys.executable, "-c", command], procs=2) == 3


@pytest.mark.slow
def test_a_rank_that_fails_ends_even_if_a_library_waits_at_its_exit() -> None:
    command = """
import atexit, os, time
import mgtrain.processes.distributed as d
d.SECONDS_TO_END = 1
with d.connect("cpu"):
    if os.environ["RANK"] == "0":
        atexit.register(time.sleep, 600)
        raise ValueError
"""
    assert launch([sys.executable, "-c", command], procs=2) == 128 + signal.SIGALRM


def test_a_users_mistake_keeps_its_exit_code_on_several_ranks(mgtrain: Start, tiny_text: str, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(tiny_text)
    done = mgtrain(tmp_path, *FIT, "data.classes=5", "--procs", 2)
    assert done.returncode == 3
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()  # both ranks come to it, one says it
    assert line.startswith("mgtrain: ")
    assert "the training videos have 4 classes, data.classes says 5; set data.classes=4" in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("gpus", "shown", "local_rank", "expected"),
    [(8, None, 3, 3), (1, None, 0, 0), (1, "5", 3, 0), (1, None, 1, None), (2, "0,1", 2, None)],
)
def test_a_rank_takes_its_own_gpu_or_the_only_one_that_it_is_shown(
    gpus: int, shown: str | None, local_rank: int, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    if expected is None:
        with pytest.raises(MissingCapabilityError, match=f"{local_rank + 1} processes, but {gpus} GPUs here"):
            _own_gpu(local_rank)
    else:
        assert _own_gpu(local_rank) == expected


def test_two_ranks_of_one_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    store = torch.distributed.HashStore()
    for uuid in ("one", "two"):
        gpu = SimpleNamespace(uuid=uuid, name="GPU")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, gpu=gpu: gpu)
        _refuse_shared_gpu(store, torch.device("cuda", 0))
    with pytest.raises(MissingCapabilityError, match=r"rank 0 uses the same GPU \(GPU\) as another rank"):
        _refuse_shared_gpu(store, torch.device("cuda", 0))


def test_a_machine_without_a_gpu_among_others_with_one_is_refused() -> None:
    _refuse_other_devices([("a", {0}, "cuda"), ("b", {0}, "cuda")])
    _refuse_other_devices([("a", {0}, "cpu"), ("b", {0}, "cpu")])
    with pytest.raises(
        MissingCapabilityError, match="torch sees no GPU on b, but on other machines; repair the driver"
    ):
        _refuse_other_devices([("a", {0}, "cuda"), ("b", {0}, "cpu"), ("b", {1}, "cpu")])


def test_processes_that_have_ended_are_not_taken_for_ranks() -> None:
    server = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    stale = torch.distributed.PrefixStore("mgtrain", server)
    for key, value in {"rank/0": "old0", "rank/1": "old1", "rank/2": "old2", "ranks": "old0 old1 old2"}.items():
        stale.set(key, value)

    def join(rank: int) -> str:
        client = torch.distributed.TCPStore("localhost", server.port, is_master=False, wait_for_workers=False)
        ours = _of_these_ranks(client, rank, 2)
        ours.set(f"here/{rank}", b"")
        return str(ours.get(f"here/{1 - rank}"))

    for _ in range(2):  # the second time as torchrun restarts them, with the store of the first
        with ThreadPoolExecutor(2) as threads:
            late = threads.submit(join, 1)
            assert not wait([late], timeout=0.3).done
            assert [threads.submit(join, 0).result(30), late.result(30)] == ["b''", "b''"]


@pytest.mark.parametrize(("local_rank", "told"), [(None, True), ("0", False)])
def test_one_rank_beside_idle_gpus_is_told(
    local_rank: str | None, told: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank:  # torchrun sets it
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    with connect() as world:
        assert str(world.device) == "cuda:0"
    assert ("one of 4 GPUs; to use all, unset it" in " ".join(capsys.readouterr().err.split())) is told


@pytest.mark.parametrize(
    ("device", "visible", "told"), [(None, None, True), (None, "0,1", True), (None, "", False), ("cpu", None, False)]
)
def test_a_gpu_that_torch_does_not_see_is_told(
    device: str | None,
    visible: str | None,
    told: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for driver in (tmp_path / "none", tmp_path):
        monkeypatch.setattr("mgtrain.processes.environment.NVIDIA", str(driver))
        with connect(device) as world:
            assert world.device.type == "cpu"
        said = "torch does not see this machine's NVIDIA GPUs" in capsys.readouterr().err
        assert said is (told and driver.is_dir())


@pytest.mark.parametrize(("watched_seconds", "minutes"), [(60, 30), (3600, 120), (float("inf"), 24 * 60)])
def test_a_fast_rank_waits_as_long_as_the_watchdog_lets_a_slow_one_take(
    watched_seconds: float, minutes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reached(Exception):
        pass

    def init(_: str, *, timeout: timedelta, **__: object) -> None:
        assert timeout == timedelta(minutes=minutes)
        raise Reached

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(None, 0, 2)]))
    monkeypatch.setattr("mgtrain.processes.distributed._of_these_ranks", lambda store, *_: store)
    monkeypatch.setattr(torch.distributed, "init_process_group", init)
    with pytest.raises(Reached), connect("cpu", watched_seconds):
        pass
    groups: list[timedelta] = []  # which torch gives 30 minutes otherwise
    monkeypatch.setattr(torch.distributed, "new_subgroups", lambda _, timeout: groups.append(timeout) or [None])
    monkeypatch.setattr("mgtrain.processes.distributed.all_gather", lambda *_, **__: None)
    World(0, 4, watchdog=Watchdog(watched_seconds)).gather(torch.zeros(1), 2)
    assert groups == [timedelta(minutes=minutes)]


def test_ranks_do_not_wait_for_others_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgtrain.processes.distributed.JOIN_MINUTES", 0.002)
    store = torch.distributed.HashStore()
    store.set("mgtrain/rank/1", "ended")
    with pytest.raises(RanksLostError, match="rank 0 of 2: the other ranks have not joined within"):
        _of_these_ranks(store, 0, 2)


def test_ranks_that_do_not_notice_a_second_interrupt_are_ended() -> None:
    deaf = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert _wait_for([deaf], lambda: True) == 130  # after a second
    deaf.kill()
    deaf.wait()


@pytest.mark.parametrize(
    ("cores", "shares"),
    [
        ([{0, 1, 2, 3}] * 2, [2, 2]),  # torchrun
        ([{0, 1, 2, 3}, {4, 5, 6, 7}], [4, 4]),  # srun --cpus-per-task=4
        ([{0, 1, 2}, {2, 3}], [2, 1]),
        ([{0}] * 4, [1] * 4),
    ],
)
def test_a_rank_shares_only_the_cores_that_others_may_use(cores: list[set[int]], shares: list[int]) -> None:
    everyone = [("a", mine, "cpu") for mine in cores]
    assert [_share_of_cores(rank, everyone) for rank in range(len(cores))] == shares
    other = [("b", set(range(8)), "cpu")] * 3  # ranks of another machine
    assert [_share_of_cores(rank, [*everyone, *other]) for rank in range(len(cores))] == shares


@pytest.mark.parametrize(("first", "cores"), [("4 * int(os.environ['RANK'])", "4"), ("0", "2")])
def test_ranks_tell_each_other_their_cores(first: str, cores: str, tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from mgtrain.processes import distributed\n"
        f"first = {first}; distributed.which_cores = lambda: set(range(first, first + 4))\n"
        "with distributed.connect('cpu') as world: Path(sys.argv[1] + str(world.rank)).write_text(str(world.cores))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "rank")]
    launcher = f"import sys, mgtrain.processes.distributed as d; sys.exit(d.launch({command}, 2))"
    assert warm.run(["-c", launcher], tmp_path).returncode == 0
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == [cores, cores]


def test_ranks_share_the_cores_unless_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command = "import os, sys; open(sys.argv[1] + os.environ['RANK'], 'w').write(os.environ['OMP_NUM_THREADS'])"
    monkeypatch.setattr("mgtrain.processes.distributed.usable_cores", lambda: 7)
    for given, expected in ((None, "3"), ("5", "5")):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if given:
            monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert launch([sys.executable, "-S", "-c", command, f"{tmp_path}/{given}"], procs=2) == 0
        assert {(tmp_path / f"{given}{rank}").read_text() for rank in (0, 1)} == {expected}


def test_a_machine_with_other_files_is_refused(tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    def checked(ours: Recipe, theirs: Recipe) -> None:
        told: list[Any] = []
        for recipe, from_main in ((theirs, lambda value: told.append(value) or value), (ours, lambda _: told[0])):
            with monkeypatch.context() as patch:
                patch.setattr(World, "from_main", lambda _, value, answer=from_main: answer(value))
                videos = tuple(open_splits(recipe.data).values())
                check_alike(recipe, make_plan(recipe, len(videos[0])), videos, World(rank=1, size=2))

    checked(tiny(), tiny("hardware.workers=1"))
    with pytest.raises(DataError, match=r"rank 1 on \S+ would train something else .*: optim\.lr 0.002 -> 0.1; "):
        checked(tiny("optim.lr=0.1"), tiny())
    with pytest.raises(DataError, match=r"rank 0: logging\.steps 1 -> 20; "):
        checked(tiny("logging.steps=20"), tiny())
    with pytest.raises(DataError, match=r"rank 0: videos \['24 .*'12 .* -> \['12 .*; plan \w+ -> \w+; give all"):
        checked(tiny("data.train=val.csv"), tiny())


def test_two_ranks_in_micro_batches_train_as_one_does(both: Callable[..., tuple[RunDir, RunDir]]) -> None:
    both(*GENTLE, "batch.clips=16", "hardware.micro_clips=5", "optim.stages=[2, 1]", "evaluation.times=1")
