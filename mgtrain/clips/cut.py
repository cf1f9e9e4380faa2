"""Choose the frames of a clip and the region of them that it shows (Wu et al. 2020, section 3.3).

A window of `crop` pixels in a frame resized to a short side is a region of the *source* frame, which the decoder
resamples directly to `crop` x `crop`. Only `cut_random` is random.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mgtrain.grid import Grid


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """A video's length in frames, frames per second, and upright size in pixels: all that cutting depends on."""

    frames: int
    fps: float
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Cut:
    """One clip: its source frames, and their region (left, top, width, height), to be resized to `crop` x `crop`."""

    frames: tuple[int, ...]
    region: tuple[int, int, int, int]
    crop: int
    flip: bool


def wanted_frames(cuts: Iterable[Cut]) -> list[int]:
    """The source frames of all cuts, each once, ascending."""
    return sorted({index for cut in cuts for index in cut.frames})


def frame_indices(start: float, frames: int, stride: float, video_frames: int) -> tuple[int, ...]:
    """Source frames of a clip that starts at `start`; the last frame repeats past the video's end.

    They are spread evenly from the first to the last of `frames * stride` source frames and rounded down, so the gaps
    are a little wider than `stride`.

    >>> frame_indices(start=2, frames=4, stride=3, video_frames=9)
    (2, 5, 8, 8)
    >>> frame_indices(start=0, frames=8, stride=2, video_frames=300)
    (0, 2, 4, 6, 8, 10, 12, 15)
    """
    # In single precision, as in PySlowFast, positions that should be whole numbers are whole.
    positions = np.linspace(start, start + max(frames * stride - 1, 0), frames, dtype=np.float32)
    return tuple(np.minimum(positions, video_frames - 1).astype(int).tolist())


def latest_start(frames: int, stride: float, video_frames: int) -> float:
    """The last source frame, possibly fractional, at which a clip can start and still fit; 0 if it never fits.

    >>> latest_start(frames=8, stride=2, video_frames=300)
    284
    """
    return max(0, video_frames - frames * stride)


def segment_bounds(frames: int, video_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last source frame of each of `frames` equal segments of a video: int64 (frames,) each.

    As in PySlowFast, the last frame of a segment is the first of the next (Something-Something; Wang et al. 2016).

    >>> [bounds.tolist() for bounds in segment_bounds(frames=3, video_frames=31)]
    [[0, 10, 20], [10, 20, 30]]
    """
    ends = np.round((video_frames - 1) / frames * np.arange(frames + 1)).astype(np.int64)
    return ends[:-1], ends[1:]


def short_side_at(u: float, low: int, high: int, inverse_uniform: bool = False) -> int:
    """The short side, in pixels, for a uniform draw `u` in [0, 1).

    With `inverse_uniform` its reciprocal is uniform, and u = 0 gives the largest (Something-Something, Charades).

    >>> short_side_at(0.5, 128, 320), short_side_at(0.5, 128, 320, inverse_uniform=True)
    (224, 183)
    """
    if inverse_uniform:
        return round(1 / (1 / high + u * (1 / low - 1 / high)))
    return round(low + u * (high - low))


def resized(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Width and height of a frame resized to a shorter side of `short_side` pixels; the longer side is rounded down.

    >>> resized(320, 240, short_side=128)
    (170, 128)
    """
    if width < height:
        return short_side, height * short_side // width
    return width * short_side // height, short_side


def source_region(
    info: VideoInfo, size: tuple[int, int], crop: int, left: float, top: float
) -> tuple[int, int, int, int]:
    """The source pixels, at least one, under a `crop` x `crop` window at (left, top) of the frame resized to `size`.

    >>> source_region(VideoInfo(300, 30.0, 320, 240), size=(170, 128), crop=112, left=58, top=16)
    (109, 30, 211, 210)
    """

    def stretch(offset: float, window: int, length: int, source: int) -> tuple[int, int]:
        extent = min(max(1, round(window * source / length)), source)
        return min(round(offset * source / length), source - extent), extent

    x, width = stretch(left, crop, size[0], info.width)
    y, height = stretch(top, crop, size[1], info.height)
    return x, y, width, height


def uniform_windows(size: tuple[int, int], crop: int, crops: int) -> list[tuple[int, int]]:
    """(left, top) of `crops` windows, spread along the longer side and centred on the shorter; one crop is the centre.

    >>> uniform_windows((341, 256), crop=256, crops=3)
    [(0, 0), (43, 0), (85, 0)]
    """
    room = max(size) - crop
    middle = -(-(min(size) - crop) // 2)
    along = [-(-room // 2)] if crops == 1 else [-(-room * i // (crops - 1)) for i in range(crops)]
    return [(middle, offset) if size[1] > size[0] else (offset, middle) for offset in along]


def cut_random(
    grid: Grid,
    info: VideoInfo,
    rng: np.random.Generator,
    *,
    fps: float = 30.0,
    flip: float = 0.5,
    inverse_uniform: bool = False,
    segments: bool = False,
) -> Cut:
    """Cut a clip for training, with random stride, start, short side, window and flip.

    The stride counts frames at `fps`, so that clips last equally long whatever the video's rate. With `segments` a clip
    has a random frame of each of the `segment_bounds` instead. The short side is at least the crop.
    """
    # Do not change the order of the draws: the clips of every seed depend on it.
    if segments:
        indices = tuple(rng.integers(*segment_bounds(grid.frames, info.frames), endpoint=True).tolist())  # 1., 2.
    else:
        stride = rng.integers(*grid.stride, endpoint=True) * info.fps / fps  # 1. in source frames
        start = rng.uniform(0, latest_start(grid.frames, stride, info.frames))  # 2.
        indices = frame_indices(start, grid.frames, stride, info.frames)
    short_side = max(grid.crop, short_side_at(rng.random(), *grid.short_side, inverse_uniform))  # 3.
    size = resized(info.width, info.height, short_side)
    left, top = rng.random(2) * (size[0] - grid.crop, size[1] - grid.crop)  # 4.
    mirrored = bool(rng.random() < flip)  # 5.
    return Cut(indices, source_region(info, size, grid.crop, left, top), grid.crop, mirrored)


def cut_views(
    grid: Grid, info: VideoInfo, times: int, crops: int, *, fps: float = 30.0, segments: bool = False
) -> list[Cut]:
    """Cut the clips of an evaluation: at `times` uniform times, each with `crops` windows; in order of time.

    A single time is the video's middle, a single crop the frame's centre. Stride and short side are the grid's
    smallest. With `segments` the times are spread evenly within the `segment_bounds`; a single time is their middle.

    >>> grid = Grid(frames=2, crop=224, stride=(2, 2), short_side=(256, 256))
    >>> for cut in cut_views(grid, VideoInfo(44, 30.0, 340, 256), times=2, crops=2):
    ...     print(cut.frames, cut.region)
    (0, 3) (0, 16, 224, 224)
    (0, 3) (116, 16, 224, 224)
    (20, 23) (0, 16, 224, 224)
    (20, 23) (116, 16, 224, 224)
    """
    if segments:
        first, last = segment_bounds(grid.frames, info.frames)
        clips = [first + (last - first) * (2 * i + 1) // (2 * times) for i in range(times)]
        return _windows([tuple(clip.tolist()) for clip in clips], grid, info, crops)
    stride = grid.stride[0] * info.fps / fps
    latest = latest_start(grid.frames, stride, info.frames)
    starts = [latest / 2] if times == 1 else [latest * i / times for i in range(times)]
    return _windows([frame_indices(start, grid.frames, stride, info.frames) for start in starts], grid, info, crops)


def cut_windows(grid: Grid, info: VideoInfo, every: float, *, fps: float = 30.0) -> list[Cut]:
    """Cut a clip of the frame's centre `every` so many seconds; the last starts at the latest frame where it fits.

    >>> grid = Grid(frames=2, crop=224, stride=(15, 15), short_side=(256, 256))
    >>> [cut.frames for cut in cut_windows(grid, VideoInfo(100, 30.0, 340, 256), every=1)]
    [(0, 29), (30, 59), (60, 89), (70, 99)]
    """
    stride = grid.stride[0] * info.fps / fps
    latest = latest_start(grid.frames, stride, info.frames)
    starts = [*(n * every * info.fps for n in range(math.ceil(latest / (every * info.fps)))), latest]
    return _windows([frame_indices(start, grid.frames, stride, info.frames) for start in starts], grid, info, crops=1)


def _windows(clips: Sequence[tuple[int, ...]], grid: Grid, info: VideoInfo, crops: int) -> list[Cut]:
    size = resized(info.width, info.height, max(grid.crop, grid.short_side[0]))
    regions = [source_region(info, size, grid.crop, *window) for window in uniform_windows(size, grid.crop, crops)]
    return [Cut(frames, region, grid.crop, flip=False) for frames in clips for region in regions]
