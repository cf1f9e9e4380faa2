"""The folder of a run: what is logged can be read back, once, whatever happened in between."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from mgtrain.errors import CheckpointError, UsageError
from mgtrain.runs.folder import RunDir, find_run
from mgtrain.runs.history import speedup_at_equal_accuracy, time_to_accuracy


def rows(*pairs: tuple[float, float]) -> list[dict[str, float]]:
    """Evaluations out of (top-1, seconds of training)."""
    return [{"top1": top1, "train_seconds": seconds} for top1, seconds in pairs]


CURVE = rows((0.2, 10), (0.5, 20), (0.4, 30), (0.8, 50))


@pytest.mark.parametrize(
    ("top1", "seconds"),
    [
        (0.0, 0.0),  # everything has accuracy 0 at once
        (0.1, 5.0),  # from 0 at the start
        (0.2, 10.0),
        (0.35, 15.0),
        (0.5, 20.0),
        (0.65, 40.0),  # between 0.5, the best so far at 30 s, and 0.8 at 50 s
        (0.8, 50.0),
        (0.81, None),
    ],
)
def test_time_to_accuracy_is_interpolated_between_evaluations(top1: float, seconds: float | None) -> None:
    assert time_to_accuracy(CURVE, top1) == (None if seconds is None else pytest.approx(seconds))


def test_without_evaluations_no_accuracy_is_reached() -> None:
    assert time_to_accuracy([], 0.1) is None


def test_speedup_is_at_the_highest_accuracy_that_both_have_reached() -> None:
    faster = rows((0.5, 4), (0.6, 5))
    # Both have 0.6: the baseline at 30 + (0.6 - 0.5) / (0.8 - 0.5) * 20 = 36.67 s, the run at 5 s.
    assert speedup_at_equal_accuracy(CURVE, faster) == pytest.approx(110 / 3 / 5)
    assert speedup_at_equal_accuracy(faster, CURVE) == pytest.approx(5 / (110 / 3))
    assert speedup_at_equal_accuracy(CURVE, CURVE) == 1
    assert speedup_at_equal_accuracy([], CURVE) is None
    assert speedup_at_equal_accuracy(CURVE, []) is None


def test_lines_come_back_as_they_were_written(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.write("plan.json", {"steps": 3})
    for step in range(1, 4):
        run.append("steps.jsonl", {"step": step, "loss": 0.1 * step})
    assert run.rows("steps.jsonl") == [{"step": step, "loss": 0.1 * step} for step in range(1, 4)]
    assert run.read("plan.json") == {"steps": 3}
    assert run.rows("evals.jsonl") == []


def test_a_line_cut_short_by_a_crash_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "steps.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert RunDir(tmp_path).rows("steps.jsonl") == [{"step": 1}, {"step": 2}]


def test_rewinding_forgets_what_came_after_a_step(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    (tmp_path / "steps.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    (tmp_path / "evals.jsonl").write_text(
        "".join(f'{{"step": {n}, "top1": 0.5, "train_seconds": 1}}\n' for n in (2, 3))
    )
    run.rewind(2)
    assert [row["step"] for row in run.rows("steps.jsonl")] == [1, 2]
    assert [row["step"] for row in run.rows("evals.jsonl")] == [2]
    run.append("steps.jsonl", {"step": 3})
    assert [row["step"] for row in run.rows("steps.jsonl")] == [1, 2, 3]
    assert {path.name for path in tmp_path.iterdir()} == {"steps.jsonl", "evals.jsonl"}


def test_ranks_that_only_compute_write_nothing(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run", writes=False)
    run.write("plan.json", {"steps": 3})
    run.append("steps.jsonl", {"step": 1})
    run.scalars(1, {"train/loss": 1.0})
    run.rewind(0)
    run.prune(1, also=[])
    run.close()
    assert not (tmp_path / "run").exists()


def test_checkpoints_come_oldest_first_and_the_newest_stay(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    for step in (1000, 5, 20, 300):
        run.checkpoint_path(step).write_bytes(b"")
    (tmp_path / "checkpoints/.step_00000400.safetensors.tmp").write_bytes(b"")  # of a crash
    assert run.checkpoints() == [run.checkpoint_path(step) for step in (5, 20, 300, 1000)]
    run.prune(keep=2, also=[run.checkpoint_path(5), run.checkpoint_path(7)])
    assert run.checkpoints() == [run.checkpoint_path(step) for step in (5, 300, 1000)]


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "env.json").write_text("{")
    for name in ("plan.json", "env.json"):
        with pytest.raises(CheckpointError) as caught:
            RunDir(tmp_path).read(name)
        assert str(caught.value).startswith(f"{tmp_path / name}: cannot be read: ")


def test_a_file_system_without_locks_is_not_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.lockf", no_locks)
    with (
        pytest.raises(CheckpointError, match="cannot be locked: No locks available; choose a folder on another"),
        RunDir(tmp_path / "run").locked(),
    ):
        pass


def test_a_lock_that_its_owner_has_removed_locks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, lockf = RunDir(tmp_path / "run"), fcntl.lockf
    removed: list[Path] = []

    def removed_before(*arguments: Any) -> None:
        if not removed:
            removed.append(run.path / ".lock")
            removed[0].unlink()
        lockf(*arguments)

    monkeypatch.setattr("fcntl.lockf", removed_before)
    with run.locked():
        assert removed[0].exists()


def test_a_folder_that_another_run_has_just_removed_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, mkdir = RunDir(tmp_path / "run"), Path.mkdir
    made: list[Path] = []

    def removed_after(path: Path, *arguments: Any, **options: Any) -> None:
        mkdir(path, *arguments, **options)
        if path == run.path and not made:
            made.append(path)
            path.rmdir()

    monkeypatch.setattr(Path, "mkdir", removed_after)
    with run.locked():
        assert made == [run.path]
        assert (run.path / ".lock").exists()


def test_rewinding_deletes_what_a_killed_process_has_left_of_a_checkpoint(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    for name in ("step_00000002.safetensors", ".step_00000003.safetensors.tmp"):
        (tmp_path / "checkpoints" / name).touch()
    run.rewind(2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002.safetensors"]


def test_runs_are_found_by_folder_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"none: not a run directory, .*; no runs in runs/ yet"):
        find_run("none")
    for name in ("second", "first"):
        RunDir(Path("runs") / name).write("recipe.yaml", "seed: 0\n")
    assert find_run("first").path == Path("runs/first")
    assert find_run("runs/first").path == Path("runs/first")
    assert find_run(tmp_path / "runs/second").name == "second"
    with pytest.raises(UsageError, match=r"none: not a run directory, .*; runs here: first, second"):
        find_run("none")
