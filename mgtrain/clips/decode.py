"""Decode the frames of clips: only the frames and the region that a clip shows, resampled directly to its size.

Cost. Packets are read first: decoding starts at the last key frame before a wanted frame, ends with the last wanted
one, and skips frames that are neither wanted nor referenced. If a file is damaged, or its timestamps do not tell which
packet is which frame, or a clip's packets have more than `MAX_HELD` bytes, the file is decoded from its start.

Frame numbers. Frame `k` is the one shown `(k + 0.5) / fps` seconds after the stream's start: at a constant frame rate
the k-th frame, and at a variable one the speed of motions is preserved. In an avi, the k-th frame that the decoder
returns is shown at the time of the k-th packet; dropped frames have none. If timestamps are missing or do not increase
(raw streams), frame `k` is the k-th frame that the decoder returns. A rate that a header lacks, or that is above
`MOST_FPS`, is checked against the packets, because it may be that of a clock.

Damaged videos. A recording may start between key frames: its first frame that can be decoded is shown for those
before it. A clip uses the frames from the key frame before it up to the damage, and repeats the last of them. If
there are none, it uses the last earlier frame that can be decoded.

Rotation. Only the quarter turns and the mirror of the display matrix count; the pixel aspect ratio is ignored.

Limits. FFmpeg gets the open file without its name, and cannot open other files, whatever the file refers to. A picture
has at most `MAX_PIXELS`, and a file no more frames than bytes.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from itertools import chain
from typing import Any

import av
import numpy as np
from av.codec.context import ThreadType
from av.video.reformatter import VideoReformatter

from mgtrain.clips.cut import Cut, VideoInfo, wanted_frames
from mgtrain.clips.pictures import Box, Frames, Pictures, UnconvertibleError, box_around, clips_of, converted, upright
from mgtrain.clips.stages import stage
from mgtrain.clips.storage import is_no_damage, reading_error
from mgtrain.clips.timeline import MOST_FPS, header_seconds, main_stream, needed_runs, shown
from mgtrain.errors import VideoError, cause_of

# Demuxers that read one file. Not allowed are those that open other files or URLs (concat, hls, dash, image2, ...).
CONTAINERS = "mov,matroska,avi,flv,asf,mpeg,mpegts,mpegvideo,h264,hevc,m4v,h263,obu,ivf,ogg,nut,gif,mjpeg,yuv4mpegpipe"

MAX_PIXELS = 1 << 25  # in a picture: slightly more than 7680 x 4320
MAX_HELD = 1 << 28  # bytes
LATEST = (1 << 63) - 1  # largest timestamp that FFmpeg accepts
ROUNDED = 0.05  # how much a rate in a header may differ from that of the packets, as a share
LOOKS_BACK = 8  # key frames to try, backwards, to find one shown before a clip


class VideoFile(AbstractContextManager["VideoFile"]):
    """An open video: `info` has its length and size, `read` decodes clips. Use it as a context manager, in one thread.

    Audio is ignored. Raises `VideoError` unless it is a local regular file with a frame that can be decoded.
    """

    first = 0  # number of its first frame in the file
    lacking = ""  # which frames are missing although all others can be decoded

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._reformatter = VideoReformatter()  # keeps swscale's tables between frames
        self.damage = ""  # the error that ended the last pass before the end of the video
        self._checked = False  # whether the whole file has been read to check its storage
        self._ticks: list[int] = []  # decoding times of the packets decoded in the last pass
        self._opened = ExitStack()  # the file and the decoder
        try:
            self._file = self._regular_file()
            self.nbytes = os.fstat(self._file).st_size
            self._open()
            self.info = self._probe()
        except BaseException:
            self._opened.close()
            raise

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def read(self, cuts: Sequence[Cut]) -> list[np.ndarray]:
        """Decode clips, each uint8 (T, crop, crop, 3) RGB, in one pass over the union of their frames."""
        assert self._container.input_was_opened, "read() after it was closed"
        as_stored = not (self._turns or self._mirrored)
        box = box_around([cut.region for cut in cuts]) if as_stored else (0, 0, *self._size)
        return clips_of(cuts, self.pictures(wanted_frames(cuts), box), box[:2])

    def pictures(self, wanted: Sequence[int], box: Box | None = None) -> Pictures:
        """Decode frames, uint8 (H, W, 3) RGB, upright, each with its ascending frame numbers among `wanted`.

        With `box`, only that part of the frames, in the coordinates of stored frames (before rotation). If a video is
        damaged, it may start again and repeat numbers.
        """
        none, box = True, box or (0, 0, *self._size)
        try:
            for picture, indices in converted(self._shown(wanted), self._size, box, self._reformatter):
                none = False
                yield np.rot90(np.fliplr(picture) if self._mirrored else picture, self._turns), indices
        except UnconvertibleError as error:
            raise self._error(str(error)) from error
        if wanted and none:
            raise self._error("no frame of it can be decoded any more")

    def decodable(self, wanted: range | None = None) -> int:
        """Count the frames up to the end or the first damage, or those wanted; `damage` then says what it is."""
        if wanted is None:
            return sum(1 for _ in self._from_start())
        self.damage = ""
        return len({indices[0] if frame.pts is None else frame.pts for frame, indices in self._shown(wanted)})

    def _regular_file(self) -> int:
        """Open the file and return its descriptor; refuse anything but a regular file, without blocking."""
        try:
            if stat.S_ISREG(os.stat(self.path).st_mode):
                file = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
                self._opened.callback(os.close, file)
                if stat.S_ISREG(os.fstat(file).st_mode):
                    return file
        except (OSError, ValueError) as error:
            raise self._error(cause_of(error)) from error
        raise self._error("not a regular file")

    @stage("open")
    def _open(self) -> None:
        """Open the container at its start, with one decoding thread."""
        alone = {"fd": str(self._file), "protocol_whitelist": "fd", "format_whitelist": CONTAINERS}
        limit = {"max_pixels": str(MAX_PIXELS)}
        os.lseek(self._file, 0, os.SEEK_SET)
        try:
            opened = av.open("fd:", options=limit, container_options=alone, metadata_errors="ignore")
            self._container = self._opened.enter_context(opened)
        except av.ArgumentError as error:
            self._check_storage()
            raise self._error("not a container that mgtrain reads (Invalid argument)") from error
        except (OSError, ValueError, av.FFmpegError) as error:
            self._check_storage(error)
            raise self._error(cause_of(error)) from error
        stream = main_stream(self._container)
        if stream is None or stream.codec_context is None:
            raise self._error("no decoder for its codec" if stream else "no video stream")
        self._stream = stream
        codec = one_thread(stream.codec_context)
        self.codec = str(codec.name)  # such as h264
        if codec.width * codec.height > MAX_PIXELS:
            raise self._error(
                f"its pictures have {codec.width} x {codec.height} pixels, more than the allowed {MAX_PIXELS:,}"
            )
        codec.options = limit
        self._unread: Iterator[av.VideoFrame] | None = self._decode(self._container.demux(self._stream))

    def _error(self, cause: str) -> VideoError:
        return VideoError(f"{self.path}: {cause}; replace this video or remove it from the list")

    def _check_storage(self, error: BaseException | None = None, through: bool = True) -> None:
        """Raise `VideoError`, from the storage's error, if not the file but its storage is at fault.

        FFmpeg may call that damage, so with `through` the whole file is read, once.
        """
        causes = [error]
        if through and not self._checked:
            self._checked = True
            causes.append(reading_error(self._file))
        for cause in causes:
            if cause and is_no_damage(cause):
                raise self._error(cause_of(cause)) from cause

    @stage("open")
    def _probe(self) -> VideoInfo:
        """Decode the first frame: sizes in headers may be wrong, and only frames have their rotation."""
        decoded_frames = self._from_start()
        first = next(decoded_frames, None)
        if first is None:
            raise self._error("no frame of it can be decoded")
        self._unread = chain([first], decoded_frames)
        stream = self._stream
        rate = stream.average_rate or stream.guessed_rate
        if not rate or rate < 0 or not stream.time_base:
            raise self._error("no frame rate")
        self._fps, self._time_base = float(rate), float(stream.time_base)
        self._paced = self._container.format.name == "avi"  # packets are a frame apart; dropped ones leave a gap
        self._timed = not self._paced and stream.start_time is not None
        self._start = self._ticks[0] if self._paced and self._ticks else stream.start_time or 0
        self._size = first.width, first.height
        self._turns, self._mirrored = upright(first)
        width, height = self._size if self._turns % 2 == 0 else self._size[::-1]
        frames = self._count()  # may correct the rate
        return VideoInfo(frames, self._fps, width, height)

    def _count(self) -> int:
        """The expected number of frames: from the header if it is consistent, else by counting packets.

        Corrects the frame rate if the header has none, or one that may be that of a clock.
        """
        stream = self._stream
        in_header = stream.frames
        seconds = header_seconds(self._container, stream, self._start * self._time_base, self._fps)
        doubtful = stream.average_rate is None or self._fps > MOST_FPS
        if doubtful or round(seconds * self._fps) < 1:
            packets, span = self._tally()
            mean = (packets - 1) / span if span > 0 else 0
            if doubtful and mean > 0 and abs(self._fps / mean - 1) > ROUNDED:
                self._fps = mean
            if round(seconds * self._fps) < 1:
                return max(1, min(round(span * self._fps) + 1 if self._timed else packets, self.nbytes))
        expected = round(seconds * self._fps)
        return min(in_header if in_header and abs(in_header - expected) <= 2 else expected, self.nbytes)

    def _tally(self) -> tuple[int, float]:
        """Count the packets with data, up to the damage, and the seconds from the start to the last one."""
        self._reopen()
        packets, last = 0, self._start
        try:
            for packet in self._container.demux(self._stream):
                packets += packet.size > 0
                last = max(last, (packet.dts if self._paced else packet.pts) or 0)
        except av.FFmpegError as error:
            self._check_storage(error)
        self._reopen()
        return packets, (last - self._start) * self._time_base if self._timed or self._paced else 0.0

    def _reopen(self) -> None:
        # Never use streams of a closed container: PyAV would read freed memory.
        self._container.close()
        self._open()

    def _from_start(self) -> Iterator[av.VideoFrame]:
        """All frames from the first. A second pass opens the file again, because some formats cannot seek."""
        if self._unread is None:
            self._reopen()
        frames, self._unread = self._unread, None
        assert frames is not None
        return frames

    def _packets_from_key_frame(self, moment: int) -> Iterator[av.Packet[av.VideoStream]] | None:
        """The packets from a key frame shown at or before `moment`, in ticks; None if there is none."""
        self._unread = None
        target = moment
        for _ in range(LOOKS_BACK):
            if target < self._start:
                break
            try:
                self._container.seek(target, stream=self._stream)
                packets = self._container.demux(self._stream)
                packet = next(packets)
            except StopIteration:
                return None
            except av.FFmpegError as error:
                self._check_storage(error, through=False)
                return None
            if not packet.is_keyframe or packet.pts is None:
                return None
            if packet.pts <= moment:
                return chain([packet], packets)
            # The container compares decoding times, which are earlier, so this key frame is shown after the moment.
            # Frames shown before it may reference the key frame before it (open GOP).
            target = min(target, packet.pts if packet.dts is None else packet.dts) - 1
        return None

    def _from_key_frame(self, index: int) -> Iterator[av.VideoFrame] | None:
        """All frames from a key frame at or before frame `index`; None if there is none."""
        moment = self._moment(index)
        frames = self._decode(self._packets_from_key_frame(moment) or ())
        first = next(frames, None)
        # If data is missing here, the caller uses an earlier frame.
        return None if first is None or (first.pts or 0) > moment else chain([first], frames)

    def _picked(self, wanted: Sequence[int]) -> Frames:
        """As `_shown`, decoding as little as possible; raises `_UntimedError` also for damage, after some frames."""
        span = self._span(self._moment(wanted[0]), self._moment(wanted[-1]))
        times = sorted(time for time, _ in span)
        if not times or len(set(times)) < len(times):
            raise _UntimedError
        positions = (((time - self._start) * self._time_base * self._fps, time) for time in times)
        frames = dict(shown(positions, wanted))  # time of a frame -> its numbers; those still to come
        codec = self._stream.codec_context

        def taken(packet: av.Packet[av.VideoStream] | None) -> Frames:
            for frame in decoded(codec, packet):
                if frame.pts is not None and frame.pts in frames and not frame.is_corrupt:
                    yield frame, frames.pop(frame.pts)

        for run in needed_runs([(packet.is_keyframe, time) for time, packet in span], set(frames)):
            for time, packet in span[run.start : run.stop]:
                codec.skip_frame = "DEFAULT" if time in frames else "NONREF"
                yield from taken(packet)
            yield from taken(None)
            codec.flush_buffers()
        codec.skip_frame = "DEFAULT"
        if frames:
            raise _UntimedError

    @stage("demux")
    def _span(self, first: int, last: int) -> list[tuple[int, av.Packet[av.VideoStream]]]:
        """Display times and packets, in decoding order, from a key frame at or before `first` to `last`, if any."""
        span: list[tuple[int, av.Packet[av.VideoStream]]] = []
        held = 0
        for packet in self._packets_from_key_frame(first) or ():
            if packet.size == 0 or (packet.dts is not None and packet.dts > last):
                break  # the end, or the next ones are shown later
            held += packet.size
            if packet.pts is None or packet.dts is None or held > MAX_HELD:
                raise _UntimedError
            span.append((packet.pts, packet))
        return span

    def _moment(self, index: int) -> int:
        """The middle of frame `index`, in ticks of the stream."""
        return min(self._start + int((index + 0.5) / self._fps / self._time_base), LATEST)

    def _decode(self, packets: Iterable[av.Packet[av.VideoStream]]) -> Iterator[av.VideoFrame]:
        """Decode frames in display order, up to the end or the first damage, which it stores in `damage`.

        A recording may start between key frames: packets before the first key frame that can be decoded are skipped, up
        to `MAX_HELD` bytes.
        """
        codec = self._stream.codec_context
        self.damage, self._ticks, begun, failed, skipped = "", [], False, False, 0
        try:
            for packet in packets:
                if failed and not packet.is_keyframe and skipped < MAX_HELD:
                    skipped += packet.size
                    continue
                if packet.is_corrupt:
                    self._check_storage()
                try:
                    frames = decoded(codec, packet if packet.size else None)
                except av.FFmpegError as error:
                    if begun or skipped >= MAX_HELD:
                        raise
                    self._check_storage(error)
                    failed, skipped = True, skipped + packet.size
                    self.lacking = f"the frames before the first key frame cannot be decoded ({cause_of(error)})"
                else:
                    begun, failed = begun or bool(frames), False
                    if packet.size and packet.dts is not None:
                        self._ticks.append(packet.dts)
                    yield from frames
        except av.FFmpegError as error:
            self._check_storage(error)
            self.damage = cause_of(error)

    def _shown(self, wanted: Sequence[int]) -> Frames:
        """Every wanted frame, with its ascending numbers; starts again from the first if needed."""
        if self._timed and wanted:
            try:
                yield from self._picked(wanted)
                return
            except (_UntimedError, av.FFmpegError) as error:
                self._check_storage(error, through=False)
                self._stream.codec_context.skip_frame = "DEFAULT"
            frames = self._from_key_frame(wanted[0]) if wanted[0] > 0 else None
            try:
                yield from shown(self._clocked(frames or self._from_start()), wanted)
                return
            except _UntimedError:
                self._timed = False
        yield from shown(self._numbered(), wanted)

    def _clocked(self, frames: Iterable[av.VideoFrame]) -> Iterator[tuple[float, av.VideoFrame]]:
        """The frames, each with the time at which it is shown, in frames after the stream's start."""
        frames_per_tick = self._time_base * self._fps
        last = None
        for frame in frames:
            if frame.pts is None or (last is not None and frame.pts <= last):
                raise _UntimedError
            last = frame.pts
            yield (last - self._start) * frames_per_tick, frame

    def _numbered(self) -> Iterator[tuple[float, av.VideoFrame]]:
        """All frames, each with its number, or in an avi with the place of its packet."""
        frames_per_tick = self._time_base * self._fps
        for number, frame in enumerate(self._from_start()):
            if self._paced and number < len(self._ticks):
                yield (self._ticks[number] - self._start) * frames_per_tick, frame
            else:
                yield number, frame


class _UntimedError(Exception):
    """Timestamps are missing or do not increase, or the packets take too much memory."""


@stage("decode")
def decoded(codec: av.VideoCodecContext, packet: av.Packet[Any] | None) -> list[av.VideoFrame]:
    """The frames that a decoder returns for a packet, or for None the frames that it still holds."""
    return codec.decode(packet)


def one_thread(decoder: av.VideoCodecContext) -> av.VideoCodecContext:
    """Limit the decoder to one thread: more threads take a fifth more CPU time, and the loader has processes."""
    decoder.thread_count = 1
    decoder.thread_type = ThreadType.NONE
    return decoder
