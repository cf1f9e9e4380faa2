"""Groups of runs: pairs by seed and fold, Welch's t otherwise, and what is said where they show nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from test_compare import DATA, evaluation, printed, written

from mgtrain.errors import UsageError
from mgtrain.recipe import Recipe
from mgtrain.runs.compare import compare
from mgtrain.runs.folder import RunDir
from mgtrain.runs.groups import Outcome, compare_groups, grouped, render_groups, verdicts, write_csv

BASELINE = "schedule={name: baseline}"


def many(
    folder: Path, recipe: Callable[..., Recipe], name: str, accuracies: Sequence[float], *words: str, seconds: float,
    seeds: Sequence[int] = (0, 1, 2, 3, 4), step: int | None = None, **env: Any,
) -> list[RunDir]:  # fmt: skip
    """Runs of a recipe, one seed each; training takes `seconds`, and one more for each seed."""
    last = step or (54 if BASELINE in words else 17)
    return [
        written(folder / f"{name}_{seed}", recipe(*words, f"seed={seed}"), [evaluation(last, top1, seconds + n)], **env)
        for n, (seed, top1) in enumerate(zip(seeds, accuracies, strict=False))
    ]


def shown(result: dict[str, Any]) -> str:
    return printed(render_groups(result))


def test_seeds_of_a_recipe_are_one_group_and_pairs(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    slow = many(tmp_path, tiny, "slow", (0.5, 0.6, 0.7), BASELINE, seconds=120.0)
    fast = many(tmp_path, tiny, "fast", (0.6, 0.8, 0.7), seconds=40.0)
    mixed = [run for pair in zip(slow, fast, strict=True) for run in pair]
    result = compare_groups(grouped(mixed))
    base, group = result["groups"]
    assert ([r["name"] for r in base["runs"]], group["seeds"]) == (["slow_0", "slow_1", "slow_2"], [0, 1, 2])
    half = 4.302653 * 0.1 / 3**0.5  # Student's t of 2 degrees of freedom
    expected = {"value": 0.6, "low": 0.6 - half, "high": 0.6 + half, "sd": 0.1, "count": 3}
    assert base["accuracy"] == pytest.approx(expected)
    # Differences of the pairs are 10, 20 and 0 points: their mean is as exact as the groups' means are not.
    assert group["pairs"] == 3
    assert (group["difference"]["value"], group["difference"]["sd"]) == pytest.approx((0.1, 0.1))
    assert (group["difference"]["low"], group["difference"]["high"]) == pytest.approx((0.1 - half, 0.1 + half))
    gain = group["speedups"]["train_seconds"]
    assert gain["value"] == pytest.approx((120 / 40 * 121 / 41 * 122 / 42) ** (1 / 3))
    assert 2.8 < gain["low"] < gain["value"] < gain["high"] < 3.1
    assert group["speedups"]["steps"]["value"] == pytest.approx(54 / 17)
    assert group["speedups"]["clock_seconds"]["value"] == pytest.approx((129 * 130 * 131 / 49 / 50 / 51) ** (1 / 3))
    assert result["warnings"] == []
    (verdict,) = verdicts(result)
    assert (
        "fewer steps; top-1: cannot tell: about 3 more seeds may decide (difference +10.0, 95 % from -14.8" in verdict
    )
    text = " ".join(shown(result).split())
    for words in (verdict, "slow_0", "60.0 % top-1", "35.2 to 84.8", "2.95x", "3 pairs of runs"):
        assert words in text, words


def test_what_takes_longer_is_said_to(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    fast = many(tmp_path, tiny, "fast", (0.6, 0.8, 0.7), "evaluation.times=3", seconds=40.0)
    slow = many(tmp_path, tiny, "slow", (0.5, 0.6, 0.7), BASELINE, seconds=120.0)
    (verdict,) = verdicts(compare_groups(grouped([*fast, *slow])))
    _, group = compare_groups(grouped([*slow, *fast]))["groups"]
    gain = group["speedups"]["train_seconds"]
    assert f"{gain['value']:.2f}x ({gain['low']:.2f} to {gain['high']:.2f}) more training time" in verdict
    assert "3.18x more steps" in verdict


def test_pairs_show_what_unpaired_groups_do_not(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    hard = (0.5, 0.6, 0.7, 0.8, 0.9)  # seeds, or folds, differ much more than the recipes
    slow = many(tmp_path, tiny, "slow", hard, BASELINE, seconds=120.0)
    near = [top1 + change for top1, change in zip(hard, (0.01, 0.02, 0.0, 0.01, 0.02), strict=True)]
    paired = compare_groups(grouped([*slow, *many(tmp_path, tiny, "fast", near, seconds=40.0)]))["groups"][1]
    assert paired["judged"].startswith("not lower (difference +1.2, 95 % from +0.2 to +2.2, margin 1 point")
    other = many(tmp_path, tiny, "other", near, seconds=40.0, seeds=(5, 6, 7, 8, 9))
    apart = compare_groups(grouped([*slow, *other]))["groups"][1]
    assert apart["pairs"] is None
    assert apart["judged"].startswith("cannot tell: about ")
    assert apart["difference"]["value"] == pytest.approx(paired["difference"]["value"])


def test_folds_pair_by_their_lists(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    runs = []
    for name, words, accuracies in (("slow", (BASELINE,), (0.3, 0.9)), ("fast", (), (0.31, 0.92))):
        for fold, top1 in enumerate(accuracies):
            recipe = tiny(*words, f"data.val=val_{fold}.csv", f"data.train=train_{fold}.csv")
            runs.append(
                written(tmp_path / f"{name}{fold}", recipe, [evaluation(17 if name == "fast" else 54, top1, 9.0)])
            )
    group = compare_groups(grouped(runs))["groups"][1]
    assert group["pairs"] == 2
    assert group["difference"]["sd"] == pytest.approx(0.01 / 2**0.5)


def on_folds(
    folder: Path, recipe: Callable[..., Recipe], name: str, *words: str, top1: dict[tuple[int, int], float]
) -> list[RunDir]:
    """A run for each (fold, seed)."""
    return [
        written(
            folder / f"{name}_{fold}_{seed}",
            recipe(*words, f"seed={seed}", f"data.val=val_{fold}.csv", f"data.train=train_{fold}.csv"),
            [evaluation(17 if name == "fast" else 54, value, 9.0)],
        )
        for (fold, seed), value in top1.items()
    ]


def test_the_seeds_of_a_fold_count_as_one_run(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    gains = {(fold, seed): (0.02, -0.002)[fold] + 0.001 * seed for fold in range(2) for seed in range(5)}
    slow = on_folds(tmp_path, tiny, "slow", BASELINE, top1=dict.fromkeys(gains, 0.5))
    fast = on_folds(tmp_path, tiny, "fast", top1={key: 0.5 + gain for key, gain in gains.items()})
    result = compare_groups(grouped([*slow, *fast]))
    group = result["groups"][1]
    assert (group["pairs"], group["folds"], group["difference"]["count"]) == (10, 2, 2)
    half = 12.7062 * 0.011  # Student's t of 1 degree of freedom, and the error of the mean of 0.022 and 0.0
    assert group["difference"]["low"] == pytest.approx(0.011 - half, abs=1e-5)
    assert verdicts(result)[0].endswith(", 10 pairs of runs in 2 folds")


def test_folds_without_a_partner_are_left_out(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    slow = on_folds(tmp_path, tiny, "slow", BASELINE, top1={(0, 0): 0.3, (1, 0): 0.9, (2, 0): 0.6})
    fast = on_folds(tmp_path, tiny, "fast", top1={(0, 0): 0.31, (1, 0): 0.92})
    result = compare_groups(grouped([*slow, *fast]))
    (warning,) = result["warnings"]
    assert warning == "fast_0_0: only 2 folds are in both groups; the others are ignored"
    assert result["groups"][1]["difference"]["value"] == pytest.approx(0.015)


def test_one_common_fold_is_a_pair(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    slow = on_folds(tmp_path, tiny, "slow", BASELINE, top1={(0, 0): 0.6, (1, 0): 0.9})
    fast = on_folds(tmp_path, tiny, "fast", top1={(0, 0): 0.65})
    result = compare_groups(grouped([*slow, *fast]))
    assert "fast_0_0: only 1 fold is in both groups; the others are ignored" in result["warnings"]
    found = result["groups"][1]["difference"]
    assert (found["value"], found["low"]) == (pytest.approx(0.05), None)  # not 0.65 - 0.75


def test_the_interval_of_a_group_counts_folds_not_seeds(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    top1 = {(fold, seed): (0.6, 0.9)[fold] for fold in range(2) for seed in range(10)}
    (group,) = compare_groups(grouped(on_folds(tmp_path, tiny, "fast", top1=top1)))["groups"]
    assert (group["accuracy"]["value"], group["accuracy"]["count"]) == (pytest.approx(0.75), 2)
    assert group["accuracy"]["high"] - group["accuracy"]["low"] > 3.8  # with one degree of freedom


def test_the_folds_of_a_study_may_be_folders(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    outcomes: dict[str, list[Outcome]] = {"slow": [], "fast": []}
    for name, words, gain in (("slow", [BASELINE], 0.0), ("fast", [], 0.002)):
        for fold, top1 in (("a", 0.3), ("b", 0.6), ("c", 0.9)):
            last = evaluation(54 if words else 17, top1 + gain, 9.0)
            run = written(tmp_path / f"{name}_{fold}", tiny(*words, f"data.root={fold}"), [last])
            outcomes[name].append(Outcome.of(run))
    group = compare_groups(outcomes)["groups"][1]
    assert (group["folds"], group["difference"]["sd"]) == (3, pytest.approx(0, abs=1e-9))


def test_folds_are_paired_even_if_their_seeds_differ(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    hard = {0: 0.3, 1: 0.9}  # folds differ much more than seeds and recipes
    top1 = {(fold, seed): hard[fold] for fold in hard for seed in (0, 1)}
    slow = on_folds(tmp_path, tiny, "slow", BASELINE, top1=top1)
    others = {(fold, seed): hard[fold] + 0.02 + 0.01 * fold for fold in hard for seed in (3, 4, 5)}
    result = compare_groups(grouped([*slow, *on_folds(tmp_path, tiny, "fast", top1=others)]))
    group = result["groups"][1]
    assert (group["pairs"], group["folds"], group["difference"]["count"]) == (None, 2, 2)
    assert group["difference"]["sd"] == pytest.approx(0.01 / 2**0.5)
    assert verdicts(result)[0].endswith(", 4 and 6 runs in 2 folds")


def test_seeds_do_not_count_as_runs_where_the_groups_share_no_fold(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    slow = on_folds(tmp_path, tiny, "slow", BASELINE, top1={(f, s): (0.3, 0.9)[f] for f in range(2) for s in range(5)})
    fast = on_folds(tmp_path, tiny, "fast", top1={(f + 2, s): (0.4, 0.8)[f] for f in range(2) for s in range(5)})
    group = compare_groups(grouped([*slow, *fast]))["groups"][1]
    assert (group["pairs"], group["folds"], group["difference"]["count"]) == (None, 4, 2)


def test_other_videos_under_the_same_name_are_noticed(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    slow = many(tmp_path, tiny, "slow", (0.5, 0.6), BASELINE, seconds=120.0)
    fast = many(tmp_path, tiny, "fast", (0.6, 0.7), seconds=40.0)
    assert compare_groups(grouped([*slow, *fast]))["warnings"] == []
    fast[1].write("data.json", {**DATA, "val": {"videos": 12, "fingerprint": "edited"}})
    (warning,) = compare_groups(grouped([*slow, *fast]))["warnings"]
    assert "different training or validation videos, though their lists have the same names" in warning


def test_what_changes_the_times_is_said(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    slow = many(tmp_path, tiny, "slow", (0.5, 0.6), BASELINE, seconds=120.0)
    fast = many(tmp_path, tiny, "fast", (0.5, 0.7), seconds=40.0)
    rare = many(tmp_path, tiny, "rare", (0.5, 0.7), "evaluation.times=3", "hardware.workers=1", seconds=30.0)
    result = compare_groups(grouped([*slow, *fast, *rare]))
    assert [len(group["runs"]) for group in result["groups"]] == [2, 2, 2]
    assert result["warnings"] == ["rare_0: differs in evaluation.times, hardware.workers, which changes the times"]


def test_runs_that_changed_their_device_have_no_comparable_times(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    slow = many(tmp_path, tiny, "slow", (0.5, 0.6), BASELINE, seconds=120.0)
    moved = many(tmp_path, tiny, "moved", (0.5, 0.7), seconds=40.0, devices=[["A CPU", 1, 2], ["A CPU", 4, 2]])
    result = compare_groups(grouped([*slow, *moved]))
    assert result["warnings"] == ["times are not compared, because the runs used different devices"]
    assert "clock_seconds" not in result["groups"][1]["speedups"]


def test_unfinished_runs_are_named_first_and_left_out(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    slow = many(tmp_path, tiny, "slow", (0.6, 0.7), BASELINE, seconds=120.0)
    late = many(tmp_path, tiny, "late", (0.1,), BASELINE, seconds=20.0, seeds=(9,), step=9)
    fast = many(tmp_path, tiny, "fast", (0.6, 0.75), seconds=40.0)
    result = compare_groups(grouped([*slow, *late, *fast]))
    assert result["warnings"][0] == "late_9 is unfinished (9 steps) and not in the means"
    assert result["groups"][0]["accuracy"]["value"] == pytest.approx(0.65)
    assert shown(result).splitlines()[0].startswith("note: late_9 is unfinished")
    with pytest.raises(UsageError, match="late_9: no run of this group is finished"):
        compare_groups(grouped([*late, *fast]))


def test_equal_numbers_and_single_runs_show_no_spread(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    slow = many(tmp_path, tiny, "slow", (0.6, 0.6), BASELINE, seconds=120.0)
    fast = many(tmp_path, tiny, "fast", (0.6, 0.6), seconds=40.0)
    result = compare_groups(grouped([*slow, *fast]))
    assert result["warnings"] == [
        "slow_0: 2 equal accuracies do not show the spread; train more seeds",
        "fast_0: 2 equal accuracies do not show the spread; train more seeds",
    ]
    assert result["groups"][0]["accuracy"]["low"] is None
    assert "±0.0" not in shown(result)
    assert "60.0 to 60.0" not in shown(result)
    assert result["groups"][1]["judged"].startswith("cannot tell: 2 equal differences show no spread")
    alone = compare_groups(grouped([*slow, *fast[:1]]))
    assert "fast_0: one run does not show the spread between seeds; train more seeds" in alone["warnings"]
    assert alone["groups"][1]["judged"].startswith("cannot tell: one seed")


def test_what_else_differs_is_said(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    slow = many(tmp_path, tiny, "slow", (0.5, 0.6, 0.7), BASELINE, seconds=120.0)
    fast = many(tmp_path, tiny, "fast", (0.5, 0.7), "optim.lr=0.1", seconds=40.0, seeds=(1, 2), threads=64)
    result = compare_groups(grouped([*slow, *fast]))
    assert result["warnings"] == [
        "times are not compared, because the runs used different devices",
        "fast_1: does not only differ in schedule, but also in optim.lr",
    ]
    assert "train_seconds" not in result["groups"][1]["speedups"]
    assert result["groups"][1]["pairs"] is None  # all runs count, as in the table
    assert result["groups"][1]["difference"]["value"] == pytest.approx(0.6 - 0.6)
    assert result["groups"][1]["speedups"]["steps"]["value"] == pytest.approx(54 / 17)


def test_groups_are_kept_apart_by_recipe_not_by_name(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    runs = many(tmp_path / "a", tiny, "run", (0.5, 0.6), BASELINE, seconds=120.0)
    runs += many(tmp_path / "b", tiny, "run", (0.7, 0.8), seconds=40.0)
    runs += many(tmp_path / "c", tiny, "run", (0.6, 0.7), "hardware.precision=bf16", "hardware.workers=2", seconds=40.0)
    found = compare_groups(grouped(runs))["groups"]
    assert [(g["name"], len(g["runs"])) for g in found] == [("run_0", 2), ("run_0 (2)", 2), ("run_0 (3)", 2)]
    assert found[1]["accuracy"]["value"] == pytest.approx(0.75)


def test_a_table_has_a_line_for_each_run(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    runs = many(tmp_path, tiny, "slow", (0.5, 0.6, 0.7), BASELINE, seconds=120.0)
    write_csv(map(Outcome.of, runs), tmp_path / "runs.csv")
    rows = (tmp_path / "runs.csv").read_text().splitlines()
    assert len(rows) == 4
    assert rows[0].startswith("name,finished,steps,")
    assert rows[1].endswith(",0")


def test_runs_on_unequal_numbers_of_videos(tiny, tmp_path: Path) -> None:
    slow = written(tmp_path / "slow", tiny(BASELINE), [evaluation(54, 0.5, 120.0, 80)])
    fast = written(tmp_path / "fast", tiny(), [evaluation(17, 0.8, 30.0, 70)])
    assert compare(slow, fast)["accuracy_difference"] == pytest.approx(0.3)
