"""What the network says of each video, averaged over its views and gathered from all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgtrain.clips.loader import BadVideos, view_batches
from mgtrain.data.videos import Videos
from mgtrain.engine.step import autocast, to_input
from mgtrain.models.norm import merge_group_stats
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe
from mgtrain.runs.journal import Journal
from mgtrain.runs.scores import Predictions


def evaluate(
    model: nn.Module,
    videos: Videos,
    recipe: Recipe,
    world: World,
    views: tuple[int, int] = (1, 1),
    journal: Journal | None = None,
) -> Predictions:
    """What the model says of all videos that can be decoded, over `views` (times, crops) of each; on every rank all.

    With a `journal` the videos that it has are not evaluated again, and every batch is added to it.
    """
    merge_group_stats(model, world.gather)
    classes, (times, crops) = recipe.data.classes, views
    numbers, probabilities = np.empty(0, np.int64), np.empty((0, classes), np.float32)
    if journal is not None:
        numbers, probabilities = world.from_main(journal.read() if world.main else (numbers, probabilities))
    left = np.setdiff1d(np.arange(len(videos)), numbers)
    bad = BadVideos(len(videos), recipe.data.max_bad_fraction)
    batches = view_batches(videos, left[world.rank :: world.size].tolist(), recipe, times, crops, world, bad)
    mine: list[tuple[Tensor, Tensor]] = []
    for chosen, rows in predict(model, batches, times * crops, recipe, world):
        mine.append((chosen, rows))
        if journal is not None:
            journal.append(world.rank, chosen.cpu().numpy(), rows.cpu().numpy())
    new_numbers, new_probabilities = gathered(mine, -(-len(left) // world.size), classes, world)
    numbers, probabilities = np.append(numbers, new_numbers), np.append(probabilities, new_probabilities, axis=0)
    order = np.argsort(numbers)
    label = videos.targets if recipe.data.multi_label else videos.label
    labels = np.array([label(number) for number in numbers[order].tolist()])
    return Predictions(numbers[order], labels, probabilities[order])


@torch.inference_mode()
def predict(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], views: int, recipe: Recipe, world: World
) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each batch the numbers of its videos, int64 (v,), and their class probabilities, float32 (v, classes).

    `batches` are clips uint8 (v * views, 3, T, S, S), `views` consecutive ones of each video, and int64 (v,). The
    softmax (the sigmoid, with several labels) is averaged over the views (the paper tests 10 x 3), or, if
    `evaluation.views` says so, its largest is taken. A pass takes no more clips than one of training.
    """
    model.eval()
    most = max(1, recipe.batch.clips // world.size)
    for clips, numbers in batches:
        if not len(numbers):
            continue
        with autocast(recipe, world):
            logits = torch.cat([model(to_input(part, recipe)).float() for part in torch.split(clips, most)])
        scores = logits.double().sigmoid() if recipe.data.multi_label else F.softmax(logits.double(), dim=1)
        scores = scores.view(len(numbers), views, -1)  # (v, views, classes)
        yield numbers, (scores.amax(1) if recipe.evaluation.views == "max" else scores.mean(1)).float()


def gathered(
    parts: list[tuple[Tensor, Tensor]], most: int, classes: int, world: World
) -> tuple[np.ndarray, np.ndarray]:
    """All ranks' rows: numbers, int64 (V,), and probabilities, float32 (V, classes); a rank has at most `most`."""
    numbers = torch.full((most,), -1, device=world.device)
    rows = torch.zeros(most, classes, device=world.device)
    if parts:
        mine = torch.cat([chosen for chosen, _ in parts])
        numbers[: len(mine)] = mine
        rows[: len(mine)] = torch.cat([row for _, row in parts])
    everyones, all_rows = world.gather(numbers).flatten(), world.gather(rows).flatten(0, 1)
    there = everyones >= 0
    return everyones[there].cpu().numpy(), all_rows[there].cpu().numpy()
