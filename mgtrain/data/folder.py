"""One folder per class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mgtrain.data.reading import check_exists
from mgtrain.data.videos import Videos
from mgtrain.errors import DataError

SUFFIXES = (
    ".3gp", ".asf", ".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm",
    ".wmv",
)  # fmt: skip


def class_folders(place: Path) -> list[str]:
    """The names of the folders in a folder, in alphabetical order, without hidden ones."""
    return sorted(path.name for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))


def is_video(name: str) -> bool:
    """Whether a file's name ends as that of a video does."""
    return name.lower().endswith(SUFFIXES)


def read_folder(root: str, source: str, classes: Sequence[str] | None) -> Videos:
    """The videos `root/<source>/<class>/<video>`, sorted by class and name, without hidden files and other files.

    Without `classes` these are the folders' names in alphabetical order.
    """
    top = Path(root, source)
    check_exists(top, "folder of classes")
    folders = class_folders(top)
    names = classes or folders
    for name in folders:
        if name not in names:
            raise DataError(f"{top / name}: {name!r} is not one of the {len(names)} classes; move the folder elsewhere")
    entries = [
        (os.path.normpath(os.path.join(os.path.relpath(top, root), name, file)), label)
        for label, name in enumerate(names)
        if name in folders
        for file in sorted(os.listdir(top / name))
        if not file.startswith(".") and is_video(file)
    ]
    if not entries:
        raise DataError(f"{top}: no videos; put them at {top}/<class>/<video>, ending in one of {' '.join(SUFFIXES)}")
    return Videos.of(root, entries, names)
