"""Which clips of the global batch a forward pass sees: all that BatchNorm and dropout need to know of the step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Part:
    """The stretch of the global batch that one forward pass sees: clips `first .. first + clips` of `total`.

    The global batch falls into `bn_groups` BatchNorm groups and into the shares of `ranks` ranks, both contiguous and
    of equal size. A pass sees whole groups or, where a group spans several ranks, this rank's whole share of one group.

    >>> part = Part(first=16, clips=8, total=32, bn_groups=4, ranks=2)  # the second rank's first micro-batch
    >>> part.group_clips, part.span, part.slots, part.slot
    (8, 1, 2, 0)
    >>> Part(first=8, clips=4, total=16, bn_groups=2, ranks=4).span  # groups of 8 clips, 4 of them on each rank
    2
    """

    first: int
    clips: int
    total: int  # clips of the global batch, over all ranks
    bn_groups: int  # BatchNorm groups of the global batch
    ranks: int = 1
    seed: int = 0  # keys this step's dropout mask
    # (tensor, n) -> (n, *tensor.shape): the tensors of that block of n consecutive ranks which holds this one; detached
    gather: Callable[[Tensor, int], Tensor] | None = None

    def __post_init__(self) -> None:
        assert (self.total % self.bn_groups, self.total % self.ranks) == (0, 0), f"unequal shares: {self}"
        assert max(self.share, self.group_clips) % min(self.share, self.group_clips) == 0, f"a group cut in two: {self}"
        unit = min(self.share, self.group_clips)
        assert (self.first % unit, self.clips % unit) == (0, 0), f"not whole groups or a whole share: {self}"
        assert self.first % self.share + self.clips <= self.share, f"more than one rank's share: {self}"

    @property
    def share(self) -> int:
        """Clips of the global batch that each rank has."""
        return self.total // self.ranks

    @property
    def group_clips(self) -> int:
        """Clips of one BatchNorm group."""
        return self.total // self.bn_groups

    @property
    def span(self) -> int:
        """Ranks that share one group; 1 if each holds whole groups."""
        return max(1, self.group_clips // self.share)

    @property
    def slots(self) -> int:
        """Groups that a rank's share holds, at least 1."""
        return max(1, self.share // self.group_clips)

    @property
    def slot(self) -> int:
        """The first slot, of this rank's, that this pass sees."""
        return self.first % self.share // self.group_clips


def set_part(model: nn.Module, part: Part | None) -> None:
    """Tell every module that has an attribute `part` which clips the next forward pass sees."""
    for module in model.modules():
        if hasattr(module, "part"):
            module.part = part  # type: ignore[assignment]
        if part is not None and hasattr(module, "begin"):
            module.begin(part)  # type: ignore[operator]  # here, so that a compiled forward pass need not
