"""SlowFast (Feichtenhofer et al. 2019): a wide pathway over few frames and a narrow pathway over all frames."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mgtrain.models.conv import Conv3d
from mgtrain.models.norm import GroupBatchNorm3d
from mgtrain.models.resnet3d import EXPANSION, Head, Stem, init_weights, stage, stage_blocks

LATERAL_RATIO = 2  # output channels of a lateral connection per channel of the fast pathway


def slow_frames(frames: int, alpha: int) -> Sequence[int] | Tensor:
    """Indices of the frames of the slow pathway: one in `alpha`, spread evenly from the first to the last.

    While a graph is traced for any number of frames, they are a tensor, int64 (frames / alpha,).

    >>> slow_frames(16, alpha=4), slow_frames(3, alpha=4)
    ((0, 5, 10, 15), (0,))
    """
    if isinstance(frames, torch.SymInt):
        count = torch.sym_max(1, frames // alpha)
        return torch.arange(count) * (frames - 1) // torch.sym_max(1, count - 1)
    count = max(1, frames // alpha)
    return tuple(i * (frames - 1) // max(1, count - 1) for i in range(count))


class Lateral(nn.Module):
    """Lateral connection: features of the fast pathway (B, C, T, H, W) to the slow one's (B, 2 * C, T/alpha, H, W).

    Each output of the convolution covers `alpha` fast frames; each slow frame takes the output that covers it.
    """

    def __init__(self, channels: int, alpha: int, kernel: int) -> None:
        super().__init__()
        out = LATERAL_RATIO * channels
        self.alpha = alpha
        self.conv = Conv3d(channels, out, (kernel, 1, 1), (alpha, 1, 1), (kernel // 2, 0, 0), bias=False)
        self.norm = GroupBatchNorm3d(out)

    def forward(self, fast: Tensor) -> Tensor:
        frames = slow_frames(fast.shape[2], self.alpha)
        places = frames // self.alpha if isinstance(frames, Tensor) else [frame // self.alpha for frame in frames]
        x = take_frames(self.conv(fast), places)  # (B, 2 * C, T/alpha, H, W)
        features: Tensor = self.norm(x, relu=True)
        return features


def take_frames(x: Tensor, frames: Sequence[int] | Tensor) -> Tensor:
    """Select frames of (B, C, T, H, W), keeping its memory format; given as numbers, without a copy to the device."""
    if isinstance(frames, Tensor):
        return x.index_select(2, frames.to(x.device))
    if list(frames) == list(range(x.shape[2])):
        return x
    return torch.cat([x[:, :, frame : frame + 1] for frame in frames], dim=2)


class SlowFast(nn.Module):
    """SlowFast on ResNets: normalized clips (B, 3, T, S, S) to logits (B, classes).

    The slow stem has `width` channels and gets one frame in `alpha`, the fast one has `width / beta_inv`. `depth` is
    50, 101 or the numbers of blocks of res2 .. res5.
    """

    def __init__(
        self, classes: int, *, width: int = 64, depth: int | Sequence[int] = 50, alpha: int = 4, beta_inv: int = 8,
        fusion_kernel: int = 7, dropout: float = 0.5,
    ) -> None:  # fmt: skip
        super().__init__()
        blocks = stage_blocks(depth)
        narrow = width // beta_inv
        self.alpha = alpha
        self.slow = _pathway(width, blocks, (1, 1, 1, 3, 3), lateral=LATERAL_RATIO * narrow)
        self.fast = _pathway(narrow, blocks, (5, 3, 3, 3, 3), lateral=0)
        outs = [narrow, *(EXPANSION * narrow * 2**index for index in range(3))]  # channels of the fast stem .. res4
        self.laterals = nn.ModuleList([Lateral(out, alpha, fusion_kernel) for out in outs])
        self.head = Head(8 * EXPANSION * (width + narrow), classes, dropout)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        slow, fast = take_frames(x, slow_frames(x.shape[2], self.alpha)), x  # (B, 3, T/alpha, S, S), (B, 3, T, S, S)
        for slow_part, fast_part, lateral in zip(self.slow, self.fast, self.laterals, strict=False):
            fast = fast_part(fast)
            slow = torch.cat([slow_part(slow), lateral(fast)], dim=1)
        logits: Tensor = self.head(self.slow[-1](slow), self.fast[-1](fast))
        return logits


def _pathway(width: int, blocks: Sequence[int], frames: Sequence[int], lateral: int) -> nn.ModuleList:
    """Stem and res2 .. res5 with temporal kernels `frames`; each stage gets `lateral` more channels per `width`."""
    parts: list[nn.Module] = [Stem(width, frames[0])]
    channels = width + lateral
    for index, (count, length) in enumerate(zip(blocks, frames[1:], strict=True)):
        parts.append(stage(channels, width * 2**index, count, (length,), stride=2 if index else 1))
        channels = EXPANSION * (width + lateral) * 2**index
    return nn.ModuleList(parts)
