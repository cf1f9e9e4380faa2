"""BatchNorm by groups of the global batch, and the dropout mask that belongs to it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from operations import Operations
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mgtrain.models.dropout import STREAMS, Dropout, DropPath, hashed_mask, keep_mask
from mgtrain.models.norm import (
    GroupBatchNorm3d,
    group_stats,
    merge_group_stats,
    put_group_stats,
    reset_group_stats,
    set_momentum,
)
from mgtrain.models.part import Part, set_part
from mgtrain.models.spanning import combined

Gather = Callable[[Tensor, int], Tensor]

torch.set_num_threads(1)
GOLDEN = json.loads((Path(__file__).parent.parent / "golden/subbn.json").read_text())
SHAPE = (8, 3, 2, 3, 3)  # of the global batch in most tests: (B, C, T, H, W)


def batch(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def norm(part: Part | None = None, channels: int = SHAPE[1]) -> GroupBatchNorm3d:
    """In training, in float64, with an affine part that does something."""
    made = GroupBatchNorm3d(channels).double().train()
    with torch.no_grad():
        made.weight.copy_(torch.linspace(0.5, 1.5, channels))
        made.bias.copy_(torch.linspace(-0.2, 0.3, channels))
    made.part = part
    return made


def run(made: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Output and gradient of the input."""
    x = x.clone().requires_grad_()
    y = made(x)
    y.backward(grad)
    assert x.grad is not None
    return y.detach(), x.grad


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_one_group_is_plain_batchnorm_without_a_copy():
    made = norm(Part(0, 8, 8, 1))
    run(made, batch(), batch(1))  # makes room for the group's statistics
    with Operations() as operations:
        run(made, batch(), batch(1))
    assert not {"split", "cat", "copy_"} & {*operations.names}
    assert operations.names.count("native_batch_norm") == 1


def test_part_knows_who_shares_a_group():
    # (total, groups, ranks) -> (share, group_clips, span, slots)
    table = {
        (512, 64, 8): (64, 8, 1, 8),
        (1024, 64, 8): (128, 16, 1, 8),
        (64, 8, 8): (8, 8, 1, 1),
        (64, 8, 16): (4, 8, 2, 1),
        (64, 8, 64): (1, 8, 8, 1),
        (24, 2, 1): (24, 12, 1, 2),
    }
    for (total, groups, ranks), expected in table.items():
        part = Part(first=0, clips=total // ranks, total=total, bn_groups=groups, ranks=ranks)
        assert (part.share, part.group_clips, part.span, part.slots) == expected
    assert [Part(first, 8, 64, 8, ranks=2).slot for first in (0, 24, 32, 56)] == [0, 3, 0, 3]


@pytest.mark.parametrize(
    ("first", "clips", "total", "groups", "ranks"),
    [(0, 4, 16, 2, 1), (4, 8, 16, 2, 1), (0, 16, 16, 2, 2), (0, 2, 16, 2, 4), (0, 15, 15, 2, 1), (0, 4, 12, 2, 3)],
)
def test_part_must_be_whole_groups_or_a_whole_share(first: int, clips: int, total: int, groups: int, ranks: int):
    with pytest.raises(AssertionError):
        Part(first, clips, total, groups, ranks)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_are_separate_batchnorms_with_one_affine_pair(groups: int, layout: torch.memory_format):
    made = norm(Part(0, 8, 8, groups))
    singles = [norm() for _ in range(groups)]
    for seed in range(3):
        x, grad = batch(seed).to(memory_format=layout), batch(seed + 9)
        y, grad_x = run(made, x, grad)
        assert y.is_contiguous(memory_format=layout)
        pieces = [
            run(single, *piece) for single, *piece in zip(singles, x.chunk(groups), grad.chunk(groups), strict=True)
        ]
        close(y, torch.cat([piece[0] for piece in pieces]))
        close(grad_x, torch.cat([piece[1] for piece in pieces]))
    close(made.weight.grad, sum(single.weight.grad for single in singles))
    close(made.bias.grad, sum(single.bias.grad for single in singles))
    close(made.group_mean, torch.stack([single.running_mean for single in singles]))
    close(made.group_var, torch.stack([single.running_var for single in singles]))


@pytest.mark.parametrize("clips", [2, 4])
def test_micro_batches_of_whole_groups_are_the_whole_pass(clips: int):
    whole, cut = norm(), norm()
    for seed in range(3):
        x, grad = batch(seed), batch(seed + 9)
        whole.part = Part(0, 8, 8, 4)
        y, grad_x = run(whole, x, grad)
        pieces = []
        for first in range(0, 8, clips):
            cut.part = Part(first, clips, 8, 4)
            pieces.append(run(cut, x[first : first + clips], grad[first : first + clips]))
        close(torch.cat([piece[0] for piece in pieces]), y)
        close(torch.cat([piece[1] for piece in pieces]), grad_x)
    close(cut.weight.grad, whole.weight.grad)
    merge_group_stats(whole)
    merge_group_stats(cut)
    close(cut.running_mean, whole.running_mean)
    close(cut.running_var, whole.running_var)


def on_ranks(ranks: int, work: Callable[[int, Callable[[Tensor, int], Tensor]], None]) -> None:
    """Run `work(rank, gather)` on a thread per rank."""
    board: list[Tensor] = [torch.empty(0)] * ranks
    barrier = threading.Barrier(ranks, timeout=20)
    failures: list[BaseException] = []

    def body(rank: int) -> None:
        def gather(x: Tensor, n: int) -> Tensor:
            board[rank] = x.detach().clone()
            barrier.wait()
            block = torch.stack(board[rank // n * n : rank // n * n + n])
            barrier.wait()  # none writes before all have read
            return block

        try:
            work(rank, gather)
        except BaseException as failure:
            failures.append(failure)
            barrier.abort()

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.mark.parametrize(("ranks", "groups"), [(2, 1), (4, 1), (4, 2), (8, 2), (2, 2), (2, 4)])
def test_ranks_together_equal_one_rank(ranks: int, groups: int):
    one, share = norm(), SHAPE[0] // ranks
    many = [norm() for _ in range(ranks)]
    # Far from zero, where E[x^2] - E[x]^2 would lose digits.
    batches = [(batch(seed) + 100, batch(seed + 9)) for seed in range(3)]
    one.part = Part(0, 8, 8, groups)
    expected = [run(one, x, grad) for x, grad in batches]
    merge_group_stats(one)
    got: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def work(rank: int, gather: Callable[[Tensor, int], Tensor]) -> None:
        mine = slice(rank * share, (rank + 1) * share)
        many[rank].part = Part(rank * share, share, 8, groups, ranks=ranks, gather=gather)
        for step, (x, grad) in enumerate(batches):
            got[step, rank] = run(many[rank], x[mine], grad[mine])
        merge_group_stats(many[rank], lambda x: gather(x, ranks))

    on_ranks(ranks, work)
    for step, (y, grad_x) in enumerate(expected):
        close(torch.cat([got[step, rank][0] for rank in range(ranks)]), y)
        close(torch.cat([got[step, rank][1] for rank in range(ranks)]), grad_x)
    close(sum(made.weight.grad for made in many), one.weight.grad)
    close(sum(made.bias.grad for made in many), one.bias.grad)
    for made in many:
        close(made.running_mean, one.running_mean)
        close(made.running_var, one.running_var)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (2, 4), (8, 2)])
def test_statistics_saved_on_some_ranks_go_on_on_others(groups: int, before: int, after: int):
    straight = nn.Sequential(norm(Part(0, 8, 8, groups)))
    for seed in range(4):
        straight(batch(seed))
    saved: list[dict[str, Tensor]] = []
    merged: list[Tensor] = []

    def trained(model: nn.Module, rank: int, ranks: int, seeds: tuple[int, int], gather: Gather) -> None:
        share = 8 // ranks
        model[0].part = Part(rank * share, share, 8, groups, ranks=ranks, gather=gather)
        for seed in seeds:
            model(batch(seed)[rank * share : (rank + 1) * share])

    def first(rank: int, gather: Gather) -> None:
        model = nn.Sequential(norm())
        trained(model, rank, before, (0, 1), gather)
        stats = group_stats(model, lambda x: gather(x, before))
        assert stats["0"].shape == (groups, 2, 3)
        if rank == 0:
            saved.append(stats)

    def second(rank: int, gather: Gather) -> None:
        model = nn.Sequential(norm())
        put_group_stats(model, saved[0])
        trained(model, rank, after, (2, 3), gather)
        merge_group_stats(model, lambda x: gather(x, after))
        merged.append(torch.stack([model[0].running_mean, model[0].running_var]))

    on_ranks(before, first)
    on_ranks(after, second)
    merge_group_stats(straight)
    for stats in merged:
        close(stats, torch.stack([straight[0].running_mean, straight[0].running_var]))


def test_what_was_put_back_can_be_merged_before_any_step():
    made, again = nn.Sequential(norm(Part(0, 8, 8, 4))), nn.Sequential(norm())
    made(batch())
    put_group_stats(again, group_stats(made))
    merge_group_stats(made)
    merge_group_stats(again)
    close(again[0].running_var, made[0].running_var)
    assert group_stats(nn.Sequential(norm())) == {}


@pytest.mark.parametrize(("ranks", "groups"), [(1, 4), (2, 2), (2, 1), (8, 2)])
def test_pooled_statistics_are_those_of_all_values_together(ranks: int, groups: int):
    batches = [3 * batch(seed) + seed for seed in range(4)]
    many, share = [norm() for _ in range(ranks)], SHAPE[0] // ranks

    @torch.no_grad()
    def work(rank: int, gather: Callable[[Tensor, int], Tensor]) -> None:
        made = many[rank]
        set_part(made, Part(rank * share, share, 8, groups, ranks=ranks, gather=gather))
        made(batch(99)[:share])  # forgotten at the reset
        reset_group_stats(made)
        for step, x in enumerate(batches):
            set_momentum(made, 1 / (step + 1), pool=True)
            made(x[rank * share : (rank + 1) * share])
        merge_group_stats(made, lambda x: gather(x, ranks))

    on_ranks(ranks, work)
    var, mean = torch.var_mean(torch.cat(batches), dim=(0, 2, 3, 4), correction=0)
    for made in many:
        close(made.running_mean, mean)
        close(made.running_var, var)


def test_gradient_across_ranks_is_that_of_finite_differences():
    x, rows = batch(shape=(2, 2, 1, 2, 2)), batch(1, (2, 2, 1, 2, 2))

    def across(x: Tensor, grad: Tensor | None) -> tuple[Tensor, Tensor]:
        pieces: dict[int, tuple[Tensor, Tensor]] = {}

        def work(rank: int, gather: Callable[[Tensor, int], Tensor]) -> None:
            made = norm(Part(rank, 1, 2, 1, ranks=2, gather=gather), channels=2)
            mine = slice(rank, rank + 1)
            pieces[rank] = run(made, x[mine], rows[mine])

        on_ranks(2, work)
        return torch.cat([pieces[0][0], pieces[1][0]]), torch.cat([pieces[0][1], pieces[1][1]])

    _, grad_x = across(x, rows)
    for place in range(0, x.numel(), 3):
        bump = torch.zeros_like(x)
        bump.view(-1)[place] = 1e-6
        slope = ((across(x + bump, rows)[0] - across(x - bump, rows)[0]) * rows).sum() / 2e-6
        close(slope, grad_x.reshape(-1)[place], 1e-7)


def golden_input(shape: list[int], step: int) -> Tensor:
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (torch.sin(0.7 * i + step) + 0.3 * torch.cos(0.013 * i * i + step)).float().reshape(shape)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{case['shape']}/{case['num_splits']}")
def test_numbers_of_the_authors_code(case: dict):
    clips, channels = case["shape"][:2]
    splits = case["num_splits"]
    order = torch.arange(clips).reshape(-1, splits).T.reshape(-1)  # their groups are interleaved, ours contiguous
    made = GroupBatchNorm3d(channels)
    with torch.no_grad():
        made.weight.copy_(torch.tensor(case["weight"]))
        made.bias.copy_(torch.tensor(case["bias"]))

    def check(y: Tensor, expected: dict) -> None:
        y = y.detach().double()
        assert y.sum().item() == pytest.approx(expected["sum"], rel=1e-5, abs=1e-4)
        assert y.square().sum().item() == pytest.approx(expected["sumsq"], rel=1e-6)
        assert y.reshape(-1)[:4].tolist() == pytest.approx(expected["first4"], rel=1e-5, abs=1e-6)

    def check_stats(expected: dict) -> None:
        for ours, key in [
            (made.group_mean.reshape(-1), "split_mean"),  # theirs is flat, split by split
            (made.group_var.reshape(-1), "split_var"),
            (made.running_mean, "mean"),
            (made.running_var, "var"),
        ]:
            assert ours.tolist() == pytest.approx(expected[key], rel=1e-5, abs=1e-6), key

    set_part(made, Part(0, clips, clips, splits))
    for step, expected in enumerate(case["train_outputs"]):
        y = torch.empty(case["shape"])
        y[order] = made(golden_input(case["shape"], step)[order]).detach()
        check(y, expected)
    merge_group_stats(made)
    check_stats(case["after_aggregate"])
    check(made.eval()(golden_input(case["shape"], 9)), case["eval_output"])

    made.train()
    reset_group_stats(made)
    with torch.no_grad():
        for step in range(5):
            set_momentum(made, 1 / (step + 1), pool=True)
            made(golden_input(case["shape"], step)[order])
    merge_group_stats(made)
    check_stats(case["precise"])


def test_slots_start_from_the_merged_statistics_when_the_number_of_groups_changes():
    made = norm(Part(0, 8, 8, 4))
    made(batch())
    merge_group_stats(made)
    merged = made.running_mean.clone(), made.running_var.clone()
    set_momentum(made, 0.0)
    made.part = Part(0, 8, 8, 2)
    made(batch(1))
    assert made.group_mean.shape == (2, 3)
    close(made.group_mean, merged[0].expand(2, 3))
    close(made.group_var, merged[1].expand(2, 3))


def test_loaded_statistics_replace_those_of_the_groups():
    made, other = norm(Part(0, 8, 8, 4)), norm()
    made(batch())
    other(batch(1))
    made.load_state_dict(other.state_dict())
    merge_group_stats(made)
    close(made.running_mean, other.running_mean)


def test_state_dict_is_that_of_plain_batchnorm():
    made = norm(Part(0, 8, 8, 4))
    made(batch())
    merge_group_stats(made)
    plain = nn.BatchNorm3d(3)
    assert list(made.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(made.state_dict())


def test_without_a_part_or_in_evaluation_it_is_plain_batchnorm():
    made, plain = norm(), nn.BatchNorm3d(3).double()
    plain.load_state_dict(made.state_dict())
    close(made(batch()), plain(batch()))
    made.part = Part(0, 8, 8, 4)
    close(made.eval()(batch()), plain.eval()(batch()))
    close(made.running_var, plain.running_var)


@pytest.mark.parametrize("span", [1, 2])
def test_statistics_stay_fp32_under_autocast(span: int):
    x = (batch() + 3).float()
    made = GroupBatchNorm3d(3)
    made.part = Part(0, 8, 8 * span, 1, ranks=span, gather=lambda stats, n: stats.detach().expand(n, *stats.shape))
    rounded = x.bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = made(rounded)
    y.float().square().sum().backward()
    assert y.dtype == rounded.grad.dtype == torch.bfloat16
    assert made.group_mean.dtype == made.group_var.dtype == torch.float32
    close(made.group_mean[0], 0.1 * rounded.detach().float().mean((0, 2, 3, 4)), 1e-6)


@pytest.mark.parametrize("clips", [1, 2, 4, 8])
def test_dropout_mask_belongs_to_the_global_batch(clips: int):
    dropout, x = Dropout(0.5), torch.ones(8, 100)
    set_part(dropout, Part(0, 8, 8, 8, seed=5))
    whole = dropout(x)
    pieces = []
    for first in range(0, 8, clips):
        set_part(dropout, Part(first, clips, 8, 8, seed=5))
        pieces.append(dropout(x[first : first + clips]))
    assert torch.equal(torch.cat(pieces), whole)
    assert set(whole.unique().tolist()) == {0.0, 2.0}
    assert 300 < whole.count_nonzero() < 500
    set_part(dropout, Part(0, 8, 8, 8, seed=6))
    assert not torch.equal(dropout(x), whole)
    assert torch.equal(dropout.eval()(x), x)


def test_set_part_reaches_every_module_that_asks():
    model = nn.Sequential(nn.Linear(1, 1), nn.Sequential(GroupBatchNorm3d(1)), Dropout(0.1))
    part = Part(0, 8, 8, 1)
    set_part(model, part)
    assert model[1][0].part is model[2].part is part
    assert not hasattr(model[0], "part")
    set_part(model, None)
    assert model[1][0].part is None


@pytest.mark.parametrize("layout", [torch.channels_last_3d, torch.contiguous_format], ids=["last", "first"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_groups_normalized_into_one_tensor_are_the_groups_one_by_one(
    layout: torch.memory_format, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    ours, theirs = (GroupBatchNorm3d(3).to(dtype) for _ in range(2))
    for norm in (ours, theirs):
        nn.init.uniform_(norm.weight, generator=torch.Generator().manual_seed(1))
    part = Part(4, 8, 24, 6, ranks=1)  # the middle groups of a rank's share
    x = torch.randn(8, 3, 2, 5, 5, dtype=dtype).to(memory_format=layout)
    weights, found = torch.randn_like(x), []
    for norm, compiling in ((ours, False), (theirs, True)):  # when torch compiles, each group is a batch_norm
        norm.part = part
        given = x.clone(memory_format=torch.preserve_format).requires_grad_()
        with mock.patch.object(torch.compiler, "is_compiling", return_value=compiling):
            for _ in range(2):
                y = norm(given)
        (y * weights).sum().backward()
        found.append([y, given.grad, norm.weight.grad, norm.bias.grad, norm.group_mean, norm.group_var])
    for expected, got in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert found[0][0].is_contiguous(memory_format=layout)
    assert not torch.equal(ours.group_mean[2], ours.group_mean[0])


@pytest.mark.parametrize("shape", [(6, 5, 2, 4, 4), (6, 1, 2, 3, 3), (6, 7, 1, 1, 1), (6, 600, 1, 2, 1)])
@pytest.mark.parametrize("layout", ["first", "last", "neither"])
def test_gradients_of_groups_are_combined_in_any_layout(shape: tuple[int, ...], layout: str) -> None:
    torch.manual_seed(0)
    x, grad = torch.randn(2, *shape, dtype=torch.float64)
    if layout == "last":
        x = x.to(memory_format=torch.channels_last_3d)
    elif layout == "neither":
        x = x.transpose(3, 4).contiguous().transpose(3, 4)
    slope, scale, shift = torch.randn(3, 3, shape[1], dtype=torch.float64)
    clips = [
        x[2 * g : 2 * g + 2] * slope[g].view(-1, 1, 1, 1)
        + grad[2 * g : 2 * g + 2] * scale[g].view(-1, 1, 1, 1)
        + shift[g].view(-1, 1, 1, 1)
        for g in range(3)
    ]
    torch.testing.assert_close(combined(x, slope, grad, scale, shift), torch.cat(clips))


@pytest.mark.parametrize("clips", [1, 2, 8])
def test_a_mask_made_on_the_device_belongs_to_the_global_batch(clips: int) -> None:
    seed = torch.tensor(7 + 2**62)
    whole = hashed_mask(seed, 0, 8, 8, 5000, 0.3)
    pieces = [hashed_mask(seed, first, clips, 8, 5000, 0.3) for first in range(0, 8, clips)]
    assert torch.equal(torch.cat(pieces), whole)
    assert whole.double().mean(1) == pytest.approx(torch.full((8,), 0.7), abs=0.03)
    others = [hashed_mask(seed + n, 0, 8, 8, 5000, 0.3) for n in (1, STREAMS - 2**64)]
    others += [mask.flatten().roll(by).view(8, -1) for mask in others for by in (-1, 1)]  # nor is it shifted
    for other in (*others, whole.roll(1, 0), whole.roll(1, 1)):  # two masks of 0.7 agree in 0.7² + 0.3² of all places
        assert (other == whole).double().mean().item() == pytest.approx(0.58, abs=0.02)
    assert hashed_mask(seed, 0, 8, 8, 5000, 0.0).all()


@pytest.mark.parametrize("make", [keep_mask, hashed_mask])
def test_traced_dropout_is_one_graph_for_all_steps(
    make: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mgtrain.models.dropout.keep_mask", make)
    model, x, graphs = nn.Sequential(Dropout(0.5), DropPath(0.5, stream=1)), torch.ones(8, 100), []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    traced = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    for step in range(3):
        set_part(model, Part(0, 8, 8, 8, seed=step))
        assert torch.equal(traced(x), model(x))
    assert len(graphs) == 1


class Layouts(TorchDispatchMode):
    """Notes the sizes and layouts that BatchNorm's kernels are given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "batch_norm" in func.overloadpacket.__name__:
            self.seen += [(x.ndim, x.is_contiguous()) for x in args[:2] if isinstance(x, Tensor) and x.ndim > 1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("clips", "groups"), [(1, 1), (4, 4), (8, 4)])
def test_a_cpu_normalizes_rows_whose_layout_is_sure(clips: int, groups: int) -> None:
    model = norm(Part(0, clips, clips, groups))
    x = batch(shape=(clips, *SHAPE[1:])).to(memory_format=torch.channels_last_3d).requires_grad_()
    with Layouts() as layouts:
        y = model(x)
        assert y.is_contiguous(memory_format=torch.channels_last_3d)
        y.backward(torch.ones_like(y))
    assert set(layouts.seen) == {(2, True)}
    assert len(layouts.seen) >= 3 * groups


def test_slots_of_a_new_phase_start_from_the_merged_statistics_of_the_last() -> None:
    made = GroupBatchNorm3d(3).double().train()
    made.part = Part(0, 8, 8, 4)
    made(torch.randn(8, 3, 2, 3, 3).double())
    means, variances = made.group_mean.clone(), made.group_var.clone()
    set_momentum(made, 0.0)
    made.part = Part(0, 8, 8, 2)
    made(torch.randn(8, 3, 2, 3, 3).double())
    torch.testing.assert_close(made.group_mean, means.mean(0).expand(2, 3))
    torch.testing.assert_close(made.group_var, (variances.mean(0) + means.var(0, correction=0)).expand(2, 3))


def test_ranks_start_a_phase_from_the_statistics_of_all() -> None:
    made = GroupBatchNorm3d(1).train()
    made.part = Part(0, 4, 8, 2, ranks=2, gather=lambda x, n: torch.stack([x.detach(), x.detach() + 2]))
    made(torch.randn(4, 1, 2, 3, 3))
    mine = made.group_mean.clone()
    set_momentum(made, 0.0)
    made.begin(Part(0, 4, 8, 4, ranks=2, gather=made.part.gather))
    torch.testing.assert_close(made.group_mean, (mine + 1).expand(2, 1))


def test_a_momentum_of_ones_own_is_restored() -> None:
    norm = GroupBatchNorm3d(3, momentum=0.01)
    set_momentum(norm, 0.5, pool=True)
    set_momentum(norm, None)
    assert (norm.momentum, norm.pool) == (0.01, False)
