"""Folders of frames: a video as a folder of numbered pictures, `img_00001.jpg` and so on."""

import os
import re
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from math import gcd

import numpy as np

from mgtrain.errors import VideoError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
NUMBERED = re.compile(rf"(.*?)([0-9]+)({'|'.join(map(re.escape, SUFFIXES))})", re.DOTALL | re.ASCII | re.IGNORECASE)
FLOW = re.compile(r"flow|[xy]_", re.IGNORECASE)  # starts the names of optical flow, which lies beside the frames


@dataclass(frozen=True, slots=True, eq=False)
class Frames:
    """The frames of a folder: their names are `prefix`, a number of at least `digits` digits, and `suffix`.

    Frame `k` of the video is the picture with the k-th number after the first, or the one before it where that is
    missing. Numbers may start anywhere and may have a constant step.
    """

    folder: str
    prefix: str
    digits: int
    suffix: str
    numbers: np.ndarray  # int64, ascending: the numbers in the files' names
    step: int  # from one frame's number to that of the next

    def __len__(self) -> int:
        return int(self.numbers[-1] - self.numbers[0]) // self.step + 1

    def gaps(self, wanted: range) -> str:
        """Which of the wanted frames have no file, in words; empty: none."""
        lacking = np.setdiff1d(self.numbers[0] + self.step * np.arange(wanted.start, wanted.stop), self.numbers)
        if not len(lacking):
            return ""
        more = f" and {len(lacking) - 1} more are" if len(lacking) > 1 else " is"
        return f"{self._name(int(lacking[0]))}{more} missing"

    def file(self, index: int) -> str:
        """The file that shows frame `index`."""
        number = int(self.numbers[0]) + self.step * index
        place = bisect_right(self.numbers, number) - 1
        return os.path.join(self.folder, self._name(int(self.numbers[place])))

    def _name(self, number: int) -> str:
        return f"{self.prefix}{number:0{self.digits}}{self.suffix}"


def is_frame(name: str) -> bool:
    """Whether a file's name is that of a numbered picture.

    >>> is_frame("img_00001.jpg"), is_frame("7.png"), is_frame("cover.jpg")
    (True, True, False)
    """
    return NUMBERED.fullmatch(name) is not None


def holds_frames(folder: str) -> bool:
    """Whether a path is a folder with a frame."""
    try:
        with os.scandir(folder) as entries:
            return any(is_frame(entry.name) and not entry.name.startswith(".") for entry in entries)
    except OSError:
        return False


def list_frames(folder: str) -> Frames:
    """The frames of a folder, remembered until it changes. Raises `VideoError` unless it holds one sequence of them."""
    try:
        return _listed(folder, os.stat(folder).st_mtime_ns)
    except OSError as error:
        raise VideoError(f"{folder}: {error.strerror}; replace this video or remove it from the list") from error


@lru_cache(maxsize=256)  # folders
def _listed(folder: str, changed: int) -> Frames:
    sequences: dict[tuple[str, str], list[str]] = {}
    for name in os.listdir(folder):
        if not name.startswith(".") and (match := NUMBERED.fullmatch(name)):
            sequences.setdefault((match[1], match[3]), []).append(match[2])
    pictures = {key: numbers for key, numbers in sequences.items() if not FLOW.match(key[0])} or sequences
    if not pictures:
        wanted = f"put the frames of one video there, as {', '.join(SUFFIXES)}"
        raise VideoError(f"{folder}: no numbered pictures such as img_00001.jpg; {wanted}")
    (prefix, suffix), written = max(sorted(pictures.items()), key=lambda item: len(item[1]))
    digits = min(map(len, written))
    numbers = np.unique(np.array(written, np.int64)) if max(map(len, written)) < 19 else np.empty(0, np.int64)
    rivals = [f"{a}*{b}" for (a, b), found in sorted(pictures.items()) if 2 * len(found) > len(written)]
    if len(rivals) > 1:
        raise VideoError(f"{folder}: several sequences of pictures, {' and '.join(rivals)}; keep one")
    frames = Frames(folder, prefix, digits, suffix, numbers, gcd(*np.diff(numbers).tolist()) or 1)
    if sorted(written) != sorted(f"{n:0{digits}}" for n in numbers.tolist()) or len(frames) > 2 * len(numbers):
        raise VideoError(f"{folder}: the numbers of {rivals[0]} do not count frames; number them 1, 2, 3, ...")
    return frames
