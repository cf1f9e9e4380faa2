"""Recipes: the complete description of a run, written in YAML.

It reads a YAML file with overrides and returns a `Recipe`: typed, complete, validated and read-only. An error is one
line that starts with `file:line:`. Nothing here reads videos, devices or clocks, and nothing in YAML is executed.
"""

from mgtrain.recipe.base import Section
from mgtrain.recipe.load import (
    affects_results,
    changed_keys,
    find_recipe,
    load_recipe,
    parse_recipe,
    recipe_differences,
    shipped_recipes,
)
from mgtrain.recipe.optim import Optim
from mgtrain.recipe.sections import Augment, BaselineSchedule, Clip, Data, Init, Logging, MultigridSchedule, Recipe

__all__ = ["Augment", "BaselineSchedule", "Clip", "Data", "Init", "Logging", "MultigridSchedule", "Optim", "Recipe",
           "Section", "affects_results", "changed_keys", "find_recipe", "load_recipe", "parse_recipe",
           "recipe_differences", "shipped_recipes"]  # fmt: skip
