"""The work of a loader process: open videos, and cut and decode the clips of a unit."""

import errno
import os
import re
import time
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from mgtrain.clips.augment import rand_augment
from mgtrain.clips.cut import Cut, VideoInfo, cut_random, cut_views
from mgtrain.clips.order import ClipRequest
from mgtrain.clips.prepared import PreparedSet, PreparedVideo
from mgtrain.clips.prepared.origin import check_origin
from mgtrain.clips.sources import Reader, open_source
from mgtrain.clips.storage import does_not_answer
from mgtrain.data.frames import holds_frames
from mgtrain.data.videos import Videos, mirrored_labels
from mgtrain.errors import DataError, VideoError, cause_of, lack_of, short_of_memory
from mgtrain.grid import Grid
from mgtrain.recipe import Augment, Data, Recipe
from mgtrain.rng import Draw, generator

REPLACEMENTS = 16  # videos to try in place of a broken one before giving up on the data set
PAUSES = (1.0, 10.0, 60.0)  # seconds to wait for the storage of the videos before each new try


@dataclass(frozen=True, slots=True)
class Loaded:
    """The result of a unit."""

    clips: Tensor  # uint8 (clips, T, S, S, 3)
    labels: Tensor  # int64 (clips,) or uint8 (clips, classes); in an evaluation, the numbers of the videos (videos,)
    bad: tuple[tuple[str, str], ...] = ()  # path and cause of each video that could not be decoded
    given_up: bool = False  # whether a video and all its replacements are bad


class Source:
    """Opens videos, from their own files or a prepared set, and records which ones are being decoded."""

    def __init__(self, videos: Videos, data: Data) -> None:
        self.videos, self.fps = videos, data.fps
        self._reading = torch.zeros(1, 2, dtype=torch.int64)  # per process: its pid, and 1 + the video's number or 0
        self._shared: list[Tensor] | None = None
        self._rows = np.empty(0, np.int32)  # of the videos, in the prepared set
        self._prepared = PreparedSet(data.prepared) if data.prepared else None
        if self._prepared:
            self._rows = self._prepared.find(videos.names())
            missing = np.flatnonzero(self._rows < 0)
            if len(missing):
                raise DataError(
                    f"{data.prepared}: lacks {len(missing)} of {len(videos)} videos, the first is "
                    f"{videos.name(int(missing[0]))}; run `mgtrain data prepare` with this recipe"
                )
            check_origin(self._prepared, videos, data.fps)
        elif len(videos) and data.fps is None and holds_frames(videos.file(0)):
            raise DataError(f"{videos.file(0)}: is a folder of frames, so set data.fps to the frames' rate per second")

    def share(self, workers: int) -> None:
        """Prepare for use by a number of processes, before they start."""
        self._reading = torch.zeros(max(1, workers), 2, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        """The state that workers receive. The arrays, which may describe millions of videos, are in shared memory."""
        if self._shared is None:
            copies = [torch.from_numpy(array.copy()) for array in (*self.videos.arrays(), self._rows)]
            self._shared = [copy.share_memory_() for copy in copies]  # type: ignore[no-untyped-call]
        return {**self.__dict__, "videos": self.videos.with_arrays([np.empty(0)] * 3), "_rows": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        *arrays, self._rows = (tensor.numpy() for tensor in state["_shared"])
        self.videos = self.videos.with_arrays(arrays)

    def read(self, video: int, choose: Callable[[VideoInfo], list[Cut]]) -> tuple[list[np.ndarray], list[Cut], float]:
        """The clips that `choose` cuts from a video, uint8 (T, S, S, 3) each, the cuts, and the frames per second.

        Raises `VideoError` as `open` does. If the storage does not answer, waits and tries again, and in the end raises
        `OSError`: the video is not broken, and the run can resume.
        """
        pauses = iter(PAUSES)
        while True:
            try:
                with self.open(video) as file:
                    cuts = choose(file.info)
                    return list(file.read(cuts)), cuts, file.info.fps
            except VideoError as error:
                if error.__cause__ is None or not does_not_answer(error.__cause__):
                    raise
                if (pause := next(pauses, None)) is None:
                    why = f"the storage of the videos does not answer: {cause_of(error.__cause__)}"
                    raise OSError(errno.EIO, why, self.videos.path(video)) from None
                time.sleep(pause)

    @contextmanager
    def open(self, video: int) -> Iterator[Reader | PreparedVideo]:
        """Open a video. Raises `VideoError` if it cannot be read, but not for a lack of memory, files or processes."""
        worker = get_worker_info()
        mine = self._reading[worker.id if worker else 0]
        mine[0], mine[1] = os.getpid(), video + 1
        try:
            with self._reader(video) as file:
                yield file
        except VideoError as error:
            if short_of_memory():  # not just for an error that says so: damaged files make FFmpeg request too much
                raise MemoryError from error
            if isinstance(error.__cause__, OSError) and lack_of(error.__cause__):
                raise error.__cause__ from None
            raise
        finally:
            mine[1] = 0

    def _reader(self, video: int) -> Reader | PreparedVideo:
        if self._prepared:
            return self._prepared.open(int(self._rows[video]), self.videos.name(video))
        return open_source(self.videos.path(video), self.fps)

    def under_way(self, pids: Container[int] | None = None) -> list[str]:
        """The paths of the videos that are being decoded: by all processes, or by some of them."""
        reading = self._reading.tolist()
        return [self.videos.path(video - 1) for pid, video in reading if video and (pids is None or pid in pids)]

    def lost(self, error: Exception) -> DataError | None:
        """The message for torch's error about workers that died; None for any other error."""
        dead = re.search(r"DataLoader worker \(pid\S* ([\d, ]+)\)", str(error))
        if dead is None:
            return None
        paths = sorted(set(self.under_way([int(pid) for pid in dead[1].split(",")])))
        return DataError(
            f"a loader process died while it read {' or '.join(paths) or 'a video'}; find all such videos with "
            "`mgtrain data check` and leave them out with data.checked, or give the process more memory"
        )


def _sendable(loaded: Loaded) -> Loaded:
    """The result, which a loader process moves to shared memory here, where it can report a lack of it."""
    if get_worker_info():
        loaded.clips.share_memory_()  # type: ignore[no-untyped-call]
        loaded.labels.share_memory_()  # type: ignore[no-untyped-call]
    return loaded


class RandomClips(Dataset[Loaded]):
    """Random clips, by units (lists of requests). A clip depends only on its request and the seed."""

    def __init__(self, videos: Videos, recipe: Recipe, draw: Draw = Draw.CUT) -> None:
        self.source = Source(videos, recipe.data)
        self.clip, self.seed, self.draw = recipe.clip, recipe.seed, draw
        self.data, self.mirrored = recipe.data, np.array(mirrored_labels(videos.classes, recipe.data.mirrored))
        # Recalibrated statistics must describe clips as in evaluations.
        self.augment = recipe.augment if draw is Draw.CUT else Augment()

    def __getitem__(self, unit: Sequence[ClipRequest]) -> Loaded:
        grid = unit[0].grid
        clips = torch.zeros(len(unit), grid.frames, grid.crop, grid.crop, 3, dtype=torch.uint8)  # (clips, T, S, S, 3)
        labels = []
        bad: list[tuple[str, str]] = []
        for i, request in enumerate(unit):
            for video in self._candidates(request):
                try:
                    clip, label = self._cut(video, request)
                except VideoError as error:
                    bad.append((self.source.videos.path(video), str(error)))
                else:
                    clips[i] = torch.from_numpy(rand_augment(clip, self.augment, self.seed, request.position))
                    labels.append(label)
                    break
            else:
                return Loaded(clips, torch.empty(0), tuple(bad), given_up=True)
        return _sendable(Loaded(clips, torch.from_numpy(np.stack(labels)), tuple(bad)))

    def _candidates(self, request: ClipRequest) -> Iterator[int]:
        """The requested video, then its replacements, the same in every process; half are of its class if balanced."""
        yield request.video
        videos = self.source.videos
        for attempt in range(REPLACEMENTS):
            rng = generator(self.seed, Draw.REPLACEMENT, request.position, attempt)
            if self.data.balance != "none" and attempt < REPLACEMENTS // 2:
                yield int(rng.choice(np.flatnonzero(videos.single_labels == videos.label(request.video))))
            else:
                yield int(rng.integers(len(videos)))

    def _cut(self, video: int, request: ClipRequest) -> tuple[np.ndarray, np.ndarray]:
        """The clip, uint8 (T, S, S, 3), and its class, int64 (), or its classes, uint8 (classes,)."""

        def choose(info: VideoInfo) -> list[Cut]:
            cut = cut_random(
                request.grid,
                info,
                generator(self.seed, self.draw, request.position),
                fps=self.clip.fps,
                flip=self.clip.flip,
                inverse_uniform=self.clip.inverse_uniform,
                segments=self.clip.sampling == "segments",
            )
            return [cut]

        (clip,), (cut,), fps = self.source.read(video, choose)
        videos = self.source.videos
        if not self.data.multi_label:
            label = videos.label(video)
            return clip, np.array(self.mirrored[label] if cut.flip else label)
        row = videos.targets(video, cut.frames[0] / fps, (cut.frames[-1] + 1) / fps)
        return clip, row[self.mirrored] if cut.flip else row


class ViewClips(Dataset[Loaded]):
    """All views of each video, by units (lists of video numbers), for evaluation. Bad videos are left out."""

    def __init__(self, videos: Videos, recipe: Recipe, times: int, crops: int) -> None:
        self.source = Source(videos, recipe.data)
        self.grid, self.times, self.crops, self.clip = evaluation_grid(recipe), times, crops, recipe.clip

    def __getitem__(self, unit: Sequence[int]) -> Loaded:
        def choose(info: VideoInfo) -> list[Cut]:
            segments = self.clip.sampling == "segments"
            return cut_views(self.grid, info, self.times, self.crops, fps=self.clip.fps, segments=segments)

        views: list[np.ndarray] = []
        numbers: list[int] = []
        bad: list[tuple[str, str]] = []
        for video in unit:
            try:
                views.extend(self.source.read(video, choose)[0])
                numbers.append(video)
            except VideoError as error:
                bad.append((self.source.videos.path(video), str(error)))
        shape = (self.grid.frames, self.grid.crop, self.grid.crop, 3)
        clips = np.stack(views) if views else np.zeros((0, *shape), np.uint8)  # (videos * times * crops, T, S, S, 3)
        return _sendable(Loaded(torch.from_numpy(clips), torch.tensor(numbers, dtype=torch.int64), tuple(bad)))


def evaluation_grid(recipe: Recipe) -> Grid:
    """The grid of all evaluations of a run."""
    stride, side = recipe.clip.stride, recipe.evaluation.short_side
    return Grid(recipe.clip.frames, recipe.evaluation.crop, (stride, stride), (side, side))
