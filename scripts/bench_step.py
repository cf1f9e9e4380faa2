#!/usr/bin/env python
"""Time a training step of mgtrain's networks against PySlowFast's, on the same shapes.

    python scripts/bench_step.py --pyslowfast CHECKOUT --threads 1 --repeats 5

Each network runs in a separate process; their steps alternate, so that load on the machine affects both equally. A step
is forward, loss, backward and SGD with Nesterov momentum. BatchNorm runs over groups of one clip of the long-cycle
batch: mgtrain's groups against PySlowFast's sub-batch BatchNorm. Prints median seconds, the median and range of their
ratios, and the peak memory of each process. Needs what scripts/parity.py needs.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
import warnings
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mgtrain.processes.cores import cpu_name, instructions

# our name of the network, and its configuration in PySlowFast
MODELS = (("slowfast_r50", "SLOWFAST_8x8_R50"), ("i3d_r50", "I3D_8x8_R50"), ("i3d_nln_r50", "I3D_NLN_8x8_R50"))
# clips, frames, crop, groups: the long cycle of 1 x 32 x 112, and two shapes of its short cycle
SHAPES = ((8, 8, 79, 8), (4, 16, 79, 4), (2, 16, 112, 2), (1, 32, 112, 1), (16, 8, 56, 8), (4, 32, 56, 1))
CLASSES = 400
Ready = tuple[nn.Module, torch.optim.Optimizer, Any]  # the last is what the network is called with


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pyslowfast", type=Path, help="a checkout; without it, mgtrain alone is timed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of both networks, by autocast")
    parser.add_argument("--fixed", action="store_true", help="compute convolutions in the forms chosen by rule")
    parser.add_argument("--models", nargs="+", default=[name for name, _ in MODELS])
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=SHAPES, help="such as 8x8x158")
    args = parser.parse_args()
    print(f"{cpu_name()}; {instructions()}")
    print(
        f"torch {torch.__version__}, {args.threads} threads, {args.precision}, convolutions "
        f"{'by rule' if args.fixed else 'measured'}; seconds of a step, medians of {args.repeats}"
    )
    print(f"{'model':14}{'shape':>12}{'mgtrain':>10}{'PySlowFast':>12}{'ratio':>8}{'range':>14}{'GiB':>6}{'theirs':>8}")
    for name, config in MODELS:
        if name in args.models:
            race(name, config, args)


def shape_of(text: str) -> tuple[int, int, int, int]:
    """A shape with BatchNorm groups of one clip, such as (8, 8, 158, 8) of `8x8x158`."""
    clips, frames, crop = map(int, text.split("x"))
    return clips, frames, crop, clips


def race(name: str, config: str, args: argparse.Namespace) -> None:
    """Print one line for each shape."""
    kinds = [("mgtrain", name)] + ([("pyslowfast", config)] if args.pyslowfast else [])
    for clips, frames, crop, groups in args.shapes:
        racers = [Racer(kind, network, args, (clips, frames, crop, groups)) for kind, network in kinds]
        seconds = [[racer.step() for racer in racers] for _ in range(args.repeats)]
        memory = [racer.end() for racer in racers]
        ours = statistics.median(row[0] for row in seconds)
        line = f"{name:14}{f'{clips}x{frames}x{crop}²':>12}{ours:>10.2f}"
        if args.pyslowfast:
            ratios = sorted(theirs / mine for mine, theirs in seconds)
            theirs = statistics.median(row[1] for row in seconds)
            spread = f"{ratios[0]:.2f}..{ratios[-1]:.2f}"
            line += f"{theirs:>12.2f}{statistics.median(ratios):>7.2f}x{spread:>14}"
        print(line + "".join(f"{gib:>7.2f}" for gib in memory), flush=True)


class Racer:
    """A process that runs a step on request."""

    def __init__(self, kind: str, network: str, args: argparse.Namespace, shape: tuple[int, int, int, int]) -> None:
        context = get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=run, args=(theirs, kind, network, args, shape))
        self._process.start()
        theirs.close()  # so that `recv` does not wait for a process that fails
        self._ours.recv()  # after a first step, which does not count

    def step(self) -> float:
        """Seconds of a step."""
        self._ours.send("step")
        seconds: float = self._ours.recv()
        return seconds

    def end(self) -> float:
        """End the process; returns its peak memory in GiB."""
        self._ours.send("end")
        gib: float = self._ours.recv()
        self._process.join()
        return gib


def run(pipe: Connection, kind: str, network: str, args: argparse.Namespace, shape: tuple[int, ...]) -> None:
    """Run steps in the process of a racer."""
    import resource

    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    clips, frames, crop, groups = shape
    x = torch.randn(clips, 3, frames, crop, crop)
    labels = torch.randint(0, CLASSES, (clips,))
    model, optimizer, given = (ours if kind == "mgtrain" else theirs)(network, args, x, groups)
    while True:
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            logits = model(given)
        nn.functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        pipe.send(time.perf_counter() - start)
        if pipe.recv() == "end":
            pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
            return


def ours(
    network: str, args: argparse.Namespace, x: Tensor, groups: int
) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    """Our network, as `fit` trains it."""
    from mgtrain.engine.machine.tuning import add_uses, fastest
    from mgtrain.engine.update.optim import make_optimizer
    from mgtrain.grid import Shape
    from mgtrain.models import build_model
    from mgtrain.models.conv import choose
    from mgtrain.models.part import Part, set_part
    from mgtrain.processes.cores import keep_freed_memory
    from mgtrain.recipe import Optim

    keep_freed_memory()
    model = build_model(network, classes=CLASSES).to(memory_format=torch.channels_last_3d).train()
    if not args.fixed:
        with torch.device("meta"):
            meta = build_model(network, classes=CLASSES).train()
        uses: dict[Any, Any] = {}
        add_uses(uses, meta, Shape(len(x), x.shape[2], x.shape[3]), len(x), 1.0)
        choose(model, fastest(uses, torch.bfloat16 if args.precision == "bf16" else torch.float32, least=math.inf))
    set_part(model, Part(0, len(x), len(x), groups))
    return model, make_optimizer(model, Optim(lr=1e-4, stages=(1,))), x.to(memory_format=torch.channels_last_3d)


def theirs(
    config: str, args: argparse.Namespace, x: Tensor, groups: int
) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    """PySlowFast's network, with the settings of its optimizer."""
    sys.path.insert(0, str(Path(__file__).parent))
    import parity

    sys.meta_path.insert(0, parity.Absent())  # type: ignore[arg-type]
    found = dict(parity.pyslowfast(args.pyslowfast))[config]
    kind = {"BN.NORM_TYPE": "sub_batchnorm", "BN.NUM_SPLITS": groups} if groups > 1 else {}
    model = found.make(64, **{"MODEL.NUM_CLASSES": CLASSES, "MODEL.DROPOUT_RATE": 0.5, **kind}).train()
    norms = [p for m in model.modules() if isinstance(m, nn.BatchNorm3d) for p in m.parameters()]
    known = {id(p) for p in norms}
    others = [p for p in model.parameters() if id(p) not in known]
    decays = [{"params": norms, "weight_decay": 0.0}, {"params": others, "weight_decay": 1e-4}]
    optimizer = torch.optim.SGD(decays, lr=1e-4, momentum=0.9, nesterov=True)
    slow = [x[:, :, [*found.frames(x.shape[2])]]] if found.frames else []
    return model, optimizer, [*slow, x]


if __name__ == "__main__":
    main()
