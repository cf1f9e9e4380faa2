"""The clips of the global batch in one forward pass: all that BatchNorm and dropout need to know about the step."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Part:
    """Clips `first .. first + clips` of the `total` clips of the global batch, in one forward pass.

    The global batch consists of `bn_groups` BatchNorm groups, and of the shares of `ranks` ranks; both are contiguous
    and of equal size. A pass gets whole groups or, where a group spans several ranks, this rank's share of one group.

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
    # (tensor, n) -> (n, *tensor.shape): gathers from this rank's block of n consecutive ranks, without gradients
    gather: Callable[[Tensor, int], Tensor] | None = None

    def __post_init__(self) -> None:
        assert (self.total % self.bn_groups, self.total % self.ranks) == (0, 0), f"unequal shares: {self}"
        unit, whole = sorted((self.share, self.group_clips))
        assert whole % unit == 0, f"a group cut in two: {self}"
        assert (self.first % unit, self.clips % unit) == (0, 0), f"not whole groups or a whole share: {self}"
        assert self.first % self.share + self.clips <= self.share, f"more than one rank's share: {self}"

    @property
    def share(self) -> int:
        """Clips per rank."""
        return self.total // self.ranks

    @property
    def group_clips(self) -> int:
        """Clips per BatchNorm group."""
        return self.total // self.bn_groups

    @property
    def span(self) -> int:
        """Ranks per group; 1 if each rank has whole groups."""
        return max(1, self.group_clips // self.share)

    @property
    def slots(self) -> int:
        """Groups per rank, at least 1."""
        return max(1, self.share // self.group_clips)

    @property
    def slot(self) -> int:
        """This pass's first group, counted from this rank's first."""
        return self.first % self.share // self.group_clips


def set_part(model: nn.Module, part: Part | None) -> None:
    """Set the `part` of every module that has one to that of the next forward pass."""
    for module in model.modules():
        if hasattr(module, "part"):
            module.part = part  # type: ignore[assignment]
        if part is not None and hasattr(module, "begin"):
            module.begin(part)  # type: ignore[operator]  # here, because a compiled forward pass cannot
