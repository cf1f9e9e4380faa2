"""What it costs to be safe: a checkpoint, and the look at every step's loss and gradients, beside a step of training.

    python scripts/bench_faults.py k400_slowfast_8x8_r50_baseline --clips 1

Medians of several, the sides interleaved. A recipe's own number of clips may be too many for the machine: give fewer.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from mgtrain.engine.checks import make_model
from mgtrain.engine.finite import not_finite
from mgtrain.engine.optim import make_optimizer
from mgtrain.engine.step import to_device, train_step
from mgtrain.models.norm import group_stats
from mgtrain.processes.distributed import World
from mgtrain.recipe import load_recipe
from mgtrain.runs.checkpoint import CheckpointInfo, save_checkpoint, verify
from mgtrain.schedule import make_plan


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--clips", type=int, default=2, help="clips of a step")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, [f"batch.clips={arguments.clips}", f"batch.bn_clips={arguments.clips}"])
    world = World(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    model = to_device(make_model(recipe), recipe, world)
    optimizer, scaler = make_optimizer(model, recipe.optim), torch.amp.GradScaler(enabled=False)
    step = replace(make_plan(recipe, 1000)[-1], shape=recipe.base, bn_groups=1)
    shape = (arguments.clips, recipe.clip.frames, recipe.clip.crop, recipe.clip.crop, 3)
    clips = torch.randint(0, 256, shape, dtype=torch.uint8, device=world.device).permute(0, 4, 1, 2, 3)
    labels = torch.zeros(arguments.clips, dtype=torch.int64, device=world.device)
    loss = torch.zeros((), device=world.device)
    info = CheckpointInfo(1, recipe.to_yaml(), ("a",) * recipe.data.classes, "", "")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        sides: dict[str, Callable[[], object]] = {
            "a step": lambda: train_step(model, optimizer, scaler, clips, labels, step, recipe, world),
            "its look for what is not finite": lambda: not_finite(loss, model.parameters(), False, world),
            "writing a checkpoint": lambda: save_checkpoint(path, model, optimizer, info, group_stats(model)),
            "verifying it": lambda: verify(path),
        }
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(arguments.repeats + 1):
            for name, side in sides.items():
                begin = time.perf_counter()
                side()
                if world.device.type == "cuda":
                    torch.cuda.synchronize()
                times[name].append(time.perf_counter() - begin)
        size = path.stat().st_size
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    for name, seconds in medians.items():
        print(f"{name:34} {1000 * seconds:10.2f} ms   {seconds / medians['a step']:8.4f} of a step")
    every = recipe.logging.checkpoint_steps
    share = medians["writing a checkpoint"] / (every * medians["a step"])
    print(
        f"a checkpoint has {size / 1e6:.1f} MB; one every {every} steps takes {100 * share:.3f} % of the training time"
    )


if __name__ == "__main__":
    main()
