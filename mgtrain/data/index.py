"""Compare the splits of a data set with the files on disk, and find duplicates and leakage between splits.

1. Look up every row's file; the index skips missing files, empty files and AppleDouble files.
2. Compare contents: files of equal size by a few blocks, those with equal blocks by all their bytes.
3. Compare rows within and between splits by path, content and source (a Kinetics clip's YouTube video).
4. Search the root for videos that no split lists.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from typing import Any, TypeVar

import numpy as np

from mgtrain.data.folder import is_video
from mgtrain.data.manifest import key_of
from mgtrain.data.videos import EXAMPLES, Videos, printable
from mgtrain.errors import DataError

THREADS = 16  # they wait for the disk
CHUNK = 1000  # rows that a thread looks up at a time
BLOCK = 4096  # bytes of the first, middle and last block
KINETICS_NAME = re.compile(r"(?:.*/)?(.{11})_\d{6}_\d{6}\.[^./]+", re.DOTALL)

# What is known of each row. 64-bit hashes stand for strings and contents, so a million rows are one small array.
ROW = np.dtype(
    [("split", "i8"), ("row", "i8"), ("size", "i8"), ("apple_double", "?"), ("label", "u8"), ("path", "u8"),
     ("content", "u8"), ("source", "u8")]
)  # fmt: skip

WARNINGS = {
    "missing": "rows without a file",
    "empty": "empty files, skipped",
    "apple_double": "AppleDouble files (._*), which are not videos, skipped",
    "repeated": "rows that repeat a path",
    "duplicates": "files with the content of another",
    "conflicts": "files with the content of another but a different label",
    "same_path": "leakage, the same videos",
    "same_content": "leakage, the same content under different names",
    "same_source": "leakage, clips of the same source",
}
NOTES = {
    "extra": "under the root, videos that no split lists",
    "extra_apple_double": "under the root, AppleDouble files (._*) that no split lists",
    "unreadable": "under the root, folders that cannot be read",
}
WITHIN_SPLIT = ("missing", "empty", "apple_double", "repeated", "duplicates")

Progress = Callable[[str, int, int], None]  # is called with the task, the items done and their total
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Finding:
    """A fact about one split or several together: `kind` is a key of `WARNINGS` or `NOTES`."""

    kind: str
    splits: tuple[str, ...]
    count: int
    examples: tuple[str, ...]

    @property
    def warns(self) -> bool:
        """Whether it concerns the splits, and not just other files under the root."""
        return self.kind in WARNINGS

    def __str__(self) -> str:
        what = f"{' and '.join(self.splits)}: {WARNINGS[self.kind]}" if self.warns else NOTES[self.kind]
        more = ", ..." if self.count > len(self.examples) else ""
        return f"{what}: {self.count:,} ({', '.join(self.examples)}{more})"


@dataclass(frozen=True, slots=True)
class Index:
    """The number of rows of each split, its usable videos (int64, ascending), and the findings.

    `copies` are usable rows whose path or content an earlier row, or one of a later split, has too.
    """

    rows: dict[str, int]
    usable: dict[str, np.ndarray]
    copies: dict[str, np.ndarray]
    findings: tuple[Finding, ...]

    def counts(self) -> dict[str, dict[str, int]]:
        """By split: its rows, those with a usable file, and its problems."""
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
    """Index the files of all splits, which share a root; with `contents` compare their bytes, too.

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
        list(_each(lambda chunk: _look_up(videos[chunk[0]], *chunk), chunks, "thousand rows looked up", show))
    )
    listed = set(table["path"].tolist())
    problems = {
        "missing": (table["size"] < 0) & ~table["apple_double"],
        "empty": (table["size"] == 0) & ~table["apple_double"],
        "apple_double": table["apple_double"],
    }
    findings = []
    for split, of in enumerate(videos):
        for kind, where in problems.items():
            rows = table[where & (table["split"] == split)]
            before = (of.missing, of.missing_names) if kind == "missing" else (0, ())
            examples = (*before[1], *map(name, rows[:EXAMPLES]))[:EXAMPLES]
            findings.append(Finding(kind, (names[split],), len(rows) + before[0], examples))

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


def _look_up(videos: Videos, split: int, rows: range) -> np.ndarray:
    """What is known of some rows before any file is opened: `ROW` (rows,)."""
    table = np.zeros(len(rows), ROW)
    for place, row in enumerate(rows):
        name = videos.name(row)
        try:
            status = os.stat(os.path.join(videos.root, name))
            size = status.st_size if stat.S_ISREG(status.st_mode) else -1
        except OSError:
            size = -1
        path, label = key_of(name), key_of(repr(videos.labels(row)))
        clip = KINETICS_NAME.fullmatch(name)
        source = key_of(clip[1]) if clip else path
        apple_double = os.path.basename(name).startswith("._")
        table[place] = (split, row, size, apple_double, label, path, path, source)
    return table


def _compare_contents(table: np.ndarray, path: Callable[[np.void], str], show: Progress) -> None:
    """Set `content`, at first the path's hash, to a hash of the bytes where several files have the same bytes."""
    _, first, inverse = np.unique(table["path"], return_index=True, return_inverse=True)
    files = table[first]  # every file once
    alike = np.flatnonzero(_shared(files["size"]))
    for what, whole in (("files of equal size compared", False), ("possible duplicates compared", True)):
        paths = [path(file) for file in files[alike]]
        digests = np.array(list(_each(partial(_hash, whole=whole), paths, what, show)), np.uint64)
        same = _shared(digests)
        alike, digests = alike[same], digests[same]
    files["content"][alike] = digests
    table["content"] = files["content"][inverse]


def _twins(
    kind: str, splits: tuple[str, ...], rows: np.ndarray, twins: np.ndarray, name: Callable[[np.void], str]
) -> Finding:
    """Rows and their twins: the examples are pairs, or one name if both have the same."""
    pairs = [(name(row), name(twin)) for row, twin in zip(rows[:EXAMPLES], twins[:EXAMPLES], strict=True)]
    return Finding(kind, splits, len(rows), tuple(a if a == b else f"{a} = {b}" for a, b in pairs))


def _repeats(split: str, rows: np.ndarray, name: Callable[[np.void], str]) -> Iterator[Finding]:
    """Rows of a split that have the path of an earlier one, and files that have the content of an earlier one."""
    for kind, key in (("repeated", "path"), ("duplicates", "content")):
        places, firsts = _repeated(rows[key])
        yield _twins(kind, (split,), rows[places], rows[firsts], name)
        rows = np.delete(rows, places)


def _conflicts(splits: tuple[str, ...], rows: np.ndarray, name: Callable[[np.void], str]) -> Finding:
    """Rows with the content of an earlier one but a different label."""
    places, firsts = _repeated(rows["content"])
    differ = rows["label"][places] != rows["label"][firsts]
    return _twins("conflicts", splits, rows[places[differ]], rows[firsts[differ]], name)


def _leaks(
    splits: tuple[str, str], one: np.ndarray, other: np.ndarray, name: Callable[[np.void], str]
) -> Iterator[Finding]:
    """Rows of the second split that the first has too; each counts once, as the strongest kind."""
    for kind, key in (("same_path", "path"), ("same_content", "content"), ("same_source", "source")):
        leaks = np.isin(other[key], one[key])
        twins = [np.argmax(one[key] == row[key]) for row in other[leaks][:EXAMPLES]]
        yield _twins(kind, splits, other[leaks], one[np.array(twins, int)], name)
        other = other[~leaks]


def _extra(root: str, listed: set[int], show: Progress) -> Iterator[Finding]:
    """Other files under the root: unlisted videos, AppleDouble files, folders that cannot be read."""
    unreadable: list[str] = []
    found: dict[str, list[str]] = {"extra": [], "extra_apple_double": []}  # the first few names
    counts = dict.fromkeys(found, 0)
    for done, (folder, folders, files) in enumerate(os.walk(root, onerror=lambda e: unreadable.append(e.filename))):
        show("folders searched", done, done + len(folders))
        folders.sort()
        within = os.path.relpath(folder, root)
        for file in sorted(files):
            name = os.path.normpath(os.path.join(within, file))
            if is_video(file) and key_of(name) not in listed:
                kind = "extra_apple_double" if file.startswith("._") else "extra"
                counts[kind] += 1
                found[kind] += [printable(name)] if len(found[kind]) < EXAMPLES else []
    for kind, names in found.items():
        yield Finding(kind, (), counts[kind], tuple(names))
    yield Finding("unreadable", (), len(unreadable), tuple(map(printable, unreadable[:EXAMPLES])))


def _repeated(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The places of ids that occur earlier too, and the first place of each.

    >>> _repeated(np.array([7, 5, 7, 7]))
    (array([2, 3]), array([0, 0]))
    """
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    places = np.flatnonzero(first[inverse] != np.arange(len(ids)))
    return places, first[inverse][places]


def _shared(ids: np.ndarray) -> np.ndarray:
    """Which ids occur several times: bool."""
    _, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
    shared: np.ndarray = counts[inverse] > 1
    return shared


def _each(function: Callable[[Item], Result], items: Sequence[Item], what: str, show: Progress) -> Iterator[Result]:
    """The function's results in order, computed in threads."""
    with ThreadPoolExecutor(THREADS) as pool:
        for done, result in enumerate(pool.map(function, items), start=1):
            show(what, done, len(items))
            yield result


def _hash(path: str, whole: bool) -> int:
    """64 bits of a file's bytes; unless `whole`, of its size and its first, middle and last block."""
    digest = hashlib.blake2b(digest_size=8)
    try:
        with open(path, "rb") as file:
            if whole:
                while block := file.read(1 << 20):
                    digest.update(block)
            else:
                size = os.fstat(file.fileno()).st_size
                digest.update(size.to_bytes(8, "little"))
                for start in (0, size // 2, max(0, size - BLOCK)):
                    file.seek(start)
                    digest.update(file.read(BLOCK))
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror}; correct its permissions, or do not compare contents"
        ) from None
    return int.from_bytes(digest.digest(), "little")
