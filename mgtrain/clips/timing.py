"""Which frame is shown when, and which packets it takes to decode it: plain numbers, no FFmpeg."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import TypeVar

Frame = TypeVar("Frame")


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


def needed_runs(packets: Sequence[tuple[bool, int]], wanted: Container[int]) -> Iterator[range]:
    """The packets that must be decoded for the frames of the wanted times, in runs that each start at a key frame.

    `packets` are (is it a key frame, time of showing) in the order of decoding, the first a key frame. A run ends with
    its last wanted packet. Frames that are shown before the key frame they follow may lean on the run before it.

    >>> packets = [(True, 0), (False, 1), (False, 2), (True, 3), (False, 4), (True, 5), (True, 8), (False, 6)]
    >>> list(needed_runs(packets, wanted={1, 6}))
    [range(0, 2), range(5, 8)]
    """
    keys = [n for n, (is_key, _) in enumerate(packets) if is_key]
    runs: list[tuple[int, int]] = []  # first packet, end
    for first, end in zip(keys, [*keys[1:], len(packets)], strict=True):
        leans_back = any(time in wanted and time < packets[first][1] for _, time in packets[first:end])
        runs.append((runs.pop()[0] if leans_back and runs else first, end))
    for first, end in runs:
        last = max((n for n in range(first, end) if packets[n][1] in wanted), default=None)
        if last is not None:
            yield range(first, last + 1)
