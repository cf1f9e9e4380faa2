"""Prepared videos: every frame is a key frame, several sizes of each, and an index that tells where each frame is.

So a clip of 8 frames costs 8 frames to decode, whatever it spans, and a clip with a small short side costs small
frames: what a clip costs shrinks with its grid, as the network's work does.

    prepared.json            what was asked for: `Settings`
    videos.jsonl             the manifest, a line for each video: its source, sizes in pixels and bytes, checksums
    offsets.bin              uint32: in each file, where the first frame starts and where each frame ends
    index.npy                one row for each video, sorted by the hash of its path; mapped into memory, not read
    256/train/a b.avi.mp4    an ordinary video: `train/a b.avi` at a short side of 256 pixels
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from pydantic import TypeAdapter, ValidationError

from mgtrain.clips.cut import Cut, VideoInfo
from mgtrain.clips.decode import decoded, one_thread
from mgtrain.clips.pictures import Clip, UnconvertibleError, box_around, converted
from mgtrain.clips.stages import stage
from mgtrain.data.manifest import key_of
from mgtrain.errors import DataError, VideoError

SCHEMA = "mgtrain.prepared/1"
EVERY_HEADER = bytes((1, 100, 0, 40, 0xFF, 0xE0, 0))  # avcC without parameter sets: each frame brings its own


@dataclass(frozen=True, slots=True)
class Settings:
    """How a set is prepared."""

    levels: tuple[int, ...]  # short sides in pixels, largest first
    quality: int  # H.264's constant rate factor; smaller is better
    fps: float | None  # frame rate above which videos are thinned out; None: all frames are kept


def row_type(levels: int) -> np.dtype:
    """A row of the index: the video as it was, and its file at each level."""
    level = [("width", "<i4"), ("height", "<i4"), ("start", "<i8")]  # width 0: none; start: in `offsets.bin`
    original = [("frames", "<i4"), ("fps", "<f8"), ("width", "<i4"), ("height", "<i4")]  # frames 0: it was broken
    return np.dtype([("key", "<u8"), *original, ("stored", "<i4"), ("levels", level, (levels,))])


def level_path(folder: Path, level: int, relative: str) -> Path:
    """The file of a video at a level."""
    return folder / str(level) / f"{relative}.mp4"


def read_settings(folder: Path) -> Settings:
    """What the folder was prepared with.

    Raises:
        DataError: it is no prepared set.
    """
    file = folder / "prepared.json"
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        cause = getattr(error, "strerror", None) or error
        raise DataError(f"{file}: cannot be read: {cause}; make the set with `mgtrain data prepare`") from None
    schema = facts.pop("schema", None) if isinstance(facts, dict) else None
    if schema != SCHEMA:
        raise DataError(f"{file}: is {schema!r}, this mgtrain reads {SCHEMA!r}; prepare the set again")
    try:
        return TypeAdapter(Settings).validate_python(facts)
    except ValidationError as error:
        raise DataError(f"{file}: is damaged: {error.errors()[0]['msg']}; prepare the set again") from None


def write_settings(folder: Path, settings: Settings) -> None:
    """Say what the folder is being prepared with."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"schema": SCHEMA, **asdict(settings)}, indent=1) + "\n"
    (folder / "prepared.json").write_text(text, encoding="utf-8")


def read_index(folder: Path, settings: Settings) -> np.ndarray:
    """`index.npy`, mapped into memory: `row_type` (N,).

    Raises:
        DataError: there is none, or it is one of something else.
    """
    try:
        rows = np.load(folder / "index.npy", mmap_mode="r")
    except (OSError, ValueError, EOFError):
        raise DataError(f"{folder}: is not finished; finish it with `mgtrain data prepare`") from None
    if not isinstance(rows, np.ndarray) or rows.dtype != row_type(len(settings.levels)) or rows.shape < (1,):
        raise DataError(f"{folder / 'index.npy'}: not an index of these levels; prepare the set again")
    return rows


class PreparedSet:
    """A prepared folder, open for reading. Costs a process no memory to speak of, however many videos there are."""

    def __init__(self, folder: str | os.PathLike[str], enlarge: float = 1.0) -> None:
        self.folder = Path(folder)
        self.settings = read_settings(self.folder)
        self.enlarge = enlarge
        self._rows = read_index(self.folder, self.settings)
        try:
            self._offsets = np.memmap(self.folder / "offsets.bin", np.uint32, mode="r")
        except (OSError, ValueError):
            raise DataError(f"{folder}: is not finished; finish it with `mgtrain data prepare`") from None

    def __reduce__(self) -> tuple[type[PreparedSet], tuple[Path, float]]:
        # A process that is not forked maps the files itself: pickled, the index of a million videos has 60 MB.
        return PreparedSet, (self.folder, self.enlarge)

    def find(self, paths: Iterable[str]) -> np.ndarray:
        """The rows of videos, given their paths relative to the data's root: int32 (N,), -1 for those not there."""
        keys = np.fromiter((key_of(path) for path in paths), np.uint64)
        rows = np.searchsorted(self._rows["key"], keys).clip(max=len(self._rows) - 1)
        return np.where(self._rows["key"][rows] == keys, rows, -1).astype(np.int32)

    @stage("open")
    def open(self, row: int, relative: str) -> PreparedVideo:
        """A video, given its row and its path relative to the data's root. Raises `VideoError` if it was broken."""
        return PreparedVideo(self, self._rows[row], relative)

    def offsets(self, start: int, first: int) -> tuple[int, int]:
        """Where a frame starts and ends in its file."""
        return int(self._offsets[start + first]), int(self._offsets[start + first + 1])


class PreparedVideo:
    """A video of a prepared set, used as `VideoFile` is: `info` is that of the original, `read` decodes clips."""

    def __init__(self, prepared: PreparedSet, row: np.void, relative: str) -> None:
        self._set, self._row, self._relative = prepared, row, relative
        self.info = VideoInfo(int(row["frames"]), float(row["fps"]), int(row["width"]), int(row["height"]))
        if min(self.info.frames, self.info.width, self.info.height) < 1 or not self.info.fps > 0:
            raise VideoError(f"{relative}: could not be prepared; {prepared.folder / 'videos.jsonl'} says why")

    def __enter__(self) -> PreparedVideo:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, cuts: Sequence[Cut]) -> list[np.ndarray]:
        """The clips, each uint8 (T, crop, crop, 3) RGB, each from the smallest level that needs no enlargement."""
        levels = [self._level(cut) for cut in cuts]
        stored = [self._stored(cut, level) for cut, level in zip(cuts, levels, strict=True)]
        clips: dict[int, np.ndarray] = {}
        for level in dict.fromkeys(levels):
            these = [n for n in range(len(cuts)) if levels[n] == level]
            clips.update(zip(these, self._read(level, [stored[n] for n in these]), strict=True))
        return [clips[n] for n in range(len(cuts))]

    def _level(self, cut: Cut) -> int:
        """Which level to read: the smallest whose pixels are not enlarged by more than allowed, else the largest."""
        least = cut.crop / self._set.enlarge - 0.5
        sizes = self._row["levels"]
        large_enough = [
            n
            for n in range(len(sizes))
            if min(
                cut.region[2] * sizes[n]["width"] / self.info.width,
                cut.region[3] * sizes[n]["height"] / self.info.height,
            )
            >= least
        ]
        return max(large_enough, default=0)

    def _stored(self, cut: Cut, level: int) -> Cut:
        """The cut in frames and pixels of the level's file."""
        stored, size = int(self._row["stored"]), self._row["levels"][level]
        frames = tuple(stored_frame(k, self.info.frames, stored) for k in cut.frames)
        left, width = stretch(cut.region[0], cut.region[2], self.info.width, int(size["width"]))
        top, height = stretch(cut.region[1], cut.region[3], self.info.height, int(size["height"]))
        return Cut(frames, (left, top, width, height), cut.crop, cut.flip)

    def _read(self, level: int, cuts: Sequence[Cut]) -> list[np.ndarray]:
        """The clips, cut from a level's file, of which each frame that they want is decoded once."""
        size = self._row["levels"][level]
        decoder, start = decoder_of((int(size["width"]), int(size["height"]))), int(size["start"])
        path = level_path(self._set.folder, self._set.settings.levels[level], self._relative)

        def frames(file: int) -> Iterator[tuple[av.VideoFrame, Sequence[int]]]:
            for index in sorted({index for cut in cuts for index in cut.frames}):
                try:
                    frame = decoder.frame(read_bytes(file, *self._set.offsets(start, index)))
                except (IndexError, OSError, OverflowError, MemoryError):  # an index of something else
                    frame = None
                if frame is None:
                    raise VideoError(f"{path}: frame {index} is damaged; `mgtrain data verify` looks for all of these")
                yield frame, (index,)

        box = box_around([cut.region for cut in cuts])
        clips = [Clip(cut, box[:2]) for cut in cuts]
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise VideoError(f"{path}: {error.strerror}; `mgtrain data prepare` makes what is missing") from error
        try:
            for picture, indices in converted(frames(file), decoder.size, box, decoder.reformatter):
                for clip in clips:
                    clip.put(indices, picture)
        except UnconvertibleError as error:
            raise VideoError(f"{path}: {error}; `mgtrain data verify` looks for damage") from error
        finally:
            os.close(file)
        return [clip.pixels() for clip in clips]


def stored_frame(index: int, frames: int, stored: int) -> int:
    """The frame of a file of `stored` frames that is shown in the middle of frame `index` of the original's `frames`.

    >>> [stored_frame(k, frames=8, stored=4) for k in range(8)]
    [0, 0, 1, 1, 2, 2, 3, 3]
    """
    return (2 * index + 1) * stored // (2 * frames)


def stretch(offset: int, extent: int, source: int, target: int) -> tuple[int, int]:
    """A stretch of pixels of a picture of length `source` as the nearest one of the same picture of length `target`.

    >>> stretch(offset=100, extent=150, source=300, target=200)
    (67, 100)
    """
    first = min(round(offset * target / source), target - 1)
    return first, min(max(1, round(extent * target / source)), target - first)


@stage("demux")
def read_bytes(file: int, begin: int, end: int) -> bytes:
    """Bytes of an open file."""
    return os.pread(file, end - begin, begin)


@dataclass(slots=True)
class Decoder:
    """Decodes stored frames of one size, one by one."""

    size: tuple[int, int]  # width, height
    codec: av.VideoCodecContext
    reformatter: VideoReformatter

    def frame(self, data: bytes) -> av.VideoFrame | None:
        """A stored frame; None if it is damaged."""
        try:
            frames = decoded(self.codec, av.Packet(data))
            if not frames:
                frames = decoded(self.codec, None)
                self.codec.flush_buffers()
        except (av.FFmpegError, ValueError):
            return None
        return frames[0] if frames and not frames[0].is_corrupt else None


@lru_cache(maxsize=8)
def decoder_of(size: tuple[int, int]) -> Decoder:
    """This process's decoder of frames of a size: with one that has met the size before, a clip takes half the time."""
    codec = one_thread(av.VideoCodecContext.create("h264", "r"))
    codec.extradata = EVERY_HEADER
    return Decoder(size, codec, VideoReformatter())
