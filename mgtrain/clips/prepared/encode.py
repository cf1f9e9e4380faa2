"""Encode one video for a prepared set: every frame a key frame, a file for each level."""

import errno
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from mgtrain.clips.cut import VideoInfo
from mgtrain.clips.prepared import Settings, level_path, stored_frame
from mgtrain.clips.sources import Reader, open_source
from mgtrain.clips.storage import raise_unanswered
from mgtrain.data.manifest import Record, checksum
from mgtrain.data.stretch import file_of
from mgtrain.errors import DataError, VideoError
from mgtrain.processes.files import replacing

# Only key frames, each with its headers; `fastdecode` avoids the entropy coder and loop filter that decode slowly.
ENCODER = {
    "preset": "veryfast", "tune": "fastdecode", "g": "1", "bf": "0", "threads": "1", "x264-params": "repeat-headers=1"
}  # fmt: skip


def encode_video(
    root: Path, path: str, folder: Path, settings: Settings, fps: float | None = None
) -> tuple[Record, list[np.ndarray]]:
    """Write the files of a video; return its record and, for each level, the offsets of its frames.

    If it cannot be decoded, the record has its `error`, and there are no offsets. `fps` is that of folders of frames.
    Raises `LackError` if the storage of the video does not answer.
    """
    try:
        source = (root / file_of(path)).stat()
        with open_source(root / path, fps) as video:
            nbytes, info = video.nbytes, video.info
            stored = max(1, round(info.frames * min(1.0, (settings.fps or info.fps) / info.fps)))
            sizes = level_sizes(info, settings.levels)
            files = [level_path(folder, level, path) for level in sizes]
            offsets = _write(video, stored, dict(zip(files, sizes.values(), strict=True)), settings.quality)
            if len(offsets[0]) <= stored:
                raise VideoError(f"{root / path}: only {len(offsets[0]) - 1} of {stored} frames can be decoded")
    except (OSError, VideoError) as error:
        raise_unanswered(root / path, error)
        cause = f"{root / path}: {error.strerror}" if isinstance(error, OSError) else str(error)
        return {"path": path, "error": cause}, []
    levels = [
        {"level": level, "width": width, "height": height, "bytes": file.stat().st_size, "sha256": checksum(file)}
        for (level, (width, height)), file in zip(sizes.items(), files, strict=True)
    ]
    facts = {"path": path, "source_bytes": nbytes, "source_mtime_ns": source.st_mtime_ns, **asdict(info)}
    return {**facts, "stored": stored, "levels": levels}, offsets


def _write(video: Reader, stored: int, sizes: dict[Path, tuple[int, int]], quality: int) -> list[np.ndarray]:
    """Write `stored` evenly spaced frames of a video to a file of each size; return the offsets of their frames."""
    frames = video.info.frames
    rate = video.info.fps * stored / frames
    try:
        with ExitStack() as stack:
            writers = [_Writer(file, size, rate, quality, stack) for file, size in sizes.items()]
            wanted = [stored_frame(n, stored, frames) for n in range(stored)]
            left = iter(wanted)
            following = next(left, None)
            for picture, indices in video.pictures(wanted):
                upright = np.ascontiguousarray(picture)
                for index in indices:
                    if index == following:  # after damage, decoding may start again
                        following = next(left, None)
                        for writer in writers:
                            writer.add(upright)
            return [writer.finish() for writer in writers]
    except (OSError, av.FFmpegError) as error:
        file = next(iter(sizes))
        if error.errno == errno.ENAMETOOLONG:
            raise VideoError(f"{file}: {error.strerror}; rename this video or remove it from the list") from error
        raise DataError(f"{file}: cannot be written: {error.strerror}; run the same command again to resume") from error


def level_sizes(info: VideoInfo, levels: Sequence[int]) -> dict[int, tuple[int, int]]:
    """Width and height of a video at each level: even numbers, never enlarged, no size twice.

    >>> level_sizes(VideoInfo(300, 30.0, 455, 256), levels=(256, 160))
    {256: (454, 256), 160: (284, 160)}
    >>> level_sizes(VideoInfo(300, 30.0, 120, 161), levels=(256, 160, 96))
    {256: (120, 160), 96: (96, 128)}
    """
    sizes: dict[int, tuple[int, int]] = {}
    for level in levels:
        scale = min(1.0, level / min(info.width, info.height))
        if not sizes or scale < 1:
            width, height = (max(2, round(length * scale) // 2 * 2) for length in (info.width, info.height))
            if (width, height) not in sizes.values():
                sizes[level] = width, height
    return sizes


class _Writer:
    """Writes pictures to an mp4 file, which gets its name when `stack` ends without an error."""

    def __init__(self, path: Path, size: tuple[int, int], rate: float, quality: int, stack: ExitStack) -> None:
        self._path, self._size, self._frames = path, size, 0
        self._temporary = stack.enter_context(replacing(path))
        self._container = av.open(str(self._temporary), "w", format="mp4")
        stack.callback(self._close)
        self._rate = Fraction(max(rate, 1 / 1000)).limit_denominator(1001)
        options = {**ENCODER, "crf": str(quality)}
        self._stream = self._container.add_stream("libx264", rate=self._rate, options=options)
        self._stream.width, self._stream.height = size
        self._stream.pix_fmt = "yuv420p"

    def add(self, picture: np.ndarray) -> None:
        """Add uint8 (H, W, 3) RGB of any size."""
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame = frame.reformat(*self._size, format="yuv420p", interpolation="BICUBIC", threads=1)
        frame.pts, frame.time_base = self._frames, 1 / self._rate
        self._frames += 1
        self._container.mux(self._stream.encode(frame))

    def finish(self) -> np.ndarray:
        """Close the file; return the offsets of its frames and of their end: uint32 (frames + 1,)."""
        self._container.mux(self._stream.encode())
        self._container.close()
        with av.open(str(self._temporary)) as container:
            places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
        ends = np.cumsum([places[0][0], *(size for _, size in places)])
        assert len(places) == self._frames, "the encoder drops frames"
        assert all(place == end for (place, _), end in zip(places, ends, strict=False)), "frames do not adjoin"
        if ends[-1] > np.iinfo(np.uint32).max:
            raise VideoError(f"{self._path}: would be larger than 4 GiB; cut the video into shorter ones")
        return ends.astype(np.uint32)

    def _close(self) -> None:
        with suppress(OSError, ValueError, av.FFmpegError):  # on a full disk, closing fails like writing
            self._container.close()
