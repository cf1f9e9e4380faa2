#!/usr/bin/env python
"""Compare two ranks of one thread with one rank of two threads, and time the exchange of gradients.

    python scripts/bench_ranks.py demo_multigrid --trace trace.json

Both compute the same steps of a recipe's plan without loading data; the configurations alternate. With ranks, a step is
timed with and without the exchange (`no_sync`), and a trace of one step is written for chrome://tracing or
perfetto.dev: all-reduces that overlap with the backward pass lie beside it in the trace, not behind it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from mgtrain.engine.checks import make_model
from mgtrain.engine.step import to_device
from mgtrain.engine.update.optim import make_optimizer
from mgtrain.models.part import Part, set_part
from mgtrain.processes.distributed import connect, launch, no_sync, replicate
from mgtrain.recipe import load_recipe
from mgtrain.schedule import make_plan

EXCHANGE = "gloo:all_reduce"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args()
    if options.worker:
        work(options)
        return
    rounds: dict[int, list[list[dict[str, Any]]]] = {1: [], 2: []}
    for _ in range(options.rounds):
        for ranks, found in rounds.items():
            found.append(start(ranks, options))
    print(f"{'shape':>14}{'1 x 2 threads':>15}{'2 x 1 thread':>14}{'speedup':>9}{'exchange':>10}{'overlap':>9}")
    for n, row in enumerate(rounds[1][0]):
        one = statistics.median(found[n]["seconds"] for found in rounds[1])
        two = statistics.median(found[n]["seconds"] for found in rounds[2])
        alone = statistics.median(found[n]["seconds_without"] for found in rounds[2])
        busy = statistics.median(found[n]["exchange"] for found in rounds[2])
        visible = max(0.0, two - alone)
        overlap = f"{100 * (1 - min(1.0, visible / busy)):.0f} %" if busy else ""
        print(
            f"{row['shape']:>14}{one:>13.3f} s{two:>12.3f} s{one / two:>8.2f}x{100 * visible / two:>8.1f} %{overlap:>9}"
        )
    print("exchange: share of a step that the exchange adds; overlap: share of the all-reduces' time that adds nothing")


def start(ranks: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The ranks' measurements, a row for each shape."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "rows.json"
        words = [sys.executable, __file__, options.recipe, *options.overrides, "--repeats", str(options.repeats)]
        words += ["--worker", str(result), *(["--trace", str(options.trace)] if options.trace and ranks > 1 else [])]
        if ranks > 1:
            os.environ["OMP_NUM_THREADS"] = "1"
            code = launch(words, ranks)
        else:
            code = subprocess.run(words, env=os.environ | {"OMP_NUM_THREADS": "2"}, check=False).returncode
        if code:
            sys.exit(code)
        rows: list[dict[str, Any]] = json.loads(result.read_text())
        return rows


def work(options: argparse.Namespace) -> None:
    """Run one rank."""
    recipe = load_recipe(options.recipe, options.overrides)
    plan = make_plan(recipe, 1000)
    rows = []
    with connect("cpu") as world:
        torch.manual_seed(0)
        model = to_device(make_model(recipe), recipe, world).train()
        replica = replicate(model, world)
        optimizer = make_optimizer(model, recipe.optim)

        def step(shape: Any, groups: int, exchange: bool) -> float:
            share = shape.clips // world.size
            x = torch.zeros(share, 3, shape.frames, shape.crop, shape.crop).to(memory_format=torch.channels_last_3d)
            set_part(model, Part(world.rank * share, share, shape.clips, groups, world.size, 0, world.gather))
            world.barrier()
            begun = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            with no_sync(replica, last=exchange):
                replica(x).square().mean().backward()
            optimizer.step()
            world.barrier()
            return time.perf_counter() - begun

        for shape, first in plan.first_steps().items():
            for exchange in (True, False):
                step(shape, first.bn_groups, exchange)
            times = [
                (step(shape, first.bn_groups, True), step(shape, first.bn_groups, False))
                for _ in range(options.repeats)
            ]
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                step(shape, first.bn_groups, True)
            events = [event for event in profiled.events() if event.name == EXCHANGE]  # type: ignore[union-attr]
            seconds, without = (statistics.median(column) for column in zip(*times, strict=True))
            exchange_seconds = sum(event.time_range.elapsed_us() for event in events) / 1e6
            rows.append(
                {"shape": str(shape), "seconds": seconds, "seconds_without": without, "exchange": exchange_seconds}
            )
            if options.trace and world.main:
                profiled.export_chrome_trace(str(options.trace))
        if world.main:
            options.worker.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
