#!/usr/bin/env python
"""Estimate a run on many GPUs: computing, exchange of gradients and loading in every phase, and where GPUs wait.

    python scripts/model_scaling.py k400_slowfast_8x8_r50_multigrid --gpus 8 128

The script estimates everything and measures nothing. Its assumptions are options, and are printed:

    GPU         3 x the forward pass's multiply-adds x 2, at --tflops per GPU, the same at every shape; then moving the
                activations kept for the backward pass through memory, --traffic times at --bandwidth
    host        --launches of kernels a step, --launch-us of a core each, at any number of BatchNorm groups; the host
                runs ahead of the GPU, so a step takes the longer of the two, which is `computing`
    exchange    gradients in float32, ring all-reduce of 2 (n-1)/n of their bytes at --gbytes per second and GPU,
                --latency per bucket and hop of the ring; all but the last bucket overlaps with the backward pass, which
                is two thirds of computing
    data        clips per second of one core, as `scripts/bench_decode.py` measured them
                (docs/explanation/performance.md), fitted by seconds = a + b x frames + c x frames x crop²; --cores for
                each GPU; loading runs beside computing

A step takes as long as loading, or as computing plus the exchange that does not overlap, whichever is slower. Within a
short cycle the loader catches up, so the estimate of a phase is its mean step over a cycle.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch

from mgtrain.console import duration
from mgtrain.engine.checks import check_shapes, make_model
from mgtrain.engine.machine.memory import Memory
from mgtrain.grid import Shape
from mgtrain.recipe import Recipe, load_recipe
from mgtrain.schedule import baseline_recipe, check_world, make_plan

BUCKET = 25 * 2**20  # bytes, DistributedDataParallel's
# frames, crop: clips per second of one core of an AMD EPYC, from ordinary and from prepared files
MEASURED = {(8, 112): (20.3, 371), (8, 158): (19.5, 304), (16, 224): (18.8, 147), (32, 224): (16.0, 78)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 128])
    parser.add_argument("--per-gpu", type=int, default=8, help="clips of the base shape (default: %(default)s)")
    for name, value, what in (
        ("tflops", 300.0, "speed of a GPU's convolutions"),
        ("bandwidth", 2700.0, "bandwidth of a GPU's memory, GB/s"),
        ("traffic", 6.0, "times that an activation goes through memory"),
        ("launches", 1500.0, "kernels of a step"),
        ("launch-us", 25.0, "microseconds of the host for each kernel"),
    ):
        parser.add_argument(f"--{name}", type=float, default=value, help=f"{what} (default: %(default)s)")
    parser.add_argument(
        "--gbytes", type=float, default=20, help="bandwidth of the exchange per GPU (default: %(default)s)"
    )
    parser.add_argument(
        "--latency", type=float, default=10e-6, help="seconds per bucket and hop (default: %(default)s)"
    )
    parser.add_argument("--cores", type=int, default=8, help="cores that load for each GPU (default: %(default)s)")
    options = parser.parse_intermixed_args()
    recipe = load_recipe(options.recipe, options.overrides)
    with torch.device("meta"):
        gradients = 4 * sum(parameter.numel() for parameter in make_model(recipe).parameters())
    print(
        f"assumed: {recipe.hardware.precision}; {options.tflops:g} TFLOP/s, {options.bandwidth:g} GB/s for "
        f"{options.traffic:g} times the activations and {options.cores} cores for each GPU; "
        f"{options.launches:g} launches of {options.launch_us:g} µs; {options.gbytes:g} GB/s and "
        f"{1e6 * options.latency:g} µs for the exchange of {gradients / 1e6:.0f} MB"
    )
    for gpus in options.gpus:
        larger = [*options.overrides, f"batch.clips={gpus * options.per_gpu}"]
        report(load_recipe(options.recipe, larger), gradients, gpus, options)


def report(recipe: Recipe, gradients: int, gpus: int, options: Any) -> None:
    """Print a line for each phase, and the times of both runs, from ordinary and from prepared files."""
    videos = recipe.data.videos or 240_000
    plan, baseline = make_plan(recipe, videos), make_plan(baseline_recipe(recipe), videos)
    shapes = dict.fromkeys([*plan.shapes(), recipe.base])
    flops, kept = check_shapes(recipe, shapes), Memory(recipe, shapes)
    host = options.launches * options.launch_us * 1e-6
    check_world(plan, gpus)
    print(f"\n{gpus} GPUs, batch.clips={recipe.base.clips}, {len(plan):,} steps; seconds of a step of each phase")
    print(
        f"{'phase':>6}{'clips':>20}{'GPU':>8}{'host':>8}{'exchange':>10}{'visible':>9}{'ordinary':>10}{'prepared':>10}"
    )
    hours: dict[str, list[float]] = {}
    for name, one in (("multigrid", plan), ("baseline", baseline)):
        totals = np.zeros(2)
        for phase in one.phases:
            cycle = phase.shapes
            gpu = float(np.mean([s.clips * (6 * flops[s] / (options.tflops * 1e12) + options.traffic * kept.per_clip(s)
                                            / (options.bandwidth * 1e9)) for s in cycle])) / gpus  # fmt: skip
            compute = max(gpu, host)
            exchange, visible = exchanged(gradients, gpus, compute, options)
            load = [
                float(np.mean([s.clips * seconds_of_clip(s, kind) for s in cycle])) / (options.cores * gpus)
                for kind in (0, 1)
            ]
            totals += phase.steps * np.maximum(compute + visible, load)
            if name == "multigrid":
                clips = "/".join(str(shape.clips) for shape in cycle)
                marks = "".join(f"{t:>9.3f}{'*' if t > compute + visible else ' '}" for t in load)
                print(f"{phase.index + 1:>6}{clips:>20}{gpu:>8.3f}{host:>8.3f}{exchange:>10.4f}{visible:>9.4f}{marks}")
        hours[name] = totals.tolist()
    for kind, files in enumerate(("ordinary", "prepared")):
        ours, theirs = hours["multigrid"][kind], hours["baseline"][kind]
        print(f"{files} files: {duration(theirs)} -> {duration(ours)}, {theirs / ours:.2f} times less")
    print("* waits for data")


def exchanged(gradients: int, gpus: int, compute: float, options: Any) -> tuple[float, float]:
    """Seconds of all all-reduces, and the seconds that the backward pass does not hide."""
    if gpus == 1:
        return 0.0, 0.0
    buckets = -(-gradients // BUCKET)

    def ring(size: float) -> float:
        return 2 * (gpus - 1) / gpus * size / (options.gbytes * 1e9) + 2 * (gpus - 1) * options.latency

    whole = buckets * ring(gradients / buckets)
    return whole, max(ring(min(gradients, BUCKET)), whole - compute * 2 / 3)


def seconds_of_clip(shape: Shape, kind: int) -> float:
    """Seconds of one core for a clip, from ordinary (0) or prepared files (1)."""
    terms = np.array([[1, frames, frames * crop**2 / 1e6] for frames, crop in MEASURED])
    times = np.array([1 / rates[kind] for rates in MEASURED.values()])
    weights = np.linalg.lstsq(terms / times[:, None], np.ones(len(times)), rcond=None)[0]  # least relative error
    return float(weights @ [1, shape.frames, shape.frames * shape.crop**2 / 1e6])


if __name__ == "__main__":
    main()
