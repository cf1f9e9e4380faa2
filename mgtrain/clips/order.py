"""The order of clips: a run is an endless stream of clips, and each position in it belongs to a video.

Position `c` belongs to epoch `c // videos`, and to the video at place `c % videos` of `Order.epoch`. A step is an
interval of positions, and may include the end of one epoch and the start of the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mgtrain.data.videos import Videos
from mgtrain.grid import Grid
from mgtrain.recipe import Recipe
from mgtrain.rng import Draw, generator
from mgtrain.schedule.plan import Step

# A class's share of an epoch is proportional to this function of its number of videos.
SHARES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"sqrt": np.sqrt, "full": np.ones_like}


@dataclass(frozen=True, slots=True)
class ClipRequest:
    """A clip to load: its video, its position in the stream, its grid."""

    video: int
    position: int
    grid: Grid


class Order:
    """The videos of each epoch in random order; an epoch of N videos has N places, balanced or not.

    With `data.balance: none` it has each video once. Otherwise it has on average q = N s / S places for a class, where
    s is the class's number of videos by one of the `SHARES`, and S the sum of all s. The first e epochs have e q of
    them, rounded up or down; one epoch has less than 2 more or fewer than q. The videos of a class take turns: none
    comes again before all have come.

    >>> order = Order(seed=0, videos=6, balance="full", labels=np.array([0, 0, 0, 0, 0, 1]))
    >>> sorted(order.epoch(0).tolist())
    [0, 1, 3, 5, 5, 5]
    """

    def __init__(self, seed: int, videos: int, balance: str = "none", labels: np.ndarray | None = None) -> None:
        self.seed, self.videos = seed, videos
        self._classes: list[np.ndarray] = []  # the videos of each class that has any; none without balance
        if balance != "none":
            assert labels is not None, "balancing classes takes labels"
            counts = np.bincount(labels)
            classes = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
            self._classes = [members for members in classes if len(members)]
            ends = np.cumsum(SHARES[balance](counts[counts > 0].astype(float)))
            self._ends = ends / ends[-1] * videos  # float64 (classes,): where in an epoch each class's share ends
        self.epoch = lru_cache(maxsize=4)(self._epoch)

    @classmethod
    def of(cls, videos: Videos, recipe: Recipe) -> Order:
        """The order of a recipe's training videos."""
        balance = recipe.data.balance
        return cls(recipe.seed, len(videos), balance, None if balance == "none" else videos.single_labels)

    def at(self, position: int) -> int:
        """The video at a position of the stream."""
        epoch, place = divmod(position, self.videos)
        return int(self.epoch(epoch)[place])

    def requests(self, positions: Iterable[int], grid: Grid) -> Iterator[ClipRequest]:
        """Requests for the clips at these positions, which may be endless."""
        return (ClipRequest(self.at(position), position, grid) for position in positions)

    def _epoch(self, epoch: int) -> np.ndarray:
        """The videos of one epoch: int64 (videos,)."""
        order = generator(self.seed, Draw.ORDER, epoch).permutation(self.videos)
        if self._classes:
            # What is rounded is where the shares end, not how long they are, so that all epochs are equally long.
            before, after = (np.diff(np.floor(n * self._ends + 0.5), prepend=0).astype(int) for n in (epoch, epoch + 1))
            order = np.concatenate(list(map(self._turns, range(len(before)), before, after)))[order]
        order.setflags(write=False)
        return order

    def _turns(self, number: int, first: int, last: int) -> np.ndarray:
        """The videos of a class's clips `first` to `last`, that one excluded, counted from the start of the run."""
        members, parts = self._classes[number], [np.empty(0, int)]
        for turn in range(first // len(members), -(-last // len(members))):
            begin, end = (min(max(clip - turn * len(members), 0), len(members)) for clip in (first, last))
            if end - begin == len(members):  # the order of a whole turn does not matter: the epoch is shuffled
                parts.append(members)
            else:
                parts.append(generator(self.seed, Draw.BALANCE, number, turn).permutation(members)[begin:end])
        return np.concatenate(parts)


def step_requests(step: Step, order: Order, rank: int = 0, ranks: int = 1) -> list[ClipRequest]:
    """The clips of one step for `rank`: its contiguous share of the global batch, in order."""
    share = step.shape.clips // ranks
    first = step.first_clip + rank * share
    return list(order.requests(range(first, first + share), step.grid))
