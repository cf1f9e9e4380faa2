"""Accuracy on the one evaluation grid, counted once per video on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgtrain.distributed import World
from mgtrain.engine.step import autocast, to_input
from mgtrain.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Scores:
    """What an evaluation found. Fractions are of the videos that could be decoded."""

    top1: float
    top5: float
    loss: float  # mean negative log likelihood of the averaged softmax
    videos: int
    correct: tuple[int, ...]  # right videos of each class
    counts: tuple[int, ...]  # videos of each class

    def per_class(self) -> list[float | None]:
        """Accuracy of each class; None for a class without videos."""
        return [right / count if count else None for right, count in zip(self.correct, self.counts, strict=True)]


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], views: int, recipe: Recipe, world: World
) -> Scores:
    """Scores of the softmax averaged over each video's `views` consecutive clips (the paper tests 10 x 3).

    `batches` are whole videos of this rank: clips uint8 (v * views, 3, T, S, S), labels int64 (v,).
    """
    model.eval()
    classes = recipe.data.classes
    tally = torch.zeros(2, classes, dtype=torch.float64, device=world.device)  # right videos and videos, by class
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)  # videos right among five, loss
    for clips, labels in batches:
        if not len(labels):
            continue
        with autocast(recipe, world):
            logits = model(to_input(clips, recipe)).float()  # (v * views, classes)
        probabilities = F.softmax(logits.double(), dim=1).view(len(labels), views, classes).mean(1)  # (v, classes)
        top5 = probabilities.topk(min(5, classes)).indices == labels[:, None]  # (v, 5)
        tally[0].index_add_(0, labels, top5[:, 0].double())
        tally[1].index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))
        sums[0] += top5.any(1).sum()
        sums[1] += F.nll_loss(probabilities.clamp_min(1e-30).log(), labels, reduction="sum")
    correct, counts = world.sum(tally).long().tolist()
    right5, loss = world.sum(sums).tolist()
    videos = max(1, sum(counts))
    return Scores(sum(correct) / videos, right5 / videos, loss / videos, sum(counts), tuple(correct), tuple(counts))
