"""BatchNorm over groups of the global batch (Wu et al. 2020, section 3.4; "sub-BN" in the authors' code).

A coarse step has many more clips than the base shape. Its statistics are taken over groups of as many clips as a GPU
had at the base shape, so that their noise, which regularizes, stays what it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgtrain.models.part import Part

AXES = (0, 2, 3, 4)  # all but the channels of (B, C, T, H, W)
ROW = 512  # numbers side by side, from which a loop over them costs little
TINY_EPS = 1e-12  # where a variance is wanted and nothing is divided by it
_seen_before = False  # see `seen_before`


@contextmanager
def seen_before() -> Iterator[None]:
    """Within it a training step's clips leave running statistics as they are, because they have come by already."""
    global _seen_before
    _seen_before = True
    try:
        yield
    finally:
        _seen_before = False


class GroupBatchNorm3d(nn.BatchNorm3d):
    """BatchNorm of (B, C, T, H, W) that in training, given a `part`, normalizes each group by itself.

    At evaluation, or without a part, it is `nn.BatchNorm3d`, whose `state_dict` it shares. Each group has a slot of
    running statistics of its own; `merge_group_stats` makes one of them. When the number of groups of the global batch
    changes, all slots start from the merged statistics (of all ranks if the part can gather).
    """

    part: Part | None = None
    frozen: bool = False  # whether the running statistics stay as they are, and normalize in training, too
    momentum: float
    running_mean: Tensor  # (C)
    running_var: Tensor  # (C)
    group_mean: Tensor  # (slots, C)
    group_var: Tensor  # (slots, C); unbiased, as in torch, but for pooled ones

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(channels, eps, momentum)
        self.usual_momentum = momentum
        self.pool = False  # see `set_momentum`
        self.groups = 0  # BatchNorm groups of the global batch that the slots are for; 0: for none yet
        self.everyones = False  # whether the slots are those of all ranks, as `put_group_stats` leaves them
        self.register_buffer("group_mean", torch.empty(0, channels), persistent=False)
        self.register_buffer("group_var", torch.empty(0, channels), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        part = self.part
        if part is None or not self.training:
            return super().forward(x)
        assert len(x) == part.clips, f"{len(x)} clips given, {part.clips} expected"
        self.begin(part)
        if part.span > 1:
            return self._norm_piece(x, part)
        groups = part.clips // part.group_clips
        if groups == 1:
            return self._norm_group(x, part.slot)
        dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last_3d)
        plain = self.pool or x.device.type != "cpu" or x.dtype != self.weight.dtype or torch.compiler.is_compiling()
        if dense and not plain:
            mine = slice(part.slot, part.slot + groups)
            means, variances = self.group_mean[mine], self.group_var[mine]  # views, which are written to
            normed: Tensor = _NormGroups.apply(x, self.weight, self.bias, means, variances, self._weight(), self.eps)
            return normed
        return torch.cat([self._norm_group(clips, slot) for slot, clips in enumerate(x.chunk(groups), part.slot)])

    def begin(self, part: Part) -> None:
        """Make room for the statistics of a part's groups, if its step is the first with so many of them."""
        if self.training and self.groups != part.bn_groups:
            self._restart_slots(part)
        elif self.training and self.everyones:
            self._keep_own_slots(part)

    def train(self, mode: bool = True) -> GroupBatchNorm3d:
        return super().train(mode and not self.frozen)

    def _norm_piece(self, x: Tensor, part: Part) -> Tensor:
        output: Tensor
        output, mean, var = _NormSpanningRanks.apply(x, self.weight, self.bias, self.eps, part)
        self._track(0, mean, var, x.numel() // x.shape[1] * part.span)
        return output

    def _norm_group(self, clips: Tensor, slot: int) -> Tensor:
        mean, var = self.group_mean[slot], self.group_var[slot]  # views, which batch_norm writes to
        if not self.pool:
            return F.batch_norm(clips, mean, var, self.weight, self.bias, True, self._weight(), self.eps)
        var, mean = torch.var_mean(clips.to(self.weight.dtype), AXES, correction=0)
        self._track(slot, mean, var, clips.numel() // clips.shape[1])
        return F.batch_norm(clips, None, None, self.weight, self.bias, True, eps=self.eps)

    @torch.no_grad()
    def _track(self, slot: int, mean: Tensor, var: Tensor, count: int) -> None:
        """Let a group's mean and (population) variance over `count` values weigh `momentum` in its slot."""
        momentum = self._weight()
        shift = mean - self.group_mean[slot]
        self.group_mean[slot].add_(shift, alpha=momentum)
        # Pooled, the variance is that of all values together, which the means' drift is part of.
        var = var + (1 - momentum) * shift.square() if self.pool else var * count / (count - 1)
        self.group_var[slot].lerp_(var, momentum)

    def _weight(self) -> float:
        """Of what is seen now, in the running statistics."""
        return 0.0 if _seen_before else self.momentum

    def _restart_slots(self, part: Part) -> None:
        gather = part.gather
        self.merge(None if gather is None else lambda stats: gather(stats, part.ranks))
        self.groups, self.everyones = part.bn_groups, False
        self.group_mean = self.running_mean.repeat(part.slots, 1)
        self.group_var = self.running_var.repeat(part.slots, 1)

    def _keep_own_slots(self, part: Part) -> None:
        first = part.first // part.share * part.share // part.group_clips
        own = slice(first, first + part.slots)
        self.group_mean, self.group_var = self.group_mean[own].clone(), self.group_var[own].clone()
        self.everyones = False

    def group_stats(self, gather_all: Callable[[Tensor], Tensor] | None) -> Tensor:
        """The slots' statistics, of all ranks if `gather_all` is given: (groups, 2, C), no groups if there are none."""
        stats = torch.stack([self.group_mean, self.group_var], dim=1)  # (slots, 2, C)
        if self.groups == 0:
            return stats[:0]
        if gather_all is None or self.everyones:
            return stats
        everyones = gather_all(stats).flatten(0, 1)  # (ranks * slots, 2, C)
        return everyones[:: max(1, len(everyones) // self.groups)]  # ranks that share a group have the same

    @torch.no_grad()
    def merge(self, gather_all: Callable[[Tensor], Tensor] | None) -> None:
        """Make one running mean and variance out of the slots': see `merge_group_stats`."""
        means, variances = self.group_stats(gather_all).unbind(dim=1)  # (groups, C)
        if len(means):
            self.running_mean.copy_(means.mean(dim=0))
            self.running_var.copy_(variances.mean(dim=0) + means.var(dim=0, correction=0))

    def put_group_stats(self, stats: Tensor) -> None:
        """Take over all ranks' slots, (groups, 2, C), as `group_stats` gave them; each rank keeps its own."""
        self.groups, self.everyones = len(stats), True
        self.group_mean, self.group_var = (part.to(self.running_mean.device) for part in stats.unbind(dim=1))

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        self.groups, self.everyones = 0, False

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.groups, self.everyones = 0, False  # the slots belong to the statistics that were there before


class _NormGroups(torch.autograd.Function):
    """Normalize each group of (B, C, T, H, W) by itself, into one tensor and, backwards, out of one.

    Statistics and sums are those of plain BatchNorm's kernels, group by group; no results are joined by copies. A
    CPU's: a GPU has better ones, which only `torch.batch_norm` knows to choose.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, means: Tensor, variances: Tensor, momentum: float, eps: float
    ) -> Tensor:
        y, groups = torch.empty_like(x), len(means)
        saved = torch.empty(2, groups, len(weight), dtype=weight.dtype)  # each group's mean and 1 / deviation
        for clips, out, mean, var, mean_of, inv_std in zip(
            x.chunk(groups), y.chunk(groups), means.unbind(), variances.unbind(), *(of.unbind() for of in saved),
            strict=True,
        ):  # fmt: skip
            torch.native_batch_norm(
                clips, weight, bias, mean, var, True, momentum, eps, out=(out, mean_of, inv_std)
            )  # fmt: skip
        ctx.save_for_backward(x, weight, *saved)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inv_std = ctx.saved_tensors  # (B, C, T, H, W), (C), (groups, C) twice
        groups = len(mean)
        sums = [
            torch.ops.aten.native_batch_norm_backward(
                above, clips, weight, None, None, group_mean, group_inv_std, True, 0.0, (False, True, True)
            )[1:]
            for clips, above, group_mean, group_inv_std in zip(
                x.chunk(groups), grad.chunk(groups), mean.unbind(), inv_std.unbind(), strict=True
            )
        ]
        of_products, of_grad = (torch.stack(column) for column in zip(*sums, strict=True))  # (groups, C)
        # (grad - of_grad / n - (x - mean) * inv_std * of_products / n) * weight * inv_std, of n values
        scale, count = weight * inv_std, x.numel() // inv_std.numel()
        slope = scale * inv_std * of_products / -count
        shift = scale * of_grad / -count - slope * mean
        grad_x = _combined(x, slope, grad, scale, shift)
        return grad_x, of_products.sum(0), of_grad.sum(0), None, None, None, None


class _NormSpanningRanks(torch.autograd.Function):
    """Normalize this rank's piece of a group by the statistics of the whole group, exchanged among its ranks.

    Forward and backward each gather once, two numbers per channel. All ranks have equally many clips, so the mean of a
    group is the mean of its pieces' means, and its variance the mean of their variances plus the variance of their
    means: nothing is lost to cancellation, as it would be in E[x²] - E[x]².
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, part: Part
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert part.gather is not None, "a group that spans ranks needs `gather`"
        stats = torch.stack(_var_mean(x, weight.dtype))  # (2, C)
        variances, means = part.gather(stats, part.span).unbind(dim=1)  # (span, C)
        mean, var = means.mean(dim=0), variances.mean(dim=0) + means.var(dim=0, correction=0)  # (C)
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt())
        ctx.part = part
        ctx.mark_non_differentiable(mean, var)
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps), mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, inv_std = ctx.saved_tensors
        grad, x_ = grad.to(weight.dtype), x.to(weight.dtype)  # (B, C, T, H, W)
        sums = torch.stack(_sums(grad, x_, mean, inv_std))  # (2, C)
        count = x.numel() // x.shape[1] * ctx.part.span
        mean_grad, mean_grad_x = (ctx.part.gather(sums, ctx.part.span).sum(dim=0) / count).unbind()  # (C)
        # (grad - mean_grad - (x - mean) * inv_std * mean_grad_x) * weight * inv_std
        scale = weight * inv_std
        slope = -scale * inv_std * mean_grad_x
        shift = -scale * mean_grad - slope * mean
        grad_x = _combined(x_, slope.unsqueeze(0), grad, scale.unsqueeze(0), shift.unsqueeze(0))
        return grad_x.to(x.dtype), sums[1], sums[0], None, None


# On a CPU the kernels of plain BatchNorm take these sums several times faster than reductions do.


def _var_mean(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Population variance and mean of (B, C, T, H, W) over all but the channels: (C) each."""
    x = x.to(dtype)
    if x.device.type != "cpu":
        return torch.var_mean(x, AXES, correction=0)
    _, mean, inv_std = torch.native_batch_norm(x, None, None, None, None, True, 0.0, TINY_EPS)
    return inv_std.pow(-2) - TINY_EPS, mean


def _sums(grad: Tensor, x: Tensor, mean: Tensor, inv_std: Tensor) -> tuple[Tensor, Tensor]:
    """Over all but the channels, the sums of the gradient and of the gradient times the normalized clips: (C) each."""
    if x.device.type != "cpu":
        return grad.sum(AXES), (grad * (x - _spread(mean))).sum(AXES) * inv_std
    _, of_products, of_grad = torch.ops.aten.native_batch_norm_backward(
        grad, x, None, mean, inv_std.pow(-2), None, None, False, 0.0, [False, True, True]
    )
    return of_grad, of_products


def _combined(x: Tensor, slope: Tensor, grad: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x * slope + grad * scale + shift of (B, C, T, H, W) in two passes; for each group of clips, (groups, C)."""
    groups, channels = shift.shape
    last = x.is_contiguous(memory_format=torch.channels_last_3d)
    made = torch.empty_like(x, memory_format=torch.channels_last_3d if last else torch.contiguous_format)
    if last:
        times = math.gcd(x.numel() // shift.numel(), max(1, ROW // channels))
        x, grad, out = (of.movedim(1, 4).reshape(groups, -1, times * channels) for of in (x, grad, made))
        slope, scale, shift = (of.repeat(1, times).unsqueeze(1) for of in (slope, scale, shift))
    else:
        x, grad, out = (of.reshape(groups, -1, channels, of[0, 0].numel()) for of in (x, grad, made))
        slope, scale, shift = (of[:, None, :, None] for of in (slope, scale, shift))
    torch.addcmul(shift, x, slope, out=out).addcmul_(grad, scale)
    return made


def merge_group_stats(model: nn.Module, gather_all: Callable[[Tensor], Tensor] | None = None) -> None:
    """Make each BatchNorm's running statistics out of those of its groups, for evaluation and for checkpoints.

    The mean of the means, and the mean of the variances plus the variance of the means: over this rank's groups, or
    those of all ranks if `gather_all` (tensor -> (ranks, *shape)) is given. The groups' own stay as they are.
    """
    for norm in _group_norms(model):
        norm.merge(gather_all)


def group_stats(model: nn.Module, gather_all: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """Each BatchNorm's statistics of its groups, (groups, 2, C), of all ranks if `gather_all` is given; by its name."""
    named = {name: m.group_stats(gather_all) for name, m in model.named_modules() if isinstance(m, GroupBatchNorm3d)}
    return {name: stats for name, stats in named.items() if len(stats)}


def put_group_stats(model: nn.Module, stats: dict[str, Tensor]) -> None:
    """Put back what `group_stats` gave, on any number of ranks."""
    for name, tensor in stats.items():
        norm = model.get_submodule(name)
        assert isinstance(norm, GroupBatchNorm3d), f"{name} has no groups"
        norm.put_group_stats(tensor)


def reset_group_stats(model: nn.Module) -> None:
    """Forget all running statistics but frozen ones, as before recalibration."""
    for norm in _group_norms(model):
        norm.reset_running_stats()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Whatever the model sees within, its BatchNorms' statistics are afterwards what they were."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [
        ({name: buffer.clone() for name, buffer in norm.named_buffers()}, getattr(norm, "groups", 0),
         getattr(norm, "everyones", False)) for norm in norms
    ]  # fmt: skip
    try:
        yield
    finally:
        for norm, (buffers, groups, everyones) in zip(norms, before, strict=True):
            for name, buffer in buffers.items():
                setattr(norm, name, buffer)
            if isinstance(norm, GroupBatchNorm3d):
                norm.groups, norm.everyones = groups, everyones


def set_momentum(model: nn.Module, momentum: float | None, *, pool: bool = False) -> None:
    """Let the statistics of the coming step weigh `momentum` in the groups' running ones; None: as before.

    With `pool`, and 1/k at the k-th step since `reset_group_stats`, these become the mean and the variance of all
    values of these steps together ("precise BN"), rather than averages of each step's.
    """
    for norm in _group_norms(model):
        norm.momentum, norm.pool = norm.usual_momentum if momentum is None else momentum, pool


def _spread(x: Tensor) -> Tensor:
    """One number per channel (C) as (C, 1, 1, 1), to go with (B, C, T, H, W)."""
    return x.view(-1, 1, 1, 1)


def _group_norms(model: nn.Module) -> Iterator[GroupBatchNorm3d]:
    """The BatchNorms whose statistics are not frozen."""
    return (module for module in model.modules() if isinstance(module, GroupBatchNorm3d) and not module.frozen)
