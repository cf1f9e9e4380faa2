"""Kill runs at random moments, resume them, and compare the results with runs that were never killed.

    python scripts/kill.py --kills 100 --ranks 1 2

Each victim is a real `mgtrain fit` on a small synthetic data set; it is killed with SIGKILL

    anywhere     at a random time after its start
    saving       while a checkpoint is being written
    evaluating   during a recalibration or evaluation
    loader       only one of its loader processes
    rank         only one of its ranks (with several ranks)

and started again with `--resume` until it finishes. Its weights, optimizer state, losses and scores must then equal
those of an uninterrupted run bit for bit, and its logs and TensorBoard must contain each step once. Linux only.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mgtrain.data.synthetic import synthesize
from mgtrain.runs.folder import RunDir

RECIPE = """\
data: {format: list, root: data, train: train.csv, val: val.csv, classes: 4}
clip: {frames: 8, stride: 2, crop: 32, short_side: [32, 40]}
evaluation: {crop: 32, short_side: 36, recalibration_batches: 8, times: 6}
model: {name: i3d_r50, width: 8, depth: [1, 1, 1, 1], dropout: 0.5}
batch: {clips: 4, bn_clips: 4}
optim: {lr: 0.002, stages: [24, 12], warmup_epochs: 1, warmup_lr: 0.001}
schedule: {name: multigrid}
hardware: {workers: 1, deterministic: true}  # otherwise each run measures its convolutions, and rounds differently
logging: {steps: 1, checkpoint_steps: 3}
"""
TIMES = ("train_seconds", "data_seconds", "eval_seconds", "clock_seconds")
POLL_SECONDS = 0.002


def main() -> None:
    """Kill runs `--kills` times, print a table, and exit with 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw, console = random.Random(arguments.seed), Console()
    kills: Counter[tuple[int, str]] = Counter()
    runs: Counter[int] = Counter()
    losses: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        synthesize(
            Path("data"), videos_per_class={"train": 6, "val": 6}, classes=("left", "right", "up", "down"), frames=24
        )
        Path("small.yaml").write_text(RECIPE)
        seconds = {ranks: straight(ranks) for ranks in arguments.ranks}
        while kills.total() < arguments.kills:
            ranks = arguments.ranks[runs.total() % len(arguments.ranks)]
            name = f"victim{runs.total()}"
            for kind in tortured(name, ranks, seconds[ranks], draw):
                kills[ranks, kind] += 1
                console.print(f"{kills.total()} kills: {name} on {ranks} ranks, {kind}")
            runs[ranks] += 1
            losses += [f"{name} on {ranks}: {what}" for what in lost(RunDir(Path(f"runs/{name}")), straight_run(ranks))]
            shutil.rmtree(f"runs/{name}")
    table = Table("ranks", "moment", "kills")
    for (ranks, kind), count in sorted(kills.items()):
        table.add_row(str(ranks), kind, str(count))
    console.print(table)
    console.print(f"{kills.total()} kills in {runs.total()} runs; lost: {len(losses) or 'nothing'}")
    for what in losses:
        console.print(what)
    sys.exit(bool(losses))


def straight_run(ranks: int) -> RunDir:
    """The uninterrupted run."""
    return RunDir(Path(f"runs/straight{ranks}"))


def straight(ranks: int) -> float:
    """Train the uninterrupted run; returns how many seconds it took."""
    begin = time.monotonic()
    name = straight_run(ranks).name
    if start(name, ranks).wait() != 0:
        raise SystemExit(f"the run fails even without a kill:\n{Path(f'{name}.log').read_text()}")
    return time.monotonic() - begin


def start(name: str, ranks: int) -> subprocess.Popen[bytes]:
    """Start or resume a run."""
    words = ["fit", "small.yaml", "--name", name, "--procs", str(ranks), "--device", "cpu", "--resume"]
    with Path(f"{name}.log").open("ab") as log:
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, "-m", "mgtrain", *words], stdout=log, stderr=log, env=one_thread)


def tortured(name: str, ranks: int, seconds: float, draw: random.Random) -> list[str]:
    """Start, kill and resume a run until it finishes; returns the kinds of kills that it survived."""
    kinds = []
    while True:
        process = start(name, ranks)
        kind = draw.choice(["anywhere", "saving", "evaluating", "loader", *(["rank"] if ranks > 1 else [])])
        moments: dict[str, Callable[[], bool]] = {
            "anywhere": after(draw.uniform(0, seconds)),
            "saving": seen(lambda: any(Path(f"runs/{name}/checkpoints").glob(".*.tmp")), draw.randint(1, 6)),
            "evaluating": in_evaluation(RunDir(Path(f"runs/{name}")), draw),
            "loader": after(draw.uniform(seconds / 3, seconds)),
            "rank": after(draw.uniform(0, seconds)),
        }
        while process.poll() is None and not moments[kind]():
            time.sleep(POLL_SECONDS)
        if process.poll() is None:
            victims = {"loader": loaders, "rank": children}.get(kind, lambda pid: [pid])(process.pid)
            for victim in draw.sample(victims, min(1, len(victims))):
                os.kill(victim, signal.SIGKILL)
                kinds.append(kind)
        if process.wait() == 0:
            return kinds


def after(seconds: float) -> Callable[[], bool]:
    """A function that says whether so many seconds have passed."""
    begin = time.monotonic()
    return lambda: time.monotonic() - begin > seconds


def seen(there: Callable[[], bool], times: int) -> Callable[[], bool]:
    """A function that says whether a condition has become true so many times."""
    count, before = 0, False

    def look() -> bool:
        nonlocal count, before
        now = there()
        count, before = count + (now and not before), now
        return count >= times

    return look


def in_evaluation(run: RunDir, draw: random.Random) -> Callable[[], bool]:
    """A function that says whether a phase has been trained to its end and saved, a random moment ago."""
    since: float | None = None
    wait = draw.uniform(0, 0.6)

    def look() -> bool:
        nonlocal since
        if since is None and (run.path / "plan.json").is_file():
            ends = {phase["first_step"] + phase["steps"] for phase in run.read("plan.json")["phases"]}
            evaluated = {row["step"] for row in run.rows("evals.jsonl")}
            if any(run.checkpoint_path(end).exists() for end in ends - evaluated):
                since = time.monotonic()
        return since is not None and time.monotonic() - since > wait

    return look


def children(pid: int) -> list[int]:
    """The child processes of a process."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def loaders(pid: int) -> list[int]:
    """The loader processes of a run: the only descendants that torch has named."""
    mine = children(pid)
    for found in mine:
        mine += children(found)
    return [found for found in mine if Path(f"/proc/{found}/comm").read_text().startswith("pt_data_worker")]


def lost(run: RunDir, rival: RunDir) -> list[str]:
    """The differences between a run and its uninterrupted rival, in words."""
    ours, theirs = (load_file(r.checkpoints()[-1]) for r in (run, rival))
    found = [f"tensors {sorted(ours.keys() ^ theirs.keys())[:3]}"] if ours.keys() != theirs.keys() else []
    found += [f"tensor {name}" for name in ours if name in theirs and not torch.equal(ours[name], theirs[name])][:3]
    for name in ("steps.jsonl", "evals.jsonl"):
        rows = [[{k: v for k, v in row.items() if k not in TIMES} for row in r.rows(name)] for r in (run, rival)]
        if rows[0] != rows[1]:
            found.append(name)
    boards = [EventAccumulator(str(r.path), {"scalars": 0}).Reload() for r in (run, rival)]
    for tag in ("train/loss", "val/top1"):
        curves = [[(event.step, event.value) for event in board.Scalars(tag)] for board in boards]
        if curves[0] != curves[1]:
            found.append(f"TensorBoard's {tag}: {len(curves[0])} points instead of {len(curves[1])}, or other values")
    return found


if __name__ == "__main__":
    main()
