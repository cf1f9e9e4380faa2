"""What labelled videos are at a place, however they lie there: `mgtrain init` starts from it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mgtrain.data import open_videos
from mgtrain.data.folder import SUFFIXES
from mgtrain.data.groups import groups_by_pattern, groups_of_names
from mgtrain.data.index import Index
from mgtrain.data.split import make_split
from mgtrain.data.videos import Videos
from mgtrain.errors import DataError

LISTS = (".csv", ".txt")
VALIDATION = ("val", "valid", "validation", "test")  # names of a validation split, the first one that is there


def find_videos(place: Path, root: Path | None = None) -> dict[str, Videos]:
    """The videos at a place by split, `train` and `val`, with the same classes; or all as `all` if nothing splits them.

    A place is a list of `path label` lines, relative to `root` or else to the list's folder, or a folder that holds

    1. lists `train.csv` and `val.csv` (or .txt; `val` may be `valid`, `validation` or `test`),
    2. folders `train` and `val` with a folder for each class,
    3. a folder for each class, or nothing but one folder that does.

    Raises:
        DataError: nothing of that kind is there.
    """
    if place.is_file():
        return {"all": open_videos("list", str(root or place.parent), os.path.abspath(place))}
    if not place.is_dir():
        raise DataError(f"{place}: is not there; give a folder of videos, or a list of `path label` lines")
    base = str(root or place)
    for suffix in LISTS:
        train = place / f"train{suffix}"
        val = next((file for name in VALIDATION if (file := place / f"{name}{suffix}").is_file()), None)
        if train.is_file() and val:
            return _splits("list", base, [os.path.abspath(train), os.path.abspath(val)])
    if _class_folders(place / "train"):
        other = next((name for name in VALIDATION if _class_folders(place / name)), None)
        if other:
            return _splits("folder", str(place), ["train", other])
    if _class_folders(place):
        return {"all": open_videos("folder", str(place), ".")}
    within = [path for path in sorted(place.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    if len(within) == 1:
        return find_videos(within[0])
    raise DataError(
        f"{place}: no labelled videos; wanted are {place}/<class>/<video>, {place}/train/<class>/<video> with "
        f"{place}/val/<class>/<video>, or lists {place}/train.csv and {place}/val.csv of `path label` lines"
    )


@dataclass(frozen=True, slots=True)
class Parts:
    """The training and validation videos, `train` and `val`, and how they were told apart."""

    splits: dict[str, Videos]
    rule: str
    groups: int | None  # of videos that stay together; None: no split was made, or none by groups


def make_parts(found: Mapping[str, Videos], index: Index, *, val: float, group_by: str | None, seed: int) -> Parts:
    """Split what `find_videos` found, unless it is split already; without copies, and what the index says is no video.

    `group_by` is a regular expression for the source in a path, `none` for no groups, or None for what names show.

    Raises:
        DataError: a part has no video that can be used, or a video has several labels.
    """
    usable = {}
    for part, videos in found.items():
        if videos.multi_label:
            raise DataError(f"{videos.root}: videos with several labels; start from one of the charades recipes")
        kept = np.isin(index.usable[part], index.copies[part], invert=True)
        if not kept.any():
            raise DataError(f"{videos.root}: no video of the {part} part can be used; see above, or give --root")
        usable[part] = _only(videos, index.usable[part][kept])
    if "all" not in usable:
        return Parts(usable, "the lists or folders that were there", None)
    every = usable["all"]
    names = [every.name(n) for n in range(len(every))]
    if group_by is None:
        groups = groups_of_names(names, [every.label(n) for n in range(len(every))])
    else:
        groups = None if group_by == "none" else groups_by_pattern(names, group_by)
    lists = make_split(every, val=val, seed=seed, groups=groups.ids if groups else None)
    rule = "class only: the names show no sources; if videos share one, give --group-by"
    if groups:
        rule = f"{groups.rule}: {groups.count} groups, each on one side ({groups.example})"
    return Parts({part: _only(every, rows) for part, rows in lists.items()}, rule, groups.count if groups else None)


def _only(videos: Videos, rows: np.ndarray) -> Videos:
    return videos.only(np.isin(np.arange(len(videos)), rows), ())


def _splits(format: str, root: str, sources: Sequence[str]) -> dict[str, Videos]:
    train = open_videos(format, root, sources[0])
    return {"train": train, "val": open_videos(format, root, sources[1], train.classes)}


def _class_folders(place: Path) -> bool:
    """Whether there are folders with videos in them, and more than one."""
    if not place.is_dir():
        return False
    folders = [path for path in place.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return sum(any(file.name.lower().endswith(SUFFIXES) for file in folder.iterdir()) for folder in folders) > 1
