"""The schedule: shape, grid and learning rate of each step.

It takes a recipe and the number of training videos and returns a `Plan`: an immutable sequence of steps, each computed
from its number. Nothing here knows tensors, devices or video files. A new schedule is a function and an entry in
`SCHEDULES`.
"""

from mgtrain.recipe import BaselineSchedule, Recipe
from mgtrain.schedule.multigrid import multigrid
from mgtrain.schedule.plan import Plan, Step, Stretch, check_world

__all__ = ["SCHEDULES", "Plan", "Step", "baseline_recipe", "check_world", "make_plan"]


def baseline(recipe: Recipe, videos: int) -> list[Stretch]:
    """One stretch for each learning-rate stage, at the base shape."""
    stages = enumerate(recipe.optim.stages)
    return [Stretch(k, k, (recipe.base,), epochs * videos / recipe.base.clips) for k, epochs in stages]


SCHEDULES = {"baseline": baseline, "multigrid": multigrid}


def make_plan(recipe: Recipe, videos: int) -> Plan:
    """The plan of a recipe for `videos` training videos. Raises `PlanError` if its keys make no valid schedule."""
    return Plan(recipe, videos, SCHEDULES[recipe.schedule.name](recipe, videos))


def baseline_recipe(recipe: Recipe) -> Recipe:
    """The same recipe with the baseline schedule."""
    return recipe.model_copy(update={"schedule": BaselineSchedule(name="baseline")})
