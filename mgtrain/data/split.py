"""Split a labelled set into training and validation videos, or into folds."""

import os
from collections.abc import Iterable

import numpy as np

from mgtrain.data.videos import Videos
from mgtrain.errors import DataError
from mgtrain.rng import Draw, generator

TRIES = 16  # orders of the groups to try
MOST_PLACED = 200_000  # groups to place in all tries together, which takes a few seconds


def make_split(
    videos: Videos,
    *,
    val: float | None = None,
    folds: int | None = None,
    seed: int = 0,
    groups: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Split videos into `train` and `val`, or `train_0`, `val_0`, ... for folds: rows of each list, int64, ascending.

    `val` is the share of validation videos, above 0 and below 1; with `folds`, each video is in one validation list.
    The split is stratified: every list has its share of every class. Videos with the same number in `groups`, int64
    (N,), stay together. The same seed gives the same lists. Raises `DataError` if the videos cannot be split this way.

    >>> videos = Videos.of("", [(f"{n}.mp4", n % 2) for n in range(10)], ("cat", "dog"))
    >>> [len(rows) for rows in make_split(videos, val=0.2).values()]
    [8, 2]
    """
    if val is not None:
        part = _parts(videos, np.array([val, 1 - val]), seed, groups)
        return {"train": np.flatnonzero(part == 1), "val": np.flatnonzero(part == 0)}
    assert folds, "give val or folds"
    part = _parts(videos, np.full(folds, 1 / folds), seed, groups)
    lists: dict[str, np.ndarray] = {}
    for fold in range(folds):
        lists |= {f"train_{fold}": np.flatnonzero(part != fold), f"val_{fold}": np.flatnonzero(part == fold)}
    return lists


def joined(sets: Iterable[Videos]) -> Videos:
    """Join sets with the same root and classes, each path once. Raises `DataError` if a path has several labels."""
    sets = list(sets)
    label_of: dict[str, int] = {}
    for videos in sets:
        if videos.multi_label:
            raise DataError(f"{videos.root}: videos with several labels cannot be split by class; list one label each")
        for name, label in zip(videos.names(), videos.single_labels.tolist(), strict=True):
            if label_of.setdefault(name, label) != label:
                raise DataError(
                    f"{os.path.join(videos.root, name)}: is {videos.classes[label]!r} in one list and "
                    f"{videos.classes[label_of[name]]!r} in another; correct one of them"
                )
    return Videos.of(sets[0].root, label_of.items(), sets[0].classes, sum(videos.missing for videos in sets))


def _parts(videos: Videos, shares: np.ndarray, seed: int, groups: np.ndarray | None) -> np.ndarray:
    """The part of each video: int64 (N,); part p gets `shares[p]` of each class."""
    labels = videos.single_labels
    for label in np.unique(labels):
        members = (labels == label).sum() if groups is None else len(np.unique(groups[labels == label]))
        if members < len(shares):
            what, more = "videos", ""
            if groups is not None:
                what = "groups of videos"
                more = ", or split without groups (--group-by none), which leaks between parts"
            raise DataError(
                f"{videos.root}: class {videos.classes[label]!r} has too few {what} for {len(shares)} parts, "
                f"{members}; add videos, drop the class, or make fewer parts{more}"
            )
    return _deal(labels, shares, seed) if groups is None else _place(labels, groups, shares, seed, videos)


def _deal(labels: np.ndarray, shares: np.ndarray, seed: int) -> np.ndarray:
    """Deal the videos of each class to the parts, in random order."""
    result = np.zeros(len(labels), np.int64)
    ahead = np.zeros(len(shares))  # videos that each part has more than its share, so far
    for label in np.unique(labels):
        members = generator(seed, Draw.CHOICE, 0, int(label)).permutation(np.flatnonzero(labels == label))
        counts = np.maximum(1, np.floor(shares * len(members)).astype(np.int64))
        while counts.sum() != len(members):
            # Add or remove a video where a part then is nearest to its share of this class and the previous ones.
            step = 1 if counts.sum() < len(members) else -1
            off = step * (counts - shares * len(members) + ahead / len(labels))
            counts[np.argmin(np.where(counts + step > 0, off, np.inf))] += step
        ahead += counts - shares * len(members)
        result[members] = np.repeat(np.arange(len(shares)), counts)
    return result


def _place(labels: np.ndarray, groups: np.ndarray, shares: np.ndarray, seed: int, videos: Videos) -> np.ndarray:
    """Place groups one by one, large ones first, each in the part that keeps all classes nearest to their shares."""
    order = np.lexsort((labels, groups))
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    members = np.split(labels[order], starts[1:])  # the labels of each group
    sums = np.bincount(labels)
    wanted = shares[:, None] * sums  # (parts, classes)
    best, least = None, np.inf
    for attempt in range(max(1, min(TRIES, MOST_PLACED // len(members)))):
        draws = generator(seed, Draw.CHOICE, 1, attempt).permutation(len(members))
        counts = np.zeros_like(wanted)
        part_of = np.zeros(len(members), np.int64)
        for group in sorted(draws.tolist(), key=lambda g: -len(members[g])):
            classes, own = np.unique(members[group], return_counts=True)
            # How much the squared distance from the wanted counts grows, in each part.
            growth = ((2 * (counts[:, classes] - wanted[:, classes]) + own) * own / sums[classes]).sum(axis=1)
            part = part_of[group] = int(np.argmin(growth / shares))  # a small part fills as fast as a large one
            counts[part, classes] += own
        distance = ((counts - wanted) ** 2 / np.maximum(1, sums)).sum()
        if distance < least and (counts[:, sums > 0] > 0).all():
            best, least = part_of, distance
    if best is None:
        raise DataError(
            f"{videos.root}: found no way to put every class into each of {len(shares)} parts with these groups; "
            "use smaller groups, fewer parts or another --seed"
        )
    return best[np.unique(groups, return_inverse=True)[1]]
