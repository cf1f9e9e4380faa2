"""Split a labelled set into training and validation videos, or into folds, and keep videos of one source together.

Sources are groups of videos, found from their names or read from a CSV.
"""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mgtrain.data.formats.reading import read_table
from mgtrain.data.index import youtube_video
from mgtrain.data.stretch import file_of
from mgtrain.data.videos import Videos, few
from mgtrain.errors import DataError, UsageError
from mgtrain.rng import Draw, generator

TRIES = 16  # orders of the groups to try
MOST_PLACED = 200_000  # groups to place in all tries together, which takes a few seconds
LEAST_GROUPS = 5  # of each class, so that each part of a split gets its share of them
NO_GROUPS = "class only: names show no sources, or too few; if videos share sources, give --group-by"
LARGEST = 0.34  # share of all videos in one group; a larger group is not a source
SOURCE = re.compile(
    r"(?<![a-z])(person|subject|actor|seq|sequence|scene|session|source|game|match|group|g)[-_ ]?\d+(?![a-z0-9])",
    re.IGNORECASE,
)
PART = re.compile(r"(.+?)[-_. ]*(?:clip|part|seg|segment|shot|c|p)?[-_. ]*\(?(?<!\d)\d+\)?", re.IGNORECASE)


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
    scarce = []
    for label in np.unique(labels):
        members = (labels == label).sum() if groups is None else len(np.unique(groups[labels == label]))
        if members < len(shares):
            scarce.append(f"{videos.classes[label]!r} ({members})")
    if scarce:
        what, more = "videos", ""
        if groups is not None:
            what = "groups of videos"
            more = ", or split without groups (--group-by none), which leaks between parts"
        classes = "class" if len(scarce) == 1 else "classes"
        raise DataError(
            f"{videos.root}: too few {what} for {len(shares)} parts in {classes} {few(scarce)}; add videos, or drop "
            f"{'it' if len(scarce) == 1 else 'them'}{more}"
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
        left = np.bincount(np.concatenate([np.unique(labels) for labels in members]), minlength=len(sums))  # groups
        part_of = np.zeros(len(members), np.int64)
        for group in sorted(draws.tolist(), key=lambda g: -len(members[g])):
            classes, own = np.unique(members[group], return_counts=True)
            # How much the squared distance from the wanted counts grows, in each part.
            growth = ((2 * (counts[:, classes] - wanted[:, classes]) + own) * own / sums[classes]).sum(axis=1)
            lacking = counts[:, classes] == 0
            last = lacking.sum(axis=0) == left[classes]  # each group left of these classes must go to a part without
            growth[(~lacking & last).any(axis=1)] = np.inf
            part = part_of[group] = int(np.argmin(growth / shares))  # a small part fills as fast as a large one
            counts[part, classes] += own
            left[classes] -= 1
        distance = ((counts - wanted) ** 2 / np.maximum(1, sums)).sum()
        if distance < least and (counts[:, sums > 0] > 0).all():
            best, least = part_of, distance
    if best is None:
        raise DataError(
            f"{videos.root}: found no way to put every class into each of {len(shares)} parts with these groups; "
            "use smaller groups, fewer parts or another --seed"
        )
    return best[np.unique(groups, return_inverse=True)[1]]


@dataclass(frozen=True, slots=True)
class Groups:
    """The group of each video, `ids` int64 (N,); the `rule` that found them, and an `example` for one video."""

    ids: np.ndarray
    rule: str
    example: str

    def __str__(self) -> str:
        return f"{self.rule}: {len(np.unique(self.ids))} groups, each in one part ({self.example})"


def find_groups(videos: Videos, group_by: str | None) -> Groups | None:
    """The groups by a regular expression; None: guessed from the names. No groups if it is `none`, or none fit."""
    if group_by is None:
        return groups_of_names(videos.names(), videos.single_labels)
    return None if group_by == "none" else groups_by_pattern(videos.names(), group_by)


def groups_of_names(names: Sequence[str], labels: Sequence[int] | np.ndarray) -> Groups | None:
    """The groups by the first naming scheme that fits these videos; stretches of one file stay together in any case.

    >>> names = [f"walk/person{n // 2:02d}_d{n % 2}.avi" for n in range(12)]
    >>> groups_of_names(names, [0] * 12).example
    'person00_d0.avi is of person00'
    """
    schemes: dict[str, Callable[[str], str | None]] = {
        "the YouTube video of a Kinetics clip": youtube_video,
        "the words for a source in names": _source,
        "names without their last number": _without_number,
    }
    files, by_file = [*map(file_of, names)], groups_of_files(names)
    for rule, key_of in schemes.items():
        keys = [key for name in files if (key := key_of(name)) is not None]
        if len(keys) == len(files):
            groups = _grouped(rule, files, keys)
            finer = by_file is not None and by_file.ids.max() == groups.ids.max()
            if _plausible(groups.ids, np.array(labels)) and not finer:
                return groups
    return by_file


def groups_of_files(names: Sequence[str]) -> Groups | None:
    """A group for each file, if some of the names are stretches of one; else None.

    >>> groups_of_files(["a.mp4#t=0,2", "b.mp4", "a.mp4#t=5,9"]).example
    'a.mp4#t=0,2 is of a.mp4'
    """
    files = [*map(file_of, names)]
    return _grouped("the file of a stretch", names, files) if len(set(files)) < len(files) else None


def groups_by_pattern(names: Sequence[str], pattern: str) -> Groups:
    """The groups that a regular expression finds in the names: the text of its capture groups, or else of its match.

    Raises `UsageError` if it is not valid, or does not match a name.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"--group-by {pattern}: not a regular expression: {error}") from None
    keys = []
    for name in map(file_of, names):
        match = compiled.search(name)
        if match is None:
            raise UsageError(f"--group-by {pattern}: does not match {name!r}; every video must have a group")
        keys.append("/".join(filter(None, match.groups())) or match[0])
    return _grouped(f"{pattern} in names", names, keys)


def read_groups(path: Path, column: str, videos: Videos) -> Groups:
    """The groups by a CSV with the columns `path` and `column`. Raises `DataError` if a video has none, or two."""
    rows = read_table(path, ("path", column), "name the columns in the first line, or choose one with --by")
    group_of: dict[str, str] = {}
    for number, row in rows:
        name, group = os.path.normpath(row["path"].strip()), row[column].strip()
        if row["path"].strip() and group and group_of.setdefault(name, group) != group:
            raise DataError(f"{path}:{number}: {name!r} is of group {group_of[name]!r} and of {group!r}; keep one")
    names = videos.names()
    groups = [group_of.get(name) or group_of.get(file_of(name), "") for name in names]
    lacking = [name for name, group in zip(names, groups, strict=True) if not group]
    if lacking:
        raise DataError(
            f"{path}: no group for {len(lacking)} of {len(names)} videos: {few(lacking)}; "
            f"add a line with the path of each in {videos.root}"
        )
    return _grouped(f"{column} in {path}", names, groups)


def _grouped(rule: str, names: Sequence[str], keys: Sequence[str]) -> Groups:
    ids = np.unique(keys, return_inverse=True)[1].astype(np.int64)
    return Groups(ids, rule, f"{os.path.basename(names[0])} is of {keys[0]}")


def _plausible(ids: np.ndarray, labels: np.ndarray) -> bool:
    """Whether some groups have several videos, none has a large share of all, and each class has enough for a split."""
    sizes = np.bincount(ids)
    if len(sizes) == len(ids) or sizes.max() > LARGEST * len(ids):
        return False
    return all(len(np.unique(ids[labels == label])) >= LEAST_GROUPS for label in np.unique(labels))


def _source(name: str) -> str | None:
    """The source in a name, such as `person15` or `seq03`. UCF101's `g07` is a source within its class only."""
    stem = os.path.splitext(os.path.basename(name))[0]
    match = SOURCE.search(stem)
    if match is None:
        return None
    return stem[: match.end()] if match[1].lower() in ("g", "group") else match[0].lower()


def _without_number(name: str) -> str:
    """A name without its last number and folder: `holiday` for `holiday_part3.mp4`."""
    stem = os.path.splitext(os.path.basename(name))[0]
    match = PART.fullmatch(stem)
    return match[1] if match else stem
