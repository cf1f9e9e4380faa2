"""Stretches: a row of a list may be a part of a video, named by the path and the part.

`match.mp4#t=12.5,20` are the seconds 12.5 to 20 of match.mp4, as in a media fragment URI, `match.mp4#t=12.5` is all
that follows second 12.5, and `run#f=30,90` are the frames 30 to 89 of run. Such a name stands wherever the path of a
whole video does: in lists, manifests, prepared sets and tables of scores.
"""

import math
import re
from dataclasses import dataclass
from typing import Literal

NUMBER = r"[0-9]+(?:\.[0-9]+)?"
NAMED = re.compile(rf"(.+)#([tf])=({NUMBER})(?:,({NUMBER}))?", re.DOTALL | re.ASCII)


@dataclass(frozen=True, slots=True)
class Stretch:
    """From `start` to before `end` (infinity: the video's): seconds (`t`), or numbers of frames from 0 (`f`)."""

    unit: Literal["t", "f"]
    start: float
    end: float

    def frames(self, fps: float, count: int) -> tuple[int, int]:
        """The first frame, and the one after the last, of a video of `count` frames; at least one frame.

        >>> Stretch("t", 0.5, 2).frames(fps=30, count=90), Stretch("f", 7, math.inf).frames(fps=30, count=90)
        ((15, 60), (7, 90))
        """
        scale = fps if self.unit == "t" else 1
        first = round(self.start * scale)
        return first, max(first + 1, count if math.isinf(self.end) else round(self.end * scale))

    def __str__(self) -> str:
        end = "" if math.isinf(self.end) else f",{_digits(self.end)}"
        return f"#{self.unit}={_digits(self.start)}{end}"


def parted(name: str) -> tuple[str, Stretch | None]:
    """The path and the stretch that a name stands for; None: the whole video.

    >>> parted("a b.mp4#t=1.5,20"), parted("a#1.mp4")
    (('a b.mp4', Stretch(unit='t', start=1.5, end=20.0)), ('a#1.mp4', None))
    >>> parted("a.mp4#t=1.5")
    ('a.mp4', Stretch(unit='t', start=1.5, end=inf))
    """
    match = NAMED.fullmatch(name) if "#" in name else None
    if match is None:
        return name, None
    path, unit, start, end = match.groups()
    return path, Stretch("t" if unit == "t" else "f", float(start), float(end or "inf"))


def file_of(name: str) -> str:
    """The path of the file, or of the folder of frames, that a name is a part of.

    >>> file_of("a.mp4#t=1,2"), file_of("a.mp4")
    ('a.mp4', 'a.mp4')
    """
    return parted(name)[0]


def _digits(number: float) -> str:
    return f"{number:.6f}".rstrip("0").rstrip(".")  # at most six decimals
