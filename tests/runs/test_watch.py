"""What a run is doing, read from its logs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import pytest
from test_compare import printed
from warm import Start

from mgtrain.errors import CheckpointError, UsageError
from mgtrain.recipe import Recipe
from mgtrain.runs.folder import RunDir
from mgtrain.runs.history import seconds_left
from mgtrain.runs.watch import look, render
from mgtrain.schedule import make_plan


def logged(folder: Path, recipe: Recipe, steps: int, pace: float = 2.0) -> RunDir:
    """A run that has logged so many steps of `pace` seconds, and evaluated after its first phase and its last step."""
    run, plan = RunDir(folder), make_plan(recipe, 24)
    run.write("recipe.yaml", recipe.to_yaml())
    run.write("plan.json", {"videos": 24})
    for step in list(plan)[:steps]:
        row = {"step": step.index + 1, "phase": step.phase.index, "epoch": step.epoch, "lr": step.lr, "loss": 1.25,
               "top1": 0.5, "train_seconds": pace * (step.index + 1), "data_seconds": step.index + 1.0,
               "clock_seconds": 70.0 + step.index}  # fmt: skip
        run.append("steps.jsonl", row)
        if step.index + 1 in (plan.phases[0].end_step, len(plan)):
            run.append("evals.jsonl", {"step": step.index + 1, "top1": 0.4, "train_seconds": row["train_seconds"]})
    return run


def shown(run: RunDir, baseline: RunDir | None = None) -> str:
    return printed(render(look(run, baseline)))


def test_a_run_under_way_says_where_it_is_and_what_is_left(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    text = shown(logged(tmp_path / "run", tiny(), 5))
    expected = (
        "run: step 5 of 17", "phase 2 of 6 (", "turn 2 of 3, step 2 of 3", "loss 1.250", "10.0 s of training",
        "50 % waiting for data, 1:14 min of wall-clock time; about 24.0 s left",
        "top-1 40.0 % after step 3, best 40.0 %",
    )  # fmt: skip
    for words in expected:
        assert words in text, words


def test_mean_class_accuracy_is_shown_where_it_is_known(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    run = logged(tmp_path / "run", tiny(), 5)
    run.append("evals.jsonl", {"step": 5, "top1": 0.5, "train_seconds": 10.0, "mean_class": 0.25})
    assert "top-1 50.0 %, mean class 25.0 % after step 5, best 50.0 %" in shown(run)


def test_a_finished_run_has_nothing_left(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    view = look(logged(tmp_path / "run", tiny(), 17))
    assert (view["finished"], view["left"]) == (True, 0)
    assert "finished" in shown(RunDir(tmp_path / "run"))


def silent(run: RunDir, seconds: float) -> RunDir:
    """The run, whose last log line is so many seconds old."""
    os.utime(run.path / "steps.jsonl", (time.time() - seconds,) * 2)
    return run


def test_a_run_is_not_finished_before_its_last_evaluation(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    run = logged(tmp_path / "run", tiny(), 17)
    (run.path / "evals.jsonl").write_text(json.dumps(run.rows("evals.jsonl")[0]) + "\n")
    assert look(run)["finished"] is False
    assert "the last evaluation is left" in shown(run)


def test_a_run_that_nobody_trains_is_stopped(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    run = silent(logged(tmp_path / "run", tiny(), 5), 120)
    assert look(run)["active"] is False
    assert "stopped; `mgtrain fit ... --resume` continues it" in shown(run)
    holds = (
        "import sys; from mgtrain.runs.folder import RunDir as R\nwith R(sys.argv[1]).locked(): print(flush=1), input()"
    )
    command = [sys.executable, "-c", holds, str(run.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert look(run)["active"] is True
        process.communicate(b"\n")
    assert look(run)["active"] is False
    assert look(silent(run, 1))["active"] is True  # a network file system may not share locks


def test_a_run_resumed_with_another_schedule_can_be_watched(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    run = logged(tmp_path / "run", tiny(), 12)
    run.write("recipe.yaml", tiny("schedule={name: baseline}").to_yaml())  # which has fewer phases
    assert run.rows("steps.jsonl")[-1]["phase"] >= len(make_plan(run.recipe(), 24).phases)
    assert look(run)["left"] > 0


def test_what_is_left_goes_at_the_pace_of_like_phases(tiny: Callable[..., Recipe]) -> None:
    plan = make_plan(tiny("optim.stages=[6, 6, 3]"), 24)
    slow, rows, seconds = plan.phases[0].shapes, [], 0.0
    for step in list(plan)[: plan.phases[4].first_step]:  # the first stage: its coarsest phase is slow
        seconds += 5.0 if step.phase.shapes == slow else 1.0
        rows.append({"step": step.index + 1, "phase": step.phase.index, "train_seconds": seconds})
    to_come = [phase for phase in plan.phases[4:] if phase.shapes == slow]
    expected = sum(phase.steps * (5.0 if phase.shapes == slow else 1.0) for phase in plan.phases[4:])
    assert to_come
    assert seconds_left(plan, rows) == pytest.approx(expected)
    phases = [list(group) for _, group in groupby(rows, key=lambda row: row["phase"])]
    ends = [row for phase in phases for row in (phase[0], phase[-1])]  # all that the progress bar remembers
    assert seconds_left(plan, ends) == pytest.approx(expected)


def test_the_baseline_at_the_same_time_and_step_is_told(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    run, rival = logged(tmp_path / "run", tiny(), 5), RunDir(tmp_path / "slow")
    rival.write("recipe.yaml", tiny("schedule={name: baseline}").to_yaml())
    rival.append("evals.jsonl", {"step": 20, "top1": 0.3, "train_seconds": 5.0})
    rival.append("evals.jsonl", {"step": 40, "top1": 0.8, "train_seconds": 60.0})
    assert "slow: 30.0 % after the same time, not evaluated yet after the same steps" in shown(run, rival)


def test_a_silent_run_is_said_to_be(
    tiny: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = silent(logged(tmp_path / "run", tiny(), 5), 3600)
    monkeypatch.setattr(RunDir, "in_use", True)
    assert "no log line for 1:00 h: it is evaluating, or it hangs" in shown(run)


def test_nothing_to_see_and_damage_are_one_line(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    run = logged(tmp_path / "run", tiny(), 0)
    with pytest.raises(UsageError, match="no step is logged yet; try again later"):
        look(run)
    run.append("steps.jsonl", {"step": 1, "phase": 99})
    with pytest.raises(CheckpointError, match="damaged"):
        look(run)


def test_the_command_shows_it_once_where_there_is_no_terminal(
    tiny: Callable[..., Recipe], tmp_path: Path, mgtrain: Start
) -> None:
    logged(tmp_path / "runs" / "mine", tiny(), 5)
    result = mgtrain(tmp_path, "watch", "mine")
    assert "mine: step 5 of 17" in result.stdout, result.stderr
    result = mgtrain(tmp_path, "watch", "mine", "--json")
    assert json.loads(result.stdout)["finished"] is False
