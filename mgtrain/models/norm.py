"""BatchNorm over groups of the global batch (Wu et al. 2020, section 3.4; "sub-BN" in the authors' code).

A coarse step has many more clips than the base shape. Its statistics are computed over groups of as many clips as one
GPU has at the base shape, because the noise of these statistics regularizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgtrain.models import fused
from mgtrain.models.part import Part
from mgtrain.models.spanning import AXES, NormSpanningGpus, NormSpanningRanks, by_rows, combined, flat

_tracking = True  # see `without_tracking`


@contextmanager
def without_tracking() -> Iterator[None]:
    """Leave running statistics as they are: for a second forward pass of the same clips."""
    global _tracking
    _tracking = False
    try:
        yield
    finally:
        _tracking = True


class GroupBatchNorm3d(nn.BatchNorm3d):
    """BatchNorm of (B, C, T, H, W) that in training, given a `part`, normalizes each group separately.

    In evaluation, or without a part, it is `nn.BatchNorm3d`, whose `state_dict` it always has. Each group has its own
    running statistics, in a slot. When the number of groups of the global batch changes, all slots start from the
    merged statistics, of all ranks if the part can gather.
    """

    part: Part | None = None
    frozen: bool = False  # whether running statistics are constant and normalize in training, too
    momentum: float
    running_mean: Tensor  # (C)
    running_var: Tensor  # (C)
    group_mean: Tensor  # (slots, C)
    group_var: Tensor  # (slots, C); unbiased, as in torch, unless pooled

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(channels, eps, momentum)
        self.usual_momentum = momentum
        self.pool = False  # see `set_momentum`
        self.groups = 0  # groups of the global batch that the slots belong to; 0: no slots yet
        self.gathered = False  # whether the slots are those of all ranks, as after `put_group_stats`
        self._storage: dict[int, tuple[Tensor, Tensor]] = {}  # see `_set_slots`
        self.register_buffer("group_mean", torch.empty(0, channels), persistent=False)
        self.register_buffer("group_var", torch.empty(0, channels), persistent=False)

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        """Normalize; with `relu`, apply ReLU too, in the same kernel where the kernels of `fused` work."""
        part = self.part
        if not self.training:
            running = self.running_mean, self.running_var
            normed = _batch_norm(x, *running, self.weight, self.bias, False, 0.0, self.eps)
        elif part is None:
            normed = super().forward(x)
        else:
            assert len(x) == part.clips, f"{len(x)} clips given, {part.clips} expected"
            self.begin(part)
            if part.span == 1 and not self.pool and fused.usable(x):
                slots = self._slots_of(part)
                return fused.norm_groups(x, self.weight, self.bias, *slots, self._momentum_now(), self.eps, relu)
            if part.span > 1:
                norm = NormSpanningGpus if x.device.type == "cuda" else NormSpanningRanks
                normed, mean, var = norm.apply(x, self.weight, self.bias, self.eps, part)
                self._track(0, mean, var, x.numel() // x.shape[1] * part.span)
            else:
                normed = self._norm_by_groups(x, part)
        # Not in place on a GPU, where `normed` may be a view.
        return F.relu(normed, inplace=x.device.type == "cpu") if relu else normed

    def begin(self, part: Part) -> None:
        """In training, prepare the slots for the part's groups, if their number has changed or they are all ranks'."""
        if not self.training:
            return
        if self.groups != part.bn_groups:
            gather = part.gather
            self.merge(None if gather is None else lambda stats: gather(stats, part.ranks))
            self.groups, self.gathered = part.bn_groups, False
            self._set_slots(self.running_mean.expand(part.slots, -1), self.running_var.expand(part.slots, -1))
        elif self.gathered:
            first = part.first // part.share * part.share // part.group_clips
            own = slice(first, first + part.slots)
            self._set_slots(self.group_mean[own], self.group_var[own])
            self.gathered = False

    def train(self, mode: bool = True) -> GroupBatchNorm3d:
        return super().train(mode and not self.frozen)

    def _norm_by_groups(self, x: Tensor, part: Part) -> Tensor:
        groups = part.clips // part.group_clips
        if groups == 1:
            return self._norm_group(x, part.slot)
        dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last_3d)
        plain = self.pool or x.device.type != "cpu" or x.dtype != self.weight.dtype or torch.compiler.is_compiling()
        if dense and not plain:
            given = x, self.weight, self.bias, *self._slots_of(part), self._momentum_now(), self.eps
            normed: Tensor = _NormGroups.apply(*given)
            return normed
        return torch.cat([self._norm_group(clips, slot) for slot, clips in enumerate(x.chunk(groups), part.slot)])

    def _slots_of(self, part: Part) -> tuple[Tensor, Tensor]:
        """The running means and variances of the part's groups, (groups, C) each: views to write to."""
        slots = slice(part.slot, part.slot + part.clips // part.group_clips)
        return self.group_mean[slots], self.group_var[slots]

    def _norm_group(self, clips: Tensor, slot: int) -> Tensor:
        mean, var = self.group_mean[slot], self.group_var[slot]  # views that batch_norm updates
        if not self.pool:
            return _batch_norm(clips, mean, var, self.weight, self.bias, True, self._momentum_now(), self.eps)
        var, mean = torch.var_mean(clips.to(self.weight.dtype), AXES, correction=0)
        self._track(slot, mean, var, clips.numel() // clips.shape[1])
        return _batch_norm(clips, None, None, self.weight, self.bias, True, 0.0, self.eps)

    @torch.no_grad()
    def _track(self, slot: int, mean: Tensor, var: Tensor, count: int) -> None:
        """Update a slot with a group's mean and population variance, of `count` values per channel."""
        momentum = self._momentum_now()
        shift = mean - self.group_mean[slot]
        self.group_mean[slot].add_(shift, alpha=momentum)
        # The pooled variance is that of all values together, so it includes the difference of the means.
        var = var + (1 - momentum) * shift.square() if self.pool else var * count / (count - 1)
        self.group_var[slot].lerp_(var, momentum)

    def _momentum_now(self) -> float:
        return self.momentum if _tracking else 0.0

    def _set_slots(self, means: Tensor, variances: Tensor) -> None:
        """Copy (slots, C) into the slots. Each number of slots has fixed memory, because CUDA graphs hold addresses."""
        storage = self._storage.get(len(means))
        if storage is None or (storage[0].device, storage[0].dtype) != (means.device, means.dtype):
            storage = self._storage[len(means)] = means.new_empty(means.shape), means.new_empty(means.shape)
        for slots, values in zip(storage, (means, variances), strict=True):
            slots.copy_(values)
        self.group_mean, self.group_var = storage

    def group_stats(self, gather_all: Callable[[Tensor], Tensor] | None) -> Tensor:
        """The statistics of each group, of all ranks if `gather_all` is given: (groups, 2, C), possibly 0 groups."""
        stats = torch.stack([self.group_mean, self.group_var], dim=1)  # (slots, 2, C)
        if self.groups == 0:
            return stats[:0]
        if gather_all is None or self.gathered:
            return stats
        of_all = gather_all(stats).flatten(0, 1)  # (ranks * slots, 2, C)
        return of_all[:: max(1, len(of_all) // self.groups)]  # ranks that share a group have equal statistics

    @torch.no_grad()
    def merge(self, gather_all: Callable[[Tensor], Tensor] | None) -> None:
        """See `merge_group_stats`."""
        means, variances = self.group_stats(gather_all).unbind(dim=1)  # (groups, C)
        if len(means):  # the variance is the mean of the groups' variances plus the variance of their means
            self.running_mean.copy_(means.mean(dim=0))
            self.running_var.copy_(variances.mean(dim=0) + means.var(dim=0, correction=0))

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        self.groups, self.gathered = 0, False

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.groups, self.gathered = 0, False  # the slots belong to the replaced statistics


def _batch_norm(x: Tensor, *args: Any) -> Tensor:
    """`torch.nn.functional.batch_norm` of (B, C, T, H, W), in the layout with the fastest kernels."""
    if by_rows(x):
        y = F.batch_norm(x.movedim(1, 4).reshape(-1, x.shape[1]), *args)
        return y.view(*(x.shape[n] for n in (0, 2, 3, 4, 1))).movedim(4, 1)
    return F.batch_norm(flat(x), *args).view(x.shape)


def _groups(x: Tensor, groups: int, by_rows: bool) -> Sequence[Tensor]:
    """The groups of (B, C, T, H, W): (B / groups, C, T, H, W) each, or as rows, (M, C)."""
    return x.movedim(1, 4).reshape(groups, -1, x.shape[1]).contiguous().unbind() if by_rows else x.chunk(groups)


class _NormGroups(torch.autograd.Function):
    """Normalize each group of (B, C, T, H, W) with a CPU's BatchNorm kernels, without concatenating copies."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, means: Tensor, variances: Tensor, momentum: float, eps: float
    ) -> Tensor:
        y, groups = torch.empty_like(x), len(means)
        ctx.by_rows = by_rows(x)
        saved = torch.empty(2, groups, len(weight), dtype=weight.dtype)  # each group's mean and 1 / deviation
        for clips, out, running_mean, running_var, mean, inv_std in zip(
            *(_groups(tensor, groups, ctx.by_rows) for tensor in (x, y)), means.unbind(), variances.unbind(),
            *(tensor.unbind() for tensor in saved), strict=True,
        ):  # fmt: skip
            torch.native_batch_norm(
                clips, weight, bias, running_mean, running_var, True, momentum, eps, out=(out, mean, inv_std)
            )
        ctx.save_for_backward(x, weight, *saved)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inv_std = ctx.saved_tensors  # (B, C, T, H, W), (C), (groups, C) twice
        groups = len(mean)
        sums = [
            torch.ops.aten.native_batch_norm_backward(
                group_grad, clips, weight, None, None, group_mean, group_inv_std, True, 0.0, (False, True, True)
            )[1:]
            for clips, group_grad, group_mean, group_inv_std in zip(
                *(_groups(tensor, groups, ctx.by_rows) for tensor in (x, grad)), mean.unbind(), inv_std.unbind(),
                strict=True,
            )
        ]  # fmt: skip
        grad_weight, grad_bias = (torch.stack(column) for column in zip(*sums, strict=True))  # (groups, C)
        # (grad - grad_bias / n - (x - mean) * inv_std * grad_weight / n) * weight * inv_std, with n values per channel
        scale, count = weight * inv_std, x.numel() // inv_std.numel()
        slope = scale * inv_std * grad_weight / -count
        shift = scale * grad_bias / -count - slope * mean
        grad_x = combined(x, slope, grad, scale, shift)
        return grad_x, grad_weight.sum(0), grad_bias.sum(0), None, None, None, None


def merge_group_stats(model: nn.Module, gather_all: Callable[[Tensor], Tensor] | None = None) -> None:
    """Set each BatchNorm's running statistics from those of its groups, for evaluation and checkpoints.

    All ranks' groups count if `gather_all` (tensor -> (ranks, *shape)) is given. The slots do not change.
    """
    for norm in _group_norms(model):
        norm.merge(gather_all)


def group_stats(model: nn.Module, gather_all: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """The statistics of each BatchNorm's groups, (groups, 2, C) by its name, of all ranks if `gather_all` is given."""
    named = {name: m.group_stats(gather_all) for name, m in model.named_modules() if isinstance(m, GroupBatchNorm3d)}
    return {name: stats for name, stats in named.items() if len(stats)}


def group_slots(model: nn.Module) -> list[Tensor]:
    """All running means and variances of groups, (slots, C) each: tensors that a training step updates in place."""
    return [slots for norm in _group_norms(model) for slots in (norm.group_mean, norm.group_var)]


def put_group_stats(model: nn.Module, stats: dict[str, Tensor]) -> None:
    """Restore the result of `group_stats`, on any number of ranks; the next step keeps those of its rank."""
    for name, tensor in stats.items():
        norm = model.get_submodule(name)
        assert isinstance(norm, GroupBatchNorm3d), f"{name} has no groups"
        norm.groups, norm.gathered = len(tensor), True
        norm._set_slots(*tensor.to(norm.running_mean.device).unbind(dim=1))


def reset_group_stats(model: nn.Module) -> None:
    """Reset all running statistics that are not frozen."""
    for norm in _group_norms(model):
        norm.reset_running_stats()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Restore the statistics of all BatchNorms on leaving, whatever the model is used for in between."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    buffers = [(norm, name, buffer, buffer.clone()) for norm in norms for name, buffer in norm.named_buffers()]
    slots = [(norm, norm.groups, norm.gathered) for norm in norms if isinstance(norm, GroupBatchNorm3d)]
    try:
        yield
    finally:
        for norm, name, buffer, values in buffers:
            setattr(norm, name, buffer.copy_(values))
        for grouped, groups, gathered in slots:
            grouped.groups, grouped.gathered = groups, gathered


def set_momentum(model: nn.Module, momentum: float | None, *, pool: bool = False) -> None:
    """Set the momentum of the groups' running statistics; None restores the usual one.

    With `pool` and a momentum of 1/k at step k after a reset, they are those of all values together ("precise BN").
    """
    for norm in _group_norms(model):
        norm.momentum, norm.pool = norm.usual_momentum if momentum is None else momentum, pool


def _group_norms(model: nn.Module) -> Iterator[GroupBatchNorm3d]:
    """The BatchNorms whose statistics are not frozen."""
    return (module for module in model.modules() if isinstance(module, GroupBatchNorm3d) and not module.frozen)
