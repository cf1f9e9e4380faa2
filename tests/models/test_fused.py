"""BatchNorm of all groups at once: its arithmetic, in Triton's interpreter where there is no GPU, and its launches."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("triton")

from mgtrain.models import fused
from mgtrain.models.fused import kernels
from mgtrain.models.fused.norm import _split, _tiles, launch
from mgtrain.models.norm import GroupBatchNorm3d, group_slots
from mgtrain.models.part import Part, set_part
from mgtrain.models.recompute import recompute

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-5
CLOSE = {torch.float32: 2e-5, torch.bfloat16: 0.02, torch.float16: 4e-3}


def inputs(shape: tuple[int, ...], groups: int, dtype: torch.dtype) -> list[Tensor]:
    """Clips far from zero, a gradient from above, weight, bias, running means and variances."""
    torch.manual_seed(0)
    x = (torch.randn(shape) * 2 + 5).to(dtype).to(memory_format=torch.channels_last_3d)
    of_channels = torch.rand(shape[1]) + 0.5, torch.randn(shape[1])
    of_groups = torch.randn(groups, shape[1]), torch.rand(groups, shape[1])
    return [t.to(DEVICE) for t in (x, torch.randn(shape).to(dtype), *of_channels, *of_groups)]


def results(function: Any, x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor, *slots: Tensor) -> list[Tensor]:
    """Output, running statistics, gradients of input, weight and bias, in double precision."""
    leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, weight, bias)]
    slots = tuple(t.clone() for t in slots)
    y = function(*leaves, *slots)
    y.backward(grad.to(y.dtype))
    return [t.double().cpu() for t in (y.detach(), *slots, *(leaf.grad for leaf in leaves))]


def oracle(relu: bool) -> Any:
    """torch's BatchNorm, group by group."""

    def normed(x: Tensor, weight: Tensor, bias: Tensor, means: Tensor, variances: Tensor) -> Tensor:
        pieces = zip(x.chunk(len(means)), means, variances, strict=True)
        y = torch.cat([F.batch_norm(clips, m, v, weight, bias, True, 0.1, EPS) for clips, m, v in pieces])
        return y.relu() if relu else y

    return normed


@pytest.mark.parametrize(
    ("shape", "groups", "dtype", "relu"),
    [
        ((4, 8, 2, 5, 5), 2, torch.float32, True),
        ((6, 3, 1, 3, 7), 3, torch.float32, False),  # odd everything
        ((2, 130, 2, 3, 3), 1, torch.bfloat16, True),  # more channels than a tile has
        ((8, 16, 1, 2, 2), 4, torch.bfloat16, False),
        ((4, 24, 1, 1, 1), 2, torch.float16, True),  # two values of each
        ((2, 8, 4, 20, 20), 1, torch.float32, True),  # several tiles and splits
    ],
)
def test_all_groups_at_once_are_the_groups_one_by_one(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype, relu: bool
) -> None:
    given = inputs(shape, groups, dtype)
    ours = results(lambda *tensors: fused.norm_groups(*tensors, 0.1, EPS, relu), *given)
    theirs = results(oracle(relu), *(t.double() for t in given))
    for mine, exact in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(exact, rel=CLOSE[dtype], abs=CLOSE[dtype])
    for mine, exact in zip(ours[1:3], theirs[1:3], strict=True):
        assert mine == pytest.approx(exact, rel=1e-5, abs=1e-5)  # statistics are taken in float32 of any input


def test_a_mean_far_from_zero_costs_no_digits() -> None:
    x, grad, *rest = inputs((4, 8, 2, 5, 5), 2, torch.float32)
    far = [x + 10_000, grad, *rest]
    ours = results(lambda *tensors: fused.norm_groups(*tensors, 1.0, EPS, False), *far)
    var = torch.stack([clips.double().var((0, 2, 3, 4)) for clips in (x + 10_000).chunk(2)]).cpu()
    assert ours[2] == pytest.approx(var, rel=1e-4)


def test_sums_of_many_splits_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgtrain.models.fused.norm.NUMBERS", 16)
    given = inputs((2, 8, 1, 8, 9), 1, torch.float32)
    assert _split(1, 144, 8) == (2, 72)
    assert kernels.JOINED < 72  # more than a program joins at a time
    ours = results(lambda *tensors: fused.norm_groups(*tensors, 0.1, EPS, True), *given)
    for mine, exact in zip(ours, results(oracle(True), *(t.double() for t in given)), strict=True):
        assert mine == pytest.approx(exact, rel=2e-5, abs=2e-5)


def test_compiled_code_has_one_node_for_all_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgtrain.models.fused.usable", lambda x: True)
    torch._dynamo.reset()
    torch.manual_seed(0)
    x = torch.randn(8, 8, 1, 3, 3, device=DEVICE).to(memory_format=torch.channels_last_3d)
    first, graphs = GroupBatchNorm3d(8).to(DEVICE), []

    def backend(graph: torch.fx.GraphModule, _: object) -> Any:
        graphs.append(graph)
        return graph.forward

    found = []
    for compiled in (False, True):
        norm = copy.deepcopy(first)
        set_part(norm, Part(0, 8, 8, 4))
        called = torch.compile(norm, backend=backend, fullgraph=True, dynamic=False) if compiled else norm
        clips = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = called(clips, relu=True)
        (y * y).sum().backward()
        assert clips.grad is not None
        of_weights = (parameter.grad for parameter in norm.parameters())
        found.append([y.detach(), norm.group_mean, norm.group_var, clips.grad, *of_weights])
    for mine, other in zip(*found, strict=True):
        assert torch.equal(mine, other)
    assert len(graphs) == 1
    assert [str(node.target) for node in graphs[0].graph.nodes].count("mgtrain.norm_groups.default") == 1


class Block(nn.Module):
    """What `recompute` takes for a block of a network."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = GroupBatchNorm3d(8)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(x, relu=True)
        return normed


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch._dynamo's own
def test_recomputed_blocks_compile_and_update_their_statistics_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgtrain.models.fused.usable", lambda x: True)
    x = inputs((8, 8, 1, 3, 3), 4, torch.float32)[0]
    found = []
    for recomputed, compiled in ((False, False), (True, False), (True, True)):
        torch._dynamo.reset()
        network = nn.Sequential(Block(), Block()).to(DEVICE).train()
        if recomputed:
            assert recompute(network) == 2
        set_part(network, Part(0, 8, 8, 4))
        called = torch.compile(network, backend="aot_eager", dynamic=False) if compiled else network
        for _ in range(2):
            clips = x.clone(memory_format=torch.preserve_format).requires_grad_()
            called(clips).square().sum().backward()
        assert clips.grad is not None
        of_weights = [parameter.grad for parameter in network.parameters()]
        found.append([clips.grad, *of_weights, *group_slots(network)])
    for others in found[1:]:
        for mine, other in zip(others, found[0], strict=True):
            torch.testing.assert_close(mine, other)


def test_what_was_seen_before_and_is_not_a_number() -> None:
    x, _, weight, bias, means, variances = inputs((4, 8, 1, 3, 3), 2, torch.float32)
    before = means.clone(), variances.clone()
    fused.norm_groups(x, weight, bias, means, variances, 0.0, EPS, True)
    assert torch.equal(means, before[0])
    assert torch.equal(variances, before[1])
    x[0, 3] = float("nan")
    y = fused.norm_groups(x, weight, bias, means, variances, 0.1, EPS, True)
    assert y[:2, 3].isnan().all()  # ReLU must not hide it
    assert y.isnan().sum() == y[:2, 3].numel()


def test_a_gradient_in_another_layout_is_taken() -> None:
    x, grad, *rest = inputs((4, 8, 2, 3, 3), 2, torch.float32)
    ours, theirs = (
        results(lambda *tensors: fused.norm_groups(*tensors, 0.1, EPS, True), x, above, *rest)
        for above in (grad, grad.contiguous(memory_format=torch.channels_last_3d))
    )
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize(
    ("groups", "rows", "channels"), [*product((1, 8, 64), (1, 77, 100_352, 3_211_264), (3, 8, 64, 2048))]
)
def test_splits_cover_a_group_and_none_is_empty(groups: int, rows: int, channels: int) -> None:
    size, splits = _split(groups, rows, channels)
    assert (splits - 1) * size < rows <= splits * size
    assert size % _tiles(channels)["TILE"] == 0


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_a_layer_takes_six_launches_at_any_number_of_groups(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def counted(kernel: Any, *args: Any, **constants: Any) -> None:
        started.append(kernel.__name__)
        launch(kernel, *args, **constants)

    monkeypatch.setattr("mgtrain.models.fused.norm.launch", counted)
    monkeypatch.setattr("mgtrain.models.fused.usable", lambda x: True)
    norm, oracle_norm = (GroupBatchNorm3d(8).to(DEVICE) for _ in range(2))
    x = torch.randn(8, 8, 1, 3, 3, device=DEVICE).to(memory_format=torch.channels_last_3d)
    part = Part(0, 8, 8, groups)
    set_part(norm, part)
    y = norm(x.requires_grad_(), relu=True)
    y.sum().backward()
    assert len(started) == 6
    monkeypatch.setattr("mgtrain.models.fused.usable", lambda x: False)
    set_part(oracle_norm, part)
    torch.testing.assert_close(oracle_norm(x, relu=True), y)
    torch.testing.assert_close(oracle_norm.group_var, norm.group_var)
    assert len(started) == 6


def test_where_triton_fails_groups_are_normalized_one_by_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr("mgtrain.models.fused.norm.launch", fails)
    fused.norm.works.cache_clear()
    assert not fused.norm.works(DEVICE)
    assert "one by one, which is slow where a step has many: RuntimeError: Failed to find C compiler" in caplog.text
    fused.norm.works.cache_clear()


COMPILE = """
import json, sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mgtrain.models.fused import kernels
from mgtrain.models.fused.norm import JOINED_CHANNELS, WARPS, _tiles

HALVES = ("x", "y", "grad", "grad_x")
INTEGERS = ("rows_of_group", "rows", "splits", "groups")
for name in ("sum_values", "join_values", "normalize", "sum_gradients", "join_gradients", "input_gradient"):
    kernel, joins = getattr(kernels, name), name.startswith("join")
    for channels in (8, 96, 2048):
        wide = {"WIDE": JOINED_CHANNELS, "JOINED": kernels.JOINED} if joins else {**_tiles(channels), "C": channels}
        constants = {key: value for key, value in {**wide, "RELU": True}.items() if key in kernel.arg_names}
        types = {
            key: "constexpr" if key in constants else "*bf16" if key in HALVES else "fp32" if key in ("momentum", "eps")
            else "i32" if key in (*INTEGERS, "C") else "*fp32"
            for key in kernel.arg_names
        }
        aligned = {(n,): [["tt.divisibility", 16]] for n, key in enumerate(types) if types[key].startswith("*")}
        made = compile(ASTSource(kernel, types, constants, aligned), target=GPUTarget("cuda", 90, 32),
                       options={"num_warps": 4 if joins else WARPS})
        print(json.dumps([name, channels, made.asm["ptx"]]))
"""


@pytest.mark.slow
def test_kernels_compile_for_an_h100_and_read_whole_words(tmp_path: Path) -> None:
    """In a process of its own, because not in the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for line in done.stdout.splitlines():
        name, channels, code = json.loads(line)
        assert name.startswith("join") or "ld.global.v4" in code, (name, channels)
        assert "ld.global.b16" not in code, (name, channels)
