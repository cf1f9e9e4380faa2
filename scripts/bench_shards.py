"""Measure how fast prepared videos are opened and read, from a file each and from tar files (shards).

    python scripts/bench_shards.py --folder /scratch/bench [--videos 20000] [--rounds 5]

The script prepares a few synthetic videos, copies each many times into two prepared sets, one of files and one of
shards, on the disk of `--folder`, and reads videos in random order from both alternately, in one process:

* opens: open the file, or find the member, and read the bytes of one frame; nothing is decoded.
* clips: open, read and decode 8 frames of a crop of 112 pixels, as a loader process does.

Each is measured with cached data, per second of CPU time, and of wall-clock time after the system was told to drop
the sets' pages from its cache (`posix_fadvise`), so that they are read from the disk. Names and inodes stay cached,
which favours files; as root on a machine of your own, `--drop-caches` drops these, too. Rates are medians over rounds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path

import numpy as np

from mgtrain.clips.cut import Cut
from mgtrain.clips.prepared import PreparedSet, Settings, level_path, write_settings
from mgtrain.data.synthetic import synthesize
from mgtrain.preflight.prepare import PreparedManifest, prepare, write_index
from mgtrain.preflight.prepare.shards import ShardWriter
from mgtrain.processes.cores import cpu_name
from mgtrain.rng import Draw, generator

LEVEL = 160  # short side, pixels
FRAMES, CROP = 8, 112  # of a clip
SHARD = 2**28  # bytes
CHUNK = 50  # videos to read from one set before the other takes its turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="new folder on the disk to measure; removed at end")
    parser.add_argument("--videos", type=int, default=20_000, help="videos of each set")
    parser.add_argument("--clips", type=int, default=2_000, help="clips to decode in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--drop-caches", action="store_true", help="drop all caches of the machine, as root")
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    try:
        sets = make_sets(options.folder, options.videos)
        measure(sets, options)
    finally:
        shutil.rmtree(options.folder)


def make_sets(folder: Path, videos: int) -> dict[str, PreparedSet]:
    """A set of files and a set of shards with the same videos."""
    root, few = folder / "originals", folder / "few"
    synthesize(root, videos_per_class={"train": 10, "val": 1}, classes=("left", "up"), size=(214, LEVEL))
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.mp4"))
    prepare(root, paths, few, Settings((LEVEL,), 25, None), os.cpu_count() or 1)
    sets = {}
    for name, shard_bytes in {"files": None, "shards": SHARD}.items():
        settings = Settings((LEVEL,), 25, None, shard_bytes)
        out = folder / name
        write_settings(out, settings)
        shutil.copy(few / "offsets.bin", out)
        loose = out if name == "files" else folder / "loose"
        known = list(PreparedManifest(few).records.values())
        with PreparedManifest(out) as manifest, ShardWriter(out, SHARD, []) as shards:
            for n in range(videos):
                record = deepcopy(known[n % len(known)])
                source = level_path(few, LEVEL, record["path"])
                record["path"] = f"{n % 400:03d}/{n:08d}.mp4"
                to = level_path(loose, LEVEL, record["path"])
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, to)
                if name == "shards":
                    shards.add(record, loose)
                    to.unlink()
                manifest.add(record)
            write_index(out, settings, manifest.records.values())
        sets[name] = PreparedSet(out)
    os.sync()
    return sets


def measure(sets: dict[str, PreparedSet], options: argparse.Namespace) -> None:
    """Measure both sets alternately and print a table."""
    tried: dict[str, tuple[Callable[[PreparedSet, int, str], object], int]] = {
        "opens": (open_one, options.videos),
        "clips": (decode_one, options.clips),
    }
    rates: dict[tuple[str, str, str], list[float]] = {}
    dropped = ""
    for turn in range(options.rounds):
        for what, (act, count) in tried.items():
            for cache, clock in {"cached": time.process_time, "from disk": time.perf_counter}.items():
                chosen = generator(turn, Draw.CHOICE).permutation(options.videos)[:count].tolist()
                paths = [f"{n % 400:03d}/{n:08d}.mp4" for n in chosen]
                seconds = dict.fromkeys(sets, 0.0)
                for ready in sets.values():
                    if cache == "from disk":
                        dropped = drop(ready.folder, options.drop_caches)
                    else:
                        run(act, ready, paths)  # so that they are cached
                for first in range(0, count, CHUNK):
                    for name, ready in sets.items():
                        start = clock()
                        run(act, ready, paths[first : first + CHUNK])
                        seconds[name] += clock() - start
                for name in sets:
                    rates.setdefault((what, cache, name), []).append(count / seconds[name])
    size = sum(path.stat().st_size for path in (sets["shards"].folder / "shards").iterdir())
    print(f"{options.videos:,} videos, {size / 1e9:.2f} GB; {cpu_name()}; {kind_of(options.folder)}; {dropped}")
    print("| per second, one process | files | shards | shards to files |\n|---|---|---|---|")
    for what in tried:
        for cache in ("cached", "from disk"):
            ours, theirs = rates[what, cache, "shards"], rates[what, cache, "files"]
            ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
            cells = f"{statistics.median(theirs):,.0f} | {statistics.median(ours):,.0f} | {ratio:.2f}x"
            print(f"| {what}, {cache} | {cells} |")


def run(act: Callable[[PreparedSet, int, str], object], ready: PreparedSet, paths: Sequence[str]) -> None:
    """Open or decode these videos."""
    for row, path in zip(ready.find(paths).tolist(), paths, strict=True):
        act(ready, row, path)


def open_one(ready: PreparedSet, row: int, path: str) -> bytes:
    """Open a video and read the bytes of a frame in its middle."""
    video = ready.open(row, path)
    place = ready._rows[row]["levels"][0]
    begin, end = ready.offsets(int(place["start"]), video.info.frames // 2)
    with ready.file(place, level_path(ready.folder, LEVEL, path)) as (file, first):
        return os.pread(file, end - begin, first + begin)


def decode_one(ready: PreparedSet, row: int, path: str) -> list[np.ndarray]:
    """Decode a clip."""
    video = ready.open(row, path)
    frames = tuple(range(0, video.info.frames, max(1, video.info.frames // FRAMES)))[:FRAMES]
    return video.read([Cut(frames, (0, 0, CROP, CROP), CROP, flip=False)])


def drop(folder: Path, everything: bool) -> str:
    """Drop the set's pages from the cache, or everything; returns what was dropped."""
    os.sync()
    if everything:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
        return "pages, names and inodes dropped"
    for path in folder.rglob("*"):
        if path.suffix in (".mp4", ".tar"):
            file = os.open(path, os.O_RDONLY)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)
    return "pages dropped, names and inodes cached"


def kind_of(folder: Path) -> str:
    """The kind of file system that a folder is on."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    inside = [(place, kind) for place, kind in mounts if str(folder.resolve()).startswith(place.rstrip("/") + "/")]
    return max(inside, key=lambda mount: len(mount[0]))[1]


if __name__ == "__main__":
    main()
