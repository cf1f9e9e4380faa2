"""Weights as other projects write them: names by rules that the golden's fingerprints of the real ones confirm."""

from __future__ import annotations

import hashlib
import math
import re
import zlib
from collections.abc import Iterable

import numpy as np

Shapes = dict[str, tuple[int, ...]]


def noise(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers in [-1, 1) that depend on the name and the place only: splitmix64's mixing function."""
    x = np.arange(math.prod(shape), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(
        zlib.crc32(name.encode())
    )
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return ((x >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1).reshape(shape)


def value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of such a size that activations stay within bounds: float64, but for the count of batches."""
    if not shape:
        return np.zeros((), np.int64)
    if len(shape) > 1:
        return noise(name, shape) * math.sqrt(6 / math.prod(shape[1:]))
    if re.search(r"(running_var|_riv|weight|_s)$", name):
        return 1 + 0.5 * noise(name, shape)
    return 0.2 * noise(name, shape)


def clips(*shape: int) -> np.ndarray:
    return 2 * noise("clips", shape)


def fingerprint(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> str:
    """Of the names and shapes of all tensors but the counts of batches, in alphabetical order."""
    lines = [f"{name} {list(shape)}\n" for name, shape in sorted(shapes) if not name.endswith("num_batches_tracked")]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def pyslowfast(name: str) -> str:
    """The name in PySlowFast's .pyth files of the tensor with this common name (see `models/weights/naming.py`)."""
    where, stage, rest = name.split(".", 2)
    number, side = _number(stage), {"slow": 0, "fast": 1, "laterals": 0, "head": 0}[where]
    if where == "head":
        return f"head.projection.{rest}"
    if where == "laterals":
        return f"s{number}_fuse.{_replace(rest, {'conv': 'conv_f2s', 'norm': 'bn'})}"
    if stage == "stem":
        return f"s1.pathway{side}_stem.{_replace(rest, {'norm': 'bn'})}"
    place, layer = rest.split(".", 1)
    if place.startswith("nonlocal"):
        inner = {"query": "conv_theta", "key": "conv_phi", "value": "conv_g", "out": "conv_out", "norm": "bn"}
        return f"s{number}.pathway0_{place}.{_replace(layer, inner)}"
    inner = {"shortcut.0": "branch1", "shortcut.1": "branch1_bn"}
    inner |= {f"conv{i}": f"branch2.{letter}" for i, letter in enumerate("abc", 1)}
    inner |= {f"norm{i}": f"branch2.{letter}_bn" for i, letter in enumerate("abc", 1)}
    return f"s{number}.pathway{side}_res{place}.{_replace(layer, inner)}"


def caffe2(name: str, blocks: tuple[int, ...]) -> str:
    """The name in Caffe2's .pkl files of a network with so many blocks in res2 .. res5."""
    where, stage, rest = name.split(".", 2)
    number, prefix = _number(stage), "t_" if where == "fast" else ""
    rest, _, last = rest.rpartition(".")
    end = {"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv"}[last]
    suffix = f"_bn_{end}" if "norm" in rest or rest.endswith("shortcut.1") else {"s": "_w", "b": "_b"}[end]
    if where == "head":
        return f"pred{suffix}"
    if where == "laterals":
        last = "t_pool1" if number == 1 else f"t_res{number}_{blocks[number - 2] - 1}_branch2c_bn"
        return f"{last}_subsample{suffix}"
    if stage == "stem":
        return f"{prefix}{'res_' if '_bn' in suffix else ''}conv1{suffix}"
    place, layer = rest.split(".", 1)
    if place.startswith("nonlocal"):
        inner = {"query": "_theta", "key": "_phi", "value": "_g", "out": "_out", "norm": ""}[layer]
        return f"nonlocal_conv{number}_{place.removeprefix('nonlocal')}{inner}{suffix}"
    branch = "branch1" if layer.startswith("shortcut") else f"branch2{'abc'[int(layer[-1]) - 1]}"
    return f"{prefix}res{number}_{place}_{branch}{suffix}"


def pytorchvideo(name: str, pathways: int) -> str:
    """The name in the files of PyTorchVideo's hub."""
    where, stage, rest = name.split(".", 2)
    index = _number(stage) - 1
    if where == "head":
        return f"blocks.6.proj.{rest}"
    if where == "laterals":
        return f"blocks.{index}.multipathway_fusion.{_replace(rest, {'conv': 'conv_fast_to_slow'})}"
    if pathways == 1:
        start = f"blocks.{index + (index > 1)}"
    else:
        start = f"blocks.{index}.multipathway_blocks.{('slow', 'fast').index(where)}"
    if stage == "stem":
        return f"{start}.{rest}"
    place, layer = rest.split(".", 1)
    inner = {"shortcut.0": "branch1_conv", "shortcut.1": "branch1_norm"}
    inner |= {
        f"{kind}{i}": f"branch2.{kind}_{letter}" for kind in ("conv", "norm") for i, letter in enumerate("abc", 1)
    }
    return f"{start}.res_blocks.{place}.{_replace(layer, inner)}"


def mmaction2(name: str, pathways: int) -> str:
    """The name in MMAction2's .pth files."""
    where, stage, rest = name.split(".", 2)
    index = _number(stage) - 1
    if where == "head":
        return f"cls_head.fc_cls.{rest}"
    if where == "laterals":
        lateral = f"layer{index}_lateral" if index else "conv1_lateral"
        return f"backbone.slow_path.{lateral}.{_replace(rest, {'norm': 'bn'})}"
    start = "backbone" if pathways == 1 else f"backbone.{where}_path"
    if stage == "stem":
        return f"{start}.conv1.{_replace(rest, {'norm': 'bn'})}"
    place, layer = rest.split(".", 1)
    if place.startswith("nonlocal"):
        inner = {"query": "theta.conv", "key": "phi.0.conv", "value": "g.0.conv"}
        inner |= {"out": "conv_out.conv", "norm": "conv_out.bn"}
        return f"{start}.layer{index}.{place.removeprefix('nonlocal')}.non_local_block.{_replace(layer, inner)}"
    inner = {"shortcut.0": "downsample.conv", "shortcut.1": "downsample.bn"}
    inner |= {f"conv{i}": f"conv{i}.conv" for i in (1, 2, 3)} | {f"norm{i}": f"conv{i}.bn" for i in (1, 2, 3)}
    return f"{start}.layer{index}.{place}.{_replace(layer, inner)}"


def _number(stage: str) -> int:
    """1 for the stem, then 2 .. 5; 0 for the classifier."""
    return ("linear", "stem", "res2", "res3", "res4", "res5").index(stage)


def _replace(rest: str, names: dict[str, str]) -> str:
    """The layer's name exchanged, what comes after it kept."""
    layer, last = rest.rsplit(".", 1)
    return f"{names.get(layer, layer)}.{last}"
