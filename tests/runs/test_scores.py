"""What is said of predictions: against sums by hand, and against each other."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from mgtrain.data.videos import Videos
from mgtrain.errors import UsageError
from mgtrain.runs.journal import Journal
from mgtrain.runs.scores import Predictions, Scores, average_precision, wilson

CLASSES = ("cat", "dog", "emu")


def predictions(rows: list[list[float]], labels: list[int]) -> Predictions:
    return Predictions(np.arange(len(rows)), np.array(labels, np.int64), np.array(rows, np.float32))


SOME = predictions([[0.9, 0.1, 0], [0.6, 0.3, 0.1], [0.25, 0.25, 0.5], [0.1, 0.2, 0.7]], [0, 1, 1, 2])


def test_scores_confusion_and_calibration_by_hand() -> None:
    scores = SOME.scores()
    assert (scores.top1, scores.top5, scores.videos) == (0.5, 1.0, 4)
    assert (scores.correct, scores.counts) == ((1, 0, 1), (1, 2, 1))
    assert scores.mean_class == pytest.approx((1 + 0 + 1) / 3)
    assert scores.row()["mean_class"] == SOME.describe(CLASSES)["mean_class"] == scores.mean_class
    assert scores.loss == pytest.approx(-np.log([0.9, 0.3, 0.25, 0.7]).mean())
    assert SOME.confusion().tolist() == [[1, 0, 0], [1, 0, 1], [0, 0, 1]]
    error, bins = SOME.calibration()
    # Confidences 0.9, 0.6, 0.5, 0.7 are of bins of their own; the first and the last are right.
    assert error == pytest.approx((0.1 + 0.6 + 0.5 + 0.3) / 4)
    assert [n for n, found in enumerate(bins) if found["videos"]] == [7, 9, 10, 13]
    assert (bins[13]["confidence"], bins[13]["accuracy"]) == (pytest.approx(0.9), 1.0)
    assert bins[0]["confidence"] is None


def test_average_precision_is_the_sum_over_thresholds() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        right, scores = rng.random(20) < 0.3, rng.integers(0, 8, 20) / 8  # with equal scores
        total, recall = 0.0, 0.0
        for threshold in sorted(set(scores), reverse=True):
            taken = scores >= threshold
            now = right[taken].sum() / max(1, right.sum())
            total, recall = total + (now - recall) * right[taken].mean(), now
        assert average_precision(right, scores) == (pytest.approx(total) if right.any() else None)


def test_videos_with_several_labels_are_scored_by_mean_average_precision() -> None:
    labels = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 0, 0]], np.uint8)
    rows = np.array([[0.9, 0.6, 0.1], [0.8, 0.7, 0.1], [0.2, 0.1, 0.1], [0.1, 0.8, 0.1]], np.float32)
    some = Predictions(np.arange(4), labels, rows)
    scores = some.scores()
    assert scores.precision == (pytest.approx((1 + 2 / 4) / 2), pytest.approx((1 / 2 + 2 / 3) / 2), None)
    assert scores.mean_ap == pytest.approx((0.75 + 7 / 12) / 2)
    assert (scores.top1, scores.top5, scores.counts, scores.correct) == (0.25, 0.75, (2, 2, 0), (1, 2, 0))
    exact = -(labels * np.log(rows) + (1 - labels) * np.log(1 - rows)).mean()
    assert scores.loss == pytest.approx(exact, rel=1e-6)
    assert scores.mean_class is None
    assert "mean_class" not in {**scores.row(), **some.describe(CLASSES)}
    facts, text = some.describe(CLASSES), some.render(CLASSES, views=2, per_class=True)
    assert (facts["mean_ap"], "confusion" in facts) == (scores.mean_ap, False)
    assert "mAP 66.67 %  top-1 25.00 %" in text
    assert "cat                              75.0 %  of 2" in text
    assert "most frequent mistakes" not in text
    assert scores.row()["mean_ap"] == scores.mean_ap


def test_the_error_of_mean_average_precision_is_that_of_other_videos() -> None:
    rng = np.random.default_rng(0)

    def draw(videos: int) -> Predictions:
        labels = (rng.random((videos, 6)) < [0.1, 0.1, 0.2, 0.2, 0.4, 0.4]).astype(np.uint8)
        rows = 1 / (1 + np.exp(-rng.normal(2 * labels - 1.0, 1.0)))
        return Predictions(np.arange(videos), labels, rows.astype(np.float32))

    found = [draw(400).scores() for _ in range(40)]
    spread = np.std([scores.mean_ap for scores in found], ddof=1)
    errors = [scores.mean_ap_sd for scores in found]
    assert np.mean(errors) == pytest.approx(spread, rel=0.3)
    exact = draw(20_000).scores().mean_ap
    inside = [low < exact < high for low, high in (scores.interval() for scores in found)]
    assert sum(inside) >= 34  # of 40; 38 are expected
    assert Scores.of(found[0].row()) == found[0]
    assert draw(0).scores().mean_ap_sd is None


def test_no_videos_are_no_accuracy() -> None:
    none = predictions([], [])
    none = Predictions(none.numbers, none.labels, np.empty((0, 3), np.float32))
    assert (none.scores().videos, none.scores().top1, none.scores().interval()) == (0, 0.0, (0.0, 1.0))
    assert (none.scores().mean_class, none.scores().row()["mean_class"]) == (None, None)
    assert none.calibration()[0] == 0
    assert "mean class" not in none.render(CLASSES, 1, per_class=True)
    assert "0 videos" in none.render(CLASSES, 1, per_class=True)


def test_mean_class_accuracy_weighs_classes_alike_and_knows_only_those_with_videos() -> None:
    # Nine cats of which all are right, a dog that is not, no emu.
    scores = predictions([[0.8, 0.1, 0.1]] * 10, [0] * 9 + [1]).scores()
    assert (scores.top1, scores.mean_class, scores.per_class()) == (0.9, 0.5, [1.0, 0.0, None])


def test_classes_that_are_equally_probable_are_taken_in_their_order() -> None:
    for row in ([1 / 7] * 7, np.arange(7.0, 0, -1) / 28):  # and those that are more probable before
        scores = predictions([row] * 7, list(range(7))).scores()
        assert scores.correct == (1, 0, 0, 0, 0, 0, 0)
        assert scores.top5 == 5 / 7


@pytest.mark.parametrize(("right", "count"), [(0, 10), (10, 10), (5, 10), (3, 1000)])
def test_the_interval_holds_the_shares_from_which_this_is_no_surprise(right: int, count: int) -> None:
    low, high = wilson(right, count)
    assert 0 <= low <= right / count <= high <= 1
    for bound in (low, high):  # the definition: the share found is 1.96 standard errors of the bound away
        if 1e-9 < bound < 1 - 1e-9:
            assert abs(right / count - bound) == pytest.approx(1.959964 * np.sqrt(bound * (1 - bound) / count))


def test_people_are_told_what_is_confused_and_how_sure_that_is() -> None:
    text = SOME.render(CLASSES, views=30, per_class=True)
    assert "dog                               0.0 %  of 2" in text
    assert "most frequent mistakes: dog as cat (1), dog as emu (1)" in text
    assert "mean confidence 67.5 %, expected calibration error 37.5 %" in text
    assert "top-1 50.00 %  mean class 66.67 %  top-5" in text
    assert "4 videos, 30 views each; 95 % interval of top-1: 15.0 to 85.0 %" in text


def test_the_table_has_every_bit_of_every_probability(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = rng.dirichlet(np.ones(3), size=5).astype(np.float32)
    videos = Videos.of("", [(f'a, "{n}".mp4', n % 3) for n in range(9)], CLASSES)
    some = Predictions(np.array([0, 2, 5, 7, 8]), np.array([0, 2, 2, 1, 2]), rows)
    some.write_csv(tmp_path / "scores.csv", videos)
    with (tmp_path / "scores.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["path"] for row in table] == [videos.name(n) for n in (0, 2, 5, 7, 8)]
    assert [row["label"] for row in table] == ["cat", "emu", "emu", "dog", "emu"]
    assert [row["predicted"] for row in table] == [CLASSES[n] for n in rows.argmax(1)]
    accuracy: dict[str, list[bool]] = {}  # mean class accuracy follows from the table
    for row in table:
        accuracy.setdefault(row["label"], []).append(row["label"] == row["predicted"])
    assert np.mean([np.mean(right) for right in accuracy.values()]) == pytest.approx(some.scores().mean_class)
    assert np.array_equal(np.array([[row[name] for name in CLASSES] for row in table], np.float32), rows)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.csv"]


def test_a_journal_gives_back_all_ranks_rows_but_a_torn_one(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).random((6, 3)).astype(np.float32)
    journal = Journal(tmp_path / "s.csv", "this", classes=3)
    assert [part.tolist() for part in journal.read()] == [[], []]
    journal.append(0, np.array([4, 0]), rows[[4, 0]])
    journal.append(1, np.array([3]), rows[[3]])
    journal.append(0, np.array([2]), rows[[2]])
    whole = (tmp_path / "s.csv.part-0").read_bytes()
    for size in range(len(whole) + 1):
        (tmp_path / "s.csv.part-0").write_bytes(whole[:size])
        numbers, found = journal.read()
        assert np.array_equal(found, rows[numbers])
        assert 3 in numbers.tolist()
        journal.append(0, np.array([5]), rows[[5]])  # the torn row is written over
        again, found = journal.read()
        assert again.tolist() == sorted({*numbers.tolist(), 5})
        assert np.array_equal(found, rows[again])
    journal.remove()
    assert not list(tmp_path.iterdir())


def test_a_journal_of_something_else_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path / "s.csv", "this", classes=3).append(0, np.array([0]), np.zeros((1, 3), np.float32))
    with pytest.raises(UsageError, match=r"s\.csv\.part-0: is of another unfinished evaluation"):
        Journal(tmp_path / "s.csv", "that", classes=3).read()
    Journal(tmp_path / "other.csv", "that", classes=3).read()
