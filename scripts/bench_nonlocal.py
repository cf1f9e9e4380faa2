#!/usr/bin/env python
"""Time the attention of a non-local block, written out and as mgtrain computes it, for several sizes of maps.

    python scripts/bench_nonlocal.py --threads 1 --repeats 5

Softmax: matrix products with a softmax between, against `scaled_dot_product_attention`. Dot product: (query keyᵀ) value
against `dot_product_attention`, which chooses the cheaper order. Both ways alternate, forward and backward. Prints
median seconds, the median and range of their ratios, MiB kept for the backward pass, and the largest difference.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from mgtrain.models.i3d import dot_product_attention
from mgtrain.processes.cores import keep_freed_memory

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
# clips, frames, pixels a side, channels: res3 and res4 of I3D-NL at 8 x 79², 8 x 158², 8 x 224²; res3 at 32 x 224²
SIZES = ((8, 4, 10, 256), (8, 4, 5, 512), (4, 4, 20, 256), (2, 4, 28, 256), (2, 4, 14, 512), (1, 16, 28, 256))


def softmax_written_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.transpose(2, 3) * query.shape[3] ** -0.5).softmax(dim=3) @ value


def product_written_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.transpose(2, 3) / key.shape[2]) @ value


PAIRS: dict[str, tuple[Attention, Attention]] = {
    "softmax": (softmax_written_out, F.scaled_dot_product_attention),
    "dot product": (product_written_out, dot_product_attention),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    print(f"torch {torch.__version__}, {args.threads} threads, medians of {args.repeats}")
    print(
        f"{'attention':12}{'map':>14}{'channels':>9}{'written out':>13}{'mgtrain':>10}{'ratio':>8}{'range':>14}", end=""
    )
    print(f"{'kept':>9}{'mgtrain':>9}{'difference':>12}")
    for name, pair in PAIRS.items():
        for clips, frames, side, channels in SIZES:
            torch.manual_seed(0)
            places = frames * side * side
            query = torch.randn(clips, 1, places, channels, requires_grad=True)
            key, value = (
                torch.randn(clips, 1, places // 4, channels, requires_grad=True) for _ in range(2)
            )  # pooled by 2 in space
            race(name, pair, (query, key, value), f"{clips}x{frames}x{side}²", args.repeats)


def race(name: str, pair: tuple[Attention, Attention], given: tuple[Tensor, ...], size: str, repeats: int) -> None:
    """Print one line."""
    results = [attend(*given) for attend in pair]
    difference = ((results[0] - results[1]).abs().max() / results[0].abs().max()).item()
    rows = [[seconds(attend, given) for attend in pair] for _ in range(repeats + 1)][1:]
    ratios = sorted(out / ours for out, ours in rows)
    out, ours = (statistics.median(column) for column in zip(*rows, strict=True))
    kept = [mebibytes(attend, given) for attend in pair]
    spread = f"{ratios[0]:.2f}..{ratios[-1]:.2f}"
    print(f"{name:12}{size:>14}{given[0].shape[3]:>9}{1e3 * out:>11.1f}ms{1e3 * ours:>8.1f}ms", end="")
    print(
        f"{statistics.median(ratios):>7.2f}x{spread:>14}{kept[0]:>9.1f}{kept[1]:>9.1f}{difference:>12.1e}", flush=True
    )


def seconds(attend: Attention, given: tuple[Tensor, ...]) -> float:
    """Seconds of a forward and a backward pass."""
    start = time.perf_counter()
    y = attend(*given)
    torch.autograd.grad(y, given, torch.ones_like(y))
    return time.perf_counter() - start


def mebibytes(attend: Attention, given: tuple[Tensor, ...]) -> float:
    """MiB kept for the backward pass, each storage once."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        attend(*given)
    return sum(kept.values()) / 2**20


if __name__ == "__main__":
    main()
