"""Predict the classes of unlabelled videos, with the views of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mgtrain.clips.cut import Cut, cut_windows
from mgtrain.clips.loader import BadVideos, view_batches
from mgtrain.clips.sources import Reader, open_source
from mgtrain.clips.units import evaluation_grid
from mgtrain.data.videos import Videos
from mgtrain.engine.evaluate import predict, refuse_non_finite
from mgtrain.engine.trained import Trained
from mgtrain.errors import UsageError, VideoError
from mgtrain.processes.distributed import World
from mgtrain.runs.scores import Answer, Window


def predict_videos(
    trained: Trained, paths: Sequence[str], world: World, views: tuple[int, int], every: float | None = None
) -> tuple[list[Answer], dict[str, str]]:
    """The predictions for the videos that can be decoded, in order, and path -> cause for the others.

    With `every`, a clip starts every so many seconds of a video; otherwise each video has `views` (times, crops), as in
    an evaluation.
    """
    recipe, (times, crops) = trained.recipe, views
    if every is None:
        videos = Videos.of("", [(path, 0) for path in paths], trained.classes)
        bad = BadVideos(len(videos), 1)
        batches = view_batches(videos, range(len(videos)), recipe, times, crops, world, bad)
        answers = [
            Answer(paths[number], row.cpu().numpy())
            for numbers, rows in predict(trained.model, batches, times * crops, recipe, world)
            for number, row in zip(numbers.tolist(), rows, strict=True)
        ]
        refuse_non_finite(np.array([answer.probabilities for answer in answers]), [answer.video for answer in answers])
        return answers, bad.causes
    answers, failed = [], {}
    for path in paths:
        try:
            answers.append(_predict_windows(trained, path, world, every))
        except VideoError as error:
            failed[path] = str(error)
    return answers, failed


def _predict_windows(trained: Trained, path: str, world: World, every: float) -> Answer:
    """Predict a clip of a video every so many seconds, of the whole file; one batch is in memory at a time."""
    recipe = trained.recipe
    if recipe.clip.sampling == "segments":
        raise UsageError("--every: with clip.sampling segments, a clip covers the whole video; leave out --every")
    with open_source(path, recipe.data.fps) as file:
        cuts = cut_windows(evaluation_grid(recipe), file.info, every, fps=recipe.clip.fps)
        batches = _batches(file, cuts, max(1, recipe.batch.clips), world)
        rows = torch.cat([rows for _, rows in predict(trained.model, batches, 1, recipe, world)]).cpu().numpy()
        fps, first = file.info.fps, file.first
    spans = [((first + cut.frames[0]) / fps, (first + cut.frames[-1] + 1) / fps) for cut in cuts]
    refuse_non_finite(rows, [f"{path}, {start:.1f} s" for start, _ in spans])
    windows = [Window(*span, row) for span, row in zip(spans, rows, strict=True)]
    return Answer(path, rows.max(0) if recipe.evaluation.views == "max" else rows.mean(0), windows)


def _batches(file: Reader, cuts: Sequence[Cut], size: int, world: World) -> Iterator[tuple[Tensor, Tensor]]:
    for first in range(0, len(cuts), size):
        clips = torch.from_numpy(np.stack(file.read(cuts[first : first + size])))  # (b, T, S, S, 3)
        yield clips.to(world.device).permute(0, 4, 1, 2, 3), torch.arange(first, first + len(clips))
