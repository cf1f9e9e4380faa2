"""Convolutions of clips, which a CPU computes as ones of pictures and as matrix products: it is better at these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MANY = 128  # input channels from which a weight's gradient is a matrix product of patches,
PATCHES = 1 << 20  # of which so many numbers are laid out at a time, so that they stay in the cache
WIDE = 32  # output channels from which 3-D convolutions of blocks of pixels are as fast as anything else

Places = Sequence[tuple[slice, slice]]  # for each frame of a kernel: which frames go where


class Conv3d(nn.Conv3d):
    """`nn.Conv3d`, which on a CPU is a 2-D convolution or a matrix product in channels_last.

    A kernel of one frame sees the frames of (B, C, T, H, W) as pictures (B * T, C, H, W), one of a single pixel sees
    all places as rows (B * T * H * W, C); in channels_last_3d both are views. A kernel of k frames is k kernels of
    one, whose results are added up, each shifted in time: they are computed together, or, where there are so few
    frames that much would fall off the ends, one by one. Where it strides, it is one kernel that sees the frames which
    belong together as k * C channels. oneDNN's 3-D convolutions take up to three times as long as these, most of
    all backwards. Nothing is kept for the backward pass but the input. Sums are rounded in another order.

    GPUs and traced graphs get the 3-D convolution.
    """

    def forward(self, x: Tensor) -> Tensor:
        deep, broad = self.kernel_size[0] > 1, self.kernel_size[1:] != (1, 1)
        if x.device.type != "cpu" or torch.compiler.is_compiling() or not _last(x):
            return super().forward(x)
        if deep and broad and self.out_channels >= WIDE:
            return super().forward(x)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        weight, bias = self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)
        padding = tuple(int(n) for n in self.padding)
        y: Tensor = _Conv.apply(x.to(dtype).movedim(1, 4), weight.movedim(1, 4), bias, self.stride, padding)
        return y.movedim(4, 1)


class _Conv(torch.autograd.Function):
    """Clips (B, T, H, W, C), kernel (O, k, kh, kw, C) -> (B, T', H', W', O)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], padding: tuple[int, ...]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        places, frames = _places(x.shape[1], weight.shape[1], stride[0], padding[0])
        if stride[0] > 1:
            y = _flat(_spread(x, places, frames).flatten(4), _beside(weight), stride[1:], padding[1:])
        elif _falls_off(places, x.shape[1]):
            ones = {n: _flat(x[:, of], weight[:, n], stride[1:], padding[1:]) for n, _, of in _asked(places)}
            y = x.new_zeros(len(x), frames, *next(iter(ones.values())).shape[2:])
            for n, made, _ in _asked(places):
                y[:, made] += ones[n]
        else:
            y = _flat(x, _apart(weight), stride[1:], padding[1:])
            y = _gather(y.view(*y.shape[:4], len(places), -1), _turned(places), frames)
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, (wants_x, wants_weight, wants_bias, *_) = ctx.stride, ctx.padding, ctx.needs_input_grad
        grad_bias = grad.sum((0, 1, 2, 3)) if wants_bias else None
        outs, kernel, high, wide, channels = weight.shape
        places, frames = _places(x.shape[1], kernel, stride[0], padding[0])
        if stride[0] > 1:
            beside = _spread(x, places, frames).flatten(4)
            grad_x, found = _flat_grads(grad, beside, _beside(weight), stride[1:], padding[1:], wants_x, wants_weight)
            if grad_x is not None:
                grad_x = _gather(grad_x.view(*grad_x.shape[:4], kernel, channels), places, x.shape[1])
            grad_weight = found if found is None else found.view(outs, high, wide, kernel, channels).movedim(3, 1)
        elif _falls_off(places, x.shape[1]):
            grad_x, grad_weight = torch.zeros_like(x), torch.zeros_like(weight)
            for n, made, of in _asked(places):
                one, found = _flat_grads(
                    grad[:, made], x[:, of], weight[:, n], stride[1:], padding[1:], wants_x, wants_weight
                )
                if one is not None:
                    grad_x[:, of] += one
                if found is not None:
                    grad_weight[:, n] = found
        else:
            grad = _spread(grad, _turned(places), x.shape[1]).flatten(4)
            grad_x, found = _flat_grads(grad, x, _apart(weight), stride[1:], padding[1:], wants_x, wants_weight)
            grad_weight = found if found is None else found.view(kernel, outs, high, wide, channels).transpose(0, 1)
        return grad_x, grad_weight, grad_bias, None, None


# A kernel of several frames as one that sees pictures, and the frames that these are of.


def _beside(weight: Tensor) -> Tensor:
    """(O, k, kh, kw, C) -> (O, kh, kw, k * C), for frames side by side."""
    return weight.movedim(1, 3).flatten(3)


def _apart(weight: Tensor) -> Tensor:
    """(O, k, kh, kw, C) -> (k * O, kh, kw, C), for what each frame of the kernel makes by itself."""
    return weight.transpose(0, 1).flatten(0, 1)


def _places(frames: int, kernel: int, stride: int, padding: int) -> tuple[Places, int]:
    """For each frame of the kernel, the frames that it makes and those that it makes them of; and how many are made.

    >>> _places(frames=5, kernel=3, stride=1, padding=1)[0]
    [(slice(1, 5, 1), slice(0, 4, 1)), (slice(0, 5, 1), slice(0, 5, 1)), (slice(0, 4, 1), slice(1, 5, 1))]
    """
    places, made = [], (frames + 2 * padding - kernel) // stride + 1
    for shift in range(-padding, kernel - padding):  # frame i is made of frame stride * i + shift, if there is one
        first = max(0, -(shift // stride))
        end = max(first, min(made, (frames - 1 - shift) // stride + 1))
        source = stride * first + shift
        places.append((slice(first, end, 1), slice(source, source + stride * (end - first), stride)))
    return places, made


def _asked(places: Places) -> list[tuple[int, slice, slice]]:
    """The kernel's frames that make any, each with its places."""
    return [(n, made, of) for n, (made, of) in enumerate(places) if made.stop > made.start]


def _falls_off(places: Places, frames: int) -> bool:
    """Whether more than a fifth of what all frames of the kernel make of all `frames` is not asked for."""
    asked: int = sum(made.stop - made.start for _, made, _ in _asked(places))
    return asked < 0.8 * len(places) * frames


def _turned(places: Places) -> Places:
    return [(source, made) for made, source in places]


def _spread(x: Tensor, places: Places, frames: int) -> Tensor:
    """(B, T, H, W, C) -> (B, frames, H, W, k, C): each frame where its places say, and zero where there is none."""
    if len(places) == 1 and places[0] == (slice(0, frames, 1), slice(0, x.shape[1], 1)):
        return x.unsqueeze(4)
    spread = x.new_empty(x.shape[0], frames, *x.shape[2:4], len(places), x.shape[4])
    for index, (there, here) in enumerate(places):
        spread[:, : there.start, :, :, index] = 0
        spread[:, there, :, :, index] = x[:, here]
        spread[:, there.stop :, :, :, index] = 0
    return spread


def _gather(x: Tensor, places: Places, frames: int) -> Tensor:
    """The reverse: (B, T, H, W, k, C) -> (B, frames, H, W, C), added up where several come to one frame."""
    if len(places) == 1 and places[0] == (slice(0, x.shape[1], 1), slice(0, frames, 1)):
        return x.squeeze(4)
    gathered = x.new_zeros(x.shape[0], frames, *x.shape[2:4], x.shape[5])
    for index, (here, there) in enumerate(places):
        gathered[:, there] += x[:, here, :, :, index]
    return gathered


# Convolutions of pictures: (B, T, H, W, C) by a kernel (O, kh, kw, C) to (B, T, H', W', O).


def _flat(x: Tensor, weight: Tensor, stride: tuple[int, ...], padding: tuple[int, ...]) -> Tensor:
    if _rows(weight, padding):
        return F.linear(x[:, :, :: stride[0], :: stride[1]], weight.flatten(1))
    y = F.conv2d(_pictures(x), weight.movedim(3, 1), None, stride, padding)
    y = y.movedim(1, 3).contiguous()  # as oneDNN makes it
    return y.view(*x.shape[:2], *y.shape[1:])


def _flat_grads(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    wants_x: bool,
    wants_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Of `_flat`, in the order in which its input and weight lie."""
    if _rows(weight, padding):
        above, rows = grad.flatten(0, 3), x[:, :, :: stride[0], :: stride[1]].flatten(0, 3)  # (M, O), (M, C)
        grad_weight = (above.t() @ rows).view(weight.shape) if wants_weight else None
        if not wants_x:
            return None, grad_weight
        grad_x = (above @ weight.flatten(1)).view(*grad.shape[:4], x.shape[4])
        if stride == (1, 1):
            return grad_x, grad_weight
        strided = torch.zeros_like(x)
        strided[:, :, :: stride[0], :: stride[1]] = grad_x
        return strided, grad_weight
    by_patches = x.shape[4] >= MANY
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        _pictures(grad), _pictures(x), weight.movedim(3, 1), None, stride, padding, (1, 1), False, (0, 0), 1,
        (wants_x, wants_weight and not by_patches, False),
    )  # fmt: skip
    if wants_x:
        grad_x = grad_x.movedim(1, 3).contiguous().view(x.shape)
    if wants_weight:
        grad_weight = _patches_grad(grad, x, weight, stride, padding) if by_patches else grad_weight.movedim(1, 3)
    return grad_x, grad_weight


def _patches_grad(grad: Tensor, x: Tensor, weight: Tensor, stride: tuple[int, ...], padding: tuple[int, ...]) -> Tensor:
    """A weight's gradient, as a matrix product of the patches that it sees.

    oneDNN's takes up to four times as long where there are many channels and few pixels, as in late stages.
    """
    outs, high, wide, channels = weight.shape
    found = weight.new_zeros(outs, high * wide * channels)
    at_once = max(1, PATCHES // (grad.shape[2] * grad.shape[3] * found.shape[1]))
    pictures, above = x.flatten(0, 1), grad.flatten(0, 1)  # (N, H, W, C), (N, H', W', O)
    for first in range(0, len(pictures), at_once):
        some = slice(first, first + at_once)
        framed = F.pad(pictures[some], (0, 0, padding[1], padding[1], padding[0], padding[0]))
        patches = framed.unfold(1, high, stride[0]).unfold(2, wide, stride[1])  # (n, H', W', C, kh, kw)
        found.addmm_(above[some].flatten(0, 2).t(), patches.movedim(3, 5).reshape(-1, found.shape[1]))
    return found.view(weight.shape)


def _rows(weight: Tensor, padding: tuple[int, ...]) -> bool:
    """Whether a kernel sees single pixels."""
    return weight.shape[1:3] == (1, 1) and tuple(padding) == (0, 0)


def _pictures(x: Tensor) -> Tensor:
    """(B, T, H, W, C) -> (B * T, C, H, W), a view in channels_last."""
    return x.flatten(0, 1).movedim(3, 1)


def _last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last_3d)
