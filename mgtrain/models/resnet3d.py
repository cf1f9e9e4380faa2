"""The parts of the 3-D residual networks (He et al. 2016; Feichtenhofer et al. 2019, table 1), for any T, H and W."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mgtrain.models.conv import Conv3d
from mgtrain.models.dropout import Dropout
from mgtrain.models.norm import GroupBatchNorm3d

STAGE_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}  # depth -> blocks of res2 .. res5
EXPANSION = 4  # a bottleneck's output channels per inner channel


def stage_blocks(depth: int | Sequence[int]) -> tuple[int, ...]:
    """The numbers of blocks of res2 .. res5, from the depth of a ResNet or as given.

    >>> stage_blocks(50), stage_blocks([1, 1, 1, 1])
    ((3, 4, 6, 3), (1, 1, 1, 1))
    """
    return STAGE_BLOCKS[depth] if isinstance(depth, int) else tuple(depth)


class Stem(nn.Module):
    """A `frames` x 7 x 7 convolution and max pooling: clips (B, 3, T, S, S) to features (B, channels, T, S/4, S/4)."""

    def __init__(self, channels: int, frames: int) -> None:
        super().__init__()
        self.conv = Conv3d(3, channels, (frames, 7, 7), (1, 2, 2), (frames // 2, 3, 3), bias=False)
        self.norm = GroupBatchNorm3d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x), relu=True)  # (B, C, T, S/2, S/2)
        return max_pool(x)  # (B, C, T, S/4, S/4)


def max_pool(x: Tensor) -> Tensor:
    """The maximum of 3x3 pixels around every second one.

    A GPU pools pictures: it adds the gradients of max_pool3d in any order, so that two runs differ by rounding.
    """
    return pool_pictures(x) if x.is_cuda else F.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1))


def pool_pictures(x: Tensor) -> Tensor:
    """`max_pool` with each frame as a picture."""
    clips, _, frames = x.shape[:3]
    pictures = F.max_pool2d(x.transpose(1, 2).flatten(0, 1), 3, 2, 1)  # of a view in channels_last_3d
    return pictures.view(clips, frames, *pictures.shape[1:]).transpose(1, 2)


class Bottleneck(nn.Module):
    """Residual block of three convolutions: `frames`x1x1, 1x3x3 (strided in space), 1x1x1 (to 4 * `inner` channels).

    Features (B, channels, T, H, W) to (B, 4 * inner, T, H/stride, W/stride).
    """

    def __init__(self, channels: int, inner: int, frames: int, stride: int) -> None:
        super().__init__()
        out = EXPANSION * inner
        self.conv1 = Conv3d(channels, inner, (frames, 1, 1), padding=(frames // 2, 0, 0), bias=False)
        self.norm1 = GroupBatchNorm3d(inner)
        self.conv2 = Conv3d(inner, inner, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False)
        self.norm2 = GroupBatchNorm3d(inner)
        self.conv3 = Conv3d(inner, out, 1, bias=False)
        self.norm3 = GroupBatchNorm3d(out)
        nn.init.zeros_(self.norm3.weight)  # so that each block starts as the identity (Goyal et al. 2017)
        self.shortcut: nn.Module = nn.Identity()
        if channels != out or stride != 1:
            conv = Conv3d(channels, out, 1, (1, stride, stride), bias=False)
            self.shortcut = nn.Sequential(conv, GroupBatchNorm3d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x), relu=True)
        y = self.norm2(self.conv2(y), relu=True)
        return F.relu_(self.norm3(self.conv3(y)) + self.shortcut(x))


def stage(channels: int, inner: int, blocks: int, frames: Sequence[int], stride: int) -> nn.Sequential:
    """`blocks` bottlenecks, the first with the `stride`; their temporal kernel sizes cycle through `frames`."""
    first = Bottleneck(channels, inner, frames[0], stride)
    later = [Bottleneck(EXPANSION * inner, inner, frames[n % len(frames)], 1) for n in range(1, blocks)]
    return nn.Sequential(first, *later)


class Head(nn.Module):
    """Average features (B, C, T, H, W) of one or more pathways over time and space; classify: logits (B, classes)."""

    def __init__(self, channels: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = Dropout(dropout)
        self.linear = nn.Linear(channels, classes)

    def forward(self, *pathways: Tensor) -> Tensor:
        pooled = [features.mean(dim=(2, 3, 4)) for features in pathways]  # (B, C) each
        logits: Tensor = self.linear(self.dropout(torch.cat(pooled, dim=1)))  # (B, classes)
        return logits


def init_weights(model: nn.Module) -> None:
    """Initialize convolutions from He et al.'s normal distribution and the classifier near zero."""
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
        if isinstance(module, nn.Conv3d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
