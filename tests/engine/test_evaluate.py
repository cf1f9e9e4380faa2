"""Evaluation: every video once, its views averaged; the same as a loop over videos by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from videos import decode

from mgtrain.clips.cut import cut_views
from mgtrain.clips.loader import view_batches
from mgtrain.clips.units import evaluation_grid
from mgtrain.data import open_videos
from mgtrain.data.videos import Videos
from mgtrain.engine.checks import make_model
from mgtrain.engine.evaluate import evaluate, predict
from mgtrain.engine.step import to_device, to_input
from mgtrain.errors import DataError
from mgtrain.models.norm import GroupBatchNorm3d
from mgtrain.processes.distributed import World
from mgtrain.processes.watchdog import Watchdog
from mgtrain.recipe import Recipe
from mgtrain.runs.scores import Predictions, Scores


def made(recipe: Recipe) -> Any:
    """A model that does not give all classes the same probability."""
    torch.manual_seed(1)
    model: Any = to_device(make_model(recipe), recipe, World())
    for module in model.modules():
        if isinstance(module, GroupBatchNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    nn.init.normal_(model.head.linear.weight, std=0.3)
    return model


def scores(recipe: Recipe, times: int, crops: int) -> Scores:
    videos = open_videos(recipe.data.format, recipe.data.root, recipe.data.val)
    return evaluate(made(recipe), videos, recipe, World(), (times, crops)).scores()


def by_hand(recipe: Recipe, times: int, crops: int) -> list[tuple[int, list[float]]]:
    """Label and class probabilities of each video, decoded and run one view at a time."""
    videos, model = open_videos(recipe.data.format, recipe.data.root, recipe.data.val), made(recipe).eval()
    answers = []
    for video in range(len(videos)):
        views = decode(
            videos.path(video), lambda info: cut_views(evaluation_grid(recipe), info, times, crops, fps=30.0)
        )
        assert len(views) == times * crops
        probabilities = torch.zeros(recipe.data.classes, dtype=torch.float64)
        for view in views:  # uint8 (T, S, S, 3)
            with torch.no_grad():
                logits = model(to_input(torch.from_numpy(view.copy()).permute(3, 0, 1, 2)[None], recipe))
            probabilities += logits[0].double().softmax(0) / len(views)
        answers.append((videos.label(video), probabilities.tolist()))
    return answers


def test_scores_are_those_of_a_loop_over_the_videos(tiny: Callable[..., Recipe]) -> None:
    recipe, losses = tiny(), set()
    for times, crops in ((1, 1), (2, 1), (3, 3)):
        ours, answers = scores(recipe, times, crops), by_hand(recipe, times, crops)
        right = [label == max(range(4), key=p.__getitem__) for label, p in answers]
        assert 0 < sum(right) < 12
        assert (ours.top1, ours.top5) == (sum(right) / 12, 1.0)
        assert ours.videos == 12
        assert ours.counts == (3, 3, 3, 3)
        assert ours.correct == tuple(
            sum(ok for ok, (label, _) in zip(right, answers, strict=True) if label == c) for c in range(4)
        )
        assert ours.per_class() == [correct / 3 for correct in ours.correct]
        assert ours.loss == pytest.approx(sum(-math.log(p[label]) for label, p in answers) / 12, rel=1e-5)
        losses.add(ours.loss)
    assert len(losses) == 3  # more views change the answer


def test_broken_videos_of_all_ranks_count(tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny("data.max_bad_fraction=0.2")
    val = open_videos("list", recipe.data.root, "val.csv")

    def lacking(count: int) -> None:
        def batches(videos: Videos, numbers: list[int], *given: Any) -> Iterator[tuple[Tensor, Tensor]]:
            return view_batches(videos, numbers[count:], *given)

        monkeypatch.setattr("mgtrain.engine.evaluate.view_batches", batches)

    lacking(2)
    assert evaluate(make_model(recipe), val, recipe, World()).scores().videos == 10
    lacking(12)
    with pytest.raises(
        DataError, match="none of 12 videos can be decoded; see what is wrong with `mgtrain data check`"
    ):
        evaluate(make_model(recipe), val, tiny("data.max_bad_fraction=1"), World())
    lacking(3)
    with pytest.raises(DataError, match=r"3 of 12 videos cannot be decoded, more than data.max_bad_fraction 0\.2"):
        evaluate(make_model(recipe), val, recipe, World())


def test_a_rank_that_waits_for_slower_ones_is_not_watched(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, watchdog, seen = tiny(), Watchdog(900.0), []
    watchdog.beat()
    gather = World.gather
    monkeypatch.setattr(World, "gather", lambda *given: seen.append(watchdog._last) or gather(*given))
    val = open_videos("list", recipe.data.root, "val.csv")
    evaluate(make_model(recipe), val, recipe, World(watchdog=watchdog))
    assert seen[-2:] == [float("inf")] * 2  # the numbers of the videos, and their probabilities
    assert watchdog._last < float("inf")


class Fixed(nn.Module):
    """Gives every view the logits that are written in its first pixels."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, x: Tensor) -> Tensor:
        number = ((x[:, 0, 0, 0, 0] * 0.225 + 0.45) * 255).round().long()
        return self.table[number]


def numbered(count: int) -> Tensor:
    """Clips uint8 (count, 3, 2, 4, 4), the n-th of them all n."""
    return torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1, 1).expand(-1, 3, 2, 4, 4).contiguous()


def asked(table: Tensor, batches: list[Tensor], views: int, recipe: Recipe, labels: list[int]) -> Scores:
    """The scores of a `Fixed` network on videos with these labels, of which `batches` hold the clips."""
    whole, first = [], 0
    for clips in batches:
        whole.append((clips, torch.arange(first, first + len(clips) // views)))
        first += len(clips) // views
    rows = torch.cat([rows for _, rows in predict(Fixed(table), whole, views, recipe, World())])
    return Predictions(np.arange(first), np.array(labels), rows.numpy()).scores()


def test_views_are_averaged_as_probabilities_not_as_logits(tiny: Callable[..., Recipe]) -> None:
    # One view is sure of class 0, two lean to class 1: the logits' mean prefers class 0, the probabilities' class 1.
    table = torch.tensor([[20.0, 0, 0, 0], [0, 3.0, 0, 0], [0, 3.0, 0, 0]])
    assert table.mean(0).argmax() == 0
    ours = asked(table, [numbered(3)], 3, tiny(), [1])
    assert ours.correct == (0, 1, 0, 0)
    assert ours.loss == pytest.approx(-math.log(2 * math.exp(3) / (math.exp(3) + 3) / 3), rel=1e-6)


def test_of_several_labels_the_sigmoid_is_taken_and_the_largest_of_the_views_if_so_wanted(
    tiny: Callable[..., Recipe],
) -> None:
    table = torch.tensor([[2.0, -1, 0, 0], [0, 3.0, 0, -2]])
    whole = [(numbered(2), torch.arange(1))]
    for words, expected in (((), table.sigmoid().mean(0)), (("evaluation.views=max",), table.sigmoid().amax(0))):
        recipe = tiny("data.multi_label=true", *words)
        ((_, rows),) = predict(Fixed(table), whole, 2, recipe, World())
        torch.testing.assert_close(rows[0], expected)


def test_an_empty_batch_is_passed_over(tiny: Callable[..., Recipe]) -> None:
    ours = asked(torch.eye(4), [numbered(0), numbered(4), numbered(0)], 1, tiny(), [0, 1, 2, 3])
    assert (ours.top1, ours.videos, ours.counts) == (1.0, 4, (1, 1, 1, 1))


def test_an_impossible_answer_has_a_finite_loss(tiny: Callable[..., Recipe]) -> None:
    table = torch.tensor([[2000.0, 0, 0, 0]])
    ours = asked(table, [numbered(1)], 1, tiny(), [1])
    assert ours.top1 == 0
    assert math.isfinite(ours.loss)


def test_an_evaluation_passes_as_many_clips_as_a_step_may(tiny: Callable[..., Recipe]) -> None:
    sizes = []

    class Counting(Fixed):
        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            return super().forward(x)

    for _ in predict(
        Counting(torch.randn(4, 4)), [(numbered(4), torch.arange(4))], 1, tiny("hardware.micro_clips=2"), World()
    ):
        pass
    assert sizes == [2, 2]
    sizes.clear()
    larger = tiny("hardware.micro_clips=1", "evaluation.crop=40", "evaluation.short_side=40")
    list(predict(Counting(torch.randn(4, 4)), [(numbered(4), torch.arange(4))], 1, larger, World()))
    assert sizes == [1, 1, 1, 1]
