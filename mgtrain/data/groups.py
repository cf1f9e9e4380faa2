"""Which videos come from one source, as far as their names show it: these stay together when a set is split."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mgtrain.data.index import KINETICS_NAME
from mgtrain.errors import UsageError

LEAST_GROUPS = 5  # of every class, so that each part of a split gets its share of them
LARGEST = 0.34  # of all videos in one group; a larger one says nothing about sources
SOURCE = re.compile(
    r"(?<![a-z])(person|subject|actor|seq|sequence|scene|session|source|game|match|group|g)[-_ ]?\d+(?![a-z0-9])",
    re.IGNORECASE,
)
PART = re.compile(r"(.+?)[-_. ]*(?:clip|part|seg|segment|shot|c|p)?[-_. ]*\(?\d+\)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Groups:
    """`ids`, int64 (N,), is each video's group; `rule` says how the names show it, `example` what one name gives."""

    ids: np.ndarray
    rule: str
    example: str

    @property
    def count(self) -> int:
        """How many there are."""
        return len(np.unique(self.ids))


def groups_of_names(names: Sequence[str], labels: Sequence[int]) -> Groups | None:
    """The first of the known ways of naming that groups these videos; None if none does.

    A way counts if it puts several videos together, no large part of all into one group, and leaves each class enough
    groups to be split.

    >>> names = [f"walk/person{n // 2:02d}_d{n % 2}.avi" for n in range(12)]
    >>> groups_of_names(names, [0] * 12).example
    'person00_d0.avi is of person00'
    """
    for rule, key_of in (
        ("the YouTube video of a Kinetics clip", _kinetics),
        ("the words for a source in names", _source),
        ("names without their last number", _part),
    ):
        keys = [key_of(name) for name in names]
        if None not in keys and (found := _grouped(rule, names, keys)) and _plausible(found.ids, labels):
            return found
    return None


def groups_by_pattern(names: Sequence[str], pattern: str) -> Groups:
    """The groups that a regular expression finds in the names: its groups' text, or all that it matches.

    Raises:
        UsageError: it is no regular expression, or does not match a name.
    """
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"--group-by {pattern}: no regular expression: {error}") from None
    found = [wanted.search(name) for name in names]
    for name, match in zip(names, found, strict=True):
        if match is None:
            raise UsageError(f"--group-by {pattern}: is nowhere in {name!r}; every video has to have a group")
    keys = ["/".join(filter(None, match.groups())) or match[0] for match in found if match]
    return _grouped(f"{pattern} in names", names, keys)


def _grouped(rule: str, names: Sequence[str], keys: Sequence[str | None]) -> Groups:
    ids = np.unique([str(key) for key in keys], return_inverse=True)[1].astype(np.int64)
    return Groups(ids, rule, f"{os.path.basename(names[0])} is of {keys[0]}")


def _plausible(ids: np.ndarray, labels: Sequence[int]) -> bool:
    sizes = np.bincount(ids)
    if len(sizes) == len(ids) or sizes.max() > LARGEST * len(ids):
        return False
    of_class = np.array(labels)
    return all(len(np.unique(ids[of_class == label])) >= LEAST_GROUPS for label in np.unique(of_class))


def _kinetics(name: str) -> str | None:
    clip = KINETICS_NAME.fullmatch(name)
    return clip[1] if clip else None


def _source(name: str) -> str | None:
    """Such as `person15` or `seq03`; UCF101's `g07` counts within its class."""
    stem = os.path.splitext(os.path.basename(name))[0]
    found = SOURCE.search(stem)
    if found is None:
        return None
    return stem[: found.end()] if found[1].lower() in ("g", "group") else found[0].lower()


def _part(name: str) -> str | None:
    """`holiday_part3.mp4` is of `holiday`, in whatever folder."""
    stem = os.path.splitext(os.path.basename(name))[0]
    found = PART.fullmatch(stem)
    return found[1] if found else stem
