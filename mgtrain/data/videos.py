"""A list of labelled videos that stays small in memory."""

from __future__ import annotations

import difflib
import hashlib
import os
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mgtrain.errors import DataError

EXAMPLES = 3  # names that a report gives of what it counts


@dataclass(frozen=True, slots=True, eq=False)
class Videos:
    """Videos and their labels, in a fixed order. `missing` counts the rows of the list whose video was not found.

    A million videos are one block of bytes and two arrays, not millions of Python objects: worker processes share
    them, and reading copies no memory pages (reference counts would). A set is multi-label if any video came with a
    sequence of labels.

    >>> videos = Videos.of("/data", [("a b.mp4", 1), ("c.mp4", 0)], classes=("cat", "dog"))
    >>> len(videos), videos.path(0), videos.label(0)
    (2, '/data/a b.mp4', 1)
    >>> videos = Videos.of("/data", [("a b.mp4", [0, 1]), ("c.mp4", [])], classes=("cat", "dog"))
    >>> videos.multi_label, videos.labels(0), videos.labels(1)
    (True, (0, 1), ())
    """

    root: str
    classes: tuple[str, ...]
    missing: int
    missing_names: tuple[str, ...]  # the first few
    _paths: np.ndarray = field(repr=False)  # uint8: bytes, relative to the root, one after the other
    _ends: np.ndarray = field(repr=False)  # int64 (N,): where each path ends in `_paths`
    _labels: np.ndarray = field(repr=False)  # int32 (N,), or all labels of all videos, one after the other
    _label_ends: np.ndarray | None = field(repr=False)  # int64 (N,): where each video's end; None: one label each
    _spans: np.ndarray | None = field(default=None, repr=False)  # float64 (labels, 2): seconds; None: always
    left_out: tuple[tuple[str, int], ...] = ()  # why videos were left out, and how many

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
        """From (path relative to `root`, label or labels) pairs; `spans` are each label's start and end in seconds."""
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
        """The arrays that grow with the number of videos."""
        arrays = (self._paths, self._ends, self._labels, self._label_ends, self._spans)
        return [array for array in arrays if array is not None]

    def without_arrays(self) -> Videos:
        """All but `arrays()`, which `with_arrays` puts back."""
        none = np.empty(0, np.uint8)
        return replace(self, _paths=none, _ends=none, _labels=none, _label_ends=None, _spans=None)

    def with_arrays(self, arrays: Sequence[np.ndarray]) -> Videos:
        """The same videos in other arrays of the same contents, such as shared memory."""
        paths, ends, labels, *others = arrays
        label_ends, spans = (*others, None, None)[:2]
        return replace(self, _paths=paths, _ends=ends, _labels=labels, _label_ends=label_ends, _spans=spans)

    def __len__(self) -> int:
        return len(self._ends)

    def name(self, index: int) -> str:
        """The path of a video, relative to the root."""
        index = range(len(self))[index]
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._paths[start : int(self._ends[index])].tobytes())

    def path(self, index: int) -> str:
        """The path of a video, including the root."""
        return os.path.join(self.root, self.name(index))

    @property
    def multi_label(self) -> bool:
        """Whether videos may have several labels, or none."""
        return self._label_ends is not None

    def label(self, index: int) -> int:
        """The class of a video: an index into `classes`. Multi-label sets have `labels` only."""
        assert self._label_ends is None, "a multi-label set has labels(), not label()"
        return int(self._labels[index])

    def labels(self, index: int, start: float = 0.0, end: float = np.inf) -> tuple[int, ...]:
        """The classes of a video, or of its seconds `start` to `end`: indices into `classes`, ascending.

        >>> videos = Videos.of("/data", [("a.mp4", [0, 1])], ("sit", "stand"), spans=[(0, 4.5), (4, 9)])
        >>> videos.labels(0), videos.labels(0, start=5, end=6)
        ((0, 1), (1,))
        """
        if self._label_ends is None:
            return (int(self._labels[index]),)
        index = range(len(self))[index]
        mine = slice(int(self._label_ends[index - 1]) if index else 0, int(self._label_ends[index]))
        labels = self._labels[mine]
        if self._spans is not None:
            labels = labels[(self._spans[mine, 0] <= end) & (self._spans[mine, 1] >= start)]
        return tuple(np.unique(labels).tolist())

    def targets(self, index: int, start: float = 0.0, end: float = np.inf) -> np.ndarray:
        """The labels as a multi-hot row: uint8 (classes,)."""
        row = np.zeros(len(self.classes), np.uint8)
        row[[*self.labels(index, start, end)]] = 1
        return row

    def only(self, chosen: np.ndarray, left_out: tuple[tuple[str, int], ...]) -> Videos:
        """The videos where `chosen`, bool (N,), is true; `left_out` counts the others by reason.

        >>> videos = Videos.of("", [("a.mp4", 1), ("b.mp4", 0), ("c.mp4", 1)], classes=("cat", "dog"))
        >>> few = videos.only(np.array([True, False, True]), left_out=(("corrupt", 1),))
        >>> [(few.name(n), few.label(n)) for n in range(len(few))]
        [('a.mp4', 1), ('c.mp4', 1)]
        """

        def picked(data: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            lengths = np.diff(ends, prepend=0)
            return data[np.repeat(chosen, lengths)], np.cumsum(lengths[chosen])

        arrays = [*picked(self._paths, self._ends)]
        if self._label_ends is None:
            arrays.append(self._labels[chosen])
        else:
            arrays += picked(self._labels, self._label_ends)
            arrays += [] if self._spans is None else [picked(self._spans, self._label_ends)[0]]
        return replace(self.with_arrays(arrays), left_out=left_out)

    @property
    def left_out_words(self) -> str:
        """How many videos were left out, and why: `3 left out (2 corrupt, 1 missing)`."""
        return f"{sum(n for _, n in self.left_out)} left out ({', '.join(f'{n} {why}' for why, n in self.left_out)})"

    @property
    def videos_per_class(self) -> np.ndarray:
        """How many videos have each class: int64 (classes,)."""
        if self._label_ends is None:
            return np.bincount(self._labels, minlength=len(self.classes))
        videos = np.repeat(np.arange(len(self)), np.diff(self._label_ends, prepend=0))
        once = np.unique(np.stack([videos, self._labels]), axis=1)  # an action may happen twice in a video
        return np.bincount(once[1], minlength=len(self.classes))

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with any path (relative to the root), label, class, or their order."""
        digest = hashlib.sha256(self._paths.data)
        for data in self.arrays()[1:]:
            digest.update(data.astype(data.dtype.newbyteorder("<")).tobytes())
        digest.update("\0".join(self.classes).encode())
        return digest.hexdigest()[:16]

    @property
    def identity(self) -> str:
        """How many videos there are, and their fingerprint."""
        return f"{len(self)} ({self.fingerprint})"


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
    labels = list(range(len(classes)))
    for one, other in pairs:
        i, j = (_label_of(name, classes) for name in (one, other))
        labels[i], labels[j] = j, i
    return tuple(labels)


def _label_of(name: str | int, classes: Sequence[str]) -> int:
    if name in range(len(classes)) if isinstance(name, int) else name in classes:
        return name if isinstance(name, int) else classes.index(name)
    near = difflib.get_close_matches(str(name), classes, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"use names or numbers 0 to {len(classes) - 1}"
    raise DataError(f"data.mirrored: {name!r} is not one of the {len(classes)} classes; {hint}")
