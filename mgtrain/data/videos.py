"""A list of labelled videos that stays small in memory, and the checks that its readers share."""

from __future__ import annotations

import csv
import difflib
import errno
import hashlib
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from mgtrain.errors import DataError

EXAMPLES = 3  # names that a report gives of whatever it counts
MOST_BYTES = 1 << 32  # of a file of annotations

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, eq=False)
class Videos:
    """Videos and their labels, in a fixed order. `missing` counts the rows of the list whose video was not found.

    A million videos are one block of bytes and two arrays, not millions of Python objects: worker processes share
    them, and reading them copies nothing (reference counts would). A set is single-label, or multi-label if any video
    came with a sequence of labels.

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
    _label_ends: np.ndarray | None = field(
        repr=False
    )  # int64 (N,): where each video's end in `_labels`; None: one each
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
        """From (path relative to `root`, label or labels) pairs; `spans` are the seconds from and to which each of all
        labels is true of its video."""
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
        """All that grows with the number of videos."""
        arrays = (self._paths, self._ends, self._labels, self._label_ends, self._spans)
        return [array for array in arrays if array is not None]

    def without_arrays(self) -> Videos:
        """The rest, to be given `with_arrays` what `arrays` gave."""
        none = np.empty(0, np.uint8)
        return replace(self, _paths=none, _ends=none, _labels=none, _label_ends=None, _spans=None)

    def with_arrays(self, arrays: Sequence[np.ndarray]) -> Videos:
        """These videos, told of by other arrays of the same contents, such as ones in shared memory."""
        paths, ends, labels, *others = arrays
        label_ends, spans = (*others, None, None)[:2]
        return replace(self, _paths=paths, _ends=ends, _labels=labels, _label_ends=label_ends, _spans=spans)

    def __len__(self) -> int:
        return len(self._ends)

    def name(self, index: int) -> str:
        """The path of a video within the root."""
        index = range(len(self))[index]
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._paths[start : int(self._ends[index])].tobytes())

    def path(self, index: int) -> str:
        """The path of a video, with the root."""
        return os.path.join(self.root, self.name(index))

    @property
    def multi_label(self) -> bool:
        """Whether videos may have several labels, or none."""
        return self._label_ends is not None

    def label(self, index: int) -> int:
        """The class of a video: an index into `classes`. In a multi-label set there is no such thing."""
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
        """The same as ones among zeros: uint8 (classes,)."""
        row = np.zeros(len(self.classes), np.uint8)
        row[[*self.labels(index, start, end)]] = 1
        return row

    def only(self, chosen: np.ndarray, left_out: tuple[tuple[str, int], ...]) -> Videos:
        """The videos where `chosen`, bool (N,), is true, in their order; the others are `left_out`.

        >>> videos = Videos.of("", [("a.mp4", 1), ("b.mp4", 0), ("c.mp4", 1)], classes=("cat", "dog"))
        >>> few = videos.only(np.array([True, False, True]), left_out=(("corrupt", 1),))
        >>> [(few.name(n), few.label(n)) for n in range(len(few))]
        [('a.mp4', 1), ('c.mp4', 1)]
        """

        def picked(data: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            lengths = np.diff(ends, prepend=0)
            return data[np.repeat(chosen, lengths)], np.cumsum(lengths[chosen])

        paths, ends = picked(self._paths, self._ends)
        one_each = np.arange(1, len(self) + 1)
        old_ends = one_each if self._label_ends is None else self._label_ends
        labels, label_ends = picked(self._labels, old_ends)
        return replace(
            self,
            _paths=paths,
            _ends=ends,
            _labels=labels,
            _label_ends=None if self._label_ends is None else label_ends,
            _spans=None if self._spans is None else picked(self._spans, old_ends)[0],
            left_out=left_out,
        )

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
        """16 hex digits that change with any path (within the root), label, class, or their order."""
        digest = hashlib.sha256(self._paths.data)
        digest.update(self._ends.astype("<i8").tobytes())
        digest.update(self._labels.astype("<i4").tobytes())
        if self._label_ends is not None:
            digest.update(self._label_ends.astype("<i8").tobytes())
        if self._spans is not None:
            digest.update(self._spans.astype("<f8").tobytes())
        digest.update("\0".join(self.classes).encode())
        return digest.hexdigest()[:16]

    @property
    def identity(self) -> str:
        """How many videos there are, and their fingerprint."""
        return f"{len(self)} ({self.fingerprint})"


class Finder:
    """Finds videos by their names without suffix in the folders under a root; each folder is read once.

    What is not found is counted in `missing` and named in `missing_names`.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.missing = 0
        self.missing_names: list[str] = []
        self._files: dict[str, dict[str, str]] = {}  # folder -> its files by name without suffix

    def find(self, name: str, folders: Iterable[str]) -> str | None:
        """The path, relative to the root, of the first `folder/name.*` that is there; hidden files do not count."""
        for folder in folders:
            if folder not in self._files:
                self._files[folder] = _files(os.path.join(self.root, folder))
            if name in self._files[folder]:
                return os.path.join(folder, self._files[folder][name])
        self.missing += 1
        if len(self.missing_names) < EXAMPLES:
            self.missing_names.append(name)
        return None

    def none_found(self, listing: Path, folders: Iterable[str]) -> DataError:
        """The error to raise where not one video of a list was found."""
        places = ", ".join(str(Path(self.root, folder)) for folder in folders)
        return DataError(
            f"{listing}: none of its {self.missing} videos is there; "
            f"looked for {self.missing_names[0]}.* and so on in {places}"
        )


def _files(folder: str) -> dict[str, str]:
    """The files of a folder by their names without suffix; none if there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return {os.path.splitext(entry.name)[0]: entry.name for entry in entries if not entry.name.startswith(".")}
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            return {}
        raise


def printable(name: str) -> str:
    """The name as it is, or quoted with escapes where it holds line breaks or bytes that are no UTF-8.

    >>> print(printable("a b.mp4"), printable("a\\nb.mp4"))
    a b.mp4 'a\\nb.mp4'
    """
    return name if name.isprintable() else repr(name)


def leaves_root(relative: str) -> bool:
    """Whether a normal path, relative to the root, leads out of it.

    >>> leaves_root("../a.mp4"), leaves_root("..a.mp4")
    (True, False)
    """
    return relative == os.pardir or relative.startswith(os.pardir + os.sep)


def mirrored_labels(classes: Sequence[str], pairs: Iterable[tuple[str | int, str | int]]) -> tuple[int, ...]:
    """The label of each class's videos once they are flipped; `pairs`, by name or number, become one another.

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
    raise DataError(f"data.mirrored: {name!r} is none of the {len(classes)} classes; {hint}")


def check_exists(path: Path, kind: str) -> None:
    """`DataError` that helps to find it, if there is no such file or folder; `kind` says in words what it should be."""
    if path.exists():
        return
    parent = next(folder for folder in path.parents if folder.exists())
    name = path.relative_to(parent).parts[0]
    names = sorted(entry for entry in os.listdir(parent) if not entry.startswith(".")) if parent.is_dir() else []
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or names[:5]
    there = f"{parent} has {', '.join(map(repr, near))}" if near else f"{parent} is empty"
    raise DataError(f"{path}: no such {kind}; {there}")


def read_file(path: Path) -> bytes:
    """The bytes of a regular file; whatever else has a name (a folder, a pipe, a device) is refused."""
    if not path.is_file():
        raise DataError(f"{path}: is no file; name one")
    if path.stat().st_size > MOST_BYTES:
        raise DataError(f"{path}: is larger than {MOST_BYTES >> 30} GiB, so it is no annotation; name another file")
    return path.read_bytes()


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file, with or without a byte order mark."""
    lines = []
    content = read_file(path).removeprefix(b"\xef\xbb\xbf")
    if b"\0" in content:
        raise DataError(
            f"{path}:{content[: content.index(0)].count(10) + 1}: has a zero byte; it has to be a text file"
        )
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            lines.append(line.decode())
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
    return lines


class Table:
    """The rows of a CSV: its `columns`, and by iteration each line's number and cells by column, empty if not there."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows = csv.DictReader(read_lines(path), restval="")
        self.columns: Sequence[str] = self._read(lambda: self._rows.fieldnames or ())

    def __iter__(self) -> Iterator[tuple[int, dict[str, str]]]:
        while (row := self._read(lambda: next(self._rows, None))) is not None:
            yield self._rows.line_num, row

    def _read(self, what: Callable[[], Result]) -> Result:
        try:
            return what()
        except csv.Error as error:
            raise DataError(f"{self._path}:{self._rows.line_num}: not a valid CSV: {error}; mend this line") from None
