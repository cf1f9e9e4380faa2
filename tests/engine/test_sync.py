"""A training step asks nothing of the device that the host would have to wait for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from operations import Operations

from mgtrain.engine.checks import make_model
from mgtrain.engine.optim import make_optimizer
from mgtrain.engine.step import to_device, train_step
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe
from mgtrain.schedule import make_plan

# What copies a number from the device to the host, or has as many results as the numbers say.
WAITS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "_unique2")


def waits(operations: Operations) -> list[str]:
    """Those after which a host would wait for a GPU."""
    return [name for name in operations.names if name in WAITS]


def test_what_waits_is_seen() -> None:
    with Operations() as operations:
        torch.ones(3).sum().item()
        torch.ones(3).nonzero()
    assert waits(operations) == ["_local_scalar_dense", "nonzero"]


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("augment={brightness: 0.4, hue: 0.1, erase: 0.5, mixup: 0.8, label_smoothing: 0.1}",),
        ("hardware.micro_clips=4",),
    ],
    ids=["plain", "augmented", "micro-batches"],
)
def test_a_step_does_not_wait(changes: tuple[str, ...], tiny: Callable[..., Recipe]) -> None:
    recipe, world = tiny(*changes), World()
    plan = make_plan(recipe, 24)
    model = to_device(make_model(recipe), recipe, world)
    optimizer = make_optimizer(model, recipe.optim)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for step in (plan[0], plan[1], plan[len(plan) - 1]):  # the first of a phase makes room for its groups' statistics
        shape = step.shape
        clips = torch.zeros(shape.clips, 3, shape.frames, shape.crop, shape.crop, dtype=torch.uint8)
        with Operations() as operations:
            train_step(
                model, optimizer, scaler, clips, torch.zeros(shape.clips, dtype=torch.int64), step, recipe, world
            )
        assert waits(operations) == []
