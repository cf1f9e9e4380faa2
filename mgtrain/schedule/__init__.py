"""Schedules: which shape and learning rate each step has. To add one: a file, and a line in `SCHEDULES`."""

from __future__ import annotations

from mgtrain.recipe import BaselineSchedule, Recipe
from mgtrain.schedule.baseline import baseline
from mgtrain.schedule.multigrid import multigrid
from mgtrain.schedule.plan import Phase, Plan, Step, Totals, check_world

SCHEDULES = {"baseline": baseline, "multigrid": multigrid}

__all__ = ["SCHEDULES", "Phase", "Plan", "Step", "Totals", "baseline_recipe", "check_world", "make_plan"]


def make_plan(recipe: Recipe, videos: int) -> Plan:
    """The plan of a recipe for a training set of `videos` videos.

    Raises:
        PlanError: the schedule cannot be carried out.
    """
    return Plan(recipe, videos, SCHEDULES[recipe.schedule.name](recipe, videos))


def baseline_recipe(recipe: Recipe) -> Recipe:
    """The same recipe under the baseline schedule."""
    return recipe.model_copy(update={"schedule": BaselineSchedule(name="baseline")})
