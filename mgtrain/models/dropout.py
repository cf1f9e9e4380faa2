"""Dropout with one mask for the global batch, whatever the number of ranks and micro-batches."""

import torch
from torch import Tensor, nn

from mgtrain.errors import UsageError
from mgtrain.models.part import Part

STREAMS = 0x9E3779B97F4A7C15  # odd, so that the seeds of all streams differ
PLACES = 0xD1B54A32D192ED03 - 2**64  # an int64: odd, and not STREAMS, so that no stream is another one's, shifted
# Shifts and factors of splitmix64 (Steele et al. 2014), as int64.
MIXING = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


class Dropout(nn.Module):
    """Dropout of features (B, ...) with probability `p`; each layer of a network has its own random `stream`.

    Given a `part`, the mask is a slice of the global batch's. A layer that is called several times in a pass drops the
    same each time. B may be several rows per clip, one after the other, as where frames are part of the batch.
    """

    part: Part | None = None
    seed: Tensor  # () of the current step, on the layer's device, where a compiled pass and a CUDA graph read it
    axes: int | None = None  # the mask has this many axes after B and is the same along the others; None: all axes

    def __init__(self, p: float, stream: int = 0) -> None:
        super().__init__()
        self.p, self.stream = p, stream
        self.register_buffer("seed", torch.zeros((), dtype=torch.int64), persistent=False)

    def begin(self, part: Part) -> None:
        """Set the seed of the mask to that of the part's step."""
        if self.p:
            self.seed.fill_((part.seed + self.stream * STREAMS) % (1 << 63))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        drawn = x.shape[1:][: self.axes]
        part = self.part
        if part is None:
            keep = torch.rand(len(x), drawn.numel(), device=x.device) >= self.p
        else:
            rows, rest = divmod(len(x), part.clips)  # of each clip
            if rest:
                cause = f"{part.clips} clips do not divide {len(x)} rows"
                raise UsageError(f"dropout: {cause}; keep clips in the first axis")
            make = keep_mask if x.device.type == "cpu" else hashed_mask
            keep = make(self.seed, part.first * rows, part.clips * rows, part.total * rows, drawn.numel(), self.p)
        return x * keep.view(len(x), *drawn, *[1] * (x.ndim - 1 - len(drawn))) / (1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class DropFeatures(Dropout):
    """Dropout of whole channels of (B, C, ...)."""

    axes = 1


class DropPath(Dropout):
    """Dropout of whole clips of (B, ...): stochastic depth (Huang et al. 2016)."""

    axes = 0


# A custom operation, because tracing would stop at the generator.
@torch.library.custom_op("mgtrain::keep_mask", mutates_args=())
def keep_mask(seed: Tensor, first: int, clips: int, total: int, features: int, p: float) -> Tensor:
    """The features to keep of clips `first .. first + clips` of `total`: bool (clips, features).

    Each is True with probability `1 - p`. The mask of the global batch is drawn on the CPU.
    """
    generator = torch.Generator().manual_seed(int(seed))  # not made in rng.py, which knows no torch
    return torch.rand(total, features, generator=generator)[first : first + clips] >= p


@keep_mask.register_fake
def _(seed: Tensor, first: int, clips: int, total: int, features: int, p: float) -> Tensor:
    return torch.empty(clips, features, dtype=torch.bool, device=seed.device)


def hashed_mask(seed: Tensor, first: int, clips: int, total: int, features: int, p: float) -> Tensor:
    """The features to keep, as `keep_mask` but from a hash, of integers only, of the seed and each feature's position.

    A GPU computes only its part of the mask, and nothing is copied from the host; all devices compute the same.
    """
    place = torch.arange(first * features, (first + clips) * features, device=seed.device)
    number = place * PLACES + seed
    for shift, factor in MIXING:
        number = (number ^ ((number >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return (number >= int(p * 2**64) - 2**63).view(clips, features)
