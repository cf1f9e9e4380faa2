"""Comparing two runs: sums by hand, and what is said where a comparison would not be fair."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console, RenderableType

from mgtrain.errors import CheckpointError, ThresholdError, UsageError
from mgtrain.recipe import Recipe, recipe_differences
from mgtrain.runs.compare import compare, demand, render
from mgtrain.runs.folder import RunDir
from mgtrain.runs.groups import Outcome, compare_groups
from mgtrain.runs.history import History
from mgtrain.runs.scores import packed

ENV = {"device": "A CPU", "ranks": 1, "threads": 2, "mgtrain": "0.1.0", "torch": "2.14.1"}
DATA = {"train": {"videos": 24, "fingerprint": "t"}, "val": {"videos": 12, "fingerprint": "v"}}
# Multiply-adds of a clip of each shape of the tiny recipes, made up.
PER_CLIP = {(2, 16): 1, (2, 23): 2, (4, 16): 2, (4, 23): 4, (4, 32): 8, (8, 16): 4, (8, 23): 8, (8, 32): 16}


def evaluation(step: int, top1: float, seconds: float, videos: int = 12) -> dict[str, Any]:
    """A line of an old run: which videos were right is not in it."""
    times = {"train_seconds": seconds, "data_seconds": seconds / 10, "eval_seconds": 2.0, "clock_seconds": seconds + 9}
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


def printed(shown: RenderableType) -> str:
    """What a wide terminal shows."""
    console = Console(file=io.StringIO(), width=250)
    console.print(shown)
    out: str = console.file.getvalue()  # type: ignore[attr-defined]
    return out


def test_device_hours_are_those_of_all_parts(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    run = History(written_run(tmp_path, tiny(), ranks=1, ranks_since=[[0.0, 8], [30.0, 1]]))  # in all 35 s
    assert run.summary.gpu_hours == pytest.approx((8 * 30 + 5) / 3600)
    assert run.device_hours(25.0) == pytest.approx(8 * 25 / 3600)


def text(result: dict[str, Any]) -> str:
    return printed(render(result))


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
            "clock_seconds": 129 / 44,
            "gpu_hours": 120 / 35,
            "at_equal_accuracy": 120 / 30,  # 50 % half-way between 25 % at 25 s and 75 % at 35 s
        }
    )
    assert result["baseline_best"] == pytest.approx({"accuracy": 0.5, "baseline_seconds": 120, "seconds": 30})
    assert result["accuracy_difference"] == 0.25
    # Newcombe's unpaired interval of 9 / 12 - 6 / 12, from Wilson's (0.4677, 0.9111) and (0.2538, 0.7462)
    low, high = 0.25 - (0.2823**2 + 0.2462**2) ** 0.5, 0.25 + (0.1611**2 + 0.2462**2) ** 0.5
    assert result["accuracy_interval"] == pytest.approx([low, high], abs=1e-4)
    assert result["only_one_right"] is None
    assert result["warnings"] == []


def test_the_verdict_names_both_gains_accuracy_and_interval(baseline: RunDir, run: RunDir) -> None:
    assert compare(baseline, run)["verdict"] == (
        "fast against slow: 3.43x less training time, 2.93x less wall-clock time, 3.18x fewer steps; top-1 75.0 % "
        "against 50.0 %, cannot tell from one seed each (difference +25.0, 95 % from -12.5 to +54.4, margin 1 point), "
        "one run each on 12 videos; other seeds may differ"
    )


def with_bits(row: dict[str, Any], right: str, left_out: tuple[int, ...] = ()) -> dict[str, Any]:
    bits = np.array([bit == "1" for bit in right])
    return {**row, "top1": bits.mean(), "videos": len(bits), "right": packed(bits), "left_out": list(left_out)}


def test_runs_on_the_same_videos_get_the_paired_interval(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    # 36 videos are right in both, 2 only in the baseline, 12 only in the run: Newcombe 1998, example of table II.
    slow, fast = "1" * 36 + "1" * 2 + "0" * 12, "1" * 36 + "0" * 2 + "1" * 12
    baseline = written(
        tmp_path / "slow", tiny("schedule={name: baseline}"), [with_bits(evaluation(54, 0, 120.0), slow)]
    )
    run = written(tmp_path / "fast", tiny(), [with_bits(evaluation(17, 0, 35.0), fast)])
    result = compare(baseline, run)
    assert result["accuracy_interval"] == pytest.approx([0.0569, 0.3404], abs=1e-4)
    assert result["only_one_right"] == [2, 12]
    assert result["mcnemar"] == pytest.approx(212 / 2**14)  # 2 * (1 + 14 + 91) / 2^14
    assert (
        "not lower (difference +20.0, 95 % from +5.7 to +34.0, margin 1 point), one run each on the same 50"
        in (result["verdict"])
    )
    assert "p = 0.013" in text(result)
    # A video that one run could not read is compared in neither.
    other = written(tmp_path / "other", tiny(), [with_bits(evaluation(17, 0, 35.0), fast[:-1], left_out=(49,))])
    found = compare(baseline, other)
    assert found["only_one_right"] == [2, 11]
    assert found["accuracy_difference"] == pytest.approx(9 / 49)
    assert found["accuracy_interval"][0] < 9 / 49 < found["accuracy_interval"][1]
    assert found["verdict"].endswith("one run each on the same 49 videos; other seeds may differ")
    # Other videos, or no bits, as in runs of earlier versions: unpaired.
    run.write("data.json", {**DATA, "val": {"videos": 50, "fingerprint": "w"}})
    apart = compare(baseline, run)
    assert apart["only_one_right"] is None
    assert apart["accuracy_interval"] != result["accuracy_interval"]


def test_a_damaged_line_of_bits_is_damage(tiny: Callable[..., Recipe], baseline: RunDir, tmp_path: Path) -> None:
    for bits in ("%", 3, None, "AA=="):
        row = {**with_bits(evaluation(17, 0, 35.0), "1" * 12), "right": bits}
        run = written(tmp_path / f"run {bits}", tiny(), [row])
        rival = written(tmp_path / f"rival {bits}", tiny(), [with_bits(evaluation(17, 0, 35.0), "1" * 12)])
        with pytest.raises(CheckpointError, match="the logs are damaged"):
            compare(rival, run)


def test_a_run_of_an_earlier_version_can_be_compared(
    tiny: Callable[..., Recipe], baseline: RunDir, tmp_path: Path
) -> None:
    rows = [
        {k: v for k, v in evaluation(step, 0.5, t).items() if k != "clock_seconds"} for step, t in ((8, 9), (17, 35))
    ]
    run = written(tmp_path / "old", tiny(), rows)
    old = run.recipe().to_yaml().replace("times: 6", "per_phase: 1")
    assert "per_phase" in old
    run.write("recipe.yaml", old)
    result = compare(baseline, run)
    assert result["runs"][1]["clock_seconds"] == 35 + 2 * 2
    assert result["warnings"] == [
        "the recipes differ in evaluation.times, which changes the times",
        "old: from an earlier version, so the wall-clock time excludes start-up and checkpoints",
    ]


def test_the_recipes_differences_are_listed(baseline: RunDir, run: RunDir) -> None:
    differences = compare(baseline, run)["recipe_differences"]
    assert {key.partition(".")[0] for key in differences} == {"schedule"}
    assert tuple(differences["schedule.name"]) == ("baseline", "multigrid")
    assert tuple(differences["schedule.epoch_factor"]) == (None, 1.5)
    assert recipe_differences(run.recipe().flat(), run.recipe().flat()) == {}


@pytest.mark.parametrize(("key", "value"), [("device", "A GPU"), ("ranks", 2), ("threads", 1)])
def test_times_of_different_devices_are_not_divided(
    tiny: Callable[..., Recipe], baseline: RunDir, tmp_path: Path, key: str, value: Any
) -> None:
    result = compare(baseline, written_run(tmp_path, tiny(), **{key: value}))
    assert result["speedups"]["train_seconds"] is None
    assert result["speedups"]["at_equal_accuracy"] is None
    assert result["speedups"]["steps"] == 54 / 17
    (warning,) = result["warnings"]
    assert warning.startswith("times are not compared, because the runs used different devices: ")
    assert f"{key} {ENV[key]} and {value}" in warning
    assert "3.43x" not in text(result)
    assert "different devices" in text(result)


def test_an_unfinished_run_is_said_to_be_one(tiny: Callable[..., Recipe], baseline: RunDir, tmp_path: Path) -> None:
    run = written(tmp_path / "fast", tiny(), [evaluation(11, 0.25, 25.0)])
    result = compare(baseline, run)
    assert not result["runs"][1]["finished"]
    late = written(tmp_path / "late", tiny(), [evaluation(16, 0.25, 25.0)])  # of 17 steps
    assert not History(late).summary.finished
    assert result["warnings"] == ["fast is unfinished: its numbers are those after 11 steps"]
    assert result["runs"][1]["clips"] == 128 + 64 + 48 + 28
    assert result["baseline_best"]["seconds"] is None
    assert "not reached" in text(result)
    assert result["speedups"]["at_equal_accuracy"] == 80 / 25  # at 25 %, which both have reached
    # Half a run costs half as much: that is no gain.
    assert {value for key, value in result["speedups"].items() if key != "at_equal_accuracy"} == {None}
    assert result["verdict"].startswith("so far (unfinished): fast against slow: top-1 25.0 % against 50.0 %, ")
    assert "4.80x" not in text(result)
    assert "unfinished" in text(result).split("training time")[1].splitlines()[0]


def test_other_versions_are_named(tiny: Callable[..., Recipe], baseline: RunDir, tmp_path: Path) -> None:
    run = written_run(tmp_path, tiny(), torch="2.9.0")
    versions = "mgtrain 0.1.0, torch 2.14.1; mgtrain 0.1.0, torch 2.9.0"
    assert compare(baseline, run)["warnings"] == [f"different versions may change the times: {versions}"]


def test_other_data_and_other_recipes_are_said(tiny: Callable[..., Recipe], baseline: RunDir, tmp_path: Path) -> None:
    run = written_run(
        tmp_path, tiny("optim.lr=0.1", "hardware.workers=3", "hardware.tf32=false", "hardware.precision=bf16")
    )
    run.write("data.json", {**DATA, "val": {"videos": 12, "fingerprint": "w"}})
    assert compare(baseline, run)["warnings"] == [
        "the runs have different training or validation videos",
        "the recipes do not only differ in schedule, but also in optim.lr, hardware.precision",
        "the recipes differ in hardware.tf32, hardware.workers, which changes the times",
    ]


def test_a_run_without_an_evaluation_cannot_be_compared(
    tiny: Callable[..., Recipe], baseline: RunDir, tmp_path: Path
) -> None:
    run = written(tmp_path / "fast", tiny(), [])
    with pytest.raises(UsageError, match="fast: no evaluation yet; wait for the first one, or resume the run with"):
        compare(baseline, run)


def test_a_run_compared_with_itself_gains_nothing(baseline: RunDir) -> None:
    result = compare(baseline, baseline)
    assert set(result["speedups"].values()) == {1.0}
    assert result["accuracy_difference"] == 0


def test_the_result_is_plain_json(baseline: RunDir, run: RunDir) -> None:
    result = compare(baseline, run)
    assert json.loads(json.dumps(result, allow_nan=False))["schema"] == "mgtrain.compare/3"
    assert set(result) == {
        "schema", "runs", "speedups", "accuracy_difference", "accuracy_interval", "only_one_right", "mcnemar",
        "same_videos", "margin", "judged", "baseline_best", "recipe_differences", "warnings", "verdict",
    }  # fmt: skip


def test_the_table_shows_both_runs_and_the_gain(baseline: RunDir, run: RunDir) -> None:
    shown = text(compare(baseline, run))
    (steps,) = [line for line in shown.splitlines() if line.startswith("steps")]
    assert steps.split()[:4] == ["steps", "54", "17", "3.18x"]
    (time,) = [line for line in shown.splitlines() if line.startswith("time to 50.0 % top-1")]
    assert "2:00 min" in time
    assert "30.0 s" in time
    assert "4.00x" in time
    assert "mean class" not in shown  # which these runs do not know


def test_mean_class_accuracy_stands_beside_top_1(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    counts = {"correct": [8, 1, 0], "counts": [10, 2, 0]}  # all that earlier versions logged
    slow, fast = ({**evaluation(step, 0.75, 30.0), **counts} for step in (54, 17))
    baseline = written(tmp_path / "slow", tiny("schedule={name: baseline}"), [slow])
    run = written(tmp_path / "fast", tiny(), [{**fast, "mean_class": 0.7}])
    result = compare(baseline, run)
    assert [summary["mean_class"] for summary in result["runs"]] == [pytest.approx(0.65), 0.7]
    (line,) = [line for line in text(result).splitlines() if line.startswith("mean class")]
    assert line.split()[2:] == ["65.0", "%", "70.0", "%", "+5.0"]


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
    assert "mAP 50.0 % against 25.0 %, cannot tell: one seed shows" in result["verdict"]
    assert result["accuracy_interval"] == [None, None]
    baseline = written(tmp_path / "slow_2", tiny("schedule={name: baseline}"), [{**slow[0], "mean_ap_sd": 0.03}])
    known = compare(baseline, written(tmp_path / "fast_2", tiny(), [{**fast[0], "mean_ap_sd": 0.04}]))
    assert known["accuracy_interval"] == [pytest.approx(0.25 - 1.96 * 0.05, abs=1e-4), pytest.approx(0.348, abs=1e-4)]
    assert "not lower (difference +25.0, 95 % from +15.2 to +34.8" in known["verdict"]
    perfect = [{**evaluation(s, 1.0, 9.0), "mean_ap": 1.0, "mean_ap_sd": 0.0} for s in (54, 17)]
    baseline = written(tmp_path / "slow_3", tiny("schedule={name: baseline}"), perfect[:1])
    same = compare(baseline, written(tmp_path / "fast_3", tiny(), perfect[1:]))
    assert same["accuracy_interval"] == [None, None]  # resampling equal values shows no spread


def test_the_training_loss_is_that_of_the_last_tenth_at_the_base_shape(baseline: RunDir, run: RunDir) -> None:
    assert compare(baseline, run)["runs"][1]["train_loss"] is None  # no step is logged
    assert "training loss" not in text(compare(baseline, run))
    for step, loss in ((48, 9.0), (49, 0.2), (50, None), (54, 0.4), (55, 9.0)):  # a tenth of 54; lost steps come after
        baseline.append("steps.jsonl", {"step": step, "frames": 8, "crop": 32, "loss": loss})
    for step, crop, loss in ((14, 32, 9.0), (16, 23, 9.0), (17, 32, 0.5)):
        run.append("steps.jsonl", {"step": step, "frames": 8, "crop": crop, "loss": loss})
    result = compare(baseline, run)
    assert [summary["train_loss"] for summary in result["runs"]] == pytest.approx([0.3, 0.5])
    assert re.search(r"training loss at the end\W+0\.300\W+0\.500", text(result))


def test_runs_with_other_scores_are_not_compared(tiny: Callable[..., Recipe], baseline: RunDir, tmp_path: Path) -> None:
    several = written(tmp_path / "several", tiny(), [{**evaluation(17, 0.9, 30.0), "mean_ap": 0.5}])
    message = "slow is scored by top-1, several by mAP; compare runs with the same score"
    with pytest.raises(UsageError, match=message):
        compare(baseline, several)
    with pytest.raises(UsageError, match=message):
        compare_groups({"slow": [Outcome.of(baseline)], "several": [Outcome.of(several)]})


def test_settings_that_change_times_are_named(tiny: Callable[..., Recipe], baseline: RunDir, tmp_path: Path) -> None:
    run = written_run(tmp_path, tiny("evaluation.times=1", "hardware.workers=1", "hardware.micro_clips=4"))
    assert compare(baseline, run)["warnings"] == [
        "the recipes differ in evaluation.times, hardware.workers, which changes the times"
    ]


def test_a_run_that_was_resumed_on_another_device_has_no_comparable_time(
    tiny: Callable[..., Recipe], baseline: RunDir, tmp_path: Path
) -> None:
    run = written_run(tmp_path, tiny(), devices=[["A CPU", 1, 2], ["A GPU", 4, 2]])
    result = compare(baseline, run)
    assert result["warnings"] == [
        "times are not compared, because the runs used different devices: fast ran on A CPU x 1 x 2, then on A GPU x 4 "
        "x 2"
    ]
    assert result["speedups"]["train_seconds"] is None


def test_what_was_gained_can_be_demanded(baseline: RunDir, run: RunDir) -> None:
    result = compare(baseline, run)
    demand(result, {"speedup": 3.4, "clock": 2.9, "steps": 3, "accuracy": 25, "top1": 24.9})
    with pytest.raises(ThresholdError, match=r"^speedup is 3\.43, less than 3\.5$"):
        demand(result, {"speedup": 3.5})
    with pytest.raises(ThresholdError, match=r"^accuracy is 25\.00, less than 25\.1$"):
        demand(result, {"accuracy": 25.1})
    with pytest.raises(ThresholdError, match=r"^clock is 2\.93, less than 3$"):
        demand(result, {"clock": 3.0})
    lost = {**result, "accuracy_difference": 199 / 200 - 1.0}  # -0.005000000000000004
    demand(lost, {"accuracy": -0.5})
    with pytest.raises(ThresholdError, match=r"^accuracy is -0\.50, less than -0\.499$"):
        demand(lost, {"accuracy": -0.499})
    rows = (run.path / "evals.jsonl").read_text().splitlines(keepends=True)
    (run.path / "evals.jsonl").write_text("".join(rows[:1]))
    early = compare(baseline, run)
    with pytest.raises(ThresholdError, match="fast is unfinished, so its gain is not known"):
        demand(early, {"speedup": 1})
    assert early["verdict"].startswith("so far (unfinished): fast against ")
    (run.path / "evals.jsonl").write_text("".join(rows))
    run.write("env.json", {**run.read("env.json"), "threads": 64})
    with pytest.raises(ThresholdError, match="speedup is not known, because the runs used different devices"):
        demand(compare(baseline, run), {"speedup": 1})


def test_the_accuracy_of_a_run_is_its_last_not_its_best(tiny: Callable[..., Recipe], baseline, tmp_path: Path) -> None:
    fell = written(tmp_path / "fell", tiny(), [evaluation(11, 0.75, 25.0), evaluation(17, 0.25, 35.0)])
    result = compare(baseline, fell)
    assert (result["runs"][1]["accuracy"], result["runs"][1]["best_accuracy"]) == (0.25, 0.75)
    assert result["accuracy_difference"] == pytest.approx(-0.25)
    assert "top-1 25.0 % against 50.0 %" in result["verdict"]
