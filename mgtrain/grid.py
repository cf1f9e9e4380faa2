"""Shapes of mini-batches and grids of clips (Wu et al. 2020, section 3).

A `Shape` is the size of a mini-batch, a `Grid` is how each of its clips is cut from a video. The functions derive
coarse shapes and their grids from the base shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    """One mini-batch over all GPUs: `clips` clips of `frames` frames of `crop` x `crop` pixels."""

    clips: int
    frames: int
    crop: int

    @property
    def height(self) -> int:
        """Pixels of a clip's side: crops are square."""
        return self.crop

    @property
    def width(self) -> int:
        """Pixels of a clip's side: crops are square."""
        return self.crop

    @property
    def voxels(self) -> int:
        """The volume `clips * frames * crop**2`, roughly proportional to the cost of a step."""
        return self.clips * self.frames * self.crop**2

    def __str__(self) -> str:
        return f"{self.clips}x{self.frames}x{self.crop}²"


@dataclass(frozen=True, slots=True)
class Grid:
    """How one clip is cut from one video: ranges of strides in time and of sizes in space.

    `frames` frames, `stride` frames apart at the recipe's rate (drawn from `stride[0]..stride[1]`, both included); a
    `crop` x `crop` window of the video resized to a short side drawn from `short_side[0]..short_side[1]` pixels.
    """

    frames: int
    crop: int
    stride: tuple[int, int]
    short_side: tuple[int, int]


def coarsen(base: Shape, time: float, space: float) -> Shape:
    """The long-cycle shape with `time` of the base's frames, `space` of its crop, and more clips for the same volume.

    >>> coarsen(Shape(clips=64, frames=32, crop=224), time=0.25, space=0.7071)
    Shape(clips=512, frames=8, crop=158)
    """
    frames = max(1, round(base.frames * time))
    crop = max(1, round(base.crop * space))
    factor = max(1, round(base.frames * base.crop**2 / (frames * crop**2)))
    return Shape(base.clips * factor, frames, crop)


def short_cycle(shape: Shape, base: Shape, factors: Sequence[float]) -> tuple[Shape, ...]:
    """The shapes that alternate within a long-cycle shape, one per step, coarse first and `shape` itself last.

    `factors` are relative to the *baseline's* crop, not to that of `shape` (Wu et al. 2020, section 3.2); no crop
    is larger than that of `shape`.

    >>> base = Shape(clips=64, frames=32, crop=224)
    >>> short_cycle(Shape(512, 8, 158), base, (0.5, 0.7071))
    (Shape(clips=1024, frames=8, crop=112), Shape(clips=512, frames=8, crop=158), Shape(clips=512, frames=8, crop=158))
    """
    crops = [min(max(1, round(base.crop * factor)), shape.crop) for factor in factors]
    return (*(Shape(shape.clips * round((shape.crop / crop) ** 2), shape.frames, crop) for crop in crops), shape)


def train_grid(shape: Shape, base: Shape, stride: int, short_side: tuple[int, int]) -> Grid:
    """The grid of a clip in a step of this `shape`, given the base's `stride` and range of short sides.

    A clip of fewer frames spans up to the base's full span, so its stride is drawn from
    `stride .. stride * base.frames / frames`. The lower end of the short side shrinks with the crop; the upper end
    stays, so a smaller crop also sees smaller parts of the image (Wu et al. 2020, section 3.3).

    >>> train_grid(Shape(512, 8, 158), Shape(64, 32, 224), stride=2, short_side=(256, 320))
    Grid(frames=8, crop=158, stride=(2, 8), short_side=(181, 320))
    """
    low, high = short_side
    longest_stride = max(stride, round(stride * base.frames / shape.frames))
    return Grid(shape.frames, shape.crop, (stride, longest_stride), (round(low * shape.crop / base.crop), high))
