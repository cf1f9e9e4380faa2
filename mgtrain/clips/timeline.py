"""How long a video is, at which rate, and which of its frames are shown when."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import TypeVar

import av
from av.container import InputContainer
from av.stream import Disposition

Item = TypeVar("Item")

MOST_FPS = 120.0  # in a header; a higher rate may be that of the file's clock
LENGTH = re.compile(r"([0-9]{1,9}):([0-9]{2}):([0-9]{2}(?:\.[0-9]+)?)", re.ASCII)  # of a matroska stream, in its tags


def main_stream(container: InputContainer) -> av.VideoStream | None:
    """The longest video stream that is not a cover, the first of equals; None if there is none."""
    pictures = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    return max(pictures, key=lambda stream: (stream.frames, own_seconds(stream)), default=None)


def own_seconds(stream: av.VideoStream) -> float:
    """The length of a stream as its header or tags have it; 0 if they do not."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    tag = stream.metadata.get(min((name for name in stream.metadata if name.startswith("DURATION")), default=""), "")
    hours, minutes, seconds = match.groups() if (match := LENGTH.match(tag)) else (0, 0, 0)
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


def header_seconds(container: InputContainer, stream: av.VideoStream, start: float, fps: float) -> float:
    """The length of the stream from its `start`, in seconds, as the header has it.

    0 if only the length of all streams together is known, or whether that includes the time before the start is not.
    """
    form, alone = container.format.name.partition(",")[0], len(container.streams) == 1
    whole, late = (container.duration or 0) / av.time_base, stream.start_time is None or start * fps >= 1
    if stream.duration and form != "asf":
        return own_seconds(stream)
    if form == "matroska" and alone:
        return whole - start  # it is the time of the end, as in tags, except in those of mkvmerge
    if form == "matroska" and not (late and any(name.startswith("_STATISTICS") for name in stream.metadata)):
        return min(whole, own_seconds(stream)) - start
    return whole if alone and not late else 0.0


def shown(frames: Iterable[tuple[float, Item]], wanted: Sequence[int]) -> Iterator[tuple[Item, Sequence[int]]]:
    """For each wanted frame number `k`, the frame shown at position `k + 0.5`, from (position, frame) in order.

    That is the last frame at or before it, or the first frame if there is none. Reads no more frames than needed.

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


def needed_runs(packets: Sequence[tuple[bool, int]], wanted: Container[int]) -> Iterator[range]:
    """The packets to decode for the frames at the wanted times, in runs from a key frame to the last wanted packet.

    `packets` are (is a key frame, display time) in decoding order, the first a key frame. Frames that follow a key
    frame but are shown before it may reference the previous run, so then both are one run.

    >>> packets = [(True, 0), (False, 1), (False, 2), (True, 3), (False, 4), (True, 5), (True, 8), (False, 6)]
    >>> list(needed_runs(packets, wanted={1, 6}))
    [range(0, 2), range(5, 8)]
    """
    keys = [n for n, (is_key, _) in enumerate(packets) if is_key]
    runs: list[tuple[int, int]] = []  # first packet, end
    for first, end in zip(keys, [*keys[1:], len(packets)], strict=True):
        needs_previous = any(time in wanted and time < packets[first][1] for _, time in packets[first:end])
        runs.append((runs.pop()[0] if needs_previous and runs else first, end))
    for first, end in runs:
        last = max((n for n in range(first, end) if packets[n][1] in wanted), default=None)
        if last is not None:
            yield range(first, last + 1)
