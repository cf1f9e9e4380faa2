"""What is in videos that nobody has labelled: the same network, clips and averages as an evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mgtrain.clips.cut import Cut, cut_windows
from mgtrain.clips.decode import VideoFile
from mgtrain.clips.loader import BadVideos, view_batches
from mgtrain.clips.units import evaluation_grid
from mgtrain.data.videos import Videos
from mgtrain.engine.evaluate import predict
from mgtrain.engine.trained import Trained
from mgtrain.errors import UsageError, VideoError
from mgtrain.processes.distributed import World
from mgtrain.runs.answers import Answer, Window


def predict_videos(
    trained: Trained, paths: Sequence[str], world: World, views: tuple[int, int], every: float | None = None
) -> tuple[list[Answer], dict[str, str]]:
    """The answers for the videos that can be decoded, in their order, and why the others cannot.

    With `every` a video is looked through with a clip that starts every so many seconds, else at `views` (times, crops)
    as an evaluation does.
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
        return answers, bad.causes
    answers, failed = [], {}
    for path in paths:
        try:
            answers.append(look_through(trained, path, world, every))
        except VideoError as error:
            failed[path] = str(error)
    return answers, failed


def look_through(trained: Trained, path: str, world: World, every: float) -> Answer:
    """One video, a clip every so many seconds; it is held in memory a batch at a time."""
    recipe = trained.recipe
    if recipe.clip.sampling == "segments":
        raise UsageError("--every: this network sees whole videos at once (clip.sampling: segments); leave it out")
    with VideoFile(path) as file:
        cuts = cut_windows(evaluation_grid(recipe), file.info, every, fps=recipe.clip.fps)
        batches = _batches(file, cuts, max(1, recipe.batch.clips), world)
        rows = torch.cat([rows for _, rows in predict(trained.model, batches, 1, recipe, world)]).cpu().numpy()
        fps = file.info.fps
    windows = [
        Window(cut.frames[0] / fps, (cut.frames[-1] + 1) / fps, row) for cut, row in zip(cuts, rows, strict=True)
    ]
    return Answer(path, rows.max(0) if recipe.evaluation.views == "max" else rows.mean(0), windows)


def _batches(file: VideoFile, cuts: Sequence[Cut], size: int, world: World) -> Iterator[tuple[Tensor, Tensor]]:
    for first in range(0, len(cuts), size):
        clips = torch.from_numpy(np.stack(file.read(cuts[first : first + size])))  # (b, T, S, S, 3)
        yield clips.to(world.device).permute(0, 4, 1, 2, 3), torch.arange(first, first + len(clips))
