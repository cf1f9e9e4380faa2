"""From decoded frames to the pixels of a clip: convert the region that the clip shows, and resample it once."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice

import av
import numpy as np
import torch
from av.video.plane import VideoPlane
from av.video.reformatter import VideoReformatter
from torch.nn.functional import interpolate

from mgtrain.clips.cut import Cut
from mgtrain.clips.stages import stage

TOGETHER = 8  # frames of a clip to resample at once: at small crops this takes half the time of one by one
PIXELS_TOGETHER = 2**19  # to convert at once; more do not fit into the processor's cache

Box = tuple[int, int, int, int]  # left, top, width, height
Frames = Iterator[tuple[av.VideoFrame, Sequence[int]]]  # each with the frame numbers that it stands for
Pictures = Iterator[tuple[np.ndarray, Sequence[int]]]  # the same, as uint8 (H, W, 3) RGB


class UnconvertibleError(Exception):
    """The pixels of a frame cannot be converted to RGB."""


def converted(frames: Frames, size: tuple[int, int], box: Box, reformatter: VideoReformatter) -> Pictures:
    """Convert a box of each frame to uint8 (height, width, 3) RGB, several frames at once; yields views.

    Frames of another size than `size` (width, height) are resized first. `reformatter` keeps its tables between calls.
    Raises `UnconvertibleError` if their format cannot be converted.
    """
    most = max(1, min(TOGETHER, PIXELS_TOGETHER // (box[2] * box[3])))
    frames = iter(frames)
    while group := list(islice(frames, most)):
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
    """The box of each frame, as `converted` returns it. A small box is copied first, so that only it is converted."""
    left, top, width, height = box
    small = 4 * width * height <= 3 * size[0] * size[1]  # copying a larger box takes longer than converting the frame
    if small and all(in_blocks(frame, frames[0], size) for frame in frames):
        return list(rgb_of_planes(frames, box, reformatter))
    whole = [reformatter.reformat(frame, *size, "rgb24", threads=1) for frame in frames]
    return [plane(frame.planes[0], size[1], size[0], 3)[top : top + height, left : left + width] for frame in whole]


def in_blocks(frame: av.VideoFrame, first: av.VideoFrame, size: tuple[int, int]) -> bool:
    """Whether each block of 2 x 2 pixels has one sample in each chroma plane, in the same format as the `first` frame.

    Otherwise swscale interpolates, and pixels near the border of a box would differ from those of the whole frame.
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
    """The box of frames that are `in_blocks`, stacked to be converted at once: uint8 (n, height, width, 3) RGB."""
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
    """A view of a frame's plane without the padding of its rows: uint8 (height, width) or (height, width, 3)."""
    pixels: np.ndarray = np.ndarray(shape, np.uint8, memoryview(data), strides=(data.line_size, *shape[2:], 1))
    return pixels


def upright(frame: av.VideoFrame) -> tuple[int, bool]:
    """Quarter turns anticlockwise that show a frame upright, and whether left and right must be swapped before.

    Other angles occur only in damaged headers.
    """
    turn, mirrored = frame.rotation, False
    with suppress(KeyError, ValueError):  # no matrix; other data of a kind that PyAV does not know
        matrix = frame.side_data["DISPLAYMATRIX"]  # type: ignore[typeddict-item]  # PyAV's stub lacks it
        a, b, _, c, d = np.frombuffer(matrix, "<i4")[:5].tolist()
        mirrored = a * d < b * c
    return ((turn + 180 * mirrored) // 90 % 4 if turn % 90 == 0 else 0), mirrored


def box_around(boxes: Sequence[Box]) -> Box:
    """The smallest box that contains all boxes.

    >>> box_around([(4, 0, 10, 20), (10, 30, 10, 5)])
    (4, 0, 16, 35)
    """
    left, top = (min(box[axis] for box in boxes) for axis in (0, 1))
    right, bottom = (max(box[axis] + box[axis + 2] for box in boxes) for axis in (0, 1))
    return left, top, right - left, bottom - top


class Clip:
    """Collects the frames of a clip as they are decoded, and resamples several at once.

    The pictures are whole frames, or a box of them that contains the clip's region and whose top left is `corner`.
    """

    def __init__(self, cut: Cut, corner: tuple[int, int] = (0, 0)) -> None:
        self.cut = cut
        left, top, width, height = cut.region
        self._rows = slice(top - corner[1], top - corner[1] + height)
        self._columns = slice(left - corner[0], left - corner[0] + width)
        self._pixels = np.empty((len(cut.frames), cut.crop, cut.crop, 3), np.uint8)
        self._wanted: dict[int, list[int]] = {}  # source frame -> its places in the clip
        for t, index in enumerate(cut.frames):
            self._wanted.setdefault(index, []).append(t)
        self._waiting: list[tuple[list[int], np.ndarray]] = []  # regions to resample, (h, w, 3), with their places

    def put(self, indices: Iterable[int], picture: np.ndarray) -> None:
        """Add a picture, uint8 (H, W, 3), of the source frames with these numbers, if the clip has one of them.

        The caller must not change the picture until the clip is complete.
        """
        places = [t for index in indices for t in self._wanted.get(index, ())]
        if places:
            self._waiting.append((places, picture[self._rows, self._columns]))
            if len(self._waiting) == TOGETHER:
                self._resample()

    def pixels(self) -> np.ndarray:
        """The clip: uint8 (T, crop, crop, 3) RGB."""
        self._resample()
        return self._pixels

    def _resample(self) -> None:
        if self._waiting:
            frames = resample(np.stack([part for _, part in self._waiting]), self.cut.crop)
            for (places, _), frame in zip(self._waiting, frames, strict=True):
                for place in places:
                    copy(frame, self._pixels[place], self.cut.flip)
            self._waiting = []


def clips_of(cuts: Sequence[Cut], pictures: Pictures, corner: tuple[int, int] = (0, 0)) -> list[np.ndarray]:
    """The clips of cuts, from pictures of source frames; `corner` as in `Clip`."""
    clips = [Clip(cut, corner) for cut in cuts]
    for picture, indices in pictures:
        for clip in clips:
            clip.put(indices, picture)
    return [clip.pixels() for clip in clips]


def clips_by(
    kind: Callable[[Cut], int], read: Callable[[int, list[Cut]], list[np.ndarray]], cuts: Sequence[Cut]
) -> list[np.ndarray]:
    """The clips of cuts, in their order, where `read` gets all cuts of one kind together."""
    by_kind: dict[int, list[Cut]] = {}
    for cut in cuts:
        by_kind.setdefault(kind(cut), []).append(cut)
    clips = {one: iter(read(one, these)) for one, these in by_kind.items()}
    return [next(clips[kind(cut)]) for cut in cuts]


@stage("resample")
def resample(parts: np.ndarray, crop: int) -> np.ndarray:
    """Resample pictures uint8 (n, H, W, 3) to uint8 (n, crop, crop, 3), bilinear with antialiasing."""
    if parts.shape[1:3] == (crop, crop):
        return parts
    # torch is three times as fast in channels last as swscale or Pillow. (A stride of 0, as that of `part[None]`,
    # does not count as channels last.)
    batch = torch.from_numpy(parts).permute(0, 3, 1, 2)  # (n, 3, H, W)
    batch = interpolate(batch, size=(crop, crop), mode="bilinear", antialias=True)
    resampled: np.ndarray = batch.permute(0, 2, 3, 1).numpy()
    return resampled


def copy(picture: np.ndarray, to: np.ndarray, flip: bool) -> None:
    """Copy a picture (H, W, 3), mirrored if `flip`."""
    if flip:
        for channel in range(3):  # five times as fast as all channels at once
            to[..., channel] = picture[:, ::-1, channel]
    else:
        to[:] = picture
