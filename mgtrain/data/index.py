"""What is on the disk of the videos that the splits of a data set name, and what they share that they should not.

1. Every row's file is looked at: missing and empty files and AppleDouble files are left out of the index.
2. Contents are compared: files of equal size by a few blocks, those that agree in these by all their bytes.
3. Rows are compared within and between splits, by path, content and source (a Kinetics clip's YouTube video).
4. The root is searched for videos that no split names.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, TypeVar

import numpy as np

from mgtrain.data.folder import SUFFIXES
from mgtrain.data.videos import EXAMPLES, Videos, printable
from mgtrain.errors import DataError

THREADS = 16  # they wait for the disk
CHUNK = 1000  # rows that a thread looks at, at a time
BLOCK = 4096  # bytes of the first, middle and last block
KINETICS_NAME = re.compile(r"(?:.*/)?(.{11})_\d{6}_\d{6}\.[^./]+", re.DOTALL)

# What is known of each row; hashes of 64 bits stand for strings and bytes, so a million rows are one small array.
ROW = np.dtype(
    [("split", "i8"), ("row", "i8"), ("size", "i8"), ("apple_double", "?"), ("label", "u8"), ("path", "u8"),
     ("content", "u8"), ("source", "u8")]
)  # fmt: skip

WARNINGS = {
    "missing": "rows without a file",
    "empty": "files without a byte, left out",
    "apple_double": "AppleDouble files (._*), which are no videos, left out",
    "repeated": "rows that repeat a path",
    "duplicates": "files with the content of another",
    "conflicts": "files with the content of another, but not its label",
    "same_path": "leakage, the same videos",
    "same_content": "leakage, the same content under other names",
    "same_source": "leakage, clips of the same source",
}
NOTES = {
    "extra": "under the root, videos that no split names",
    "extra_apple_double": "under the root, AppleDouble files (._*) that no split names",
    "unreadable": "under the root, folders that cannot be read",
}
WITHIN_SPLIT = ("missing", "empty", "apple_double", "repeated", "duplicates")

Progress = Callable[[str, int, int], None]  # told what is being done, how many are done, and of how many
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to know of one split, or of what several share: `kind` is a key of `WARNINGS` or `NOTES`."""

    kind: str
    splits: tuple[str, ...]
    count: int
    examples: tuple[str, ...]

    @property
    def warns(self) -> bool:
        """Whether it is a matter of the splits, and not just of what else there is."""
        return self.kind in WARNINGS

    def __str__(self) -> str:
        what = f"{' and '.join(self.splits)}: {WARNINGS[self.kind]}" if self.warns else NOTES[self.kind]
        more = ", ..." if self.count > len(self.examples) else ""
        return f"{what}: {self.count:,} ({', '.join(self.examples)}{more})"


@dataclass(frozen=True, slots=True)
class Index:
    """How many rows each split has, which of its videos can be used (int64, ascending), and what was found.

    `copies` are usable rows that an earlier row, or one of a later split, has the path or the content of.
    """

    rows: dict[str, int]
    usable: dict[str, np.ndarray]
    copies: dict[str, np.ndarray]
    findings: tuple[Finding, ...]

    def counts(self) -> dict[str, dict[str, int]]:
        """By split: its rows, those that match a usable file, and what is wrong within it."""
        wrong = {(found.kind, found.splits): found.count for found in self.findings}
        return {
            name: {
                "rows": rows,
                "matched": len(self.usable[name]),
                **{kind: wrong.get((kind, (name,)), 0) for kind in WITHIN_SPLIT},
            }
            for name, rows in self.rows.items()
        }

    def describe(self) -> dict[str, Any]:
        """The index as JSON."""
        findings = [{**asdict(found), "warning": found.warns} for found in self.findings]
        return {"splits": self.counts(), "findings": findings}


def make_index(splits: Mapping[str, Videos], *, contents: bool = True, progress: Progress | None = None) -> Index:
    """Look at the files of all splits, which share their root; with `contents` also at what is in them.

    Raises:
        DataError: a file cannot be read.
    """
    show = progress or (lambda what, done, total: None)
    names, videos = list(splits), list(splits.values())

    def name(row: np.void) -> str:
        return printable(videos[row["split"]].name(int(row["row"])))

    def path(row: np.void) -> str:
        return str(videos[row["split"]].path(int(row["row"])))

    chunks = [
        (split, range(first, min(first + CHUNK, len(of))))
        for split, of in enumerate(videos)
        for first in range(0, len(of), CHUNK)
    ]
    table = np.concatenate(
        list(_each(lambda chunk: _look(videos[chunk[0]], *chunk), chunks, "thousand rows looked at", show))
    )
    listed = set(table["path"].tolist())
    findings = []
    for split, key in enumerate(names):
        own = table[table["split"] == split]
        problems = {
            "missing": own[(own["size"] < 0) & ~own["apple_double"]],
            "empty": own[(own["size"] == 0) & ~own["apple_double"]],
            "apple_double": own[own["apple_double"]],
        }
        for kind, rows in problems.items():
            of = videos[split]
            before = (of.missing, of.missing_names) if kind == "missing" else (0, ())
            examples = (*before[1], *map(name, rows[:EXAMPLES]))[:EXAMPLES]
            findings.append(Finding(kind, (key,), len(rows) + before[0], examples))

    table = table[(table["size"] > 0) & ~table["apple_double"]]
    if contents:
        _compare_contents(table, path, show)
    by_split = [table[table["split"] == split] for split in range(len(names))]
    for key, own in zip(names, by_split, strict=True):
        findings += _repeats(key, own, name)
    findings.append(_conflicts(tuple(names), table, name))
    for one, other in combinations(range(len(names)), 2):
        findings += _leaks((names[one], names[other]), by_split[one], by_split[other], name)
    findings += _extra(videos[0].root, listed, show)
    last_first = np.concatenate(by_split[::-1])
    copies = last_first[_repeated(last_first["content"])[0]]
    return Index(
        {key: len(of) + of.missing for key, of in splits.items()},
        {key: own["row"] for key, own in zip(names, by_split, strict=True)},
        {key: copies["row"][copies["split"] == split] for split, key in enumerate(names)},
        tuple(found for found in findings if found.count),
    )


def _look(videos: Videos, split: int, rows: range) -> np.ndarray:
    """What is known of some rows before any file is opened: `ROW` (rows,)."""
    table = np.zeros(len(rows), ROW)
    table["split"], table["row"] = split, rows
    for place, row in enumerate(rows):
        name = videos.name(row)
        try:
            status = os.stat(os.path.join(videos.root, name))
            size = status.st_size if stat.S_ISREG(status.st_mode) else -1
        except OSError:
            size = -1
        path = _hash(os.fsencode(name))
        clip = KINETICS_NAME.fullmatch(name)
        source = _hash(os.fsencode(clip[1])) if clip else path
        label = _hash(repr(videos.labels(row)).encode())
        apple_double = os.path.basename(name).startswith("._")
        table[place] = (split, row, size, apple_double, label, path, path, source)
    return table


def _compare_contents(table: np.ndarray, path: Callable[[np.void], str], show: Progress) -> None:
    """Give rows whose files have equal bytes equal `content`: a hash of the bytes in place of that of the path."""
    _, first, inverse = np.unique(table["path"], return_index=True, return_inverse=True)
    files = table[first]  # every file once
    alike = np.flatnonzero(_shared(files["size"]))
    for what, digest in (
        ("files of equal size compared", _hash_of_blocks),
        ("possible duplicates compared", _hash_of_file),
    ):
        paths = [path(file) for file in files[alike]]
        digests = np.array(list(_each(digest, paths, what, show)), np.uint64)
        same = _shared(digests)
        alike, digests = alike[same], digests[same]
    files["content"][alike] = digests
    table["content"] = files["content"][inverse]


def _twins(
    kind: str, splits: tuple[str, ...], rows: np.ndarray, twins: np.ndarray, name: Callable[[np.void], str]
) -> Finding:
    """Rows and what they are like: the examples are pairs, or one name where both have it."""
    pairs = [(name(row), name(twin)) for row, twin in zip(rows[:EXAMPLES], twins[:EXAMPLES], strict=True)]
    return Finding(kind, splits, len(rows), tuple(a if a == b else f"{a} = {b}" for a, b in pairs))


def _repeats(split: str, rows: np.ndarray, name: Callable[[np.void], str]) -> Iterator[Finding]:
    """Rows of a split that have the path of an earlier one, and files that have the content of an earlier one."""
    for kind, key in (("repeated", "path"), ("duplicates", "content")):
        places, firsts = _repeated(rows[key])
        yield _twins(kind, (split,), rows[places], rows[firsts], name)
        rows = np.delete(rows, places)


def _conflicts(splits: tuple[str, ...], rows: np.ndarray, name: Callable[[np.void], str]) -> Finding:
    """Rows with the content of an earlier one, but another label."""
    places, firsts = _repeated(rows["content"])
    differ = rows["label"][places] != rows["label"][firsts]
    return _twins("conflicts", splits, rows[places[differ]], rows[firsts[differ]], name)


def _leaks(
    splits: tuple[str, str], one: np.ndarray, other: np.ndarray, name: Callable[[np.void], str]
) -> Iterator[Finding]:
    """Rows of the second split that the first has, too; each counts once, as the strongest kind."""
    for kind, key in (("same_path", "path"), ("same_content", "content"), ("same_source", "source")):
        leaks = np.isin(other[key], one[key])
        twins = [np.argmax(one[key] == row[key]) for row in other[leaks][:EXAMPLES]]
        yield _twins(kind, splits, other[leaks], one[np.array(twins, int)], name)
        other = other[~leaks]


def _extra(root: str, listed: set[int], show: Progress) -> Iterator[Finding]:
    """What else is under the root: videos that are not listed, AppleDouble files, folders that cannot be read."""
    unreadable: list[str] = []
    found: dict[str, list[str]] = {"extra": [], "extra_apple_double": []}  # the first few names
    counts = dict.fromkeys(found, 0)
    for done, (folder, folders, files) in enumerate(os.walk(root, onerror=lambda e: unreadable.append(e.filename))):
        show("folders searched", done, done + len(folders))
        folders.sort()
        within = os.path.relpath(folder, root)
        for file in sorted(files):
            name = os.path.normpath(os.path.join(within, file))
            if file.lower().endswith(SUFFIXES) and _hash(os.fsencode(name)) not in listed:
                kind = "extra_apple_double" if file.startswith("._") else "extra"
                counts[kind] += 1
                found[kind] += [printable(name)] if len(found[kind]) < EXAMPLES else []
    for kind, names in found.items():
        yield Finding(kind, (), counts[kind], tuple(names))
    yield Finding("unreadable", (), len(unreadable), tuple(map(printable, unreadable[:EXAMPLES])))


def _repeated(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The places of ids that stand at an earlier place, too, and the first place of each.

    >>> _repeated(np.array([7, 5, 7, 7]))
    (array([2, 3]), array([0, 0]))
    """
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    places = np.flatnonzero(first[inverse] != np.arange(len(ids)))
    return places, first[inverse][places]


def _shared(ids: np.ndarray) -> np.ndarray:
    """Which ids stand at several places: bool."""
    _, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
    shared: np.ndarray = counts[inverse] > 1
    return shared


def _each(function: Callable[[Item], Result], items: Sequence[Item], what: str, show: Progress) -> Iterator[Result]:
    """The function's results in order, worked out in threads."""
    with ThreadPoolExecutor(THREADS) as pool:
        for done, result in enumerate(pool.map(function, items), start=1):
            show(what, done, len(items))
            yield result


def _hash(data: bytes) -> int:
    """64 bits: two different ones of a million collide once in 37 million data sets."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _hash_of_blocks(path: str) -> int:
    """Of a file's size and its first, middle and last block."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            blocks = [size.to_bytes(8, "little")]
            for start in (0, size // 2, max(0, size - BLOCK)):
                file.seek(start)
                blocks.append(file.read(BLOCK))
    except OSError as error:
        raise _unreadable(path, error) from None
    return _hash(b"".join(blocks))


def _hash_of_file(path: str) -> int:
    digest = hashlib.blake2b(digest_size=8)
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise _unreadable(path, error) from None
    return int.from_bytes(digest.digest(), "little")


def _unreadable(path: str, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read: {error.strerror}; mend its permissions, or do not compare contents")
