"""What a network says of each video, and what that says of the network: accuracy, confusion, calibration."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mgtrain.data.videos import Videos

BINS = 15  # of confidence, by which calibration is told (Guo et al. 2017)
NORMAL_95 = 1.959964  # standard deviations that hold 95 % of a normal distribution
MISTAKES = 5  # pairs of classes that are named
LEAST = 1e-30  # probability that a loss is taken of


@dataclass(frozen=True, slots=True)
class Scores:
    """What an evaluation found. Fractions are of the videos that could be decoded."""

    top1: float  # where videos have several labels: the most probable class is one of them
    top5: float
    loss: float  # mean negative log likelihood of the averaged softmax; or mean binary cross entropy
    videos: int
    correct: tuple[int, ...]  # videos of each class that were right
    counts: tuple[int, ...]  # videos of each class
    precision: tuple[float | None, ...] | None = None  # average precision of each class, where videos have several

    @property
    def mean_ap(self) -> float | None:
        """Mean average precision over the classes that have videos; None where each video has one label."""
        known = [value for value in self.precision or () if value is not None]
        return float(np.mean(known)) if known else None

    def row(self) -> dict[str, Any]:
        """The scores as a line of a run's evaluations."""
        return asdict(self) | ({} if self.precision is None else {"mean_ap": self.mean_ap})

    def per_class(self) -> list[float | None]:
        """Accuracy, or average precision, of each class; None for a class without videos."""
        if self.precision is not None:
            return [*self.precision]
        return [right / count if count else None for right, count in zip(self.correct, self.counts, strict=True)]

    def line(self, views: int) -> str:
        """Accuracy in one line."""
        mean_ap = "" if self.mean_ap is None else f"mAP {100 * self.mean_ap:.2f} %  "
        return (
            f"{mean_ap}top-1 {100 * self.top1:.2f} %  top-5 {100 * self.top5:.2f} %  loss {self.loss:.3f}  "
            f"on {self.videos} videos, {views} {'view' if views == 1 else 'views'} each"
        )

    def interval(self) -> tuple[float, float]:
        """Between what the top-1 accuracy lies with a confidence of 95 % (see `wilson`)."""
        return wilson(round(self.top1 * self.videos), self.videos)


@dataclass(frozen=True, slots=True)
class Calibration:
    """How far the probability of the first choice can be believed. Of equal bins of it, from 0 to 1."""

    error: float  # expected calibration error: mean of |confidence - accuracy| over the videos
    counts: tuple[int, ...]  # videos in each bin
    confidence: tuple[float | None, ...]  # mean probability of their first choice; None in an empty bin
    accuracy: tuple[float | None, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """The class probabilities of videos, a row each."""

    numbers: np.ndarray  # int64 (V,): the videos' places in their list, rising
    labels: np.ndarray  # int64 (V,); or uint8 (V, classes), ones where a video has the class
    probabilities: np.ndarray  # float32 (V, classes): softmax or sigmoid, averaged over the views or their largest

    def scores(self) -> Scores:
        """Accuracy and loss. The order of equally probable classes is theirs."""
        count, classes = len(self.numbers), self.probabilities.shape[1]
        if self.multi_label:
            return self._scores_of_several()
        right = self.right
        own = self.probabilities[np.arange(count), self.labels]
        # As many classes are more probable than the video's own, or as probable and before it.
        ahead = (self.probabilities > own[:, None]).sum(1)
        before = np.arange(classes) < self.labels[:, None]
        ahead += ((self.probabilities == own[:, None]) & before).sum(1)
        loss = -np.log(np.maximum(own.astype(np.float64), LEAST)).sum()
        return Scores(
            float(right.sum()) / max(1, count),
            float((ahead < 5).sum()) / max(1, count),
            float(loss) / max(1, count),
            count,
            tuple(np.bincount(self.labels[right], minlength=classes).tolist()),
            tuple(np.bincount(self.labels, minlength=classes).tolist()),
        )

    def _scores_of_several(self) -> Scores:
        count, there = max(1, len(self.numbers)), self.labels.astype(bool)
        order = np.argsort(-self.probabilities, axis=1, kind="stable")[:, :5]
        among = np.take_along_axis(there, order, axis=1)  # (V, 5)
        sure = np.clip(self.probabilities.astype(np.float64), LEAST, 1 - 1e-12)
        loss = -np.where(there, np.log(sure), np.log1p(-sure)).mean(1).sum()
        right = there & (self.probabilities >= 0.5)
        return Scores(
            float(among[:, :1].sum()) / count,
            float(among.any(1).sum()) / count,
            float(loss) / count,
            len(self.numbers),
            tuple(right.sum(0).tolist()),
            tuple(there.sum(0).tolist()),
            tuple(average_precision(*pair) for pair in zip(there.T, self.probabilities.T, strict=True)),
        )

    @property
    def multi_label(self) -> bool:
        """Whether a video may have several classes, or none."""
        return self.labels.ndim == 2

    @property
    def right(self) -> np.ndarray:
        """Whether each video's most probable class is (one of) its own: bool (V,)."""
        if self.multi_label:
            return np.take_along_axis(self.labels, self.first[:, None], axis=1)[:, 0] > 0
        right: np.ndarray = self.first == self.labels
        return right

    @property
    def first(self) -> np.ndarray:
        """The most probable class of each video: int64 (V,)."""
        most: np.ndarray = self.probabilities.argmax(1)
        return most

    def confusion(self) -> np.ndarray:
        """Videos of each class (row) that were taken for each class (column): int64 (classes, classes)."""
        matrix = np.zeros((self.probabilities.shape[1],) * 2, np.int64)
        np.add.at(matrix, (self.labels, self.first), 1)
        return matrix

    def mistakes(self) -> list[tuple[int, int, int]]:
        """What was confused most often: class, the one that it was taken for, and videos."""
        confusion = self.confusion()
        np.fill_diagonal(confusion, 0)
        most = np.argsort(-confusion, axis=None, kind="stable")[:MISTAKES]
        pairs = [(*divmod(int(n), len(confusion)), int(confusion.flat[n])) for n in most]
        return [pair for pair in pairs if pair[2]]

    def calibration(self) -> Calibration:
        """How far the probability of the first choice can be believed."""
        confidence = self.probabilities.max(1, initial=0).astype(np.float64)
        bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
        counts = np.bincount(bins, minlength=BINS)
        sure = np.bincount(bins, confidence, BINS)
        right = np.bincount(bins, self.right, BINS)

        def means(sums: np.ndarray) -> tuple[float | None, ...]:
            return tuple(float(s / n) if n else None for s, n in zip(sums, counts, strict=True))

        error = float(np.abs(sure - right).sum()) / max(1, len(self.numbers))
        return Calibration(error, tuple(counts.tolist()), means(sure), means(right))

    def describe(self, classes: Sequence[str]) -> dict[str, Any]:
        """Everything but the videos, as plain data."""
        scores, calibration = self.scores(), self.calibration()
        kind = {"mean_ap": scores.mean_ap} if self.multi_label else {"confusion": self.confusion().tolist()}
        return {
            "top1": scores.top1,
            "top1_interval": scores.interval(),
            "top5": scores.top5,
            "loss": scores.loss,
            "videos": scores.videos,
            "per_class": dict(zip(classes, scores.per_class(), strict=True)),
            "counts": dict(zip(classes, scores.counts, strict=True)),
            **kind,
            "calibration_error": calibration.error,
            "calibration": [
                {"videos": n, "confidence": sure, "accuracy": right}
                for n, sure, right in zip(calibration.counts, calibration.confidence, calibration.accuracy, strict=True)
            ],
        }

    def render(self, classes: Sequence[str], views: int, per_class: bool) -> str:
        """For people: each class if wanted, what was confused, calibration, and the accuracy last."""
        scores, lines = self.scores(), []
        if per_class:
            for name, accuracy, count in zip(classes, scores.per_class(), scores.counts, strict=True):
                share = "no videos" if accuracy is None else f"{100 * accuracy:6.1f} %"
                lines.append(f"{name:30} {share}  of {count}")
        mistakes = [] if self.multi_label else self.mistakes()
        if mistakes:
            named = (f"{classes[label]} for {classes[taken]} ({count})" for label, taken, count in mistakes)
            lines.append(f"taken most often: {', '.join(named)}")
        confidence = float(self.probabilities.max(1, initial=0).mean()) if scores.videos else 0.0
        lines.append(
            f"calibration: the first choice has a probability of {100 * confidence:.1f} % on average; "
            f"expected calibration error {100 * self.calibration().error:.1f} %"
        )
        low, high = scores.interval()
        return "\n".join(
            [*lines, f"{scores.line(views)}; 95 % interval of top-1: {100 * low:.1f} to {100 * high:.1f} %"]
        )

    def write_csv(self, path: Path, videos: Videos) -> None:
        """A line for each video: path, label, the most probable class, and every class's probability."""
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "label", "predicted", *videos.classes])
            for number, first, row in zip(self.numbers.tolist(), self.first.tolist(), self.probabilities, strict=True):
                labels = ";".join(videos.classes[label] for label in videos.labels(number))
                names = videos.name(number), labels, videos.classes[first]
                writer.writerow([*names, *(f"{p:.9g}" for p in row.tolist())])  # 9 digits are all of a float32
        temporary.replace(path)


def average_precision(right: np.ndarray, scores: np.ndarray) -> float | None:
    """The area under the precision of the best, as more of them are taken: bool and float (V,); None if none is right.

    Equal scores are taken together, as scikit-learn does, whose `average_precision_score` this is.

    >>> average_precision(np.array([True, False, True]), np.array([0.9, 0.8, 0.7]))
    0.8333333333333333
    """
    if not right.any():
        return None
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.diff(scores[order], append=-np.inf))  # the last of each run of equal scores
    found = np.cumsum(right[order])[ends]
    return float((np.diff(found, prepend=0) * found / (ends + 1)).sum() / found[-1])


def wilson(right: int, count: int) -> tuple[float, float]:
    """Between what a share lies with a confidence of 95 %, `right` of `count` having been found (Wilson 1927).

    >>> low, high = wilson(29, 37)
    >>> f"{low:.3f} {high:.3f}"
    '0.628 0.886'
    """
    if not count:
        return 0.0, 1.0
    share, z = right / count, NORMAL_95
    middle = share + z * z / (2 * count)
    margin = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    low, high = ((middle + sign * margin) / (1 + z * z / count) for sign in (-1, 1))
    return max(0.0, min(low, share)), min(1.0, max(high, share))  # rounding aside, they are on either side of it
