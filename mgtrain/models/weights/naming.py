"""How a project names the tensors of its networks, against the names that all of them are brought to.

The common names are `<pathway>.<stage>.<rest>`: `slow.stem.conv.weight`, `fast.res2.0.norm1.bias`,
`slow.res3.nonlocal1.query.weight`, `laterals.res4.conv.weight`; and `head.linear.weight`. A network with one pathway
has the slow one. Within a block, `rest` is as in `mgtrain.models`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Rules = tuple[tuple[str, str], ...]
Tensors = dict[str, Tensor]
STAGES = ("stem", "res2", "res3", "res4", "res5")


@dataclass(frozen=True, slots=True)
class Naming:
    """A project's names as regular expressions, each replaced wherever it is found, one after the other."""

    project: str
    sign: str  # what one of its names, and no other project's, begins with
    rules: Rules
    ignored: str = "$^"  # names of what is no weight, such as an optimizer's state
    mend: Callable[[Tensors], Tensors] = lambda tensors: tensors  # what differs by more than its name
    notes: Rules = ()  # (pattern of common names, what a network with such a tensor computes differently there)

    def common(self, name: str) -> str:
        """The common name of one of the project's tensors."""
        for pattern, replacement in self.rules:
            name = re.sub(pattern, replacement, name)
        return name


OWN = Naming(
    "mgtrain",
    sign=r"(stem|slow\.0)\.conv\.weight",
    rules=(
        (r"^(?=stem\.|res\d\.)", "slow."),
        *((rf"^(slow|fast|laterals)\.{index}\.", rf"\1.{stage}.") for index, stage in enumerate(STAGES)),
    ),
)
