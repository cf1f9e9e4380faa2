"""One folder per class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mgtrain.data.videos import Videos, check_exists
from mgtrain.errors import DataError

SUFFIXES = (
    ".3gp",
    ".asf",
    ".avi",
    ".flv",
    ".gif",
    ".m4v",
    ".mkv",
    ".mov",
    ".mp4",
    ".mpeg",
    ".mpg",
    ".ogv",
    ".ts",
    ".webm",
    ".wmv",
)


def read_folder(root: str, source: str, classes: Sequence[str] | None) -> Videos:
    """The videos `root/<source>/<class>/<video>`, sorted by class and name; hidden files and other files are left out.

    Without `classes` these are the folders' names in alphabetical order.
    """
    top = Path(root, source)
    check_exists(Path(root), "folder of videos")
    check_exists(top, "folder of classes")
    folders = sorted(path.name for path in top.iterdir() if path.is_dir() and not path.name.startswith("."))
    names = tuple(classes or folders)
    for name in folders:
        if name not in names:
            raise DataError(f"{top / name}: {name!r} is none of the {len(names)} classes; move the folder elsewhere")
    entries = [
        (os.path.normpath(os.path.join(os.path.relpath(top, root), name, file)), label)
        for label, name in enumerate(names)
        if name in folders
        for file in sorted(os.listdir(top / name))
        if not file.startswith(".") and file.lower().endswith(SUFFIXES)
    ]
    if not entries:
        raise DataError(
            f"{top}: no videos; they have to be at {top}/<class>/<video>, ending in one of {' '.join(SUFFIXES)}"
        )
    return Videos.of(root, entries, names)
