"""Find groups of videos of the same source, from their names or a CSV, so that a split keeps them together."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mgtrain.data.formats.reading import read_table
from mgtrain.data.index import youtube_video
from mgtrain.data.stretch import file_of
from mgtrain.data.videos import Videos, few
from mgtrain.errors import DataError, UsageError

LEAST_GROUPS = 5  # of each class, so that each part of a split gets its share of them
LARGEST = 0.34  # share of all videos in one group; a larger group is not a source
SOURCE = re.compile(
    r"(?<![a-z])(person|subject|actor|seq|sequence|scene|session|source|game|match|group|g)[-_ ]?\d+(?![a-z0-9])",
    re.IGNORECASE,
)
PART = re.compile(r"(.+?)[-_. ]*(?:clip|part|seg|segment|shot|c|p)?[-_. ]*\(?\d+\)?", re.IGNORECASE)


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
    """The groups by the first naming scheme that fits these videos; None if none fits.

    A scheme fits if some groups have several videos, no group has a large share of all videos, and each class has
    enough groups for a split. Stretches of one file stay together in any case.

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


def read_groups(path: Path, column: str, videos: Videos) -> np.ndarray:
    """The group of each video, numbered from 0: int64 (N,), from a CSV with the columns `path` and `column`."""
    rows = read_table(path, ("path", column), "name the columns in the first line, or choose one with --by")
    group_of = {os.path.normpath(row["path"]): row[column] for _, row in rows if row["path"] and row[column]}
    names = videos.names()
    groups = [group_of.get(name) or group_of.get(file_of(name), "") for name in names]
    lacking = [name for name, group in zip(names, groups, strict=True) if not group]
    if lacking:
        raise DataError(
            f"{path}: no group for {len(lacking)} of {len(names)} videos: {few(lacking)}; "
            f"add a line with the path of each in {videos.root}"
        )
    return _grouped(column, names, groups).ids


def _grouped(rule: str, names: Sequence[str], keys: Sequence[str]) -> Groups:
    ids = np.unique(keys, return_inverse=True)[1].astype(np.int64)
    return Groups(ids, rule, f"{os.path.basename(names[0])} is of {keys[0]}")


def _plausible(ids: np.ndarray, labels: np.ndarray) -> bool:
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
