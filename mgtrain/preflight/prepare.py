"""Make a prepared set (see clips/prepared.py) out of the videos of a data set, and verify one.

Every video is independent: a worker decodes it once, upright and at an even pace, and writes a file for each level
under a temporary name. When they are all there, they get their names and the video its line in the manifest. So
whatever stops the work loses no more than the videos under way, and running it again goes on.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import av
import numpy as np

from mgtrain.clips.prepared import (
    Settings,
    level_path,
    read_index,
    read_settings,
    row_type,
    write_settings,
)
from mgtrain.data.manifest import Manifest, Record, checksum, key_of
from mgtrain.data.videos import leaves_root
from mgtrain.errors import DataError, MissingCapabilityError
from mgtrain.preflight.encode import encode_video
from mgtrain.processes.isolated import Lost, isolated
from mgtrain.rng import Draw, generator

SAMPLE = 8  # videos, drawn at random, after which the rest is forecast


@dataclass(frozen=True, slots=True)
class Forecast:
    """What the whole set will take, going by the videos made until now."""

    videos: int
    seconds: float  # from now on, with as many workers
    bytes: tuple[int, ...]  # of each level
    originals: int  # bytes


@dataclass(frozen=True, slots=True)
class Summary:
    """What there is now."""

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
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Summary:
    """Prepare the videos at `paths`, relative to `root`, in `folder`; those that are there already are kept.

    `forecast` is told, once, what the rest will take; it returns whether to go on. `progress` is told how many videos
    of how many are done.

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
    todo = [path for path in paths if not _is_there(root, folder, settings, path, manifest.records.get(path))]
    todo = [todo[n] for n in generator(0, Draw.PREPARE).permutation(len(todo))]  # so that the first are a fair sample
    begin, made, told = time.monotonic(), 0, False
    with manifest:
        if todo:  # until all is done again, the index would tell of files that are being replaced
            (folder / "index.npy").unlink(missing_ok=True)
        for record, offsets in _all_done(todo, workers, root, folder, settings):
            manifest.add_video(record, offsets)
            made += 1
            progress("preparing", len(paths) - len(todo) + made, len(paths))
            if not told and made >= min(len(todo), max(SAMPLE, workers)):
                told = True
                left = (time.monotonic() - begin) / made * (len(todo) - made)
                expected = _forecast(manifest.of(paths), len(paths), left, settings)
                _check_disk(folder, expected, manifest.of(paths))
                if not forecast(expected):
                    break
    records = manifest.of(paths)
    if len(records) == len(paths):
        write_index(folder, settings, manifest.records.values())
    broken = {record["path"]: record["error"] for record in records if "error" in record}
    sizes, originals = _bytes(records, settings)
    return Summary(len(records), made, broken, sizes, originals, time.monotonic() - begin)


class PreparedManifest(Manifest):
    """`videos.jsonl`, and `offsets.bin` with it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "videos.jsonl")
        self._offsets = folder / "offsets.bin"
        odd = next((path for path, record in self.records.items() if not _is_record(record)), None)
        if odd is not None:
            raise DataError(f"{self.file}: the line of {odd!r} is not of a prepared video; prepare the set anew")

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


def _all_done(
    paths: Sequence[str], workers: int, root: Path, folder: Path, settings: Settings
) -> Iterator[tuple[Record, list[np.ndarray]]]:
    """`encode_video` of all paths, in processes. A video that kills its process is broken, and costs no other one."""
    encode = partial(encode_video, root, folder=folder, settings=settings)
    for path, done in isolated(encode, paths, workers):
        if isinstance(done, Lost):
            cause = f"crashes the decoder ({done.cause}); replace this video or leave it out of the list"
            done = {"path": path, "error": f"{root / path}: {cause}"}, []
        yield done


def _claim(folder: Path, settings: Settings) -> None:
    """Make the folder, or see that it holds a set of the same settings."""
    if (folder / "prepared.json").exists():
        there = read_settings(folder)
        if there != settings:
            raise DataError(
                f"{folder}: is prepared with {_words(there)}, not {_words(settings)}; "
                "choose another folder or the same settings"
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise DataError(f"{folder}: holds other files; choose an empty or a new folder")
    else:
        write_settings(folder, settings)


def _is_record(record: Record) -> bool:
    """Whether a line of the manifest says what `encode_video` says."""
    levels = record.get("levels", [])
    return not leaves_root(record["path"]) and (
        "error" in record
        or (
            record.keys() >= {"source_bytes", "source_mtime_ns", "frames", "fps", "width", "height", "stored", "levels"}
            and isinstance(levels, list)
            and all(
                isinstance(of, dict) and of.keys() >= {"level", "width", "height", "bytes", "sha256"} for of in levels
            )
        )
    )


def _words(settings: Settings) -> str:
    fps = f" --fps {settings.fps:g}" if settings.fps else ""
    return f"--levels {','.join(map(str, settings.levels))} --quality {settings.quality}{fps}"


def _is_there(root: Path, folder: Path, settings: Settings, path: str, record: Record | None) -> bool:
    """Whether a video need not be prepared again: its files are whole, and the original is what it was."""
    if record is None or "error" in record:
        return False
    try:
        source = (root / path).stat()
        same = (source.st_size, source.st_mtime_ns) == (record["source_bytes"], record["source_mtime_ns"])
    except OSError:
        same = True  # the original is not needed any more
    return same and all(
        file.exists() and file.stat().st_size == level["bytes"]
        for level in record["levels"]
        for file in [level_path(folder, level["level"], path)]
    )


def _bytes(records: Iterable[Record], settings: Settings) -> tuple[tuple[int, ...], int]:
    """Bytes of each level, and of the originals."""
    by_level = dict.fromkeys(settings.levels, 0)
    originals = 0
    for record in records:
        originals += record.get("source_bytes", 0)
        for level in record.get("levels", ()):
            by_level[level["level"]] += level["bytes"]
    return tuple(by_level.values()), originals


def _forecast(records: Sequence[Record], total: int, seconds: float, settings: Settings) -> Forecast:
    sizes, originals = _bytes(records, settings)
    scale = total / len(records)
    return Forecast(total, seconds, tuple(round(size * scale) for size in sizes), round(originals * scale))


def _check_disk(folder: Path, expected: Forecast, records: Sequence[Record]) -> None:
    there = sum(level["bytes"] for record in records for level in record.get("levels", ()))
    missing, free = sum(expected.bytes) - there, shutil.disk_usage(folder).free
    if missing > free:
        raise DataError(
            f"{folder}: about {missing / 1e9:.1f} GB are still to be written and {free / 1e9:.1f} GB are free; "
            "make room, choose fewer --levels or a higher --quality number, and run it again"
        )


def write_index(folder: Path, settings: Settings, records: Iterable[Record]) -> None:
    """Write `index.npy`: one row for each video, sorted by key."""
    latest = list(records)
    rows = np.zeros(len(latest), row_type(len(settings.levels)))
    for row, record in zip(rows, latest, strict=True):
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


def verify(
    folder: Path, workers: int, progress: Callable[[str, int, int], None] = lambda what, done, total: None
) -> dict[str, str]:
    """Look at every byte of a prepared set: what is wrong, by file. Nothing is changed.

    Raises:
        DataError: it is no prepared set.
    """
    settings = read_settings(folder)
    records = [record for record in PreparedManifest(folder).records.values() if "error" not in record]
    wrong: dict[str, str] = {}
    there = read_index(folder, settings) if (folder / "index.npy").exists() else ()
    rows = {int(row["key"]): row for row in there}

    def look(record: Record) -> dict[str, str]:
        found = {}
        row = rows.get(key_of(record["path"]))
        if row is None or int(row["frames"]) != record["frames"]:
            found["index.npy"] = "is older than the manifest"
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
        for done, found in enumerate(pool.map(look, records), start=1):
            wrong.update(found)
            progress("verifying", done, len(records))
    return wrong
