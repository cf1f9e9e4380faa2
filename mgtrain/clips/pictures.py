"""From decoded frames to the pixels of a clip: only the region that the clip shows, straight to its size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import av
import numpy as np
import torch
from av.video.plane import VideoPlane
from av.video.reformatter import VideoReformatter
from torch.nn.functional import interpolate

from mgtrain.clips.cut import Cut
from mgtrain.clips.stages import stage

TOGETHER = 8  # frames of a clip that are resampled in one go: half the time of one by one at small crops


PIXELS_TOGETHER = 2**19  # of frames that are converted in one go: beyond, they leave the processor's cache


Box = tuple[int, int, int, int]  # left, top, width, height


class UnconvertibleError(Exception):
    """The pixels of a frame cannot be made RGB."""


def converted(
    frames: Iterable[tuple[av.VideoFrame, Sequence[int]]],
    size: tuple[int, int],
    box: Box,
    reformatter: VideoReformatter,
) -> Iterator[tuple[np.ndarray, Sequence[int]]]:
    """A box of each frame as uint8 (height, width, 3) RGB, a view; several frames are converted in one go.

    Frames that are not of `size` (width, height) are made to fit first. A reformatter keeps its tables.

    Raises:
        UnconvertibleError: the pixels are of a format that cannot be made RGB.
    """
    waiting, most = iter(frames), max(1, min(TOGETHER, PIXELS_TOGETHER // (box[2] * box[3])))
    while group := list(islice(waiting, most)):
        try:
            pictures = rgb([frame for frame, _ in group], size, box, reformatter)
        except (av.FFmpegError, ValueError) as error:
            raise UnconvertibleError(
                f"pixels of format {group[0][0].format.name} cannot be converted to RGB"
            ) from error
        yield from zip(pictures, (indices for _, indices in group), strict=True)


@stage("convert")
def rgb(
    frames: Sequence[av.VideoFrame], size: tuple[int, int], box: Box, reformatter: VideoReformatter
) -> Sequence[np.ndarray]:
    """The box of each frame, as `converted` has it: cut out of whole frames, or, if it is small, converted alone."""
    left, top, width, height = box
    small = 4 * width * height <= 3 * size[0] * size[1]  # else it takes longer to copy its planes
    if small and all(in_blocks(frame, frames[0], size) for frame in frames):
        return list(rgb_of_planes(frames, box, reformatter))
    whole = [reformatter.reformat(frame, *size, "rgb24", threads=1) for frame in frames]
    return [plane(frame.planes[0], size[1], size[0], 3)[top : top + height, left : left + width] for frame in whole]


def in_blocks(frame: av.VideoFrame, first: av.VideoFrame, size: tuple[int, int]) -> bool:
    """Whether each 2 x 2 pixels have their colour from one sample of each chroma plane, as in the `first` frame.

    Else swscale interpolates, and pixels near the border of a box would differ from those of the whole frame.
    """
    return (
        frame.format.name in ("yuv420p", "yuvj420p")
        and (frame.width, frame.height) == size
        and size[0] % 2 == size[1] % 2 == 0
        and not frame.interlaced_frame
        and (frame.format.name, frame.colorspace, frame.color_range)
        == (first.format.name, first.colorspace, first.color_range)
    )


def rgb_of_planes(frames: Sequence[av.VideoFrame], box: Box, reformatter: VideoReformatter) -> np.ndarray:
    """The box of frames that are `in_blocks`, piled up and converted in one go: uint8 (n, height, width, 3) RGB."""
    left, top = box[0] // 2 * 2, box[1] // 2 * 2  # whole blocks
    width, height = -(-(box[0] + box[2]) // 2) * 2 - left, -(-(box[1] + box[3]) // 2) * 2 - top
    pile = av.VideoFrame(width, height * len(frames), frames[0].format.name)
    pile.colorspace, pile.color_range = frames[0].colorspace, frames[0].color_range
    steps = (1, 2, 2)  # luma; chroma of half the size
    piles = [plane(data, len(frames) * height // n, width // n) for data, n in zip(pile.planes, steps, strict=True)]
    for k, frame in enumerate(frames):
        for piled, data, n in zip(piles, frame.planes, steps, strict=True):
            part = plane(data, frame.height // n, frame.width // n)[:, left // n : (left + width) // n]
            piled[k * height // n : (k + 1) * height // n] = part[top // n : (top + height) // n]
    pictures = plane(reformatter.reformat(pile, format="rgb24", threads=1).planes[0], len(frames) * height, width, 3)
    y, x = box[1] - top, box[0] - left
    return pictures.reshape(len(frames), height, width, 3)[:, y : y + box[3], x : x + box[2]]


def plane(data: VideoPlane, *shape: int) -> np.ndarray:
    """A plane of a frame without the padding of its rows: uint8 (height, width) or (height, width, 3), a view."""
    pixels: np.ndarray = np.ndarray(shape, np.uint8, memoryview(data), strides=(data.line_size, *shape[2:], 1))
    return pixels


def box_around(boxes: Sequence[Box]) -> Box:
    """The smallest box that holds all of them.

    >>> box_around([(4, 0, 10, 20), (10, 30, 10, 5)])
    (4, 0, 16, 35)
    """
    left, top = (min(box[axis] for box in boxes) for axis in (0, 1))
    right, bottom = (max(box[axis] + box[axis + 2] for box in boxes) for axis in (0, 1))
    return left, top, right - left, bottom - top


class Clip:
    """A clip in the making: takes the pictures of its frames as they come, resamples its region of several at once.

    The pictures are of frames, or of a box of them that holds the region and has its upper left corner at `corner`.
    """

    def __init__(self, cut: Cut, corner: tuple[int, int] = (0, 0)) -> None:
        self.cut = cut
        left, top, width, height = cut.region
        self._rows = slice(top - corner[1], top - corner[1] + height)
        self._columns = slice(left - corner[0], left - corner[0] + width)
        self._pixels = np.empty((len(cut.frames), cut.crop, cut.crop, 3), np.uint8)
        self._wanted: dict[int, list[int]] = {}  # source frame -> the frames of the clip that it becomes
        for t, index in enumerate(cut.frames):
            self._wanted.setdefault(index, []).append(t)
        self._parts: list[np.ndarray] = []  # regions that wait to be resampled, (h, w, 3)
        self._places: list[list[int]] = []  # and the frames of the clip that each becomes

    def put(self, indices: Iterable[int], picture: np.ndarray) -> None:
        """Take uint8 (H, W, 3), if it is wanted here, as the source frames of these numbers; it is kept for a while."""
        places = [t for index in indices for t in self._wanted.get(index, ())]
        if places:
            self._parts.append(picture[self._rows, self._columns])
            self._places.append(places)
            if len(self._parts) == TOGETHER:
                self._resample()

    def pixels(self) -> np.ndarray:
        """The clip: uint8 (T, crop, crop, 3) RGB."""
        self._resample()
        return self._pixels

    def _resample(self) -> None:
        if self._parts:
            for places, frame in zip(self._places, resample(np.stack(self._parts), self.cut.crop), strict=True):
                for place in places:
                    copy(frame, self._pixels[place], self.cut.flip)
            self._parts, self._places = [], []


@stage("resample")
def resample(parts: np.ndarray, crop: int) -> np.ndarray:
    """Pictures uint8 (n, H, W, 3) as uint8 (n, crop, crop, 3): antialiased bilinear."""
    if parts.shape[1:3] == (crop, crop):
        return parts
    # Channels last is the fastest path of torch, three times as fast as swscale or Pillow.
    # (`part[None]` would have a stride of 0, which torch does not take for channels last.)
    batch = torch.from_numpy(parts).permute(0, 3, 1, 2)  # (n, 3, H, W)
    resampled: np.ndarray = (
        interpolate(batch, size=(crop, crop), mode="bilinear", antialias=True).permute(0, 2, 3, 1).numpy()
    )
    return resampled


def copy(picture: np.ndarray, to: np.ndarray, flip: bool) -> None:
    """Copy a picture (H, W, 3), mirrored if wanted."""
    if flip:
        for channel in range(3):  # a fifth of the time of all channels at once
            to[..., channel] = picture[:, ::-1, channel]
    else:
        to[:] = picture
