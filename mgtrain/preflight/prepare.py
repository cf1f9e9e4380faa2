"""Make a prepared set (see clips/prepared.py) from the videos of a data set, and verify one.

Every video is independent: a worker decodes it once, upright and at a constant frame rate, and writes a file for each
level under a temporary name. Complete files get their names, and the video its line in the manifest. So an
interruption loses only the videos in progress, and the same command resumes.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import av
import numpy as np

from mgtrain.clips.encode import encode_video
from mgtrain.clips.prepared import Settings, level_path, read_index, read_settings, row_type, write_settings
from mgtrain.console import ShowProgress, no_progress
from mgtrain.data.manifest import Manifest, Record, checksum, key_of
from mgtrain.data.videos import leaves_root
from mgtrain.errors import DataError, MissingCapabilityError
from mgtrain.processes.isolated import Lost, isolated
from mgtrain.rng import Draw, generator

SAMPLE = 8  # videos, drawn at random, from which the rest is forecast
OF_VIDEO = {"source_bytes", "source_mtime_ns", "frames", "fps", "width", "height", "stored", "levels"}
OF_LEVEL = {"level", "width", "height", "bytes", "sha256"}


@dataclass(frozen=True, slots=True)
class Forecast:
    """What the whole set will take, estimated from the videos prepared so far."""

    videos: int
    seconds: float  # from now on, with as many workers
    bytes: tuple[int, ...]  # of each level
    originals: int  # bytes


@dataclass(frozen=True, slots=True)
class Summary:
    """What the set holds now."""

    videos: int
    made: int  # this time
    broken: dict[str, str]  # path -> cause
    bytes: tuple[int, ...]  # of each level
    originals: int  # bytes
    seconds: float


def prepare(
    root: Path,
    paths: Iterable[str],
    folder: Path,
    settings: Settings,
    workers: int,
    *,
    forecast: Callable[[Forecast], bool] = lambda _: True,
    progress: ShowProgress = no_progress,
) -> Summary:
    """Prepare the videos at `paths`, relative to `root`, in `folder`; videos that are already there are kept.

    `forecast` is called once with what the rest will take, and returns whether to continue.

    Raises:
        DataError: the folder holds a set with other settings, or the disk is too small.
        MissingCapabilityError: PyAV has no H.264 encoder.
    """
    if "libx264" not in av.codecs_available:
        raise MissingCapabilityError("PyAV was built without libx264, which writes prepared videos; pip install av")
    paths = sorted(set(paths))
    for path in paths:
        if leaves_root(path):  # its files would lead out of the folder, too
            raise DataError(f"{root / path}: is outside of {root}; set data.root to a folder that holds all videos")
    _claim(folder, settings)
    manifest = PreparedManifest(folder)
    todo = [path for path in paths if not _is_there(root, folder, path, manifest.records.get(path))]
    todo = [todo[n] for n in generator(0, Draw.PREPARE).permutation(len(todo))]  # so that the first are a fair sample
    start, made = time.monotonic(), 0
    with manifest:
        if todo:  # until all is done again, the index would point to files that are being replaced
            (folder / "index.npy").unlink(missing_ok=True)
        for path, done in isolated(partial(encode_video, root, folder=folder, settings=settings), todo, workers):
            if isinstance(done, Lost):
                cause = f"crashes the decoder ({done.cause}); replace this video or leave it out of the list"
                done = {"path": path, "error": f"{root / path}: {cause}"}, []
            manifest.add_video(*done)
            made += 1
            progress("preparing", len(paths) - len(todo) + made, len(paths))
            if made == min(len(todo), max(SAMPLE, workers)):
                left = (time.monotonic() - start) / made * (len(todo) - made)
                records = manifest.of(paths)
                sizes, originals = _bytes(records, settings)
                scale = len(paths) / len(records)
                of_all = tuple(round(size * scale) for size in sizes)
                _check_disk(folder, sum(of_all) - sum(sizes))
                if not forecast(Forecast(len(paths), left, of_all, round(originals * scale))):
                    break
    records = manifest.of(paths)
    if len(records) == len(paths):
        write_index(folder, settings, manifest.records.values())
    broken = {record["path"]: record["error"] for record in records if "error" in record}
    return Summary(len(records), made, broken, *_bytes(records, settings), time.monotonic() - start)


class PreparedManifest(Manifest):
    """`videos.jsonl`, and `offsets.bin` with it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "videos.jsonl")
        self._offsets = folder / "offsets.bin"
        odd = next((path for path, record in self.records.items() if not _is_record(record)), None)
        if odd is not None:
            raise DataError(f"{self.file}: the line of {odd!r} is not of a prepared video; prepare the set again")

    def __enter__(self) -> PreparedManifest:
        super().__enter__()
        self._to_offsets = self._offsets.open("ab")
        self._to_offsets.truncate(self._to_offsets.tell() // 4 * 4)
        return self

    def __exit__(self, *_: object) -> None:
        self._to_offsets.close()
        super().__exit__()

    def add_video(self, record: Record, offsets: Sequence[np.ndarray]) -> None:
        """Add a video and, for each of its levels, where frames are in its file: uint32 (frames + 1,)."""
        for level, ends in zip(record.get("levels", ()), offsets, strict=True):
            level["start"] = self._to_offsets.seek(0, os.SEEK_END) // 4
            self._to_offsets.write(ends.astype("<u4").tobytes())
        self._to_offsets.flush()
        self.add(record)


def _is_record(record: Record) -> bool:
    """Whether a line of the manifest has the keys that `encode_video` writes."""
    levels = record.get("levels", [])
    whole = record.keys() >= OF_VIDEO and isinstance(levels, list)
    whole = whole and all(isinstance(level, dict) and level.keys() >= OF_LEVEL for level in levels)
    return not leaves_root(record["path"]) and ("error" in record or whole)


def _claim(folder: Path, settings: Settings) -> None:
    """Make the folder, or check that it holds a set with the same settings."""

    def words(settings: Settings) -> str:
        fps = f" --fps {settings.fps:g}" if settings.fps else ""
        return f"--levels {','.join(map(str, settings.levels))} --quality {settings.quality}{fps}"

    if (folder / "prepared.json").exists():
        there = read_settings(folder)
        if there != settings:
            raise DataError(
                f"{folder}: is prepared with {words(there)}, not {words(settings)}; "
                "choose another folder or the same settings"
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise DataError(f"{folder}: holds other files; choose an empty or a new folder")
    else:
        write_settings(folder, settings)


def _is_there(root: Path, folder: Path, path: str, record: Record | None) -> bool:
    """Whether a video need not be prepared again: its files are complete, and the original has not changed."""
    if record is None or "error" in record:
        return False
    try:
        source = (root / path).stat()
        same = (source.st_size, source.st_mtime_ns) == (record["source_bytes"], record["source_mtime_ns"])
    except OSError:
        same = True  # the original is not needed any more
    files = {level_path(folder, level["level"], path): level["bytes"] for level in record["levels"]}
    return same and all(file.exists() and file.stat().st_size == size for file, size in files.items())


def _bytes(records: Iterable[Record], settings: Settings) -> tuple[tuple[int, ...], int]:
    """Bytes of each level, and of the originals."""
    by_level = dict.fromkeys(settings.levels, 0)
    originals = 0
    for record in records:
        originals += record.get("source_bytes", 0)
        for level in record.get("levels", ()):
            by_level[level["level"]] += level["bytes"]
    return tuple(by_level.values()), originals


def _check_disk(folder: Path, missing: int) -> None:
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise DataError(
            f"{folder}: about {missing / 1e9:.1f} GB more will be written and {free / 1e9:.1f} GB are free; "
            "make room, choose fewer --levels or a higher --quality number, and run the same command again"
        )


def write_index(folder: Path, settings: Settings, records: Iterable[Record]) -> None:
    """Write `index.npy`: one row for each video, sorted by key."""
    records = list(records)
    rows = np.zeros(len(records), row_type(len(settings.levels)))
    for row, record in zip(rows, records, strict=True):
        row["key"] = key_of(record["path"])
        for name in ("frames", "fps", "width", "height", "stored"):
            row[name] = record.get(name, 0)
        for level in record.get("levels", ()):
            place = row["levels"][settings.levels.index(level["level"])]
            place["width"], place["height"], place["start"] = level["width"], level["height"], level["start"]
    rows.sort(order="key")
    assert (rows["key"][1:] != rows["key"][:-1]).all(), "two paths with one hash"
    temporary = folder / ".index.npy"
    with temporary.open("wb") as file:
        np.save(file, rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / "index.npy")


def verify(folder: Path, workers: int, progress: ShowProgress = no_progress) -> dict[str, str]:
    """Read every byte of a prepared set and return what is wrong, by file. Nothing is changed.

    Raises:
        DataError: the folder is not a prepared set.
    """
    settings = read_settings(folder)
    records = [record for record in PreparedManifest(folder).records.values() if "error" not in record]
    index = read_index(folder, settings) if (folder / "index.npy").exists() else ()
    indexed = {int(row["key"]): int(row["frames"]) for row in index}
    wrong: dict[str, str] = {}

    def verify_video(record: Record) -> dict[str, str]:
        stale = indexed.get(key_of(record["path"])) != record["frames"]
        found = {"index.npy": "is older than the manifest"} if stale else {}
        for level in record["levels"]:
            file = level_path(folder, level["level"], record["path"])
            if not file.exists():
                found[str(file)] = "is missing"
            elif file.stat().st_size != level["bytes"]:
                found[str(file)] = f"has {file.stat().st_size} bytes instead of {level['bytes']}"
            elif checksum(file) != level["sha256"]:
                found[str(file)] = "has another checksum than when it was written"
            elif level["level"] not in settings.levels:
                found[str(file)] = "is of a level that the set does not have"
        return found

    with ThreadPoolExecutor(workers) as pool:
        for done, found in enumerate(pool.map(verify_video, records), start=1):
            wrong.update(found)
            progress("verifying", done, len(records))
    return wrong
