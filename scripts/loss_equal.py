#!/usr/bin/env python
"""Compare the losses of two commits, step by step: a change to the step's code must not change them.

    python scripts/loss_equal.py HEAD~1 HEAD demo_multigrid data.root=data/motions optim.lr=0.001 --steps 30

Each commit is checked out to its own folder and trains the recipe from the same seed in this environment, with stages
shortened to about that many steps. If sums are taken in another order the losses diverge, faster at higher learning
rates; as a yardstick, the first commit also runs with the other memory layout. Exits with 1 if up to any step the two
commits differ by more than ten times as much as the two layouts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from mgtrain.data import open_splits
from mgtrain.recipe import load_recipe
from mgtrain.schedule import make_plan

MARGIN = 10  # allowed: so many times the difference between layouts
ROUNDING = 1e-7  # relative, of a float32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_intermixed_args()
    recipe = load_recipe(options.recipe, options.overrides)
    steps = len(make_plan(recipe, len(open_splits(recipe.data)["train"])))
    stages = [epochs * options.steps / steps for epochs in recipe.optim.stages]
    words = [
        options.recipe, *options.overrides, f"data.root={Path(recipe.data.root).resolve()}", f"optim.stages={stages}",
        "optim.warmup_epochs=0", "logging.steps=1", "evaluation.recalibration_batches=1",
    ]  # fmt: skip
    last = recipe.hardware.channels_last
    with tempfile.TemporaryDirectory() as folder:
        before = losses(options.before, words, Path(folder))
        layout = losses(options.before, [*words, f"hardware.channels_last={not last}".lower()], Path(folder))
        after = losses(options.after, words, Path(folder))
    print(f"{'step':>5}{options.before[:12]:>15}{options.after[:12]:>15}{'difference':>12}{'layouts':>12}")
    worst = rounding = 0.0
    equal = True
    for step, (one, other, third) in enumerate(zip(before, after, layout, strict=True)):
        differs, rounds = abs(other - one) / abs(one), abs(third - one) / abs(one)
        worst, rounding = max(worst, differs), max(rounding, rounds)
        equal = equal and worst <= MARGIN * max(rounding, ROUNDING)
        print(f"{step:>5}{one:>15.7f}{other:>15.7f}{differs:>12.1e}{rounds:>12.1e}")
    print(f"{'equal' if equal else 'NOT equal'}: commits differ by up to {worst:.1e}, layouts by {rounding:.1e}")
    sys.exit(not equal)


def losses(commit: str, words: list[str], scratch: Path) -> list[float]:
    """The loss of each step that the commit trains."""
    folder = scratch / "checkout"
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(folder), commit], check=True)
    try:
        command = [sys.executable, "-m", "mgtrain", "fit", *words, "--name", "run", "--device", "cpu"]
        environment = os.environ | {"PYTHONPATH": str(folder)}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{commit}: {done.stderr}")
        rows = (folder / "runs/run/steps.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(row)["loss"] for row in rows]
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(folder)], check=True)


if __name__ == "__main__":
    main()
