"""Class probabilities of each video, and the scores computed from them."""

from __future__ import annotations

import base64
import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from mgtrain.data.videos import Videos
from mgtrain.processes.files import replacing
from mgtrain.rng import Draw, generator
from mgtrain.runs.statistics import Z, wilson

BINS = 15  # of confidence, for the expected calibration error (Guo et al. 2017)
MISTAKES = 5  # most frequent pairs of confused classes
LEAST = 1e-30  # lower limit of the probabilities in a loss
REPLICATES = range(20, 201)  # of the bootstrap of mean average precision: fewer for many videos and classes


@dataclass(frozen=True, slots=True)
class Scores:
    """The results of an evaluation, over the videos that could be decoded."""

    top1: float  # with several labels: the share of videos whose most probable class is one of them
    top5: float
    loss: float  # mean negative log likelihood of the averaged softmax; or mean binary cross entropy
    videos: int
    correct: tuple[int, ...]  # correctly classified videos of each class
    counts: tuple[int, ...]  # videos of each class
    precision: tuple[float | None, ...] | None = None  # average precision of each class, with several labels
    mean_ap_sd: float | None = None  # standard error of their mean over samples of as many videos, by the bootstrap

    @property
    def mean_ap(self) -> float | None:
        """Mean average precision over the classes with videos; None if each video has one label."""
        known = [value for value in self.precision or () if value is not None]
        return float(np.mean(known)) if known else None

    @property
    def mean_class(self) -> float | None:
        """Mean accuracy of the classes with videos; None without videos, or if videos have several labels."""
        return None if self.precision is not None else mean_class(self.correct, self.counts)

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Scores:
        known: dict[str, Any] = {field.name: row.get(field.name) for field in fields(cls)}
        return cls(**known)

    def row(self) -> dict[str, Any]:
        """The scores as part of a row of `evals.jsonl`."""
        mean = {"mean_class": self.mean_class} if self.precision is None else {"mean_ap": self.mean_ap}
        return asdict(self) | mean

    def per_class(self) -> list[float | None]:
        """Accuracy, or average precision, of each class; None for a class without videos."""
        if self.precision is not None:
            return [*self.precision]
        return [right / count if count else None for right, count in zip(self.correct, self.counts, strict=True)]

    def accuracies(self, digits: int) -> list[str]:
        """Each kind of accuracy that is known, in percent."""
        found = {"mAP": self.mean_ap, "top-1": self.top1, "mean class": self.mean_class, "top-5": self.top5}
        return [f"{name} {100 * value:.{digits}f} %" for name, value in found.items() if value is not None]

    def line(self, views: int) -> str:
        """Accuracy and loss in one line; each video has so many `views`."""
        videos = f"on {self.videos} videos, {views} {'view' if views == 1 else 'views'} each"
        return "  ".join([*self.accuracies(2), f"loss {self.loss:.3f}", videos])

    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the top-1 accuracy (see `wilson`), or of mAP if its error is known."""
        if self.mean_ap is not None and self.mean_ap_sd is not None:
            half = Z * self.mean_ap_sd
            return max(0.0, self.mean_ap - half), min(1.0, self.mean_ap + half)
        return wilson(round(self.top1 * self.videos), self.videos)


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """The class probabilities of videos, one row per video."""

    numbers: np.ndarray  # int64 (V,): the videos' positions in their list, ascending
    labels: np.ndarray  # int64 (V,); or uint8 (V, classes), 1 if a video has the class
    probabilities: np.ndarray  # float32 (V, classes): mean or maximum of softmax or sigmoid over the views

    def scores(self) -> Scores:
        """Accuracy and loss. Equally probable classes count in the order of their numbers."""
        classes, count = np.arange(self.probabilities.shape[1]), max(1, len(self.numbers))
        order = np.argsort(-self.probabilities, axis=1, kind="stable")[:, :5]
        several: dict[str, Any] = {}
        if self.multi_label:
            there = self.labels.astype(bool)  # (V, classes): whether a video has a class
            right = there & (self.probabilities >= 0.5)
            sure = np.clip(self.probabilities.astype(np.float64), LEAST, 1 - 1e-12)
            loss = -np.where(there, np.log(sure), np.log1p(-sure)).mean(1).sum()
            precision = tuple(average_precision(*pair) for pair in zip(there.T, self.probabilities.T, strict=True))
            several = {"precision": precision, "mean_ap_sd": mean_ap_sd(there, self.probabilities)}
        else:
            there = self.labels[:, None] == classes
            right = there & (order[:, :1] == classes)
            loss = -np.log(np.maximum(self.probabilities[there].astype(np.float64), LEAST)).sum()
        among = np.take_along_axis(there, order, axis=1)  # (V, 5)
        return Scores(
            float(among[:, :1].sum()) / count,
            float(among.any(1).sum()) / count,
            float(loss) / count,
            len(self.numbers),
            tuple(right.sum(0).tolist()),
            tuple(there.sum(0).tolist()),
            **several,
        )

    @property
    def multi_label(self) -> bool:
        """Whether a video may have several classes, or none."""
        return self.labels.ndim == 2

    @property
    def right(self) -> np.ndarray:
        """Whether each video's most probable class is one of its labels: bool (V,)."""
        first = self.first
        right: np.ndarray = self.labels[np.arange(len(first)), first] > 0 if self.multi_label else self.labels == first
        return right

    @property
    def first(self) -> np.ndarray:
        """The most probable class of each video: int64 (V,)."""
        most: np.ndarray = self.probabilities.argmax(1)
        return most

    def confusion(self) -> np.ndarray:
        """The number of videos of each class (row) predicted as each class (column): int64 (classes, classes)."""
        matrix = np.zeros((self.probabilities.shape[1],) * 2, np.int64)
        np.add.at(matrix, (self.labels, self.first), 1)
        return matrix

    def mistakes(self) -> list[tuple[int, int, int]]:
        """The most frequent mistakes: label, predicted class, number of videos; none with several labels."""
        if self.multi_label:
            return []
        confusion = self.confusion()
        np.fill_diagonal(confusion, 0)
        most = np.argsort(-confusion, axis=None, kind="stable")[:MISTAKES]
        return [(*divmod(int(n), len(confusion)), int(confusion.flat[n])) for n in most if confusion.flat[n]]

    def calibration(self) -> tuple[float, list[dict[str, Any]]]:
        """How well confidence, the probability of the most probable class, agrees with accuracy.

        The expected calibration error, which is the mean of |confidence - accuracy| over the videos; and of each of
        `BINS` equal bins of confidence, the number of videos and their mean confidence and accuracy, None without any.
        """
        confidence = self.probabilities.max(1, initial=0).astype(np.float64)
        bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
        counts = np.bincount(bins, minlength=BINS)
        sure = np.bincount(bins, confidence, BINS)
        right = np.bincount(bins, self.right, BINS)
        error = float(np.abs(sure - right).sum()) / max(1, len(self.numbers))
        return error, [
            {"videos": n, "confidence": s / n if n else None, "accuracy": r / n if n else None}
            for n, s, r in zip(counts.tolist(), sure.tolist(), right.tolist(), strict=True)
        ]

    def right_row(self, videos: int) -> dict[str, Any]:
        """Which of all `videos` were right, as bits, and which could not be read: part of a row of `evals.jsonl`."""
        left_out = np.setdiff1d(np.arange(videos), self.numbers).tolist()
        return {"right": packed(self.right), "left_out": left_out}

    def describe(self, classes: Sequence[str]) -> dict[str, Any]:
        scores, (error, bins) = self.scores(), self.calibration()
        if self.multi_label:
            kind = {"mean_ap": scores.mean_ap, "mean_ap_interval": scores.interval()}
        else:
            kind = {"mean_class": scores.mean_class, "confusion": self.confusion().tolist()}
        return {
            "top1": scores.top1,
            **({} if self.multi_label else {"top1_interval": scores.interval()}),
            "top5": scores.top5,
            "loss": scores.loss,
            "videos": scores.videos,
            "per_class": dict(zip(classes, scores.per_class(), strict=True)),
            "counts": dict(zip(classes, scores.counts, strict=True)),
            **kind,
            "calibration_error": error,
            "calibration": bins,
        }

    def render(self, classes: Sequence[str], views: int, per_class: bool) -> str:
        """All scores as text: each class if `per_class`, mistakes, calibration, and accuracy in the last line."""
        scores, lines = self.scores(), []
        if per_class:
            for name, accuracy, count in zip(classes, scores.per_class(), scores.counts, strict=True):
                share = "no videos" if accuracy is None else f"{100 * accuracy:6.1f} %"
                lines.append(f"{name:30} {share}  of {count}")
        if mistakes := self.mistakes():
            named = (f"{classes[label]} as {classes[predicted]} ({count})" for label, predicted, count in mistakes)
            lines.append(f"most frequent mistakes: {', '.join(named)}")
        confidence = float(self.probabilities.max(1, initial=0).mean()) if scores.videos else 0.0
        lines.append(
            f"calibration: mean confidence {100 * confidence:.1f} %, "
            f"expected calibration error {100 * self.calibration()[0]:.1f} %"
        )
        low, high = (100 * end for end in scores.interval())
        kind = "top-1" if scores.mean_ap is None else "mAP"
        return "\n".join([*lines, f"{scores.line(views)}; 95 % interval of {kind}: {low:.1f} to {high:.1f} %"])

    def write_csv(self, path: Path, videos: Videos) -> None:
        """Write a CSV file with a row for each video: path, label, predicted class, probability of every class."""
        with (
            replacing(path) as temporary,
            temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
        ):
            writer = csv.writer(file)
            writer.writerow(["path", "label", "predicted", *videos.classes])
            for number, first, row in zip(self.numbers.tolist(), self.first.tolist(), self.probabilities, strict=True):
                labels = ";".join(videos.classes[label] for label in videos.labels(number))
                names = videos.name(number), labels, videos.classes[first]
                writer.writerow([*names, *(f"{p:.9g}" for p in row.tolist())])  # 9 digits are exact for float32


def mean_class(correct: Sequence[int], counts: Sequence[int]) -> float | None:
    """Mean accuracy of the classes with videos, from the numbers of correct videos and of all videos of each class.

    >>> mean_class(correct=[8, 1, 0], counts=[8, 2, 0])
    0.75
    """
    found = [right / count for right, count in zip(correct, counts, strict=True) if count]
    return float(np.mean(found)) if found else None


def average_precision(right: np.ndarray, scores: np.ndarray) -> float | None:
    """Average precision, bool and float (V,), equal to scikit-learn's `average_precision_score`; None if none is right.

    >>> average_precision(np.array([True, False, True]), np.array([0.9, 0.8, 0.7]))
    0.8333333333333333
    """
    (area,) = _areas(right, scores, np.ones((1, len(right)), np.int64))
    return None if np.isnan(area) else float(area)


def _areas(right: np.ndarray, scores: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Average precision if each video counts so many `times`, (R, V): float (R,), NaN where no right video counts."""
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.diff(scores[order], append=-np.inf))  # the last of each run of equal scores
    counted = times[:, order]
    found, taken = (counted * right[order]).cumsum(1)[:, ends], counted.cumsum(1)[:, ends]
    steps = np.diff(found, prepend=0, axis=1) * found / np.maximum(taken, 1)
    with np.errstate(invalid="ignore"):
        areas: np.ndarray = steps.sum(1) / found.max(1, initial=0)
    return areas


def mean_ap_sd(right: np.ndarray, scores: np.ndarray) -> float | None:
    """The bootstrap's standard error of mAP, bool and float (V, classes); None if too few samples have right videos."""
    count = len(right)
    if not count:
        return None
    replicates = min(REPLICATES[-1], max(REPLICATES[0], 2 * 10**8 // right.size))
    times = generator(0, Draw.BOOTSTRAP).multinomial(count, np.full(count, 1 / count), size=replicates)  # (R, V)
    total, known = np.zeros(replicates), np.zeros(replicates)
    for row, score in zip(right.T, scores.T, strict=True):
        areas = _areas(row, score, times)
        total += np.nan_to_num(areas)
        known += ~np.isnan(areas)
    means = total[known > 0] / known[known > 0]
    return float(means.std(ddof=1)) if len(means) > 1 else None


def packed(right: np.ndarray) -> str:
    """Bool (V,) as text that `unpacked` reads.

    >>> packed(np.array([True, False, True]))
    'oA=='
    """
    return base64.b64encode(np.packbits(right).tobytes()).decode()


def unpacked(text: str, count: int, left_out: Sequence[int]) -> np.ndarray:
    """For all videos 1, 0, or -1 for those `left_out`, from the bits of the `count` others: int8 (count + left out,).

    >>> unpacked("oA==", 3, left_out=[1]).tolist()
    [1, -1, 0, 1]
    """
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text, validate=True), np.uint8))[:count]
    found = np.full(count + len(left_out), -1, np.int8)
    found[np.setdiff1d(np.arange(len(found)), left_out)] = bits
    return found
