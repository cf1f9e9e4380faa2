"""The baseline schedule: every step has the base shape."""

from __future__ import annotations

from mgtrain.recipe import Recipe
from mgtrain.schedule.plan import Stretch


def baseline(recipe: Recipe, videos: int) -> list[Stretch]:
    """One stretch for each learning-rate stage, at the base shape."""
    return [
        Stretch(stage, stage, (recipe.base,), epochs * videos / recipe.base.clips)
        for stage, epochs in enumerate(recipe.optim.stages)
    ]
