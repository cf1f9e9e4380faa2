"""Intervals and verdicts, against scipy's and published ones, and by simulation."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from scipy import stats

from mgtrain.rng import Draw, generator
from mgtrain.runs.statistics import (
    Interval,
    judge,
    mcnemar,
    mean,
    more_seeds,
    paired_means,
    paired_shares,
    ratio,
    welch,
)


def test_means_are_students_and_welchs() -> None:
    a, b = [3.0, 4.0, 1.0, 2.1], [5.0, 7.0, 6.1]
    ours, theirs = mean(a), stats.t.interval(0.95, 3, np.mean(a), stats.sem(a))
    assert (ours.low, ours.high) == pytest.approx(theirs)
    ends = stats.ttest_ind(b, a, equal_var=False).confidence_interval()
    assert (welch(a, b).low, welch(a, b).high) == pytest.approx((ends.low, ends.high))
    ends = stats.ttest_rel(b, a[:3]).confidence_interval()
    assert (paired_means(a[:3], b).low, paired_means(a[:3], b).high) == pytest.approx((ends.low, ends.high))


def test_rounding_is_no_spread() -> None:
    first, second = [(18 / 20 + 16 / 20) / 2, 0.9], [(17 / 20 + 17 / 20) / 2, 0.9]
    assert second[0] - first[0] != 0  # by rounding, on any machine
    assert paired_means(first, second).low is None
    assert paired_means([18 / 20, 0.9], second).low is not None


def test_a_ratio_is_geometric_and_does_not_depend_on_its_direction() -> None:
    slow, fast = [100.0, 130.0, 90.0], [30.0, 36.0, 31.0]
    for paired in (True, False):
        there, back = ratio(slow, fast, paired), ratio(fast, slow, paired)
        assert there.value == pytest.approx(1 / back.value) == pytest.approx((100 * 130 * 90 / 30 / 36 / 31) ** (1 / 3))
        assert (there.low, there.high) == pytest.approx((1 / back.high, 1 / back.low))  # type: ignore[operator]
    assert ratio([4.0], [2.0], paired=False) == Interval(pytest.approx(2.0))


def test_mcnemars_test_is_exact() -> None:
    for b, c in ((0, 0), (2, 12), (5, 5), (40, 61)):
        expected = stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
        assert mcnemar(b, c) == pytest.approx(expected)


@pytest.mark.parametrize(("shared", "accuracies"), [(0.9, (0.85, 0.87)), (0.0, (0.6, 0.6)), (0.5, (0.97, 0.95))])
def test_the_paired_interval_holds_the_truth_in_95_of_100_cases(shared: float, accuracies: tuple[float, float]) -> None:
    """Of 160 videos, a share `shared` is as hard for one run as for the other."""
    rng, held, cases = generator(0, Draw.SYNTHETIC, 9), 0, 1000
    for _ in range(cases):
        hard = rng.random(160)
        same = rng.random(160) < shared
        a, b = hard < accuracies[0], np.where(same, hard, rng.random(160)) < accuracies[1]
        found = paired_shares(int((a & b).sum()), int((a & ~b).sum()), int((b & ~a).sum()), int((~a & ~b).sum()))
        assert found.low is not None
        assert found.high is not None
        held += found.low <= accuracies[1] - accuracies[0] <= found.high
    assert 0.93 * cases < held < 0.995 * cases


def test_the_verdict_follows_from_the_interval_and_the_margin() -> None:
    cases = {(-0.4, 2.8): "not lower", (-1.0, 0.0): "not lower", (-0.8, -0.2): "lower, but by less than the margin",
             (-4.1, -1.9): "lower", (-1.5, -0.1): "lower", (-1.5, 0.1): "cannot tell: about"}  # fmt: skip
    for (low, high), answer in cases.items():
        said = judge(Interval((low + high) / 2, low, high, sd=1.0, count=5), 1.0)
        assert said.startswith(answer), said
        assert said.startswith((answer + " (", answer + " "))
    assert judge(Interval(-1.5, -1.9, -1.1, 1.0, 5), 2.0).startswith("lower, but by less than the margin")
    assert judge(Interval(0.5), 1.0).startswith("cannot tell: one seed shows")
    unclear = Interval(-0.5, -2.0, 1.0, sd=1.0, count=5)
    assert judge(unclear, 1.0, "folds").startswith("cannot tell: more videos or seeds may decide (")
    assert judge(Interval(0.5), 1.0, "folds").startswith("cannot tell: one fold shows no spread, more videos or seeds")


def test_so_many_more_seeds_would_decide() -> None:
    for difference, sd, count, margin in ((-0.5, 2.3, 5, 1.0), (-0.1, 1.0, 3, 0.5), (-3.0, 5.0, 4, 1.0)):
        half = stats.t.ppf(0.975, count - 1) * sd / math.sqrt(count)
        more = more_seeds(Interval(difference, difference - half, difference + half, sd, count), margin)
        assert more is not None

        def decided(n: int, difference: float = difference, sd: float = sd, margin: float = margin) -> bool:
            reach = stats.t.ppf(0.975, n - 1) * sd / math.sqrt(n)
            return bool(difference - reach >= -margin or difference + reach <= 0)

        assert decided(count + more)
        assert not decided(count + more - 1)
    assert more_seeds(Interval(0.0, -9, 9, 9.0, 2), 0.0) is None


def test_unpaired_groups_both_need_so_many_seeds() -> None:
    few, many = [1.0, 4.0, 2.0, 5.0], [3.0, 3.1, 2.9, 3.2, 2.8, 3.0, 3.3, 2.7, 3.0, 3.1]
    found = welch(many, few)
    more = more_seeds(found, 1.0)
    assert more is not None
    size = len(few) + more
    spread = math.sqrt((statistics.variance(few) + statistics.variance(many)) / size)
    assert stats.t.ppf(0.975, size - 1) * spread <= max(found.value + 1, -found.value)
    assert "more seed may decide" in judge(Interval(0.5, -1.1, 2.1, 1.29, 5), 1.0)


def test_the_gain_of_unpaired_groups_has_welchs_interval() -> None:
    slow, fast = [100.0, 130.0, 90.0], [30.0, 36.0, 31.0]
    expected = stats.ttest_ind(np.log(slow), np.log(fast), equal_var=False).confidence_interval()
    found = ratio(slow, fast, paired=False)
    assert (found.low, found.high) == pytest.approx((math.exp(expected.low), math.exp(expected.high)))
