"""Which video each position of the run's endless stream of clips belongs to.

Position `c` belongs to epoch `c // videos`, in which it is video `epoch_order(...)[c % videos]`. There is no epoch
loop: a step is an interval of positions, and may straddle two epochs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mgtrain.grid import Grid
from mgtrain.rng import Draw, generator
from mgtrain.schedule.plan import Step


@dataclass(frozen=True, slots=True)
class ClipRequest:
    """One clip to make: of which video, for which position of the stream, on which grid."""

    video: int
    position: int
    grid: Grid


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, videos: int) -> np.ndarray:
    """The videos of one epoch in random order: int64 (videos,)."""
    order = generator(seed, Draw.ORDER, epoch).permutation(videos)
    order.setflags(write=False)
    return order


def video_at(position: int, videos: int, seed: int) -> int:
    """The video at a position of the stream."""
    epoch, place = divmod(position, videos)
    return int(epoch_order(seed, epoch, videos)[place])


def step_requests(step: Step, videos: int, seed: int, rank: int = 0, ranks: int = 1) -> list[ClipRequest]:
    """The clips of one step that fall to `rank`: its contiguous share of the global batch, in order."""
    share = step.shape.clips // ranks
    first = step.first_clip + rank * share
    return [ClipRequest(video_at(c, videos, seed), c, step.grid) for c in range(first, first + share)]
