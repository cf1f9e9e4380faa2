"""BatchNorm of groups that span several ranks: each rank normalizes its clips with the whole group's statistics."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mgtrain.models.part import Part

AXES = (0, 2, 3, 4)  # all but the channels of (B, C, T, H, W)
ROW = 512  # numbers in the rows of `combined`: shorter rows make torch's inner loops slow
TINY_EPS = 1e-12  # to compute a variance with a kernel that returns 1 / deviation


class NormSpanningRanks(torch.autograd.Function):
    """Normalize this rank's clips with the statistics of the whole group, exchanged among its ranks.

    Forward and backward pass each gather two numbers per channel, once. All ranks have equally many clips, so the
    variance is the mean of the ranks' variances plus that of their means, without the cancellation of E[x²] - E[x]².
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, part: Part) -> tuple[Tensor, ...]:
        """The normalized clips, and the group's mean and population variance."""
        assert part.gather is not None, "a group that spans ranks needs `gather`"
        # On a CPU, BatchNorm's own kernels compute sums over all but the channels several times faster than reductions.
        _, mean, inv_std = torch.native_batch_norm(x.to(weight.dtype), None, None, None, None, True, 0.0, TINY_EPS)
        stats = torch.stack([inv_std.pow(-2) - TINY_EPS, mean])  # (2, C)
        variances, means = part.gather(stats, part.span).unbind(dim=1)  # (span, C)
        mean, var = means.mean(dim=0), variances.mean(dim=0) + means.var(dim=0, correction=0)  # (C)
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt())
        ctx.part = part
        ctx.mark_non_differentiable(mean, var)
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps), mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inv_std = ctx.saved_tensors
        grad, x_ = grad.to(weight.dtype), x.to(weight.dtype)  # (B, C, T, H, W)
        _, sum_product, sum_grad = torch.ops.aten.native_batch_norm_backward(
            grad, x_, None, mean, inv_std.pow(-2), None, None, False, 0.0, [False, True, True]
        )
        sums = torch.stack([sum_grad, sum_product])  # (2, C)
        count = x.numel() // x.shape[1] * ctx.part.span
        mean_grad, mean_grad_x = (ctx.part.gather(sums, ctx.part.span).sum(dim=0) / count).unbind()  # (C)
        # (grad - mean_grad - (x - mean) * inv_std * mean_grad_x) * weight * inv_std
        scale = (weight * inv_std).unsqueeze(0)
        slope = -scale * inv_std * mean_grad_x
        shift = -scale * mean_grad - slope * mean
        grad_x = combined(x_, slope, grad, scale, shift)
        return grad_x.to(x.dtype), sums[1], sums[0], None, None


class NormSpanningGpus(torch.autograd.Function):
    """`NormSpanningRanks` with torch's kernels for GPUs, those of `nn.SyncBatchNorm`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, part: Part) -> tuple[Tensor, ...]:
        assert part.gather is not None, "a group that spans ranks needs `gather`"
        if not x.is_contiguous(memory_format=torch.channels_last_3d):
            x = x.contiguous()  # `flat` must be a view of the result
        rows = flat(x)
        mean, inv_std = torch.batch_norm_stats(rows, eps)  # (C) each, float32
        means, inv_stds = part.gather(torch.stack([mean, inv_std]), part.span).unbind(dim=1)  # (span, C)
        count = x.numel() // x.shape[1]
        counts = torch.full((part.span,), count, dtype=mean.dtype, device=x.device)
        # Only the dtype of its first argument counts, and must be that of `counts`.
        mean, inv_std = torch.batch_norm_gather_stats_with_counts(means, means, inv_stds, None, None, 0.0, eps, counts)
        ctx.save_for_backward(x, weight, mean, inv_std)
        ctx.part = part
        var = inv_std.pow(-2).sub_(eps).clamp_(min=0)
        ctx.mark_non_differentiable(mean, var)
        y = torch.empty_like(x)
        torch.batch_norm_elemt(rows, weight, bias, mean, inv_std, eps, out=flat(y))
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inv_std = ctx.saved_tensors
        last = x.is_contiguous(memory_format=torch.channels_last_3d)
        grad = grad.contiguous(memory_format=torch.channels_last_3d if last else torch.contiguous_format)
        rows, grads = flat(x), flat(grad)
        sum_grad, sum_product, grad_weight, grad_bias = torch.batch_norm_backward_reduce(
            grads, rows, mean, inv_std, weight, True, True, True
        )
        sums = ctx.part.gather(torch.stack([sum_grad, sum_product]), ctx.part.span).sum(dim=0)  # (2, C)
        counts = torch.full((ctx.part.span,), x.numel() // x.shape[1], dtype=torch.int32, device=x.device)
        grad_x = torch.batch_norm_backward_elemt(grads, rows, mean, inv_std, weight, sums[0], sums[1], counts)
        return grad_x.view(x.shape), grad_weight, grad_bias, None, None


def combined(x: Tensor, slope: Tensor, grad: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x * slope + grad * scale + shift of clips (B, C, T, H, W), with factors (groups, C) of groups, in two passes."""
    groups, channels = shift.shape
    last = x.is_contiguous(memory_format=torch.channels_last_3d)
    result = torch.empty_like(x, memory_format=torch.channels_last_3d if last else torch.contiguous_format)
    if last:
        times = math.gcd(x.numel() // shift.numel(), max(1, ROW // channels))
        x, grad, out = (t.movedim(1, 4).reshape(groups, -1, times * channels) for t in (x, grad, result))
        slope, scale, shift = (t.repeat(1, times).unsqueeze(1) for t in (slope, scale, shift))
    else:
        x, grad, out = (t.reshape(groups, -1, channels, t[0, 0].numel()) for t in (x, grad, result))
        slope, scale, shift = (t[:, None, :, None] for t in (slope, scale, shift))
    torch.addcmul(shift, x, slope, out=out).addcmul_(grad, scale)
    return result


def flat(x: Tensor) -> Tensor:
    """(B, C, T, H, W) in channels_last_3d as (B, C, T * H, W) on a GPU; otherwise unchanged.

    With five dimensions, torch's BatchNorm for GPUs copies half precision to float32 and uses slow kernels.
    """
    return x if x.device.type == "cpu" or torch.compiler.is_compiling() or x.is_contiguous() else x.flatten(2, 3)


def by_rows(x: Tensor) -> bool:
    """Whether to normalize (B, C, T, H, W) as rows (B * T * H * W, C): on a CPU in channels_last_3d.

    The strides of a single clip fit both layouts, and torch then chooses kernels for the gradient ten times as slow.
    """
    last = x.is_contiguous(memory_format=torch.channels_last_3d)
    return last and x.device.type == "cpu" and not torch.compiler.is_compiling()
