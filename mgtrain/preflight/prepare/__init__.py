"""Make a prepared set (see clips/prepared/) from the videos of a data set, and verify one.

A worker decodes a video once, upright and at a constant frame rate, and writes a file for each level under a temporary
name. Complete files are renamed, and the video is added to the manifest. So an interruption loses only the videos in
progress, and running the same command again resumes. With shards, complete files are in a separate folder until they
are appended to a tar file.
"""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np

from mgtrain.clips.prepared import Settings, level_path, read_index, read_settings, row_type, write_settings
from mgtrain.clips.prepared.encode import encode_video
from mgtrain.clips.prepared.shards import shard_path
from mgtrain.console import ShowProgress, no_progress
from mgtrain.data.manifest import Manifest, Record, checksum, key_of
from mgtrain.data.stretch import file_of
from mgtrain.data.videos import leaves_root
from mgtrain.errors import DataError, MissingCapabilityError
from mgtrain.preflight.prepare.shards import Member, ShardWriter, is_there, members_of, shard_problem
from mgtrain.processes.files import replacing
from mgtrain.processes.isolated import Lost, isolated
from mgtrain.rng import Draw, generator

SAMPLE = 8  # random videos from which the time and size of the set are estimated
OF_VIDEO = {"source_bytes", "source_mtime_ns", "frames", "fps", "width", "height", "stored", "levels"}
OF_LEVEL = ("level", "width", "height", "bytes")  # whole numbers
IN_SHARD = ("shard", "offset")
LOOSE = "loose"  # folder of files that are not in a shard yet


@dataclass(frozen=True, slots=True)
class Forecast:
    """The estimated time and size of the whole set, from the videos prepared so far."""

    videos: int
    seconds: float  # from now on
    bytes: tuple[int, ...]  # of each level
    originals: int  # bytes


@dataclass(frozen=True, slots=True)
class Summary:
    videos: int
    made: int  # by this call
    broken: dict[str, str]  # path -> cause
    bytes: tuple[int, ...]  # of each level
    originals: int  # bytes
    seconds: float
    shards: int = 0


def prepare(
    root: Path,
    paths: Iterable[str],
    folder: Path,
    settings: Settings,
    workers: int,
    *,
    seconds: float = float("inf"),
    fps: float | None = None,
    forecast: Callable[[Forecast], bool] = lambda _: True,
    progress: ShowProgress = no_progress,
) -> Summary:
    """Prepare the videos at `paths`, relative to `root`, in `folder`; videos that are already there are kept.

    `seconds` limits the time of a video. `fps` is the rate of folders of frames. `forecast` is called once with the
    estimate for the remaining videos, and returns whether to continue. Raises `DataError` if the folder holds a set
    with other settings or the disk is too small, `MissingCapabilityError` if PyAV has no H.264 encoder.
    """
    if "libx264" not in av.codecs_available:
        raise MissingCapabilityError("PyAV has no libx264 to write prepared videos; use its wheel: pip install av")
    paths = sorted(set(paths))
    for path in paths:
        if leaves_root(path):  # its prepared files would be outside of the folder, too
            raise DataError(f"{root / path}: is outside of {root}; set data.root to a folder that holds all videos")
    _claim(folder, replace(settings, root=os.path.abspath(root), data_fps=fps))
    manifest = PreparedManifest(folder)
    known, sharded = manifest.records, bool(settings.shards)
    todo = [path for path in paths if not _is_there(root, folder, path, fps, known.get(path), sharded)]
    todo = [todo[n] for n in generator(0, Draw.PREPARE).permutation(len(todo))]  # the first ones are a random sample
    start, made = time.monotonic(), 0
    loose = folder / LOOSE if sharded else folder
    encode = partial(encode_video, root, folder=loose, settings=settings, fps=fps)
    with manifest, ExitStack() as stack:
        shards = None
        if settings.shards and todo:
            shutil.rmtree(loose, ignore_errors=True)  # of an interrupted preparation
            shards = stack.enter_context(ShardWriter(folder, settings.shards, manifest.records.values()))
        if any("levels" in known.get(path, ()) for path in todo):  # the index points to files that will be replaced
            (folder / "index.npy").unlink(missing_ok=True)
        for made, (path, done) in enumerate(isolated(encode, todo, workers, seconds=seconds), start=1):
            if isinstance(done, Lost):
                done = {"path": path, "error": f"{root / path}: {_lost(done)}"}, []
            if shards:
                shards.add(done[0], loose)
            manifest.add_video(*done)
            for level in done[0].get("levels", ()) if shards else ():  # they are in a shard now
                level_path(loose, level["level"], path).unlink()
            progress("preparing", len(paths) - len(todo) + made, len(paths))
            if made == min(len(todo), max(SAMPLE, workers)):
                left = (time.monotonic() - start) / made * (len(todo) - made)
                if not forecast(_expected(folder, settings, manifest.of(paths), len(paths), left)):
                    break
    if sharded:
        shutil.rmtree(loose, ignore_errors=True)
    records = manifest.of(paths)
    if len(records) == len(paths):
        write_index(folder, settings, manifest.records.values())
    broken = {record["path"]: record["error"] for record in records if "error" in record}
    used = {member.shard for member in members_of(records)} if sharded else ()
    return Summary(len(records), made, broken, *_bytes(records, settings), time.monotonic() - start, len(used))


def _lost(done: Lost) -> str:
    if done.kind == "timeout":
        return f"{done.cause}; raise --seconds if it is a long video, or replace or remove it"
    return f"crashes the decoder ({done.cause}); replace this video or remove it from the list"


class PreparedManifest(Manifest):
    """The manifest `videos.jsonl`, together with `offsets.bin`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "videos.jsonl")
        self._offsets = folder / "offsets.bin"
        settings = read_settings(folder)
        odd = next((path for path, record in self.records.items() if not _is_record(record, settings)), None)
        if odd is not None:
            raise DataError(
                f"{self.file}: damaged: the line of {odd!r} lacks keys or has wrong values; prepare the set again"
            )

    def __enter__(self) -> PreparedManifest:
        super().__enter__()
        self._to_offsets = self._offsets.open("ab")
        self._to_offsets.truncate(self._to_offsets.tell() // 4 * 4)
        return self

    def __exit__(self, *_: object) -> None:
        self._to_offsets.close()
        super().__exit__()

    def add_video(self, record: Record, offsets: Sequence[np.ndarray]) -> None:
        """Add a video and, for each of its levels, the offsets of its frames: uint32 (frames + 1,)."""
        for level, ends in zip(record.get("levels", ()), offsets, strict=True):
            level["start"] = self._to_offsets.seek(0, os.SEEK_END) // 4
            self._to_offsets.write(ends.astype("<u4").tobytes())
        self._to_offsets.flush()
        self.add(record)


def _is_record(record: Record, settings: Settings) -> bool:
    """Whether a line of the manifest has what `encode_video` writes."""
    counts = (*OF_LEVEL, *IN_SHARD) if settings.shards else OF_LEVEL

    def is_level(level: Any) -> bool:
        whole = isinstance(level, dict) and "sha256" in level and level.get("level") in settings.levels
        return whole and all(type(level.get(key)) is int and level[key] >= 0 for key in counts)

    levels = record.get("levels")
    whole = record.keys() >= OF_VIDEO and isinstance(levels, list) and all(map(is_level, levels))
    return not leaves_root(record["path"]) and ("error" in record or whole)


def _claim(folder: Path, settings: Settings) -> None:
    """Make the folder, or check that it contains a set with the same settings."""

    def words(settings: Settings) -> str:
        fps = f" --fps {settings.fps:g}" if settings.fps else ""
        shards = ""
        if settings.shards:
            whole = settings.shards % 2**30 == 0
            shards = f" --shards {f'{settings.shards >> 30}GiB' if whole else f'{settings.shards / 1e6:.6g}MB'}"
        return f"--levels {','.join(map(str, settings.levels))} --quality {settings.quality}{fps}{shards}"

    if (folder / "prepared.json").exists():
        there = read_settings(folder)
        if there != settings:
            raise DataError(
                f"{folder}: contains a set made with {words(there)}, not {words(settings)}; "
                "choose another folder or the same settings"
            )
        now = replace(settings, data_fps=settings.data_fps or there.data_fps)
        if (now.root, now.data_fps) != (there.root, there.data_fps):
            write_settings(folder, now)
    elif folder.is_dir() and any(folder.iterdir()):
        raise DataError(f"{folder}: contains other files; choose an empty or a new folder")
    else:
        write_settings(folder, settings)


def _is_there(root: Path, folder: Path, path: str, fps: float | None, record: Record | None, sharded: bool) -> bool:
    """Whether a video need not be prepared again: its files are complete, and the original has not changed."""
    if record is None or "error" in record:
        return False
    try:
        file = file_of(path)
        source = (root / file).stat()
        same = source.st_mtime_ns == record["source_mtime_ns"]
        if stat.S_ISDIR(source.st_mode):
            same = same and record["fps"] == fps
        elif file == path:  # of a stretch, the record has its share of the bytes
            same = same and record["source_bytes"] == source.st_size
    except OSError:
        same = True  # the original is no longer needed
    if sharded:
        return same and all(is_there(folder, member) for member in members_of([record]))
    files = {level_path(folder, level["level"], path): level["bytes"] for level in record["levels"]}
    return same and all(file.exists() and file.stat().st_size == size for file, size in files.items())


def _bytes(records: Iterable[Record], settings: Settings) -> tuple[tuple[int, ...], int]:
    """Bytes of each level, and of the originals."""
    by_level, originals = dict.fromkeys(settings.levels, 0), 0
    for record in records:
        originals += record.get("source_bytes", 0)
        for level in record.get("levels", ()):
            by_level[level["level"]] += level["bytes"]
    return tuple(by_level.values()), originals


def _expected(folder: Path, settings: Settings, records: Sequence[Record], videos: int, seconds: float) -> Forecast:
    """The size of all `videos`, estimated from some records. Raises `DataError` if the disk is too small."""
    sizes, originals = _bytes(records, settings)
    scale = videos / len(records)
    of_all = tuple(round(size * scale) for size in sizes)
    missing, free = sum(of_all) - sum(sizes), shutil.disk_usage(folder).free
    if missing > free:
        raise DataError(
            f"{folder}: needs about {missing / 1e9:.1f} GB more, but {free / 1e9:.1f} GB are free; free some space, or "
            "choose fewer --levels or a higher --quality number, and run the same command again"
        )
    return Forecast(videos, seconds, of_all, round(originals * scale))


def write_index(folder: Path, settings: Settings, records: Iterable[Record]) -> None:
    """Write `index.npy`: one row for each video, sorted by key."""
    records = list(records)
    rows = np.zeros(len(records), row_type(settings))
    for row, record in zip(rows, records, strict=True):
        row["key"] = key_of(record["path"])
        for name in ("frames", "fps", "width", "height", "stored"):
            row[name] = record.get(name, 0)
        for level in record.get("levels", ()):
            place = row["levels"][settings.levels.index(level["level"])]
            for name in place.dtype.names:
                place[name] = level["bytes" if name == "size" else name]
    rows.sort(order="key")
    assert (rows["key"][1:] != rows["key"][:-1]).all(), "two paths with one hash"
    with replacing(folder / "index.npy") as temporary, temporary.open("wb") as file:
        np.save(file, rows)
        file.flush()
        os.fsync(file.fileno())


def verify(folder: Path, workers: int, progress: ShowProgress = no_progress) -> dict[str, str]:
    """Read every byte of a prepared set; returns file -> what is wrong. Raises `DataError` for any other folder."""
    settings = read_settings(folder)
    records = [record for record in PreparedManifest(folder).records.values() if "error" not in record]
    index = read_index(folder, settings) if (folder / "index.npy").exists() else ()
    indexed = {int(row["key"]): int(row["frames"]) for row in index}
    wrong: dict[str, str] = {}

    def verify_video(record: Record) -> dict[str, str]:
        stale = indexed.get(key_of(record["path"])) != record["frames"]
        found = {"index.npy": "is older than the manifest"} if stale else {}
        for level in () if settings.shards else record["levels"]:
            file = level_path(folder, level["level"], record["path"])
            if not file.exists():
                found[str(file)] = "is missing"
            elif file.stat().st_size != level["bytes"]:
                found[str(file)] = f"has {file.stat().st_size} bytes instead of {level['bytes']}"
            elif checksum(file) != level["sha256"]:
                found[str(file)] = "has a wrong checksum, so it is damaged"
        return found

    by_shard: dict[Path, list[Member]] = {}
    for member in members_of(records) if settings.shards else ():
        by_shard.setdefault(shard_path(folder, member.shard), []).append(member)

    with ThreadPoolExecutor(workers) as pool:
        for done, found in enumerate(pool.map(verify_video, records), start=1):
            wrong.update(found)
            progress("verifying", done, len(records))
        problems = pool.map(shard_problem, by_shard.keys(), by_shard.values())
        for done, (path, problem) in enumerate(zip(by_shard, problems, strict=True), start=1):
            wrong.update({str(path): problem} if problem else {})
            progress("verifying shards", done, len(by_shard))
    return wrong
