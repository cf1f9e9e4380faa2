"""A list of labelled videos that stays small in memory, and the checks that its readers share."""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mgtrain.errors import DataError


@dataclass(frozen=True, slots=True, eq=False)
class Videos:
    """Videos and their labels, in a fixed order. `missing` counts the rows of the list whose video was not found.

    A million videos are one block of bytes and two arrays, not millions of Python objects: worker processes share
    them, and reading them copies nothing (reference counts would).

    >>> videos = Videos.of("/data", [("a b.mp4", 1), ("c.mp4", 0)], classes=("cat", "dog"))
    >>> len(videos), videos.path(0), videos.label(0)
    (2, '/data/a b.mp4', 1)
    """

    root: str
    classes: tuple[str, ...]
    missing: int
    _paths: bytes = field(repr=False)  # relative to the root, one after the other
    _ends: np.ndarray = field(repr=False)  # int64 (N,): where each path ends in `_paths`
    _labels: np.ndarray = field(repr=False)  # int32 (N,)

    @classmethod
    def of(
        cls,
        root: str | os.PathLike[str],
        entries: Iterable[tuple[str, int]],
        classes: Sequence[str],
        missing: int = 0,
    ) -> Videos:
        """From (path relative to `root`, label) pairs."""
        paths, labels = [], []
        for path, label in entries:
            paths.append(os.fsencode(path))
            labels.append(label)
        ends = np.cumsum([len(path) for path in paths], dtype=np.int64)
        return cls(os.fspath(root), tuple(classes), missing, b"".join(paths), ends, np.array(labels, np.int32))

    def __len__(self) -> int:
        return len(self._labels)

    def path(self, index: int) -> str:
        """The path of a video, with the root."""
        index = range(len(self))[index]
        start = int(self._ends[index - 1]) if index else 0
        return os.path.join(self.root, os.fsdecode(self._paths[start : int(self._ends[index])]))

    def label(self, index: int) -> int:
        """The class of a video: an index into `classes`."""
        return int(self._labels[index])

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with any path (within the root), label, class, or their order."""
        digest = hashlib.sha256(self._paths)
        digest.update(self._ends.astype("<i8").tobytes())
        digest.update(self._labels.astype("<i4").tobytes())
        digest.update("\0".join(self.classes).encode())
        return digest.hexdigest()[:16]


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


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file, with or without a byte order mark."""
    lines = []
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        try:
            lines.append(line.decode())
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{number}: not UTF-8 ({error.reason}); save the file as UTF-8") from error
    return lines
