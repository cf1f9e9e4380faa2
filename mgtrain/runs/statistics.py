"""Confidence intervals of differences between runs, and verdicts about them.

All intervals have a confidence of 95 %. Methods: Wilson (1927) for a share; Newcombe (Statistics in Medicine 1998) for
a difference of two shares, of the same videos (17:2635, method 10) or of different ones (17:873, method 10); McNemar's
exact test; Student's and Welch's t for means over seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import special

CONFIDENCE = 0.95
Z = float(special.ndtri((1 + CONFIDENCE) / 2))  # the quantile of the normal distribution for it, 1.96
MOST_SEEDS = 1000  # limit of the number that a verdict suggests


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its confidence interval, whose ends are None if there are too few data."""

    value: float
    low: float | None = None
    high: float | None = None
    sd: float | None = None  # standard deviation of a seed's value, or of a pair's difference
    count: int = 1  # seeds, folds or pairs; for two unpaired groups, the seeds of the smaller one

    def scaled(self, factor: float) -> Interval:
        """The interval in another unit, such as points instead of fractions."""
        low, high, sd = (None if x is None else factor * x for x in (self.low, self.high, self.sd))
        return Interval(factor * self.value, low, high, sd, self.count)


def quantile_t(freedom: float) -> float:
    """The quantile of Student's t with `freedom` degrees of freedom for 95 % confidence."""
    return float(special.stdtrit(freedom, (1 + CONFIDENCE) / 2))


def wilson(right: int, count: int) -> tuple[float, float]:
    """The confidence interval of a share, if `right` of `count` are right.

    >>> low, high = wilson(29, 37)
    >>> f"{low:.3f} {high:.3f}"
    '0.628 0.886'
    """
    if not count:
        return 0.0, 1.0
    share = right / count
    middle = share + Z * Z / (2 * count)
    margin = Z * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    low, high = ((middle + sign * margin) / (1 + Z * Z / count) for sign in (-1, 1))
    return max(0.0, min(low, share)), min(1.0, max(high, share))  # guards against rounding


def paired_shares(both: int, first: int, second: int, neither: int) -> Interval:
    """The second run's share of right videos minus the first's, for the same videos.

    The arguments count the videos that both, only the first, only the second and neither run gets right.

    >>> found = paired_shares(both=36, first=2, second=12, neither=0)
    >>> f"{found.value:.3f} {found.low:.4f} {found.high:.4f}"
    '0.200 0.0569 0.3404'
    """
    count = both + first + second + neither
    if not count:
        return Interval(0.0)
    product = (both + first) * (second + neither) * (both + second) * (first + neither)
    excess: float = both * neither - first * second
    if excess > 0:
        excess = max(0, excess - count / 2)  # continuity correction
    return _newcombe(both + second, count, both + first, count, excess / math.sqrt(product) if product else 0.0)


def unpaired_shares(first: int, of_first: int, second: int, of_second: int) -> Interval:
    """The second share minus the first, for different videos.

    >>> found = unpaired_shares(48, 80, 56, 70)
    >>> f"{found.value:.3f} {found.low:.4f} {found.high:.4f}"
    '0.200 0.0524 0.3339'
    """
    if not of_first or not of_second:
        return Interval(0.0)
    return _newcombe(second, of_second, first, of_first, 0.0)


def _newcombe(right: int, count: int, rival: int, of_rival: int, correlation: float) -> Interval:
    """Newcombe's interval of `right / count - rival / of_rival` from the two Wilson intervals."""
    p, q = right / count, rival / of_rival
    (p_low, p_high), (q_low, q_high) = wilson(right, count), wilson(rival, of_rival)

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b))

    low, high = p - q - reach(p - p_low, q_high - q), p - q + reach(p_high - p, q - q_low)
    return Interval(p - q, max(-1.0, low), min(1.0, high))


def mcnemar(first: int, second: int) -> float:
    """The p-value of McNemar's exact test, from the numbers of videos that only one of two runs gets right.

    >>> round(mcnemar(2, 12), 6)
    0.012939
    """
    return min(1.0, 2 * float(special.bdtr(min(first, second), first + second, 0.5)))


def mean(values: Sequence[float], parts: Sequence[float] = ()) -> Interval:
    """The mean over seeds with Student's t; no interval for fewer than two values, or ones equal but for rounding.

    `parts` are the numbers whose differences the values are, which tell how large their rounding errors may be.

    >>> found = mean([1.0, 2.0, 3.0])
    >>> found.value, found.sd, f"{found.low:.3f} {found.high:.3f}"
    (2.0, 1.0, '-0.484 4.484')
    """
    centre = statistics.fmean(values)
    if len(values) < 2:
        return Interval(centre)
    sd = statistics.stdev(values)
    if _vanishes(sd, parts or values):
        return Interval(centre, None, None, 0.0, len(values))
    half = quantile_t(len(values) - 1) * sd / math.sqrt(len(values))
    return Interval(centre, centre - half, centre + half, sd, len(values))


def paired_means(first: Sequence[float], second: Sequence[float]) -> Interval:
    """The mean of the differences `second` - `first` of pairs, such as the same seed."""
    return mean([b - a for a, b in zip(first, second, strict=True)], [*first, *second])


def welch(first: Sequence[float], second: Sequence[float]) -> Interval:
    """The mean of `second` minus the mean of `first`, unpaired and with any variances (Welch 1947).

    >>> found = welch([3.0, 4.0, 1.0, 2.1], [5.0, 7.0, 6.1])
    >>> f"{found.value:.3f} {found.low:.3f} {found.high:.3f}"
    '3.508 1.285 5.732'
    """
    difference, least = statistics.fmean(second) - statistics.fmean(first), min(len(first), len(second))
    if least < 2:
        return Interval(difference)
    a, b = (statistics.variance(values) / len(values) for values in (first, second))
    sd = math.sqrt(statistics.variance(first) + statistics.variance(second))  # of the difference of two seeds
    if _vanishes(sd, [*first, *second]):
        return Interval(difference, None, None, 0.0, least)
    freedom = (a + b) ** 2 / (a**2 / (len(first) - 1) + b**2 / (len(second) - 1))
    half = quantile_t(freedom) * math.sqrt(a + b)
    return Interval(difference, difference - half, difference + half, sd, least)


def ratio(first: Sequence[float], second: Sequence[float], paired: bool) -> Interval:
    """The ratio of `first` to `second`: geometric mean with its interval.

    >>> found = ratio([40.0, 90.0], [10.0, 10.0], paired=True)
    >>> f"{found.value:.2f}"
    '6.00'
    """
    logs = [math.log(x) for x in second], [math.log(x) for x in first]
    found = paired_means(*logs) if paired else welch(*logs)
    low, high = (None if x is None else math.exp(x) for x in (found.low, found.high))
    return Interval(math.exp(found.value), low, high, found.sd, found.count)


def _vanishes(sd: float, values: Sequence[float]) -> bool:
    """Whether a standard deviation is only rounding error."""
    return sd <= 1e-12 * max(map(abs, values))


def judge(difference: Interval, margin: float, unit: str = "seeds") -> str:
    """The verdict whether an accuracy is lower than another, from their difference and a margin in points.

    `unit` is what its interval counts: seeds, or folds, of which there cannot be more.

    >>> judge(Interval(1.2, -0.4, 2.8), margin=1)
    'not lower (difference +1.2, 95 % from -0.4 to +2.8, margin 1 point)'
    >>> judge(Interval(-3.0, -4.1, -1.9), margin=1)
    'lower (difference -3.0, 95 % from -4.1 to -1.9, margin 1 point)'
    >>> judge(Interval(-0.5, -0.8, -0.2), margin=1)
    'lower, but by less than the margin (difference -0.5, 95 % from -0.8 to -0.2, margin 1 point)'
    >>> judge(Interval(-0.5, -3.4, 2.4, sd=2.3, count=5), margin=1)
    'cannot tell: about 79 more seeds may decide (difference -0.5, 95 % from -3.4 to +2.4, margin 1 point)'
    """
    points = f"margin {margin:g} point{'' if margin == 1 else 's'}"
    if difference.low is None or difference.high is None:
        why = f"one {unit.rstrip('s')} shows" if difference.count == 1 else f"{difference.count} equal differences show"
        do = "train more seeds" if unit == "seeds" else "more videos or seeds may decide"
        return f"cannot tell: {why} no spread, {do} (difference {difference.value:+.1f}, {points})"
    if difference.low >= -margin:
        answer = "not lower" if difference.high >= 0 else "lower, but by less than the margin"
    elif difference.high < 0:
        answer = "lower"
    elif difference.sd is None:
        answer = "cannot tell from one seed each"
    elif unit == "folds":
        answer = "cannot tell: more videos or seeds may decide"
    else:
        more = more_seeds(difference, margin)
        answer = f"cannot tell: {f'about {more}' if more else f'more than {MOST_SEEDS}'} more "
        answer += f"{'seed' if more == 1 else 'seeds'} may decide"
    ends = f"95 % from {difference.low:+.1f} to {difference.high:+.1f}"
    return f"{answer} (difference {difference.value:+.1f}, {ends}, {points})"


def more_seeds(difference: Interval, margin: float) -> int | None:
    """The number of further seeds for a verdict, if mean and spread stay the same; None if more than `MOST_SEEDS`.

    For two unpaired groups, of each, counted from the smaller one.
    """
    assert difference.sd is not None
    room = max(difference.value + margin, -difference.value)  # half the interval's length for either verdict
    for count in range(difference.count + 1, difference.count + MOST_SEEDS + 1):
        if quantile_t(count - 1) * difference.sd / math.sqrt(count) <= room:
            return count - difference.count
    return None
