"""Find the files of videos that an annotation file lists without their folder or suffix."""

import errno
import os
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from mgtrain.data.formats.reading import is_video
from mgtrain.data.videos import Videos
from mgtrain.errors import DataError


class Row(NamedTuple):
    """A video that an annotation file lists."""

    where: str  # file and line, for messages
    video: str  # name of the file, without suffix
    label: str | Sequence[int]  # name of the class, or numbers of the classes
    folders: Iterable[str]  # to search in this order, relative to the root
    spans: Sequence[tuple[float, float]] = ()  # start and end of each label, seconds; empty: the whole video


def locate(root: str, listing: Path, rows: Sequence[Row], classes: Sequence[str]) -> Videos:
    """Find the rows' files or folders of frames, `<folder>/<video>.*` or `<folder>/<video>`; the others are `missing`.

    Raises `DataError` if there are no rows, a label is not a class, or no video exists.
    """
    if not rows:
        raise DataError(f"{listing}: lists no video; use the published file")
    numbers = {name: number for number, name in enumerate(classes)}
    files_in = cache(lambda folder: _files(os.path.join(root, folder)))
    found: list[tuple[str, int | Sequence[int]]] = []
    spans: list[tuple[float, float]] = []
    missing: list[str] = []
    for row in rows:
        label = numbers.get(row.label) if isinstance(row.label, str) else row.label
        if label is None:
            raise DataError(
                f"{row.where}: {row.label!r} is not one of the {len(classes)} classes; fix the label or the classes"
            )
        for folder in row.folders:
            if file := files_in(folder).get(row.video):
                found.append((os.path.join(folder, file), label))
                spans += row.spans
                break
        else:
            missing.append(row.video)
    if not found:
        places = ", ".join(str(Path(root, folder)) for folder in rows[0].folders)
        raise DataError(
            f"{listing}: none of its {len(missing)} videos exists; looked in {places}, for example for "
            f"{missing[0]}.*; set data.root to the folder of the videos"
        )
    return Videos.of(root, found, classes, len(missing), missing, spans or None)


def _files(folder: str) -> dict[str, str]:
    """What a folder holds, by name without suffix: videos before other files before folders; empty if there is none."""
    try:
        with os.scandir(folder) as entries:
            found = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            return {}
        raise
    folders = {name: name for name, is_folder in found if is_folder}
    files = sorted((name for name, is_folder in found if not is_folder), key=is_video)
    return folders | {os.path.splitext(name)[0]: name for name in files}
