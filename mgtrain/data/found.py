"""Find the labelled videos in a folder of any common layout, and split them, for `mgtrain init`."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mgtrain.data import open_videos
from mgtrain.data.formats.folder import class_folders, videos_in
from mgtrain.data.index import Index
from mgtrain.data.split import NO_GROUPS, find_groups, make_split
from mgtrain.data.videos import Videos
from mgtrain.errors import DataError, UsageError

VALIDATION = ("val", "valid", "validation", "test")  # names of a validation split, in this order


def find_videos(place: Path, root: Path | None = None) -> dict[str, Videos]:
    """Find the videos at `place`: the splits `train` and `val` with the same classes, or `all` if there are no splits.

    `place` is a list of `path label` lines, relative to `root` or else to the list's folder, or a folder that contains

    1. lists `train.csv` and `val.csv` (or .txt; `val` may be `valid`, `validation` or `test`),
    2. folders `train` and `val` with a folder for each class,
    3. a folder for each class, or just one folder that does.

    Raises `DataError` if it is none of these.
    """
    if place.is_file():
        return {"all": open_videos("list", str(root or place.parent), os.path.abspath(place))}
    found = _find_in(place, root)
    if root and os.path.abspath(root) != os.path.abspath(next(iter(found.values())).root):
        raise UsageError(f"--root {root}: is for the paths of lists, and {place} has none; leave it out")
    return found


def _find_in(place: Path, root: Path | None) -> dict[str, Videos]:
    if not place.is_dir():
        raise DataError(f"{place}: no such file or folder; give a folder of videos, or a list of `path label` lines")
    if train := _list(place, "train"):
        val = next((file for name in VALIDATION if (file := _list(place, name))), None)
        if val is None:
            raise DataError(
                f"{train}: has no list of validation videos beside it; add {place}/val{train.suffix}, or split it with "
                f"--data {train}"
            )
        return _open_both("list", root or place, os.path.abspath(train), os.path.abspath(val))
    validation = next((name for name in VALIDATION if _has_classes(place / name)), None)
    if validation and _has_classes(place / "train"):
        return _open_both("folder", place, "train", validation)
    folders = class_folders(place)
    if _has_classes(place):
        if {*folders} <= {"train", *VALIDATION}:
            raise DataError(
                f"{place}: {' and '.join(folders)} hold videos, not a folder for each class; sort the videos into "
                f"{place}/train/<class>, or write lists of `path label` lines"
            )
        return {"all": open_videos("folder", str(place), ".")}
    if len(folders) == 1:
        return _find_in(place / folders[0], root)
    raise DataError(
        f"{place}: no labelled videos; expected {place}/<class>/<video>, {place}/train/<class>/<video> with "
        f"{place}/val/<class>/<video>, or lists {place}/train.csv and {place}/val.csv of `path label` lines"
    )


@dataclass(frozen=True, slots=True)
class Parts:
    splits: dict[str, Videos]  # `train` and `val`
    rule: str  # that split them
    groups: int | None = None  # number of groups of videos that stay together; None: not split by groups


def make_parts(splits: Mapping[str, Videos], index: Index, *, val: float, group_by: str | None, seed: int) -> Parts:
    """Split the videos of `find_videos`, unless they are already split, and drop duplicates and unusable files.

    `group_by` is as in `find_groups`. Raises `DataError` if a part has no usable video, or a video has several labels.
    """
    usable = {}
    for part, videos in splits.items():
        if videos.multi_label:
            raise DataError(f"{videos.root}: videos have several labels; start from one of the charades recipes")
        rows = np.setdiff1d(index.usable[part], index.copies[part])
        if not len(rows):
            raise DataError(f"{videos.root}: no video of the {part} part can be used; see above, or give --root")
        usable[part] = videos.only(rows)
    if "all" not in usable:
        if group_by not in (None, "none"):
            raise UsageError(
                f"--group-by {group_by}: the videos are already split; leave it out, or give all in one list"
            )
        return Parts(usable, "the existing lists or folders")
    videos = usable["all"]
    groups = find_groups(videos, group_by)
    lists = make_split(videos, val=val, seed=seed, groups=groups.ids if groups else None)
    parts = {part: videos.only(rows) for part, rows in lists.items()}
    if groups is None:
        return Parts(parts, NO_GROUPS)
    return Parts(parts, str(groups), len(np.unique(groups.ids)))


def _open_both(format: str, root: Path, train: str, val: str) -> dict[str, Videos]:
    videos = open_videos(format, str(root), train)
    return {"train": videos, "val": open_videos(format, str(root), val, videos.classes)}


def _list(place: Path, name: str) -> Path | None:
    return next((file for end in (".csv", ".txt") if (file := place / f"{name}{end}").is_file()), None)


def _has_classes(place: Path) -> bool:
    """Whether there are at least two folders with videos."""
    folders = class_folders(place) if place.is_dir() else []
    return sum(bool(videos_in(place / folder)) for folder in folders) > 1
