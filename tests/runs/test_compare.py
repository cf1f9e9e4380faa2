"""Comparing two runs: sums by hand, and what is said where a comparison would not be fair."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mgtrain.errors import ThresholdError, UsageError
from mgtrain.recipe import Recipe, recipe_differences
from mgtrain.runs.compare import compare, compare_groups, demand, render, render_groups, write_csv
from mgtrain.runs.folder import RunDir

ENV = {"device": "A CPU", "ranks": 1, "threads": 2}
DATA = {"train": {"videos": 24, "fingerprint": "t"}, "val": {"videos": 12, "fingerprint": "v"}}
# Multiply-adds of a clip of each shape of the tiny recipes, made up.
PER_CLIP = {(2, 16): 1, (2, 23): 2, (4, 16): 2, (4, 23): 4, (4, 32): 8, (8, 16): 4, (8, 23): 8, (8, 32): 16}


def evaluation(step: int, top1: float, seconds: float, videos: int = 12) -> dict[str, Any]:
    times = {"train_seconds": seconds, "data_seconds": seconds / 10, "eval_seconds": 2.0}
    return {"step": step, **times, "top1": top1, "top5": 1.0, "videos": videos}


def written(folder: Path, recipe: Recipe, evals: list[dict[str, Any]], **env: Any) -> RunDir:
    """A run directory with just what a comparison reads."""
    run = RunDir(folder)
    run.write("recipe.yaml", recipe.to_yaml())
    flops = [{"frames": frames, "crop": crop, "multiply_adds": n} for (frames, crop), n in PER_CLIP.items()]
    run.write("plan.json", {"videos": 24, "flops_per_clip": flops})
    run.write("env.json", {**ENV, **env})
    run.write("data.json", DATA)
    for row in evals:
        run.append("evals.jsonl", row)
    return run


def written_baseline(folder: Path, recipe: Recipe) -> RunDir:
    return written(folder / "slow", recipe, [evaluation(36, 0.25, 80.0), evaluation(54, 0.5, 120.0)])


def written_run(folder: Path, recipe: Recipe, **env: Any) -> RunDir:
    return written(folder / "fast", recipe, [evaluation(11, 0.25, 25.0), evaluation(17, 0.75, 35.0)], **env)


@pytest.fixture
def baseline(tiny: Callable[..., Recipe], tmp_path: Path) -> RunDir:
    """54 steps of 4 clips in 120 s, to 50 % top-1."""
    return written_baseline(tmp_path, tiny("schedule={name: baseline}"))


@pytest.fixture
def run(tiny: Callable[..., Recipe], tmp_path: Path) -> RunDir:
    """17 steps in 35 s, to 75 % top-1."""
    return written_run(tmp_path, tiny())


def text(result: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(render(result))
    out: str = console.file.getvalue()  # type: ignore[attr-defined]
    return out


def test_a_comparison_adds_up_as_by_hand(baseline: RunDir, run: RunDir) -> None:
    result = compare(baseline, run)
    theirs, ours = result["runs"]
    assert (theirs["name"], theirs["finished"], theirs["steps"], theirs["clips"]) == ("slow", True, 54, 216)
    assert (ours["name"], ours["finished"], ours["steps"]) == ("fast", True, 17)
    # 64 32 32 | 32 16 16 | 32 16 | 16 8 4, three times
    assert ours["clips"] == 128 + 64 + 48 + 3 * 28
    assert (theirs["epochs"], ours["epochs"]) == (9, 13.5)
    assert theirs["voxels"] == 216 * 8 * 32**2
    assert ours["voxels"] == (
        (64 * 2 * 16**2 + 64 * 2 * 23**2) + (32 * 4 * 16**2 + 32 * 4 * 23**2) + (32 * 4 * 16**2 + 16 * 4 * 23**2)
        + 3 * (16 * 8 * 16**2 + 8 * 8 * 23**2 + 4 * 8 * 32**2)
    )  # fmt: skip
    assert theirs["multiply_adds"] == 216 * 16
    assert ours["multiply_adds"] == (64 + 64 * 2) + (32 * 2 + 32 * 4) + (32 * 2 + 16 * 4) + 3 * (64 + 64 + 64)
    assert (theirs["train_seconds"], theirs["data_seconds"], theirs["eval_seconds"]) == (120, 12, 4)
    assert (ours["train_seconds"], ours["top1"], ours["best_accuracy"], ours["videos"]) == (35, 0.75, 0.75, 12)


def test_speedups_are_the_baselines_over_the_runs(baseline: RunDir, run: RunDir) -> None:
    result = compare(baseline, run)
    assert result["speedups"] == pytest.approx(
        {
            "steps": 54 / 17,
            "epochs": 9 / 13.5,
            "clips": 216 / 324,
            "voxels": 1769472 / 565760,
            "multiply_adds": 3456 / 1088,
            "train_seconds": 120 / 35,
            "gpu_hours": 120 / 35,
            "at_equal_accuracy": 120 / 30,  # 50 % half-way between 25 % at 25 s and 75 % at 35 s
        }
    )
    assert result["baseline_best"] == pytest.approx({"accuracy": 0.5, "baseline_seconds": 120, "seconds": 30})
    assert result["accuracy_difference"] == 0.25
    # p = (0.625 * 12 + 1) / 14 = 0.607; 1.96 * sqrt(p * (1 - p) * 2 / 12)
    assert result["accuracy_noise"] == pytest.approx(0.3908, abs=1e-4)
    assert result["warnings"] == []


def test_the_verdict_names_gain_accuracy_and_noise(baseline: RunDir, run: RunDir) -> None:
    verdict = compare(baseline, run)["verdict"]
    for words in ("fast", "slow", "3.43x", "3.18x", "75.0 %", "50.0 %", "+25.0", "within", "12 videos", "39.1"):
        assert words in verdict
    assert "\n" not in verdict


def test_a_difference_beyond_the_noise_is_called_that(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    baseline = written(tmp_path / "slow", tiny("schedule={name: baseline}"), [evaluation(54, 0.5, 120.0, 4000)])
    run = written(tmp_path / "fast", tiny(), [evaluation(17, 0.55, 35.0, 4000)])
    result = compare(baseline, run)
    assert result["accuracy_noise"] == pytest.approx(1.96 * (0.525 * 0.475 * 2 / 4000) ** 0.5, rel=1e-3)
    assert "beyond the noise" in result["verdict"]


def test_the_recipes_differences_are_listed(baseline: RunDir, run: RunDir) -> None:
    differences = compare(baseline, run)["recipe_differences"]
    assert {key.partition(".")[0] for key in differences} == {"schedule"}
    assert tuple(differences["schedule.name"]) == ("baseline", "multigrid")
    assert tuple(differences["schedule.epoch_factor"]) == (None, 1.5)
    assert recipe_differences(run.recipe(), run.recipe()) == {}


@pytest.mark.parametrize(("key", "value"), [("device", "A GPU"), ("ranks", 2), ("threads", 1)])
def test_times_of_different_devices_are_not_divided(
    tiny: Callable[..., Recipe], baseline: RunDir, tmp_path: Path, key: str, value: Any
) -> None:
    result = compare(baseline, written_run(tmp_path, tiny(), **{key: value}))
    assert result["speedups"]["train_seconds"] is None
    assert result["speedups"]["at_equal_accuracy"] is None
    assert result["speedups"]["steps"] == 54 / 17
    (warning,) = result["warnings"]
    assert warning.startswith("times are not divided, the runs were made on different devices: ")
    assert f"{key} {ENV[key]} and {value}" in warning
    assert "3.43x" not in text(result)
    assert "different devices" in text(result)


def test_an_unfinished_run_is_said_to_be_one(tiny: Callable[..., Recipe], baseline: RunDir, tmp_path: Path) -> None:
    run = written(tmp_path / "fast", tiny(), [evaluation(11, 0.25, 25.0)])
    result = compare(baseline, run)
    assert not result["runs"][1]["finished"]
    assert result["warnings"] == ["fast is unfinished: its numbers stop after 11 steps"]
    assert result["runs"][1]["clips"] == 128 + 64 + 48 + 28
    assert result["baseline_best"]["seconds"] is None
    assert "not reached" in text(result)
    assert result["speedups"]["at_equal_accuracy"] == 80 / 25  # at 25 %, which both have reached


def test_other_data_and_other_recipes_are_said(tiny: Callable[..., Recipe], baseline: RunDir, tmp_path: Path) -> None:
    run = written_run(tmp_path, tiny("optim.lr=0.1", "hardware.workers=3"))
    run.write("data.json", {**DATA, "val": {"videos": 12, "fingerprint": "w"}})
    assert compare(baseline, run)["warnings"] == [
        "the runs saw different training or validation videos",
        "the recipes differ in more than schedule: optim.lr",
    ]


def test_a_run_without_an_evaluation_cannot_be_compared(
    tiny: Callable[..., Recipe], baseline: RunDir, tmp_path: Path
) -> None:
    run = written(tmp_path / "fast", tiny(), [])
    with pytest.raises(UsageError, match="fast: no evaluation yet; wait until its first one, or continue it with"):
        compare(baseline, run)


def test_a_run_compared_with_itself_gains_nothing(baseline: RunDir) -> None:
    result = compare(baseline, baseline)
    assert set(result["speedups"].values()) == {1.0}
    assert result["accuracy_difference"] == 0


def test_the_result_is_plain_json(baseline: RunDir, run: RunDir) -> None:
    result = compare(baseline, run)
    assert json.loads(json.dumps(result, allow_nan=False))["schema"] == "mgtrain.compare/2"
    assert set(result) == {
        "schema", "runs", "speedups", "accuracy_difference", "accuracy_noise", "baseline_best", "recipe_differences",
        "warnings", "verdict",
    }  # fmt: skip


def test_the_table_shows_both_runs_and_the_gain(baseline: RunDir, run: RunDir) -> None:
    shown = text(compare(baseline, run))
    (steps,) = [line for line in shown.splitlines() if line.startswith("steps")]
    assert steps.split()[:4] == ["steps", "54", "17", "3.18x"]
    (time,) = [line for line in shown.splitlines() if line.startswith("time to 50.0 % top-1")]
    assert "2:00 min" in time
    assert "30.0 s" in time
    assert "4.00x" in time


def test_runs_on_several_labels_are_compared_by_mean_average_precision(
    tiny: Callable[..., Recipe], tmp_path: Path
) -> None:
    slow, fast = ([{**evaluation(s, 0.9, t, 12), "mean_ap": ap}] for s, t, ap in ((54, 120.0, 0.25), (17, 30.0, 0.5)))
    baseline, run = (
        written(tmp_path / "slow", tiny("schedule={name: baseline}"), slow),
        written(tmp_path / "fast", tiny(), fast),
    )
    result = compare(baseline, run)
    assert (result["accuracy_difference"], result["baseline_best"]["accuracy"]) == (0.25, 0.25)
    assert result["baseline_best"]["seconds"] == pytest.approx(15)  # half-way from nothing to 50 %
    assert "mAP 50.0 % against 25.0 %" in result["verdict"]


def test_what_was_gained_can_be_demanded(baseline: RunDir, run: RunDir) -> None:
    result = compare(baseline, run)
    demand(result, {"speedup": 3.4, "steps": 3, "accuracy": 25, "top1": 24.9})
    with pytest.raises(ThresholdError, match=r"^speedup is 3\.43, less than 3\.5$"):
        demand(result, {"speedup": 3.5})
    with pytest.raises(ThresholdError, match=r"^accuracy is 25\.00, less than 25\.1$"):
        demand(result, {"accuracy": 25.1})
    with pytest.raises(UsageError, match="--fail-under sped: allowed are speedup, steps, accuracy, top1"):
        demand(result, {"sped": 1})
    run.write("env.json", {**run.read("env.json"), "threads": 64})
    with pytest.raises(ThresholdError, match="speedup is not known: the runs were made on different devices"):
        demand(compare(baseline, run), {"speedup": 1})


def test_seeds_of_a_recipe_are_one_group(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    runs = []
    for seed, (slow, fast) in enumerate([(0.5, 0.6), (0.6, 0.8), (0.7, 0.7)]):
        recipe = tiny("schedule={name: baseline}", f"seed={seed}")
        runs.append(written(tmp_path / f"slow{seed}", recipe, [evaluation(54, slow, 120.0 + seed, 12)]))
        runs.append(written(tmp_path / f"fast{seed}", tiny(f"seed={seed}"), [evaluation(17, fast, 40.0, 12)]))
    result = compare_groups(runs)
    slow, fast = result["groups"]
    assert ([r["name"] for r in slow["runs"]], fast["seeds"]) == (["slow0", "slow1", "slow2"], [0, 1, 2])
    assert slow["accuracy"] == pytest.approx({"mean": 0.6, "sd": 0.1, "interval": 4.303 * 0.1 / 3**0.5})
    assert fast["accuracy_difference"] == pytest.approx(0.1)
    assert fast["speedups"] == pytest.approx(
        {"steps": 54 / 17, "multiply_adds": 3456 / 1088, "train_seconds": 121 / 40}
    )
    console = Console(file=io.StringIO(), width=200)
    console.print(render_groups(result))
    shown: str = console.file.getvalue()  # type: ignore[attr-defined]
    for words in ("slow0", "60.0 %", "10.0", "±24.8", "+10.0", "3.18x fewer", "3.02x less"):
        assert words in shown
    write_csv(runs, tmp_path / "runs.csv")
    rows = (tmp_path / "runs.csv").read_text().splitlines()
    assert len(rows) == 7
    assert rows[0].startswith("name,finished,steps,")
    runs[1].write("env.json", {**runs[1].read("env.json"), "threads": 64})
    apart = compare_groups(runs)
    assert "train_seconds" not in apart["groups"][1]["speedups"]
    assert apart["warnings"]
