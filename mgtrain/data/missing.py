"""Find listed videos without a file before training, and suggest what to correct."""

import difflib
import logging
import os
from contextlib import suppress
from functools import cache

from mgtrain.data.frames import list_frames
from mgtrain.data.stretch import file_of
from mgtrain.data.videos import Videos, few, printable
from mgtrain.errors import DataError, VideoError

log = logging.getLogger(__name__)


def missing_rows(videos: Videos) -> list[int]:
    """The rows whose file does not exist."""
    files = cache(_files)
    split = (os.path.split(videos.file(row)) for row in range(len(videos)))
    return [row for row, (folder, name) in enumerate(split) if name not in files(folder)]


def check_present(kind: str, videos: Videos, most: float) -> None:
    """Log a warning about missing files. Raises `DataError` if more than this fraction of the videos is missing."""
    rows = missing_rows(videos)
    if not rows:
        return
    names = few([videos.name(row) for row in rows])
    text = f"{len(rows)} of {len(videos)} {kind} videos are not in {videos.root}: {names}; {explain(videos, rows[0])}"
    if len(rows) > most * len(videos):
        raise DataError(text)
    log.warning(text)


def explain(videos: Videos, row: int) -> str:
    """A likely cause of a missing file, from the files that exist near it, and what to do."""
    path, name = videos.file(row), file_of(videos.name(row))
    if os.path.isdir(path):
        try:
            list_frames(path)
        except VideoError as error:
            return str(error)
    folder, base = os.path.split(path)
    stem = os.path.splitext(base)[0]
    there = sorted(_files(folder))
    for start in (base, stem):
        longer = [file for file in there if file.startswith(start) and not file[len(start) :][:1].isalnum()]
        if longer:
            return f"{folder} has {printable(longer[0])!r}; write names as they are there, with what follows {start!r}"
    parts = name.split("/")
    for first in range(1, len(parts)):
        found = os.path.join(videos.root, *parts[first:])
        if os.path.lexists(found):
            return f"{found} exists; leave out {'/'.join(parts[:first])!r} at the start of the rows"
    outer = os.path.dirname(os.path.abspath(videos.root))
    found = os.path.join(outer, name)
    if os.path.lexists(found):
        return f"{found} exists; set data.root={outer}"
    for place in _folders(videos.root):
        found = os.path.join(place, name)
        if os.path.lexists(found):
            return (
                f"{found} exists; write {os.path.basename(place)}/ before the paths of this list, or set "
                f"data.root={place} if it has the videos of all lists"
            )
    if not os.path.isdir(folder):
        return f"there is no folder {folder}; correct data.root or the rows"
    near = difflib.get_close_matches(base, there, n=1) or there[:1]
    return f"{folder} {f'has {printable(near[0])!r}' if near else 'is empty'}; correct data.root or the rows"


def _folders(folder: str) -> list[str]:
    with suppress(OSError), os.scandir(folder or ".") as entries:
        return sorted(entry.path for entry in entries if entry.is_dir())
    return []


def _files(folder: str) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder or "."))
    except OSError:
        return frozenset()
