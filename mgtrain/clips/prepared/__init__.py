"""Prepared videos: files at several sizes in which every frame is a key frame, and an index of the frames.

The loader decodes only the frames of a clip, and small ones for a small short side. So coarse clips take less time to
load than fine ones, as they do in the network.

    prepared.json            the `Settings` that the set was prepared with; older sets lack `root` and `data_fps`
    videos.jsonl             the manifest, a line for each video: its source, sizes in pixels and bytes, checksums
    offsets.bin              uint32: for each file, the offset of its first frame and of each frame's end
    index.npy                a row for each video, sorted by the hash of its path; memory-mapped
    256/train/a b.avi.mp4    an ordinary video: `train/a b.avi` at a short side of 256 pixels
    shards/00000.tar         optional: tar files that contain these files; the index has their offsets
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from pydantic import TypeAdapter, ValidationError

from mgtrain.clips.cut import Cut, VideoInfo, wanted_frames
from mgtrain.clips.decode import decoded, one_thread
from mgtrain.clips.pictures import Frames, UnconvertibleError, box_around, clips_by, clips_of, converted
from mgtrain.clips.prepared.shards import check_shards, opened_shards, shard_path
from mgtrain.clips.stages import stage
from mgtrain.data.manifest import key_of
from mgtrain.errors import DataError, VideoError, cause_of
from mgtrain.processes.files import write_whole

SCHEMA, SHARDED = "mgtrain.prepared/1", "mgtrain.prepared/2"
EVERY_HEADER = bytes((1, 100, 0, 40, 0xFF, 0xE0, 0))  # avcC without parameter sets: each frame has its own


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of a prepared set."""

    levels: tuple[int, ...]  # short sides in pixels, largest first
    quality: int  # H.264's constant rate factor; smaller is better
    fps: float | None  # frame rate to which faster videos are reduced; None: keep all frames
    shards: int | None = None  # maximum bytes of a tar file; None: a file for each video and level
    root: str | None = field(default=None, compare=False)  # folder of the originals when they were prepared
    data_fps: float | None = field(default=None, compare=False)  # frame rate of folders of frames


def row_type(settings: Settings) -> np.dtype:
    """The dtype of a row of the index: length and size of the original video, and its file at each level."""
    level = [("width", "<i4"), ("height", "<i4"), ("start", "<i8")]  # width 0: no file; start: index in `offsets.bin`
    level += [("shard", "<i4"), ("offset", "<i8"), ("size", "<i8")] if settings.shards else []
    original = [("frames", "<i4"), ("fps", "<f8"), ("width", "<i4"), ("height", "<i4")]  # frames 0: a bad video
    return np.dtype([("key", "<u8"), *original, ("stored", "<i4"), ("levels", level, (len(settings.levels),))])


def level_path(folder: Path, level: int, relative: str) -> Path:
    """The file of a video at a level."""
    return folder / str(level) / f"{relative}.mp4"


def read_settings(folder: Path) -> Settings:
    """The settings that the folder was prepared with. Raises `DataError` if it is not a prepared set."""
    file = folder / "prepared.json"
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        cause = cause_of(error)
        raise DataError(f"{file}: cannot be read: {cause}; write the set with `mgtrain data prepare`") from None
    schema = facts.pop("schema", None) if isinstance(facts, dict) else None
    if schema not in (SCHEMA, SHARDED):
        raise DataError(
            f"{file}: has schema {schema!r}, but this version of mgtrain reads {SCHEMA!r} and {SHARDED!r}; "
            "prepare the set again"
        )
    try:
        return TypeAdapter(Settings).validate_python(facts)
    except ValidationError as error:
        raise DataError(f"{file}: is damaged: {error.errors()[0]['msg']}; prepare the set again") from None


def write_settings(folder: Path, settings: Settings) -> None:
    """Write the settings of a set."""
    facts = {"schema": SHARDED if settings.shards else SCHEMA, **asdict(settings)}
    facts = {key: value for key, value in facts.items() if value is not None or key == "fps"}
    write_whole(folder / "prepared.json", f"{json.dumps(facts, indent=1)}\n".encode())


def read_index(folder: Path, settings: Settings) -> np.ndarray:
    """`index.npy`, mapped into memory: `row_type` (N,). Raises `DataError` if it is missing or of another set."""
    try:
        rows = np.load(folder / "index.npy", mmap_mode="r")
    except (OSError, ValueError, EOFError):
        raise DataError(f"{folder}: is incomplete; resume `mgtrain data prepare`") from None
    if not isinstance(rows, np.ndarray) or rows.dtype != row_type(settings) or rows.shape < (1,):
        raise DataError(f"{folder / 'index.npy'}: not an index of these levels; prepare the set again")
    return rows


class PreparedSet:
    """A prepared set, open for reading. Its index is memory-mapped, so it takes little memory."""

    def __init__(self, folder: str | os.PathLike[str], check: bool = True) -> None:
        self.folder = Path(folder)
        self.settings = read_settings(self.folder)
        self._rows = read_index(self.folder, self.settings)
        try:
            self._offsets = np.memmap(self.folder / "offsets.bin", np.uint32, mode="r")
        except (OSError, ValueError):
            raise DataError(f"{folder}: is incomplete; resume `mgtrain data prepare`") from None
        self._shards = opened_shards(self.folder) if self.settings.shards else None
        if self._shards and check:
            check_shards(self.folder, self._rows["levels"])

    def __reduce__(self) -> tuple[type[PreparedSet], tuple[Path, bool]]:
        # Another process maps the files again, because the pickled index of a million videos takes 60 MB.
        return PreparedSet, (self.folder, False)

    def find(self, paths: Iterable[str]) -> np.ndarray:
        """The rows of videos, given their paths relative to the data's root: int32 (N,), -1 if not in the set."""
        keys = np.fromiter((key_of(path) for path in paths), np.uint64)
        rows = np.searchsorted(self._rows["key"], keys).clip(max=len(self._rows) - 1)
        return np.where(self._rows["key"][rows] == keys, rows, -1).astype(np.int32)

    @stage("open")
    def open(self, row: int, relative: str) -> PreparedVideo:
        """The video of a row, with its path relative to the data's root. Raises `VideoError` if it is a bad video."""
        return PreparedVideo(self, self._rows[row], relative)

    @contextmanager
    def file(self, place: np.void, path: Path) -> Iterator[tuple[int, int]]:
        """Open the file with a video's level, its own at `path` or a shard; return it and the offset of the level."""
        if self._shards:
            shard = self._shards(int(place["shard"]))  # stays open while `shard` refers to it
            yield shard.file, int(place["offset"])
        else:
            file = os.open(path, os.O_RDONLY)
            try:
                yield file, 0
            finally:
                os.close(file)

    def where(self, place: np.void, path: Path) -> str:
        """The name of the file of a video's level, for messages."""
        if not self._shards:
            return str(path)
        return f"{shard_path(self.folder, int(place['shard']))}, member {path.relative_to(self.folder)}"

    def offsets(self, start: int, first: int) -> tuple[int, int]:
        """The bytes of a frame in its file, (begin, end)."""
        return int(self._offsets[start + first]), int(self._offsets[start + first + 1])


class PreparedVideo(AbstractContextManager["PreparedVideo"]):
    """A video of a prepared set, read like a `VideoFile`: `info` describes the original, `read` decodes clips."""

    def __init__(self, prepared: PreparedSet, row: np.void, relative: str) -> None:
        self._set, self._row, self._relative = prepared, row, relative
        self.info = VideoInfo(int(row["frames"]), float(row["fps"]), int(row["width"]), int(row["height"]))
        if min(self.info.frames, self.info.width, self.info.height) < 1 or not self.info.fps > 0:
            raise VideoError(f"{relative}: could not be prepared; {prepared.folder / 'videos.jsonl'} says why")

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, cuts: Sequence[Cut]) -> list[np.ndarray]:
        """Decode clips, uint8 (T, crop, crop, 3) RGB, each from the smallest level that needs no enlargement."""
        return clips_by(self._level, self._read, cuts)

    def _level(self, cut: Cut) -> int:
        """The smallest level that needs no enlargement, or else the largest."""
        sizes, (_, _, width, height) = self._row["levels"], cut.region
        for level in range(len(sizes) - 1, 0, -1):
            size = sizes[level]
            scaled = width * size["width"] / self.info.width, height * size["height"] / self.info.height
            if min(scaled) >= cut.crop - 0.5:
                return level
        return 0

    def _stored(self, cut: Cut, level: int) -> Cut:
        """The cut in frames and pixels of the level's file."""
        stored, size = int(self._row["stored"]), self._row["levels"][level]
        frames = tuple(stored_frame(k, self.info.frames, stored) for k in cut.frames)
        left, width = stretch(cut.region[0], cut.region[2], self.info.width, int(size["width"]))
        top, height = stretch(cut.region[1], cut.region[3], self.info.height, int(size["height"]))
        return Cut(frames, (left, top, width, height), cut.crop, cut.flip)

    def _read(self, level: int, cuts: Sequence[Cut]) -> list[np.ndarray]:
        cuts = [self._stored(cut, level) for cut in cuts]
        place = self._row["levels"][level]
        size, start = (int(place["width"]), int(place["height"])), int(place["start"])
        decoder = decoder_of(size)
        path = level_path(self._set.folder, self._set.settings.levels[level], self._relative)
        where = self._set.where(place, path)

        def frames(file: int, first: int) -> Frames:
            wanted = wanted_frames(cuts)
            with suppress(AttributeError, IndexError, OSError, OverflowError):  # macOS has no posix_fadvise
                for index in wanted:  # so that a cold disk reads all of them while the first is decoded
                    begin, end = self._set.offsets(start, index)
                    os.posix_fadvise(file, first + begin, end - begin, os.POSIX_FADV_WILLNEED)
            for index in wanted:
                try:
                    begin, end = self._set.offsets(start, index)
                    frame = decoder.frame(read_bytes(file, first + begin, first + end))
                    cause = None
                except (IndexError, OSError, OverflowError, MemoryError) as error:  # the index belongs to other files
                    frame, cause = None, error
                if frame is None:
                    damaged = f"{where}: frame {index} is damaged; `mgtrain data verify` lists all damage"
                    raise VideoError(damaged) from cause
                yield frame, (index,)

        box = box_around([cut.region for cut in cuts])
        try:
            with self._set.file(place, path) as (file, first):
                return clips_of(cuts, converted(frames(file, first), size, box, decoder.reformatter), box[:2])
        except UnconvertibleError as error:
            raise VideoError(f"{where}: {error}; `mgtrain data verify` lists all damage") from error
        except OSError as error:
            raise VideoError(f"{where}: {error.strerror}; `mgtrain data prepare` writes what is missing") from error


def stored_frame(index: int, frames: int, stored: int) -> int:
    """The number, of `stored` frames, of the frame shown in the middle of the original's frame `index` of `frames`.

    >>> [stored_frame(k, frames=8, stored=4) for k in range(8)]
    [0, 0, 1, 1, 2, 2, 3, 3]
    """
    return (2 * index + 1) * stored // (2 * frames)


def stretch(offset: int, extent: int, source: int, target: int) -> tuple[int, int]:
    """Scale a stretch of pixels (offset, extent) from a picture of length `source` to one of length `target`.

    >>> stretch(offset=100, extent=150, source=300, target=200)
    (67, 100)
    """
    first = min(round(offset * target / source), target - 1)
    return first, min(max(1, round(extent * target / source)), target - first)


@stage("demux")
def read_bytes(file: int, begin: int, end: int) -> bytes:
    """Read bytes `begin .. end` of an open file."""
    return os.pread(file, end - begin, begin)


class Decoder:
    """A decoder for stored frames of one size (width, height)."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.reformatter = VideoReformatter()
        self._codec = one_thread(av.VideoCodecContext.create("h264", "r"))
        self._codec.extradata = EVERY_HEADER

    def frame(self, data: bytes) -> av.VideoFrame | None:
        """Decode a frame; None if it is damaged."""
        try:
            frames = decoded(self._codec, av.Packet(data))
            if not frames:
                frames = decoded(self._codec, None)
                self._codec.flush_buffers()
        except (av.FFmpegError, ValueError):
            return None
        return frames[0] if frames and not frames[0].is_corrupt else None


decoder_of = lru_cache(maxsize=8)(Decoder)  # this process's decoders: reusing one halves the time of a clip
