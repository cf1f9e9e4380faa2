"""The moving average of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mgtrain.schedule.plan import Step


def kept(decay: float, base_clips: int, step: Step) -> float:
    """The share of the average that a step keeps, a function of the step alone.

    `decay` is that of a step of `base_clips` clips; a step of k times as many keeps its k-th power, so that the average
    spans as many clips in a multigrid run as in its baseline (Busbridge et al. 2023). Early in a run it spans about a
    tenth of the clips so far, so that the first weights are soon forgotten.

    >>> from mgtrain.recipe import load_recipe
    >>> from mgtrain.schedule import make_plan
    >>> plan = make_plan(load_recipe("demo_baseline"), 1000)
    >>> [round(kept(0.9, plan.base.clips, plan[n]), 3) for n in (0, 10, 200)]
    [0.1, 0.55, 0.9]
    """
    before = step.first_clip / base_clips
    return float(min(decay, (1 + before) / (10 + before)) ** (step.shape.clips / base_clips))


class Average:
    """A moving average of a model's trained weights (EMA), which is evaluated and exported in their place."""

    def __init__(self, model: nn.Module, decay: float, base_clips: int) -> None:
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._decay, self._base_clips = decay, base_clips
        self.restart()

    def restart(self) -> None:
        """Start from the model's weights as they are."""
        self.weights = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, step: Step, skipped: Tensor) -> None:
        """Add the weights after `step`, unless its update was `skipped`, which is 1 then, on the device."""
        share = (1 - kept(self._decay, self._base_clips, step)) * (1 - skipped)
        averages = [*self.weights.values()]
        changes = torch._foreach_sub([*self._parameters.values()], averages)
        torch._foreach_mul_(changes, share)
        torch._foreach_add_(averages, changes)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the average's weights into the model within the block."""
        own = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._put(self.weights)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(weights[name])
