"""Compare the splits of a data set with the files on disk, and find duplicates and leakage between splits.

1. Look up every row's file or folder of frames; missing, empty and AppleDouble files are not usable.
2. Compare contents: files of equal size by a few blocks, files with equal blocks by all their bytes.
3. Compare rows within and between splits by path, content and source (a Kinetics clip's YouTube video). Stretches of a
   file are different rows, but leak from one split to another.
4. Search the root for videos that no split lists.
"""

import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np

from mgtrain.console import ShowProgress, no_progress
from mgtrain.data.formats.reading import is_video
from mgtrain.data.frames import Frames, is_frame, list_frames
from mgtrain.data.manifest import key_of
from mgtrain.data.missing import explain
from mgtrain.data.stretch import parted
from mgtrain.data.videos import EXAMPLES, Videos, printable
from mgtrain.errors import DataError, VideoError

THREADS = 16  # more than cores, because they wait for the disk
CHUNK = 1000  # rows that a thread looks up at a time
BLOCK = 4096  # bytes of the first, middle and last block
KINETICS_NAME = re.compile(r"(?:.*/)?(.{11})_\d{6}_\d{6}\.[^./]+", re.DOTALL)

# One row of a split. 64-bit hashes stand for strings and contents, so a million rows are one small array: `path` for
# the path with its stretch, `file` for the path alone, `content` for the file's bytes, `part` for the stretch of these.
ROW = np.dtype(
    [("split", "i8"), ("row", "i8"), ("size", "i8"), ("apple_double", "?"), ("label", "u8"), ("path", "u8"),
     ("file", "u8"), ("content", "u8"), ("part", "u8"), ("source", "u8")]
)  # fmt: skip

WARNINGS = {
    "missing": "rows without a file",
    "empty": "empty files, skipped",
    "apple_double": "AppleDouble files (._*), which are not videos, skipped",
    "repeated": "rows that repeat a path",
    "duplicates": "files with the content of another",
    "conflicts": "files with the content of another but a different label",
    "same_path": "leakage, the same videos",
    "same_file": "leakage, stretches of the same file",
    "same_content": "leakage, the same content under different names",
    "same_source": "leakage, clips of the same source",
}
NOTES = {
    "extra": "under the root, videos that no split lists",
    "extra_apple_double": "under the root, AppleDouble files (._*) that no split lists",
    "unreadable": "under the root, folders that cannot be read",
}
WITHIN_SPLIT = ("missing", "empty", "apple_double", "repeated", "duplicates")


@dataclass(frozen=True, slots=True)
class Finding:
    """A fact about one or more splits; `kind` is a key of `WARNINGS` or `NOTES`."""

    kind: str
    splits: tuple[str, ...]
    count: int
    examples: tuple[str, ...]
    hint: str = ""  # what to do

    @property
    def warns(self) -> bool:
        """Whether it is about the splits, not about other files under the root."""
        return self.kind in WARNINGS

    def __str__(self) -> str:
        what = f"{' and '.join(self.splits)}: {WARNINGS[self.kind]}" if self.warns else NOTES[self.kind]
        more = ", ..." if self.count > len(self.examples) else ""
        return f"{what}: {self.count:,} ({', '.join(self.examples)}{more}){self.hint and f'; {self.hint}'}"


@dataclass(frozen=True, slots=True)
class Index:
    """The number of rows of each split, its usable rows (int64, ascending), and the findings.

    `copies` are usable rows with the same path or content as an earlier row or a row of a later split.
    """

    rows: dict[str, int]
    usable: dict[str, np.ndarray]
    copies: dict[str, np.ndarray]
    findings: tuple[Finding, ...]

    def counts(self) -> dict[str, dict[str, int]]:
        """For each split: its rows, those with a usable file, and its problems."""
        counts = {split: {"rows": rows, "matched": len(self.usable[split])} for split, rows in self.rows.items()}
        counted = {(finding.kind, finding.splits): finding.count for finding in self.findings}
        for split, of in counts.items():
            of |= {kind: counted.get((kind, (split,)), 0) for kind in WITHIN_SPLIT}
        return counts

    def describe(self) -> dict[str, Any]:
        """The index as JSON."""
        findings = [{**asdict(finding), "warning": finding.warns} for finding in self.findings]
        return {"splits": self.counts(), "findings": findings}


def make_index(splits: Mapping[str, Videos], *, contents: bool = True, progress: ShowProgress = no_progress) -> Index:
    """Index the files of splits that share a root. Raises `DataError` if `contents` to compare cannot be read."""
    names, videos = list(splits), list(splits.values())

    def pairs(kind: str, about: tuple[str, ...], rows: np.ndarray, twins: np.ndarray) -> Finding:
        """A finding about rows and the rows that they equal; its examples are pairs of names, or one if both equal."""
        both = zip(rows[:EXAMPLES], twins[:EXAMPLES], strict=True)
        examples = [tuple(printable(videos[r["split"]].name(int(r["row"]))) for r in pair) for pair in both]
        return Finding(kind, about, len(rows), tuple(a if a == b else f"{a} = {b}" for a, b in examples))

    chunks = [
        (split, range(len(of))[first : first + CHUNK])
        for split, of in enumerate(videos)
        for first in range(0, len(of), CHUNK)
    ]
    tables = _in_threads(lambda chunk: _look_up(videos[chunk[0]], *chunk), chunks, "thousand rows looked up", progress)
    table = np.concatenate(tables)
    listed = set(table["file"].tolist())
    findings = list(_without_video(splits, table))
    table = table[(table["size"] > 0) & ~table["apple_double"]]
    if contents:
        _hash_contents(table, videos, progress)
    table["part"] ^= table["content"]
    by_split = {name: table[table["split"] == split] for split, name in enumerate(names)}
    for name, rows in by_split.items():
        for kind, key in (("repeated", "path"), ("duplicates", "part")):
            places, firsts = _repeated(rows[key])
            findings.append(pairs(kind, (name,), rows[places], rows[firsts]))
            rows = np.delete(rows, places)
    places, firsts = _repeated(table["part"])
    differ = table["label"][places] != table["label"][firsts]
    findings.append(pairs("conflicts", tuple(names), table[places[differ]], table[firsts[differ]]))
    for one, other in combinations(names, 2):
        rows = by_split[other]
        for key in ("path", "file", "content", "source"):  # each leak counts once, as the strongest kind
            leaks = np.isin(rows[key], by_split[one][key])
            twins = [np.argmax(by_split[one][key] == row[key]) for row in rows[leaks][:EXAMPLES]]
            findings.append(pairs(f"same_{key}", (one, other), rows[leaks], by_split[one][np.array(twins, int)]))
            rows = rows[~leaks]
    findings += _unlisted(videos[0].root, listed, progress)
    last_first = np.concatenate([*by_split.values()][::-1])
    copies = last_first[_repeated(last_first["part"])[0]]
    return Index(
        {name: len(of) + of.missing for name, of in splits.items()},
        {name: rows["row"] for name, rows in by_split.items()},
        {name: copies["row"][copies["split"] == split] for split, name in enumerate(names)},
        tuple(finding for finding in findings if finding.count),
    )


def _look_up(videos: Videos, split: int, rows: range) -> np.ndarray:
    """The facts about some rows for which no file is opened: `ROW` (rows,)."""
    table = np.zeros(len(rows), ROW)
    for place, row in enumerate(rows):
        name = videos.name(row)
        path, stretch = parted(name)
        size, apple_double = _size(os.path.join(videos.root, path)), os.path.basename(path).startswith("._")
        file, label, part = key_of(path), key_of(repr(videos.labels(row))), key_of(str(stretch)) if stretch else 0
        source = key_of(youtube_video(path) or path)
        table[place] = (split, row, size, apple_double, label, key_of(name), file, file, part, source)
    return table


def youtube_video(path: str) -> str | None:
    """The YouTube video of a Kinetics clip; None for other names."""
    clip = KINETICS_NAME.fullmatch(path)
    return clip[1] if clip else None


def _size(path: str) -> int:
    """Bytes of a file, or of some frames of a folder; -1 if it is missing or something else."""
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            return sum(os.stat(file).st_size for file in _first_middle_last(list_frames(path)))
        return status.st_size if stat.S_ISREG(status.st_mode) else -1
    except (OSError, VideoError):
        return -1


def _first_middle_last(frames: Frames) -> list[str]:
    return [frames.file(index) for index in (0, len(frames) // 2, len(frames) - 1)]


def _without_video(splits: Mapping[str, Videos], table: np.ndarray) -> Iterator[Finding]:
    """Findings about rows whose file is missing, empty or an AppleDouble file."""
    real, size = ~table["apple_double"], table["size"]
    problems = {"missing": (size < 0) & real, "empty": (size == 0) & real, "apple_double": ~real}
    for split, (name, videos) in enumerate(splits.items()):
        for kind, where in problems.items():
            rows = table["row"][where & (table["split"] == split)]
            count, names = (videos.missing, videos.missing_names) if kind == "missing" else (0, ())
            examples = tuple(map(printable, (*names, *(videos.name(int(row)) for row in rows[:EXAMPLES]))))
            hint = explain(videos, int(rows[0])) if kind == "missing" and len(rows) else ""
            yield Finding(kind, (name,), len(rows) + count, examples[:EXAMPLES], hint)


def _hash_contents(table: np.ndarray, videos: Sequence[Videos], progress: ShowProgress) -> None:
    """Set `content` to a hash of the file's bytes where several files are equal; elsewhere it is the path's hash."""
    _, first, inverse = np.unique(table["file"], return_index=True, return_inverse=True)
    files = table[first]  # every file once
    alike = np.flatnonzero(_shared(files["size"]))
    for what, whole in (("files of equal size compared", False), ("possible duplicates compared", True)):
        paths = [videos[file["split"]].file(int(file["row"])) for file in files[alike]]
        digests = np.array(_in_threads(partial(_hash, whole=whole), paths, what, progress), np.uint64)
        same = _shared(digests)
        alike, digests = alike[same], digests[same]
    files["content"][alike] = digests
    table["content"] = files["content"][inverse]


def _unlisted(root: str, listed: set[int], progress: ShowProgress) -> Iterator[Finding]:
    """Findings about other files under the root: unlisted videos, AppleDouble files, unreadable folders."""
    unreadable: list[str] = []
    examples: dict[str, list[str]] = {"extra": [], "extra_apple_double": []}
    counts = dict.fromkeys(examples, 0)
    for done, (folder, folders, files) in enumerate(os.walk(root, onerror=lambda e: unreadable.append(e.filename))):
        progress("folders searched", done, done + len(folders))
        folders.sort()
        within = os.path.relpath(folder, root)
        here = [os.path.normpath(os.path.join(within, file)) for file in sorted(files) if is_video(file)]
        if not here and not folders and any(map(is_frame, files)):
            here = [within]
        for name in here:
            if key_of(name) not in listed:
                kind = "extra_apple_double" if os.path.basename(name).startswith("._") else "extra"
                counts[kind] += 1
                examples[kind] += [printable(name)] if len(examples[kind]) < EXAMPLES else []
    for kind, names in examples.items():
        yield Finding(kind, (), counts[kind], tuple(names))
    yield Finding("unreadable", (), len(unreadable), tuple(map(printable, unreadable[:EXAMPLES])))


def _repeated(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The places of ids that also occur earlier, and the first place of each.

    >>> _repeated(np.array([7, 5, 7, 7]))
    (array([2, 3]), array([0, 0]))
    """
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    places = np.flatnonzero(first[inverse] != np.arange(len(ids)))
    return places, first[inverse][places]


def _shared(ids: np.ndarray) -> np.ndarray:
    """Whether each id occurs several times: bool (N,)."""
    _, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
    shared: np.ndarray = counts[inverse] > 1
    return shared


def _in_threads(function: Callable[[Any], Any], items: Sequence[Any], what: str, progress: ShowProgress) -> list[Any]:
    """The function's results in the order of the items."""
    results = []
    with ThreadPoolExecutor(THREADS) as pool:
        for result in pool.map(function, items):
            results.append(result)
            progress(what, len(results), len(items))
    return results


def _hash(path: str, whole: bool) -> int:
    """A 64-bit hash of a file or of all frames of a folder.

    Unless `whole`, it is of the size and the first, middle and last block of a file, and of such frames of a folder.
    """
    digest = hashlib.blake2b(digest_size=8)
    try:
        files = [path]
        if os.path.isdir(path):
            frames = list_frames(path)
            files = [frames.file(index) for index in range(len(frames))] if whole else _first_middle_last(frames)
        for name in files:
            with open(name, "rb") as file:
                if whole:
                    for block in iter(partial(file.read, 1 << 20), b""):
                        digest.update(block)
                else:
                    size = os.fstat(file.fileno()).st_size
                    digest.update(size.to_bytes(8, "little"))
                    for start in (0, size // 2, max(0, size - BLOCK)):
                        file.seek(start)
                        digest.update(file.read(BLOCK))
    except OSError as error:
        advice = "correct its permissions, or do not compare contents"
        raise DataError(f"{path}: cannot be read: {error.strerror}; {advice}") from None
    return int.from_bytes(digest.digest(), "little")
