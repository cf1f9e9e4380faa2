#!/usr/bin/env python
"""Measure the gain from decoding a video once for all its views instead of once per view.

    python scripts/bench_views.py k400_slowfast_8x8_r50_baseline data.root=/data/k400 --views 10x3 --videos 20

Both ways alternate on the same videos, in one process with one thread. Prints medians of the seconds per video, and
checks that the clips are the same.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch

from mgtrain.clips.cut import cut_views
from mgtrain.clips.decode import VideoFile
from mgtrain.clips.units import evaluation_grid
from mgtrain.data import open_videos
from mgtrain.recipe import load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--views", default="10x3")
    parser.add_argument("--videos", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_intermixed_args()
    torch.set_num_threads(1)

    recipe = load_recipe(options.recipe, options.overrides)
    data, grid = recipe.data, evaluation_grid(recipe)
    times, crops = map(int, options.views.split("x"))
    videos = open_videos(data.format, data.root, data.val, None, data.outside_root)
    paths = [videos.path(n) for n in range(min(options.videos, len(videos)))]

    def at_once(path: str) -> list[np.ndarray]:
        with VideoFile(path) as file:
            return file.read(cut_views(grid, file.info, times, crops, fps=recipe.clip.fps))

    def one_by_one(path: str) -> list[np.ndarray]:
        clips = []
        for view in range(times * crops):
            with VideoFile(path) as file:
                clips += file.read([cut_views(grid, file.info, times, crops, fps=recipe.clip.fps)[view]])
        return clips

    seconds: dict[str, list[float]] = {"once": [], "per view": []}
    for _ in range(options.repeats):
        for path in paths:
            clips = []
            for way, read in (("once", at_once), ("per view", one_by_one)):
                begun = time.perf_counter()
                clips.append(read(path))
                seconds[way].append(time.perf_counter() - begun)
            assert all(np.array_equal(a, b) for a, b in zip(*clips, strict=True)), f"{path}: the clips differ"
    once, each = (statistics.median(seconds[way]) for way in ("once", "per view"))
    ratios = [b / a for a, b in zip(seconds["once"], seconds["per view"], strict=True)]
    print(
        f"{options.views} views of {len(paths)} videos: {1000 * once:.0f} ms a video decoded once, "
        f"{1000 * each:.0f} ms decoded per view; "
        f"{statistics.median(ratios):.1f}x ({min(ratios):.1f} to {max(ratios):.1f})"
    )


if __name__ == "__main__":
    main()
