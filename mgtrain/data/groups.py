"""Which videos come from one source, according to their names or a CSV: these stay together when a set is split."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mgtrain.data.index import KINETICS_NAME
from mgtrain.data.reading import read_table
from mgtrain.data.videos import EXAMPLES, Videos
from mgtrain.errors import DataError, UsageError

LEAST_GROUPS = 5  # of every class, so that each part of a split gets its share of them
LARGEST = 0.34  # of all videos in one group; a larger one says nothing about sources
SOURCE = re.compile(
    r"(?<![a-z])(person|subject|actor|seq|sequence|scene|session|source|game|match|group|g)[-_ ]?\d+(?![a-z0-9])",
    re.IGNORECASE,
)
PART = re.compile(r"(.+?)[-_. ]*(?:clip|part|seg|segment|shot|c|p)?[-_. ]*\(?\d+\)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Groups:
    """`ids`, int64 (N,), is each video's group; `rule` says how they were found, `example` shows it on one name."""

    ids: np.ndarray
    rule: str
    example: str

    @property
    def count(self) -> int:
        """The number of groups."""
        return len(np.unique(self.ids))


def groups_of_names(names: Sequence[str], labels: Sequence[int]) -> Groups | None:
    """The groups by the first known naming scheme that fits these videos; None if none fits.

    A scheme fits if it puts several videos together, no large part of all into one group, and leaves each class enough
    groups to be split.

    >>> names = [f"walk/person{n // 2:02d}_d{n % 2}.avi" for n in range(12)]
    >>> groups_of_names(names, [0] * 12).example
    'person00_d0.avi is of person00'
    """
    schemes: list[tuple[str, Callable[[str], str | None]]] = [
        (
            "the YouTube video of a Kinetics clip",
            lambda name: clip[1] if (clip := KINETICS_NAME.fullmatch(name)) else None,
        ),
        ("the words for a source in names", _source),
        ("names without their last number", _part),
    ]
    for rule, key_of in schemes:
        keys = [key_of(name) for name in names]
        if None not in keys and (found := _grouped(rule, names, keys)) and _plausible(found.ids, labels):
            return found
    return None


def groups_by_pattern(names: Sequence[str], pattern: str) -> Groups:
    """The groups that a regular expression finds in the names: the text of its own groups, or else of its match.

    Raises:
        UsageError: not a valid regular expression, or it does not match a name.
    """
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"--group-by {pattern}: not a regular expression: {error}") from None
    keys = []
    for name in names:
        match = wanted.search(name)
        if match is None:
            raise UsageError(f"--group-by {pattern}: does not match {name!r}; every video must have a group")
        keys.append("/".join(filter(None, match.groups())) or match[0])
    return _grouped(f"{pattern} in names", names, keys)


def read_groups(path: Path, column: str, videos: Videos) -> np.ndarray:
    """The group of each video, numbered from 0: int64 (N,), from a CSV with the columns `path` and `column`."""
    rows = read_table(path, ("path", column), "name the columns in the first line, or choose one with --by")
    group_of = {os.path.normpath(row["path"]): row[column] for _, row in rows if row["path"] and row[column]}
    names = [videos.name(i) for i in range(len(videos))]
    lacking = [name for name in names if name not in group_of]
    if lacking:
        raise DataError(
            f"{path}: no group for {len(lacking)} of {len(names)} videos: {', '.join(lacking[:EXAMPLES])}"
            f"{', ...' if len(lacking) > EXAMPLES else ''}; add a line with the path of each in {videos.root}"
        )
    return _grouped(column, names, [group_of[name] for name in names]).ids


def _grouped(rule: str, names: Sequence[str], keys: Sequence[str | None]) -> Groups:
    ids = np.unique([str(key) for key in keys], return_inverse=True)[1].astype(np.int64)
    return Groups(ids, rule, f"{os.path.basename(names[0])} is of {keys[0]}")


def _plausible(ids: np.ndarray, labels: Sequence[int]) -> bool:
    sizes = np.bincount(ids)
    if len(sizes) == len(ids) or sizes.max() > LARGEST * len(ids):
        return False
    of_class = np.array(labels)
    return all(len(np.unique(ids[of_class == label])) >= LEAST_GROUPS for label in np.unique(of_class))


def _source(name: str) -> str | None:
    """Such as `person15` or `seq03`; UCF101's `g07` counts within its class."""
    stem = os.path.splitext(os.path.basename(name))[0]
    found = SOURCE.search(stem)
    if found is None:
        return None
    return stem[: found.end()] if found[1].lower() in ("g", "group") else found[0].lower()


def _part(name: str) -> str:
    """`holiday_part3.mp4` is of `holiday`, in any folder."""
    stem = os.path.splitext(os.path.basename(name))[0]
    found = PART.fullmatch(stem)
    return found[1] if found else stem
