#!/usr/bin/env python
"""Time each augmentation for one clip, next to cutting and decoding that clip, on one core.

    taskset -c 0 python scripts/bench_augment.py [--repeats 15] [--clips 8]

Makes two videos of 340x256, 10 s, in a temporary folder. All rows alternate, so that load on the
machine affects all of them equally; a row is the median over the repeats. RandAugment runs in the loader's workers, the
rest on the device, here the CPU, where `input` (to float, normalized) is part of every step. The last two rows are
torchvision's ColorJitter, which mgtrain does not use.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import ColorJitter

from mgtrain.clips.augment import colour_rows, erase, erase_rows, jitter_colour, normalize, rand_augment, sent
from mgtrain.clips.cut import cut_random
from mgtrain.clips.decode import VideoFile
from mgtrain.data.synthetic import synthesize
from mgtrain.engine.mix import mix, mix_rows
from mgtrain.grid import Grid
from mgtrain.models.part import Part
from mgtrain.recipe import Augment
from mgtrain.rng import Draw, generator

GRIDS = [Grid(8, 158, (8, 8), (181, 320)), Grid(32, 224, (2, 2), (256, 320))]
COLOURS = Augment(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--clips", type=int, default=8, help="clips of a batch on the device, an even number")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        synthesize(Path(folder), videos_per_class={"train": 1}, classes=("left", "up"), frames=300, size=(340, 256))
        paths = sorted(Path(folder).rglob("*.mp4"))
        for grid in GRIDS:
            rows = dict(work(grid, paths, options.clips))
            print(f"{grid.frames} x {grid.crop}²: ms per clip, median of {options.repeats}")
            for name, milliseconds in interleaved(rows, options.repeats).items():
                print(f"  {name:32}{milliseconds:8.2f}")


def work(grid: Grid, paths: list[Path], clips: int) -> Iterator[tuple[str, tuple[int, Callable[[], object]]]]:
    """The calls to time: name -> (clips of a call, call)."""
    numbers = count()

    def decode() -> np.ndarray:
        n = next(numbers)
        with VideoFile(paths[n % len(paths)]) as file:
            return file.read([cut_random(grid, file.info, generator(0, Draw.CUT, n))])[0]

    clip = decode()
    batch = torch.from_numpy(np.stack([clip] * clips)).permute(0, 4, 1, 2, 3)  # (B, 3, T, S, S)
    x = normalize(batch, torch.channels_last_3d)
    draws = np.random.default_rng(0).random((clips, 5))
    labels, part = torch.arange(clips) % 8, Part(0, clips, clips, 1)

    def there(rows: np.ndarray) -> Tensor:
        return sent({"rows": rows}, x.device)["rows"]

    def mixed(mixup: float, cutmix: float) -> object:
        return mix(x, labels, there(mix_rows(part, grid.crop, generator(0, Draw.MIX, 0), mixup, cutmix)), classes=8)

    hsv, grey = ColorJitter(0.4, 0.4, 0.4, 0.1), ColorJitter(0.4, 0.4, 0.4)
    two = Augment(rand_augment=2)

    yield "open, cut and decode", (1, decode)
    yield "RandAugment, 2 operations", (1, lambda: rand_augment(clip, two, 0, next(numbers)))
    yield "input", (clips, lambda: normalize(batch, torch.channels_last_3d))
    yield "colour", (clips, lambda: jitter_colour(x, there(colour_rows(draws[:, :4], COLOURS))))
    yield "erasing, all clips", (clips, lambda: erase(x, there(erase_rows(draws, 1, grid.crop))))
    yield "MixUp", (clips, lambda: mixed(1, 0))
    yield "CutMix", (clips, lambda: mixed(0, 1))
    pixels = torch.from_numpy(clip).permute(0, 3, 1, 2)  # (T, 3, S, S)
    yield "torchvision's ColorJitter", (1, lambda: hsv(pixels))
    yield "torchvision's, without hue", (1, lambda: grey(pixels))


def interleaved(rows: dict[str, tuple[int, Callable[[], object]]], repeats: int) -> dict[str, float]:
    """Median milliseconds per clip of each row."""
    times: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(repeats + 1):
        for name, (clips, call) in rows.items():
            start = time.perf_counter()
            call()
            if turn:  # the first warms up
                times[name].append(1000 * (time.perf_counter() - start) / clips)
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    main()
