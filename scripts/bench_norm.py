#!/usr/bin/env python
"""Time a training step with BatchNorm over groups of clips against one with plain BatchNorm over all of them.

    python scripts/bench_norm.py --threads 1 --repeats 5

Both are the same network in the same process; their steps alternate, in both memory layouts. Prints median seconds, and
the median and range of the ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

from mgtrain.engine.update.optim import make_optimizer
from mgtrain.models import build_model
from mgtrain.models.part import Part, set_part
from mgtrain.recipe import Optim

LAYOUTS = {"channels last": torch.channels_last_3d, "channels first": torch.contiguous_format}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="slowfast_r50")
    parser.add_argument("--shape", type=int, nargs=3, default=[8, 8, 80], metavar=("CLIPS", "FRAMES", "CROP"))
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clips, frames, crop = args.shape
    print(f"{args.model}, {clips}x{frames}x{crop}², {args.threads} threads, medians of {args.repeats} steps")
    print(f"{'layout':16}{'groups':>7}{'plain':>10}{'groups':>10}{'cost':>8}{'range':>18}")
    for name, layout in LAYOUTS.items():
        model = build_model(args.model, classes=400).to(memory_format=layout).train()
        optimizer = make_optimizer(model, Optim(lr=1e-5, stages=(1.0,)))
        x = torch.randn(clips, 3, frames, crop, crop).to(memory_format=layout)

        def step(
            part: Part | None,
            model: nn.Module = model,
            x: torch.Tensor = x,
            optimizer: torch.optim.Optimizer = optimizer,
        ) -> float:
            set_part(model, part)
            start = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.int64)).backward()
            optimizer.step()
            return time.perf_counter() - start

        for groups in args.groups:
            part = Part(0, clips, clips, groups)
            step(None), step(part)
            rows = [(step(None), step(part)) for _ in range(args.repeats)]
            ratios = sorted(grouped / plain - 1 for plain, grouped in rows)
            plain, grouped = (statistics.median(column) for column in zip(*rows, strict=True))
            spread = f"{100 * ratios[0]:+.1f} .. {100 * ratios[-1]:+.1f} %"
            cost = f"{100 * statistics.median(ratios):+.1f} %"
            print(f"{name:16}{groups:>7}{plain:>9.3f}s{grouped:>9.3f}s{cost:>8}{spread:>18}", flush=True)


if __name__ == "__main__":
    main()
