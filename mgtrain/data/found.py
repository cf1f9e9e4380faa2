"""Find the labelled videos in a folder, in any usual layout: the start of `mgtrain init`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mgtrain.data import open_videos
from mgtrain.data.folder import class_folders, is_video
from mgtrain.data.groups import groups_by_pattern, groups_of_names
from mgtrain.data.index import Index
from mgtrain.data.split import make_split
from mgtrain.data.videos import Videos
from mgtrain.errors import DataError

LISTS = (".csv", ".txt")
VALIDATION = ("val", "valid", "validation", "test")  # names of a validation split, the first one that is there


def find_videos(place: Path, root: Path | None = None) -> dict[str, Videos]:
    """The videos at `place` by split, `train` and `val` with the same classes, or `all` if they are not split.

    `place` is a list of `path label` lines, relative to `root` or else to the list's folder, or a folder that contains

    1. lists `train.csv` and `val.csv` (or .txt; `val` may be `valid`, `validation` or `test`),
    2. folders `train` and `val` with a folder for each class,
    3. a folder for each class, or just one folder that does.

    Raises:
        DataError: none of these is there.
    """
    if place.is_file():
        return {"all": open_videos("list", str(root or place.parent), os.path.abspath(place))}
    if not place.is_dir():
        raise DataError(f"{place}: no such file or folder; give a folder of videos, or a list of `path label` lines")
    for suffix in LISTS:
        train = place / f"train{suffix}"
        val = next((file for name in VALIDATION if (file := place / f"{name}{suffix}").is_file()), None)
        if train.is_file() and val:
            return _splits("list", root or place, os.path.abspath(train), os.path.abspath(val))
    other = next((name for name in VALIDATION if _has_classes(place / name)), None)
    if other and _has_classes(place / "train"):
        return _splits("folder", place, "train", other)
    if _has_classes(place):
        return {"all": open_videos("folder", str(place), ".")}
    within = class_folders(place)
    if len(within) == 1:
        return find_videos(place / within[0])
    raise DataError(
        f"{place}: no labelled videos; expected {place}/<class>/<video>, {place}/train/<class>/<video> with "
        f"{place}/val/<class>/<video>, or lists {place}/train.csv and {place}/val.csv of `path label` lines"
    )


@dataclass(frozen=True, slots=True)
class Parts:
    """The training and validation videos, `train` and `val`, and the rule by which they were split."""

    splits: dict[str, Videos]
    rule: str
    groups: int | None  # of videos that stay together; None: not split by groups, or split already


def make_parts(found: Mapping[str, Videos], index: Index, *, val: float, group_by: str | None, seed: int) -> Parts:
    """Split what `find_videos` found unless it is split already, without duplicates and files that cannot be used.

    `group_by` is a regular expression for the source in a path, `none` for no groups, or None to guess from the names.

    Raises:
        DataError: a part has no usable video, or a video has several labels.
    """
    usable = {}
    for part, videos in found.items():
        if videos.multi_label:
            raise DataError(f"{videos.root}: videos have several labels; start from one of the charades recipes")
        kept = np.isin(index.usable[part], index.copies[part], invert=True)
        if not kept.any():
            raise DataError(f"{videos.root}: no video of the {part} part can be used; see above, or give --root")
        usable[part] = _only(videos, index.usable[part][kept])
    if "all" not in usable:
        return Parts(usable, "the existing lists or folders", None)
    every = usable["all"]
    names = [every.name(n) for n in range(len(every))]
    if group_by is None:
        groups = groups_of_names(names, [every.label(n) for n in range(len(every))])
    else:
        groups = None if group_by == "none" else groups_by_pattern(names, group_by)
    ids, count, rule = None, None, "class only: the names show no sources; if videos share sources, give --group-by"
    if groups:
        ids, count = groups.ids, groups.count
        rule = f"{groups.rule}: {count} groups, each in one part ({groups.example})"
    lists = make_split(every, val=val, seed=seed, groups=ids)
    return Parts({part: _only(every, rows) for part, rows in lists.items()}, rule, count)


def _only(videos: Videos, rows: np.ndarray) -> Videos:
    return videos.only(np.isin(np.arange(len(videos)), rows), ())


def _splits(format: str, root: Path, train: str, val: str) -> dict[str, Videos]:
    videos = open_videos(format, str(root), train)
    return {"train": videos, "val": open_videos(format, str(root), val, videos.classes)}


def _has_classes(place: Path) -> bool:
    """Whether there are at least two folders with videos."""
    folders = class_folders(place) if place.is_dir() else []
    return sum(any(map(is_video, os.listdir(place / folder))) for folder in folders) > 1
