#!/usr/bin/env python
"""Train a baseline and a multigrid recipe with several seeds, and print means with their spread.

    python scripts/study.py ut6_baseline ut6_multigrid --seeds 0 1 2 data.root=/path/to/ut6

Every run is a process of its own, `mgtrain fit --resume`, so an interrupted study resumes. With --fold, each seed has
its own annotation files: --fold 'data.train=train_{seed}.csv data.val=val_{seed}.csv'. Baseline and multigrid runs
alternate, so that load on the machine affects both equally.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("baseline")
    parser.add_argument("multigrid")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--fold", default="", help="overrides with {seed}, for one split per seed")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    parser.add_argument("--views", default="10x3", help="views of the final evaluation")
    options = parser.parse_intermixed_args()

    pairs = []
    for seed in options.seeds:
        overrides = [*options.overrides, f"seed={seed}", *options.fold.format(seed=seed).split()]
        runs = [options.runs / f"{recipe}_{seed}" for recipe in (options.baseline, options.multigrid)]
        for recipe, run in zip((options.baseline, options.multigrid), runs, strict=True):
            mgtrain("fit", recipe, "--resume", "--name", f"{run.parent}/{run.name}", *overrides)
        tests = [mgtrain("eval", str(run), "--views", options.views, "--json") for run in runs]
        pairs.append((mgtrain("compare", *map(str, runs), "--json"), *tests))
    report(options.seeds, pairs, options.views)


def mgtrain(*arguments: str) -> dict[str, Any]:
    """Run a command of mgtrain; its JSON, if it prints any."""
    print("$ mgtrain", *arguments, file=sys.stderr)
    result = subprocess.run(
        [sys.executable, "-m", "mgtrain", *arguments], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(result.stdout) if "--json" in arguments else {}


def report(seeds: list[int], pairs: list[tuple[dict[str, Any], ...]], views: str) -> None:
    """A line for each number: each seed's, mean, standard deviation."""
    rows: dict[str, list[float]] = {}
    for comparison, *tests in pairs:
        for name, run, test in zip(("baseline", "multigrid"), comparison["runs"], tests, strict=True):
            rows.setdefault(f"{name}: top-1 %, 1 view", []).append(100 * run["top1"])
            rows.setdefault(f"{name}: top-1 %, {views} views", []).append(100 * test["top1"])
            rows.setdefault(f"{name}: best top-1 %, 1 view", []).append(100 * run["best_accuracy"])
            rows.setdefault(f"{name}: steps", []).append(run["steps"])
            rows.setdefault(f"{name}: epochs", []).append(run["epochs"])
            rows.setdefault(f"{name}: training, s", []).append(run["train_seconds"])
            rows.setdefault(f"{name}: of it waiting for data, s", []).append(run["data_seconds"])
        for key, value in comparison["speedups"].items():
            rows.setdefault(f"speedup: {key}", []).append(float("nan") if value is None else value)
    print(f"{'':42}" + "".join(f"  seed {seed:<5}" for seed in seeds) + f"{'mean':>10}{'sd':>9}")
    for label, values in rows.items():
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        print(f"{label:42}" + "".join(f"{v:12.2f}" for v in values) + f"{statistics.mean(values):10.2f}{spread:9.2f}")


if __name__ == "__main__":
    main()
