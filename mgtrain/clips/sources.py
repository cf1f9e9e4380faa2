"""Open what a row of a list names: a video file or a folder of frames, or a stretch of either."""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np

from mgtrain.clips.cut import Cut
from mgtrain.clips.decode import VideoFile
from mgtrain.clips.frames import FrameFolder
from mgtrain.clips.pictures import Pictures
from mgtrain.data.stretch import Stretch, parted
from mgtrain.errors import VideoError


class Part(AbstractContextManager["Part"]):
    """A stretch of a video, read as if its frames were the whole video. Closing it closes the video."""

    def __init__(self, whole: VideoFile | FrameFolder, stretch: Stretch) -> None:
        if not stretch.start < stretch.end:
            raise VideoError(f"{whole.path}{stretch}: has nothing in it; the end must be after the start")
        info, self.whole, self.codec = whole.info, whole, whole.codec
        self.first, end = stretch.frames(info.fps, info.frames)
        if self.first >= info.frames:
            raise VideoError(
                f"{whole.path}{stretch}: starts after the end, which is at frame {info.frames}, "
                f"{info.frames / info.fps:.2f} s; correct its times or remove it from the list"
            )
        self.info = replace(info, frames=min(end, info.frames) - self.first)
        self._after = end - info.frames  # frames of the stretch after the video's end

    def __exit__(self, *_: object) -> None:
        self.whole.__exit__()

    @property
    def nbytes(self) -> int:
        """The stretch's share of the video's bytes."""
        return round(self.whole.nbytes * self.info.frames / self.whole.info.frames)

    @property
    def damage(self) -> str:
        """What ended the decoding of all frames before their end."""
        return self.whole.damage

    @property
    def lacking(self) -> str:
        """What is missing of its frames, after `decodable`; times may be rounded by a frame."""
        return f"the video ends {self._after} frames before the stretch" if self._after > 1 else self.whole.lacking

    def read(self, cuts: Sequence[Cut]) -> list[np.ndarray]:
        """The clips, each uint8 (T, crop, crop, 3) RGB; their frames count from the stretch's first."""
        return self.whole.read([replace(cut, frames=tuple(k + self.first for k in cut.frames)) for cut in cuts])

    def pictures(self, wanted: Sequence[int]) -> Pictures:
        """Frames as uint8 (H, W, 3) RGB, each with the wanted numbers that it stands for, from the stretch's first."""
        for picture, indices in self.whole.pictures([index + self.first for index in wanted]):
            yield picture, [index - self.first for index in indices]

    def decodable(self) -> int:
        """The number of its frames that can be decoded; `damage` says what ended it early."""
        return self.whole.decodable(range(self.first, self.first + self.info.frames))


Reader = VideoFile | FrameFolder | Part


def open_source(path: str | os.PathLike[str], fps: float | None = None) -> Reader:
    """The video at a path, which may end in a stretch; `fps` is the rate of folders of frames. Raises `VideoError`."""
    file, stretch = parted(os.fspath(path))
    whole = FrameFolder(file, fps) if os.path.isdir(file) else VideoFile(file)
    if stretch is None:
        return whole
    try:
        return Part(whole, stretch)
    except VideoError:
        whole.__exit__()
        raise
