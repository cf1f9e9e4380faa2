"""Recipes: what the user wrote.

In comes a YAML file with overrides, out goes a `Recipe`: typed, complete, validated and read-only. A mistake is one
line that starts with `file:line:`. Nothing here reads videos, devices or clocks, and nothing in YAML is executed.
"""

from mgtrain.recipe.load import find_recipe, load_recipe, parse_recipe, recipe_differences, shipped_recipes
from mgtrain.recipe.model import ModelOptions
from mgtrain.recipe.sections import (
    Augment,
    BaselineSchedule,
    Batch,
    Clip,
    Data,
    Evaluation,
    Faults,
    Hardware,
    Init,
    Logging,
    MultigridSchedule,
    Optim,
    Recipe,
    Section,
)

__all__ = [
    "Augment",
    "BaselineSchedule",
    "Batch",
    "Clip",
    "Data",
    "Evaluation",
    "Faults",
    "Hardware",
    "Init",
    "Logging",
    "ModelOptions",
    "MultigridSchedule",
    "Optim",
    "Recipe",
    "Section",
    "find_recipe",
    "load_recipe",
    "parse_recipe",
    "recipe_differences",
    "shipped_recipes",
]
