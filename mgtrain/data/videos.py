"""A list of labelled videos that stays small in memory."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mgtrain.data.stretch import file_of
from mgtrain.errors import DataError

EXAMPLES = 3  # names to give with each count in a report
SIDES = (("left", "right"), ("leftward", "rightward"), ("clockwise", "anticlockwise"),
         ("clockwise", "counterclockwise"))  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Videos:
    """Videos and their labels, in a fixed order, as a few arrays that worker processes share without copies.

    A set is multi-label if any video has a sequence of labels.

    >>> videos = Videos.of("/data", [("a b.mp4", 1), ("c.mp4", 0)], classes=("cat", "dog"))
    >>> len(videos), videos.path(0), videos.label(0)
    (2, '/data/a b.mp4', 1)
    >>> videos = Videos.of("/data", [("a b.mp4", [0, 1]), ("c.mp4", [])], classes=("cat", "dog"))
    >>> videos.multi_label, videos.labels(0), videos.labels(1)
    (True, (0, 1), ())
    """

    root: str
    classes: tuple[str, ...]
    missing: int  # rows of the list whose video was not found
    missing_names: tuple[str, ...]  # the first few
    _paths: np.ndarray = field(repr=False)  # uint8: all paths, relative to the root, concatenated
    _ends: np.ndarray = field(repr=False)  # int64 (N,): the end of each path in `_paths`
    _labels: np.ndarray = field(repr=False)  # int32 (N,), or the labels of all videos, concatenated
    _label_ends: np.ndarray | None = field(repr=False)  # int64 (N,): the end of each video's labels; None: one each
    _spans: np.ndarray | None = field(default=None, repr=False)  # float64 (labels, 2): seconds; None: whole video
    left_out: tuple[tuple[str, int], ...] = ()  # reasons why videos were left out, with their counts
    remarks: tuple[str, ...] = ()  # how the list was read, if that may be wrong

    @classmethod
    def of(
        cls,
        root: str | os.PathLike[str],
        entries: Iterable[tuple[str, int | Sequence[int]]],
        classes: Sequence[str],
        missing: int = 0,
        missing_names: Sequence[str] = (),
        spans: Sequence[tuple[float, float]] | None = None,
    ) -> Videos:
        """Make a set of (path relative to `root`, label or labels) pairs; `spans` are each label's times in seconds."""
        paths, ends, labels, label_ends, multi = bytearray(), array("q"), array("i"), array("q"), False
        for path, label in entries:
            paths += os.fsencode(path)
            ends.append(len(paths))
            if isinstance(label, int):
                labels.append(label)
            else:
                labels.extend(label)
                multi = True
            label_ends.append(len(labels))
        return cls(
            os.fspath(root),
            tuple(classes),
            missing,
            tuple(missing_names[:EXAMPLES]),
            np.frombuffer(bytes(paths), np.uint8),
            np.array(ends, np.int64),
            np.array(labels, np.int32),
            np.array(label_ends, np.int64) if multi else None,
            None if spans is None else np.array(spans, np.float64).reshape(-1, 2),
        )

    def arrays(self) -> list[np.ndarray]:
        """The arrays, whose size depends on the number of videos."""
        arrays = (self._paths, self._ends, self._labels, self._label_ends, self._spans)
        return [array for array in arrays if array is not None]

    def with_arrays(self, arrays: Sequence[np.ndarray]) -> Videos:
        """The same videos with other arrays, such as copies in shared memory."""
        paths, ends, labels, *others = arrays
        label_ends, spans = (*others, None, None)[:2]
        return replace(self, _paths=paths, _ends=ends, _labels=labels, _label_ends=label_ends, _spans=spans)

    def __len__(self) -> int:
        return len(self._ends)

    def name(self, index: int) -> str:
        """The path of a video, relative to the root, with its stretch if it is one (see data/stretch.py)."""
        return os.fsdecode(self._paths[self._own(self._ends, index)].tobytes())

    def _own(self, ends: np.ndarray, index: int) -> slice:
        index = range(len(self))[index]
        return slice(ends[index - 1] if index else 0, ends[index])

    def names(self) -> list[str]:
        """The paths of all videos, relative to the root."""
        return [self.name(index) for index in range(len(self))]

    def path(self, index: int) -> str:
        """The path of a video, including the root."""
        return os.path.join(self.root, self.name(index))

    def file(self, index: int) -> str:
        """The file or folder of frames that a video is or is a stretch of, including the root."""
        return file_of(self.path(index))

    @property
    def multi_label(self) -> bool:
        """Whether videos may have several labels, or none."""
        return self._label_ends is not None

    @property
    def timed(self) -> bool:
        """Whether labels have times within their videos, as Charades' actions do."""
        return self._spans is not None

    def label(self, index: int) -> int:
        """The class of a video: an index into `classes`. Multi-label sets have `labels` only."""
        return int(self.single_labels[index])

    @property
    def single_labels(self) -> np.ndarray:
        """The class of each video, int32 (N,), of sets with one label per video."""
        assert self._label_ends is None, "a multi-label set has labels(), not label()"
        return self._labels

    def labels(self, index: int, start: float = 0.0, end: float = np.inf) -> tuple[int, ...]:
        """The classes of a video, or of its seconds `start` to `end`: indices into `classes`, ascending.

        >>> videos = Videos.of("/data", [("a.mp4", [0, 1])], ("sit", "stand"), spans=[(0, 4.5), (4, 9)])
        >>> videos.labels(0), videos.labels(0, start=5, end=6)
        ((0, 1), (1,))
        """
        if self._label_ends is None:
            return (int(self._labels[index]),)
        own = self._own(self._label_ends, index)
        labels = self._labels[own]
        if self._spans is not None:
            labels = labels[(self._spans[own, 0] <= end) & (self._spans[own, 1] >= start)]
        return tuple(np.unique(labels).tolist())

    def targets(self, index: int, start: float = 0.0, end: float = np.inf) -> np.ndarray:
        """The result of `labels` as a multi-hot row: uint8 (classes,)."""
        row = np.zeros(len(self.classes), np.uint8)
        row[[*self.labels(index, start, end)]] = 1
        return row

    def only(self, rows: np.ndarray, left_out: tuple[tuple[str, int], ...] = ()) -> Videos:
        """Select the videos in these rows, in the order of the list; `left_out` counts the others by reason.

        >>> videos = Videos.of("", [("a.mp4", 1), ("b.mp4", 0), ("c.mp4", 1)], classes=("cat", "dog"))
        >>> videos.only(np.array([2, 0]), left_out=(("corrupt", 1),)).names()
        ['a.mp4', 'c.mp4']
        """
        chosen = np.zeros(len(self), bool)
        chosen[rows] = True

        def select(data: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            lengths = np.diff(ends, prepend=0)
            return data[np.repeat(chosen, lengths)], np.cumsum(lengths[chosen])

        arrays = [*select(self._paths, self._ends)]
        arrays += [self._labels[chosen]] if self._label_ends is None else select(self._labels, self._label_ends)
        if self._label_ends is not None and self._spans is not None:
            arrays.append(select(self._spans, self._label_ends)[0])
        return replace(self.with_arrays(arrays), left_out=left_out)

    @property
    def left_out_words(self) -> str:
        """How many videos were left out, and why: `3 left out (2 corrupt, 1 missing)`."""
        return f"{sum(n for _, n in self.left_out)} left out ({', '.join(f'{n} {why}' for why, n in self.left_out)})"

    @property
    def videos_per_class(self) -> np.ndarray:
        """The number of videos of each class: int64 (classes,)."""
        if self._label_ends is None:
            return np.bincount(self._labels, minlength=len(self.classes))
        videos = np.repeat(np.arange(len(self)), np.diff(self._label_ends, prepend=0))
        once = np.unique(np.stack([videos, self._labels]), axis=1)  # an action may happen twice in a video
        return np.bincount(once[1], minlength=len(self.classes))

    @property
    def fingerprint(self) -> str:
        """16 hex digits that depend on all paths (relative to the root), labels, classes, and their order."""
        digest = hashlib.sha256(self._paths.data)
        for data in self.arrays()[1:]:
            digest.update(data.astype(data.dtype.newbyteorder("<")).tobytes())
        digest.update("\0".join(self.classes).encode())
        return digest.hexdigest()[:16]

    @property
    def identity(self) -> str:
        return f"{len(self)} ({self.fingerprint})"


def few(names: Sequence[str]) -> str:
    """The first names of a list, for a message."""
    return ", ".join(map(printable, names[:EXAMPLES])) + (", ..." if names[EXAMPLES:] else "")


def printable(name: str) -> str:
    """The name, quoted with escapes if it has line breaks or bytes that are not UTF-8.

    >>> print(printable("a b.mp4"), printable("a\\nb.mp4"))
    a b.mp4 'a\\nb.mp4'
    """
    return name if name.isprintable() else repr(name)


def leaves_root(relative: str) -> bool:
    """Whether a normalized path, relative to the root, leads out of it.

    >>> leaves_root("../a.mp4"), leaves_root("..a.mp4")
    (True, False)
    """
    return relative == os.pardir or relative.startswith(os.pardir + os.sep)


def mirrored_labels(classes: Sequence[str], pairs: Iterable[tuple[str | int, str | int]]) -> tuple[int, ...]:
    """The label of each class after a horizontal flip; `pairs` of classes, by name or number, swap.

    >>> mirrored_labels(("left", "up", "right"), [("left", "right")])
    (2, 1, 0)
    """
    number_of: dict[str | int, int] = {name: n for n, name in enumerate(classes)} | {n: n for n in range(len(classes))}
    labels = [*range(len(classes))]
    for one, other in pairs:
        for name in (one, other):
            if name not in number_of:
                near = difflib.get_close_matches(str(name), classes, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"use names or numbers 0 to {len(classes) - 1}"
                raise DataError(f"data.mirrored: {name!r} is not one of the {len(classes)} classes; {hint}")
        labels[number_of[one]], labels[number_of[other]] = number_of[other], number_of[one]
    return tuple(labels)


def mirrored_pairs(classes: Sequence[str]) -> tuple[list[tuple[str, str]], bool]:
    """Pairs of classes that a flip swaps, by their names, and whether a class names a side but has no mirror image.

    Names may be in camel case.

    >>> mirrored_pairs(["turn left", "turn right", "stop"])
    ([('turn left', 'turn right')], False)
    >>> mirrored_pairs(["look left", "stop"])
    ([], True)
    """
    pairs: list[tuple[str, str]] = []
    paired: set[str] = set()
    sided: set[str] = set()
    words = {name: re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name) for name in classes}
    known = {words[name].lower(): name for name in reversed(classes)}
    for one, other in SIDES:
        word, either = (re.compile(rf"(?<![a-z])({side})(?![a-z])", re.IGNORECASE) for side in (one, f"{one}|{other}"))
        sided |= {name for name in classes if either.search(words[name])}
        for name in classes:
            twin = known.get(word.sub(other, words[name]).lower()) if word.search(words[name]) else None
            if twin and not {name, twin} & paired:
                pairs.append((name, twin))
                paired |= {name, twin}
    return pairs, bool(sided - paired)
