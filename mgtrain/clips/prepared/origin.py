"""Check that a prepared set is of the videos that a recipe names, as far as their originals exist."""

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from mgtrain.clips.prepared import PreparedSet
from mgtrain.data.frames import list_frames
from mgtrain.data.manifest import START, Record
from mgtrain.data.stretch import file_of
from mgtrain.data.videos import Videos
from mgtrain.errors import DataError, VideoError

SAMPLE = 100  # originals to look at
COARSE = 2_000_000_000  # ns: how far copies of a file may differ in time, because some disks count in two seconds


def check_origin(prepared: PreparedSet, videos: Videos, fps: float | None) -> None:
    """Raise `DataError` if a set was prepared from other originals than `videos`, or at another rate of frames.

    Compares some of the originals that exist with the manifest: sizes must be equal, and times of change too, unless
    all differ, as in a copy. `fps` is the rate of folders of frames.
    """
    folder, then, again = prepared.folder, prepared.settings, "run `mgtrain data prepare` with this recipe again"
    if then.data_fps and fps and fps != then.data_fps:
        was = f"{then.data_fps:g}"
        raise DataError(f"{folder}: was prepared with data.fps={was}, not {fps:g}; set data.fps={was}, or {again}")
    later: list[str] = []
    same = 0
    for name, record in _records(folder / "videos.jsonl", videos):
        path = os.path.join(videos.root, name)
        with suppress(OSError, KeyError, TypeError, VideoError):  # bad then, or now
            if size := _other_size(path, record):
                place = f"{folder} from {then.root}" if then.root else folder
                raise DataError(f"{path}: {size} when it was prepared in {place}; {again}")
            if abs(os.stat(file_of(path)).st_mtime_ns - record["source_mtime_ns"]) > COARSE:
                later.append(path)
            else:
                same += 1
    if later and same:
        raise DataError(f"{later[0]}: has changed since it was prepared in {folder}; {again}")


def _other_size(path: str, record: Record) -> str:
    """The sizes now and then, in words, if they differ; those of a stretch are not compared."""
    if file_of(path) != path:
        return ""
    if os.path.isdir(path):
        now, then, unit = len(list_frames(path)), record["frames"], "frames"
    else:
        now, then, unit = os.stat(path).st_size, record["source_bytes"], "bytes"
    return "" if now == then else f"has {now} {unit}, but had {then}"


def _records(manifest: Path, videos: Videos) -> Iterator[tuple[str, Record]]:
    """The names and last records of a sample of videos whose originals exist."""
    rows = np.linspace(0, len(videos) - 1, SAMPLE).astype(int).tolist() if len(videos) else []
    sample = {videos.name(row) for row in rows if os.path.exists(videos.file(row))}
    starts = {START + json.dumps(name).encode(): name for name in sample}
    lines: dict[str, bytes] = {}
    with suppress(OSError), manifest.open("rb") as file:
        for line in file if starts else ():
            name = starts.get(line[: line.find(b'", "', len(START) + 1) + 1])
            if name is not None:
                lines[name] = line
    with suppress(ValueError):
        for name in sorted(lines):
            yield name, json.loads(lines[name])
