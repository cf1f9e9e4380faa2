"""Find the frame shown at a time, and the packets needed to decode it. Plain numbers, no FFmpeg."""

from bisect import bisect_left
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import TypeVar

Frame = TypeVar("Frame")


def shown(frames: Iterable[tuple[float, Frame]], wanted: Sequence[int]) -> Iterator[tuple[Frame, Sequence[int]]]:
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
