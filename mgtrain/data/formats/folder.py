"""One folder per class."""

import os
from collections.abc import Sequence
from pathlib import Path

from mgtrain.data.formats.reading import SUFFIXES, check_exists, classes_file, is_video
from mgtrain.data.frames import holds_frames
from mgtrain.data.videos import Videos
from mgtrain.errors import DataError


def class_folders(folder: Path) -> list[str]:
    """The names of the folders in a folder, in alphabetical order, without hidden ones."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def videos_in(folder: Path) -> list[str]:
    """The names of the video files and folders of frames in a folder, in alphabetical order, without hidden ones."""
    with os.scandir(folder) as entries:
        found = [(entry.name, entry.path, entry.is_dir()) for entry in entries if not entry.name.startswith(".")]
    return sorted(name for name, path, is_folder in found if (holds_frames(path) if is_folder else is_video(name)))


def read_folder(root: str, source: str, classes: Sequence[str] | None) -> Videos:
    """The videos `root/<source>/<class>/<video>`, files or folders of frames, sorted by class and name.

    Hidden and other files are ignored. `classes` defaults to the folders' names in alphabetical order.
    """
    top = Path(root, source)
    check_exists(top, "folder of classes")
    folders = class_folders(top)
    names = classes or folders
    for name in folders:
        if name not in names:
            listed = classes_file(root, source)
            where, add = (f" in {listed}", "add it there, or ") if listed else ("", "")
            raise DataError(
                f"{top / name}: {name!r} is not one of the {len(names)} classes{where}; {add}move the folder elsewhere"
            )
    entries = [
        (os.path.normpath(os.path.join(os.path.relpath(top, root), name, file)), label)
        for label, name in enumerate(names)
        if name in folders
        for file in videos_in(top / name)
    ]
    if not entries:
        raise DataError(
            f"{top}: no videos; put them at {top}/<class>/<video>, ending in one of {' '.join(SUFFIXES)}, "
            "or folders of frames such as img_00001.jpg"
        )
    return Videos.of(root, entries, names)
