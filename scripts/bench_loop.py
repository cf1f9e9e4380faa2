#!/usr/bin/env python
"""How much of a training step is neither waiting for clips, nor their preparation, forward, backward or update.

    python scripts/bench_loop.py demo_multigrid data.root=data/motions

Trains a recipe's first steps with `mgtrain.engine.fit.fit`, as `mgtrain fit` does, with clocks hung on the calls that
do the work. What is left of the run's training time is the loop: the plan's lookup, learning rates, BatchNorm groups,
seeds, logging. Medians over the steps, by shape.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

import mgtrain.engine.fit as loop
import mgtrain.engine.step as stepping
from mgtrain.errors import StoppedError
from mgtrain.processes.distributed import connect
from mgtrain.recipe import load_recipe
from mgtrain.runs.folder import RunDir

PARTS = ("waiting", "pixels", "forward", "backward", "update")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_intermixed_args()
    recipe = load_recipe(options.recipe, options.overrides)
    rows = measure(recipe, options.steps)
    print(
        f"{'shape':>14}{'steps':>7}{'step':>10}"
        + "".join(f"{part:>10}" for part in PARTS)
        + f"{'loop':>10}{'share':>9}"
    )
    for shape, found in rows.items():
        whole = statistics.median(row["whole"] for row in found)
        parts = [statistics.median(row[part] for row in found) for part in PARTS]
        rest = statistics.median(row["whole"] - sum(row[part] for part in PARTS) for row in found)
        times = "".join(f"{1e3 * seconds:>8.1f}ms" for seconds in (whole, *parts, rest))
        print(f"{shape:>14}{len(found):>7}{times}{100 * rest / whole:>7.2f} %")
    rest = sum(row["whole"] - sum(row[part] for part in PARTS) for found in rows.values() for row in found)
    whole = sum(row["whole"] for found in rows.values() for row in found)
    print(f"the loop takes {100 * rest / whole:.2f} % of {whole:.1f} s, logging every {recipe.logging.steps} steps")


def measure(recipe: Any, steps: int) -> dict[str, list[dict[str, float]]]:
    """Seconds of the parts of each step, by shape; the first step of each shape is left out."""
    spent: dict[str, float] = defaultdict(float)
    rows: dict[str, list[dict[str, float]]] = defaultdict(list)

    def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = call(*args, **kwargs)
            spent[part] += time.perf_counter() - start
            return result

        return run

    make = loop.make_model
    backward: list[float] = []

    def hooked(*args: Any) -> nn.Module:
        model = make(*args)
        model.register_forward_pre_hook(lambda *_: backward.append(time.perf_counter()))
        model.register_forward_hook(lambda *_: ended())
        return model

    def ended() -> None:
        spent["forward"] += time.perf_counter() - backward[-1]
        backward[-1] = time.perf_counter()  # loss and backward pass go from here to the update

    make_optimizer = loop.make_optimizer

    def optimizer_with_hooks(*args: Any) -> Any:
        optimizer = make_optimizer(*args)
        begun: list[float] = []

        def begins(*_: Any) -> None:
            begun.append(time.perf_counter())
            spent["backward"] += begun[-1] - backward[-1]

        optimizer.register_step_pre_hook(begins)
        optimizer.register_step_post_hook(lambda *_: ends(begun[-1]))
        return optimizer

    def ends(begun: float) -> None:
        spent["update"] += time.perf_counter() - begun

    class Clock(loop.Clock):  # type: ignore[name-defined, misc]
        def lap(self) -> float:
            seconds: float = super().lap()
            spent["whole"] = seconds
            return seconds

    class Progress(loop.TrainProgress):  # type: ignore[name-defined, misc]
        def time(self, step: Any, seconds: float) -> None:
            super().time(step, seconds)
            rows[str(step.shape)].append(dict.fromkeys((*PARTS, "whole"), 0.0) | dict(spent))
            spent.clear()
            if step.index + 1 == steps:
                raise StoppedError("measured")

    loop.make_model, loop.make_optimizer = hooked, optimizer_with_hooks
    loop.Clock, loop.TrainProgress = Clock, Progress
    Clock.wait_for = timed("waiting", loop.Clock.wait_for)  # type: ignore[method-assign]
    stepping.augmented = timed("pixels", stepping.augmented)
    with tempfile.TemporaryDirectory() as folder, connect("cpu") as world, suppress(StoppedError):
        loop.fit(recipe, RunDir(Path(folder) / "run"), world)
    return {shape: found[1:] for shape, found in rows.items() if len(found) > 1}


if __name__ == "__main__":
    main()
