"""Evaluation: class probabilities of each video, averaged over its views and gathered from all ranks."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgtrain.clips.loader import view_batches
from mgtrain.data.videos import Videos
from mgtrain.engine.checks import micro_limit
from mgtrain.engine.step import autocast, to_input
from mgtrain.errors import DataError, NonFiniteError
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
    """The predictions for all decodable videos, on every rank, with `views` (times, crops) of each video.

    Videos in the `journal` are not evaluated again, and every batch is added to it. Raises `DataError` if too many
    videos cannot be decoded, `NonFiniteError` if a class probability is NaN.
    """
    merge_group_stats(model, world.gather)
    classes, (times, crops) = recipe.data.classes, views
    numbers, probabilities = np.empty(0, np.int64), np.empty((0, classes), np.float32)
    if journal is not None:
        numbers, probabilities = world.from_main(journal.read() if world.main else (numbers, probabilities))
    left = np.setdiff1d(np.arange(len(videos)), numbers)
    batches = view_batches(videos, left[world.rank :: world.size].tolist(), recipe, times, crops, world)
    most = -(-len(left) // world.size)  # rows of each rank; those without a video have the number -1
    mine, my_rows = torch.full((most,), -1, device=world.device), torch.zeros(most, classes, device=world.device)
    done = 0
    for chosen, rows in predict(model, batches, times * crops, recipe, world):
        mine[done : done + len(chosen)], my_rows[done : done + len(chosen)] = chosen, rows
        done += len(chosen)
        if journal is not None:
            journal.append(world.rank, chosen.cpu().numpy(), rows.cpu().numpy())
    with world.watchdog.paused():  # for slower ranks, which have their own
        every, every_row = world.gather(mine).flatten(), world.gather(my_rows).flatten(0, 1)  # of all ranks
        numbers = np.append(numbers, every[every >= 0].cpu().numpy())
        probabilities = np.append(probabilities, every_row[every >= 0].cpu().numpy(), axis=0)
    lost, most_lost = len(videos) - len(numbers), recipe.data.max_bad_fraction
    if lost > most_lost * len(videos):  # the loader of each rank counts its own only
        raise DataError(
            f"{lost} of {len(videos)} videos cannot be decoded, more than data.max_bad_fraction {most_lost:g} allows; "
            "skip them (`mgtrain data check`, data.checked), or raise it"
        )
    if not len(numbers):
        raise DataError(f"none of {len(videos)} videos can be decoded; see what is wrong with `mgtrain data check`")
    refuse_non_finite(probabilities, [videos.name(number) for number in numbers.tolist()])
    order = np.argsort(numbers)
    label = videos.targets if recipe.data.multi_label else videos.label
    labels = np.array([label(number) for number in numbers[order].tolist()])
    return Predictions(numbers[order], labels, probabilities[order])


@torch.inference_mode()
def predict(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], views: int, recipe: Recipe, world: World
) -> Iterator[tuple[Tensor, Tensor]]:
    """For each batch, the numbers of its videos, int64 (v,), and their class probabilities, float32 (v, classes).

    `batches` are clips uint8 (v * views, 3, T, S, S), `views` consecutive ones per video, and numbers int64 (v,).
    `evaluation.views` says whether the mean or the maximum over the views counts (the paper uses 10 x 3 views). A
    forward pass has at most as many clips as in training.
    """
    model.eval()
    share, limit = recipe.batch.clips // world.size, micro_limit(recipe, recipe.evaluation_shape)
    most = max(1, share if limit is None else min(share, limit))
    for clips, numbers in batches:
        if not len(numbers):
            continue
        with autocast(recipe, world):
            logits = torch.cat([model(to_input(part, recipe)).float() for part in torch.split(clips, most)])
        scores = logits.double().sigmoid() if recipe.data.multi_label else F.softmax(logits.double(), dim=1)
        scores = scores.view(len(numbers), views, -1)  # (v, views, classes)
        yield numbers, (scores.amax(1) if recipe.evaluation.views == "max" else scores.mean(1)).float()


def refuse_non_finite(probabilities: np.ndarray, names: Sequence[str]) -> None:
    """Raise `NonFiniteError` if class probabilities, (videos, classes), are not finite."""
    bad = [name for name, row in zip(names, probabilities, strict=True) if not np.isfinite(row).all()]
    if bad:
        raise NonFiniteError(
            f"the network's class probabilities of {len(bad)} of {len(names)} videos are not finite, such as those of "
            f"{bad[0]}; use an earlier checkpoint, or hardware.precision=fp32 if half precision overflows"
        )
