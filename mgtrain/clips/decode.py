"""Decode the frames of clips: only those wanted, only their region, straight to the clip's size.

What frame `k` is. Timestamps decide: it is the frame shown `(k + 0.5) / fps` seconds after the stream's start, which is
exactly the k-th frame at a constant frame rate, and keeps the pace of things at a variable one. Where timestamps are
missing or do not increase (avi, raw streams) it is the k-th frame that comes out of the decoder.

What is used of a damaged video: the frames from the key frame before the clip up to the damage; the last of them
repeats. If there are none, the last frame before that decodes is used.

Quarter turns of the display matrix are carried out, other matrices and the shape of pixels are ignored.
"""

from __future__ import annotations

import os
import stat
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from types import TracebackType
from typing import TypeVar

import av
import numpy as np
import torch
from av.codec.context import ThreadType
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from torch.nn.functional import interpolate

from mgtrain.clips.cut import Cut, VideoInfo
from mgtrain.errors import VideoError

# Demuxers of single files. Left out are those that open further files or URLs (concat, hls, dash, image2, sdp, ...).
CONTAINERS = "mov,matroska,avi,flv,asf,mpeg,mpegts,mpegvideo,h264,hevc,m4v,h263,obu,ivf,ogg,nut,gif,mjpeg,yuv4mpegpipe"

Frame = TypeVar("Frame")


class VideoFile:
    """An open video: `info` tells its length and size, `read` decodes clips. Use as a context manager, in one thread.

    Raises `VideoError` for anything but a local regular file with at least one frame that decodes. The audio is never
    touched. One decoding thread: parallelism is the loader's, and further threads cost a fifth more CPU time.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._reformatter = VideoReformatter()  # keeps swscale's tables from frame to frame
        self._open()
        try:
            self.info = self._probe()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the file and the decoder."""
        self._container.close()

    @property
    def codec(self) -> str:
        """The codec's name, such as h264."""
        return str(self._stream.codec_context.name)

    def read(self, cuts: Sequence[Cut]) -> list[np.ndarray]:
        """The clips, each uint8 (T, crop, crop, 3) RGB, in one pass over the union of their frames."""
        assert self._container.input_was_opened, "read() after close()"
        clips = [np.empty((len(cut.frames), cut.crop, cut.crop, 3), np.uint8) for cut in cuts]
        places: dict[int, list[tuple[int, int]]] = {}  # frame number -> (clip, frame of that clip)
        for c, cut in enumerate(cuts):
            for t, index in enumerate(cut.frames):
                places.setdefault(index, []).append((c, t))
        frame = None
        for frame, indices in self._shown(sorted(places)):
            picture = self._upright(frame)  # (H, W, 3)
            for c, t in chain.from_iterable(places[index] for index in indices):
                clips[c][t] = resample(picture, cuts[c])
        if places and frame is None:
            raise self._error("no frame of it can be decoded any more")
        return clips

    def _open(self) -> None:
        """Open the container at its start, with one decoding thread."""
        try:
            if not stat.S_ISREG(os.stat(self.path).st_mode):
                raise self._error("not a regular file")
            self._container = av.open(
                f"file:{self.path}", container_options={"protocol_whitelist": "file", "format_whitelist": CONTAINERS}
            )
        except (OSError, ValueError, av.FFmpegError) as error:
            raise self._error(getattr(error, "strerror", None) or str(error)) from error
        pictures = [s for s in self._container.streams.video if not s.disposition & Disposition.attached_pic]
        if not pictures or pictures[0].codec_context is None:
            self.close()
            raise self._error("no decoder for its codec" if pictures else "no video stream")
        self._stream = pictures[0]
        self._stream.codec_context.thread_count = 1
        self._stream.codec_context.thread_type = ThreadType.NONE
        self._unread: Iterator[av.VideoFrame] | None = self._decode(self._container.demux(self._stream))

    def _error(self, cause: str) -> VideoError:
        return VideoError(f"{self.path}: {cause}; replace this video or leave it out of the list")

    def _probe(self) -> VideoInfo:
        """Decode the first frame: sizes in headers may be wrong, and rotation comes with frames only."""
        frames = self._from_start()
        first = next(frames, None)
        if first is None:
            raise self._error("no frame of it can be decoded")
        self._unread = chain([first], frames)
        rate, self._start = self._stream.average_rate or self._stream.guessed_rate, self._stream.start_time or 0
        if not rate or not self._stream.time_base:
            raise self._error("no frame rate")
        self._fps, self._time_base = float(rate), float(self._stream.time_base)
        self._size = first.width, first.height
        # Quarter turns anticlockwise; what is no multiple of a quarter turn is nonsense of a damaged header.
        self._turns = first.rotation // 90 % 4 if first.rotation % 90 == 0 else 0
        self._timed = self._container.format.name != "avi" and self._stream.start_time is not None
        width, height = self._size if self._turns % 2 == 0 else self._size[::-1]
        return VideoInfo(self._count(), self._fps, width, height)

    def _count(self) -> int:
        """How many frames there should be: by the header as far as it agrees with itself, else packets are counted."""
        stream, container = self._stream, self._container
        if stream.duration:
            seconds = stream.duration * self._time_base
        else:
            seconds = (container.duration or 0) / av.time_base
            if container.format.name.startswith("matroska"):  # there it is the time of the end
                seconds -= self._start * self._time_base
        expected = round(seconds * self._fps)
        if expected > 0:
            return stream.frames if stream.frames and abs(stream.frames - expected) <= 2 else expected
        self._reopen()
        packets = 0
        try:
            for packet in self._container.demux(self._stream):
                packets += packet.size > 0
        except av.FFmpegError:
            pass  # counted up to the damage
        self._reopen()
        return max(1, packets)

    def _reopen(self) -> None:
        # Streams of a closed container must not be touched again: PyAV would read memory that has been freed.
        self.close()
        self._open()

    def _from_start(self) -> Iterator[av.VideoFrame]:
        """All frames from the first. Some formats cannot be wound back, so a second pass opens the file anew."""
        if self._unread is None:
            self._reopen()
        frames, self._unread = self._unread, None
        assert frames is not None
        return frames

    def _from_key_frame(self, index: int) -> Iterator[av.VideoFrame] | None:
        """The frames from a key frame at or before frame `index`; None if there is no such place to start from."""
        self._unread = None
        moment = target = self._start + int((index + 0.5) / self._fps / self._time_base)
        while target >= self._start:
            try:
                self._container.seek(target, stream=self._stream)
                packets = self._container.demux(self._stream)
                packet = next(packets)
            except (av.FFmpegError, StopIteration):
                return None
            if not packet.is_keyframe or packet.pts is None:
                return None
            if packet.pts <= moment:
                frames = self._decode(chain([packet], packets))
                first = next(frames, None)
                # Data may be missing from here on: then something before must serve.
                return None if first is None or (first.pts or 0) > moment else chain([first], frames)
            # The container looks for decoding times, which are earlier: this key frame is shown after the moment, and
            # what is shown before it may lean on the key frame before it (open GOP).
            target = min(target, packet.pts if packet.dts is None else packet.dts) - 1
        return None

    @staticmethod
    def _decode(packets: Iterable[av.Packet[av.VideoStream]]) -> Iterator[av.VideoFrame]:
        """Frames in the order of showing, up to the end or the first damage."""
        try:
            for packet in packets:
                yield from packet.decode()
        except av.FFmpegError:
            return

    def _shown(self, wanted: Sequence[int]) -> Iterator[tuple[av.VideoFrame, Sequence[int]]]:
        """Every frame that is wanted, with the rising numbers for which it stands; anew from the first if need be."""
        if self._timed and wanted:
            frames = self._from_key_frame(wanted[0]) if wanted[0] > 0 else None
            try:
                yield from shown(self._clocked(frames or self._from_start()), wanted)
                return
            except _UntimedError:
                self._timed = False
        yield from shown(enumerate(self._from_start()), wanted)

    def _clocked(self, frames: Iterable[av.VideoFrame]) -> Iterator[tuple[float, av.VideoFrame]]:
        """The frames and when each is shown, in frames after the stream's start."""
        frames_per_tick = self._time_base * self._fps
        last = None
        for frame in frames:
            if frame.pts is None or (last is not None and frame.pts <= last):
                raise _UntimedError
            last = frame.pts
            yield (last - self._start) * frames_per_tick, frame

    def _upright(self, frame: av.VideoFrame) -> np.ndarray:
        """The frame as it is meant to be seen: uint8 (H, W, 3) RGB, a view."""
        width, height = self._size  # of the first frame; others are made to fit
        try:
            rgb = self._reformatter.reformat(frame, width, height, "rgb24", threads=1)
        except (av.FFmpegError, ValueError) as error:
            raise self._error(f"pixels of format {frame.format.name} cannot be converted to RGB") from error
        rows = rgb.planes[0].line_size  # bytes, padding included
        picture: np.ndarray = np.ndarray((height, width, 3), np.uint8, memoryview(rgb.planes[0]), strides=(rows, 3, 1))
        return np.rot90(picture, self._turns)


class _UntimedError(Exception):
    """Timestamps are missing or do not increase."""


def decode(path: str | os.PathLike[str], cut_of: Callable[[VideoInfo], Sequence[Cut]]) -> list[np.ndarray]:
    """The clips that `cut_of` asks for when told what the video is: each uint8 (T, crop, crop, 3) RGB.

    Raises `VideoError`, which names the file and the cause.
    """
    with VideoFile(path) as video:
        return video.read(cut_of(video.info))


def shown(frames: Iterable[tuple[float, Frame]], wanted: Sequence[int]) -> Iterator[tuple[Frame, Sequence[int]]]:
    """Which frame is shown in the middle of each wanted frame number, given (position, frame) in rising order.

    That is the last one at or before it; failing that the first one. Takes no more frames than it must.

    >>> list(shown([(0, "a"), (1, "b"), (2.7, "c"), (4, "d")], wanted=[0, 2, 3, 7, 9]))
    [('a', [0]), ('b', [2]), ('c', [3]), ('d', [7, 9])]
    """
    done, current = 0, None
    for position, frame in frames:
        if current is not None:
            until = bisect_left(wanted, position - 0.5, done)
            if until > done:
                yield current, wanted[done:until]
            if until == len(wanted):
                return
            done = until
        current = frame
    if current is not None:
        yield current, wanted[done:]


def resample(picture: np.ndarray, cut: Cut) -> np.ndarray:
    """The cut's region of a picture, uint8 (H, W, 3), as uint8 (crop, crop, 3): antialiased bilinear, then the flip."""
    left, top, width, height = cut.region
    part = np.ascontiguousarray(picture[top : top + height, left : left + width])
    if (width, height) != (cut.crop, cut.crop):
        # Channels last with a batch axis: the fastest path of torch, three times as fast as swscale or Pillow.
        # (`part[None]` would have a stride of 0, which torch does not take for channels last.)
        batch = torch.from_numpy(part).unsqueeze(0).permute(0, 3, 1, 2)  # (1, 3, height, width)
        batch = interpolate(batch, size=(cut.crop, cut.crop), mode="bilinear", antialias=True)
        part = batch[0].permute(1, 2, 0).numpy()  # (crop, crop, 3)
    return part[:, ::-1] if cut.flip else part
