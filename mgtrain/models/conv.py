"""Convolutions of clips that a CPU computes as ones of pictures where these are the same."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conv3d(nn.Conv3d):
    """`nn.Conv3d`, which on a CPU is a 2-D convolution in channels_last where its kernel is flat.

    A kernel of one frame sees the frames of (B, C, T, H, W) as a batch of pictures (B * T, C, H, W); one of a single
    pixel sees a clip as a picture (B, C, T, H * W). In channels_last_3d both are views: the numbers lie as they are.
    oneDNN's 2-D kernels are up to twice as fast as its 3-D ones, and torch's own 3-D one, which small clips get, far
    slower than either; sums are rounded in another order. GPUs and traced graphs get the 3-D convolution.
    """

    def forward(self, x: Tensor) -> Tensor:
        plain = x.device.type != "cpu" or torch.compiler.is_compiling() or not _last(x)
        if not plain and self.kernel_size[0] == self.stride[0] == 1:
            return self._as_pictures(x)
        if not plain and self.kernel_size[1:] == self.stride[1:] == (1, 1):
            return self._as_strips(x)
        return super().forward(x)

    # A kernel of one pixel has no dilation, but asked for one, torch takes oneDNN for a few pictures or one clip, too.

    def _as_pictures(self, x: Tensor) -> Tensor:
        clips, _, frames = x.shape[:3]
        stride, padding, dilation = self.stride[1:], (int(self.padding[1]), int(self.padding[2])), 1
        pictures = x.transpose(1, 2).flatten(0, 1)  # (B * T, C, H, W)
        if self.kernel_size[1:] == (1, 1) and padding == (0, 0):
            dilation = 2 if len(pictures) < 16 else 1
            if stride != (1, 1):  # "averages" of one pixel: what lies between is left out, which oneDNN is slow at
                pictures, stride = F.avg_pool2d(pictures, 1, stride), (1, 1)
        y = F.conv2d(pictures, self.weight.squeeze(2), self.bias, stride, padding, dilation)
        return _kept(y.view(clips, frames, *y.shape[1:]).transpose(1, 2))  # (B, C, T, H, W)

    def _as_strips(self, x: Tensor) -> Tensor:
        # Flattened with the channels last, or one clip's strides would no longer tell that they are.
        strips = x.movedim(1, 4).flatten(2, 3).movedim(3, 1)  # (B, C, T, H * W)
        padding, dilation = (int(self.padding[0]), 0), (1, 2 if len(x) == 1 else 1)
        y = F.conv2d(strips, self.weight.squeeze(4), self.bias, (self.stride[0], 1), padding, dilation)
        y = y.movedim(1, 3)  # (B, T, H * W, C)
        return _kept(y.view(*y.shape[:2], *x.shape[3:], -1).movedim(4, 1))  # (B, C, T, H, W)


def _last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last_3d)


def _kept(y: Tensor) -> Tensor:
    """In channels_last_3d, as it is already if oneDNN has made it."""
    return y.contiguous(memory_format=torch.channels_last_3d)
