#!/usr/bin/env python
"""Measure what a list of a million videos costs: time to start, memory of each process, and its growth.

    python scripts/bench_million.py [--videos 1000000] [--workers 2] [--json]

The list and the index of a prepared set are made up; there are no videos. Measured are

    list         seconds of CPU time and MiB to read the list
    prepared     the same, to find every one of its videos in the index of a prepared set
    first step   seconds of CPU time to draw the first epoch's order and the first step's clips
    workers      MiB that a worker process holds by itself (not shared with the others), when it starts and after it
                 has looked at the paths and labels of all videos: what grows is what copy-on-write has copied
    hand-over    MiB and seconds to send the data set to a process that is not forked (spawn, forkserver)
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mgtrain.clips.order import step_requests
from mgtrain.clips.prepared import Settings, write_settings
from mgtrain.clips.units import RandomClips
from mgtrain.data import open_videos
from mgtrain.data.videos import Videos
from mgtrain.preflight.prepare import write_index
from mgtrain.recipe import parse_recipe
from mgtrain.schedule import make_plan

CLASSES = 400
RECIPE = """
data: {{format: list, root: {root}, train: train.csv, val: train.csv, classes: 400, prepared: {prepared}}}
clip: {{frames: 32, stride: 2, crop: 224, short_side: [256, 320]}}
evaluation: {{crop: 256, short_side: 256}}
model: {{name: i3d_r50}}
batch: {{clips: 64, bn_clips: 8}}
optim: {{lr: 0.1, stages: [20, 10]}}
schedule: {{name: multigrid}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(Path(folder), options.videos, options.workers)
    if options.json:
        print(json.dumps({"schema": "mgtrain.bench_million/1", "videos": options.videos, "measured": measured}))
    else:
        print(f"{options.videos:,} videos")
        for name, values in measured.items():
            print(f"  {name:12}" + ", ".join(f"{key} {value:.2f}" for key, value in values.items()))


def measure(folder: Path, count: int, workers: int) -> dict[str, dict[str, float]]:
    """What it costs, in the order of a run's start."""
    paths = make_list(folder, count)
    make_set(folder / "prepared", paths)
    del paths
    measured: dict[str, dict[str, float]] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        start, before = time.process_time(), own_memory()
        yield
        measured[name] = {"seconds": time.process_time() - start, "MiB": own_memory() - before}

    recipe = parse_recipe(RECIPE.format(root=folder, prepared=folder / "prepared"), "bench_million")
    with timed("list"):
        videos = open_videos("list", str(folder), "train.csv")
    with timed("prepared"):
        dataset = RandomClips(videos, recipe)
    with timed("first step"):
        step_requests(make_plan(recipe, len(videos))[0], len(videos), recipe.seed)
    measured["workers"] = grow(lambda: look_at_all(videos), workers)
    start = time.process_time()
    handed_over = pickle.dumps(dataset)
    pickle.loads(handed_over)
    measured["hand-over"] = {"seconds": time.process_time() - start, "MiB": len(handed_over) / 2**20}
    return measured


def make_list(folder: Path, count: int) -> list[str]:
    """Write the list; the videos' paths."""
    paths = [f"class_{n % CLASSES:03}/abcdefghijk_{n:07}_{n + 10:07}.mp4" for n in range(count)]
    (folder / "train.csv").write_text("".join(f"{path} {n % CLASSES}\n" for n, path in enumerate(paths)))
    return paths


def make_set(folder: Path, paths: list[str]) -> None:
    """Write the index of a prepared set of these videos, of 300 frames each."""
    settings = Settings((256, 160), 25, None)
    write_settings(folder, settings)
    sizes = [{"level": 256, "width": 340, "height": 256, "start": 0}]
    facts = {"frames": 300, "fps": 30.0, "width": 340, "height": 256, "stored": 300, "levels": sizes}
    write_index(folder, settings, ({"path": path, **facts} for path in paths))
    (folder / "offsets.bin").write_bytes(bytes(4 * 301))


def own_memory() -> float:
    """MiB that this process does not share with another."""
    rows = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return sum(int(row[1]) for row in rows if row[0].startswith("Private_")) / 1024


def grow(work: Callable[[], None], workers: int) -> dict[str, float]:
    """The memory of forked processes at their start and after each has done the work: of the largest."""
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    for _ in range(workers):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=worker, args=(work, theirs)))
        pipes.append(ours)
        processes[-1].start()
    results = [pipe.recv() for pipe in pipes]
    for process, pipe in zip(processes, pipes, strict=True):
        pipe.send(None)  # none ends before all have measured, or what they share would become their own
        process.join()
    return {"MiB at start": max(first for first, _ in results), "MiB at end": max(last for _, last in results)}


def worker(work: Callable[[], None], pipe: Any) -> None:
    first = own_memory()
    work()
    pipe.send((first, own_memory()))
    pipe.recv()


def look_at_all(videos: Videos) -> None:
    for n in range(len(videos)):
        videos.path(n)
        videos.label(n)


if __name__ == "__main__":
    main()
