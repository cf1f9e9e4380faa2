"""The definition of a study: its runs are all combinations of variants, folds and seeds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, model_validator

from mgtrain.errors import RecipeError
from mgtrain.recipe import Recipe, Section, find_recipe, load_recipe
from mgtrain.recipe.load import as_json, first_error, parse_yaml, read_text

Words = tuple[str, ...]


class Variant(Section):
    recipe: str | None = Field(None, description="recipe file or shipped recipe; null: the study's")
    overrides: Words = Field((), description="changes of its keys, such as optim.lr=0.05")


class Study(Section):
    """A question, and the runs that answer it."""

    question: str = Field(description="the study's question, its title")
    paper: str = Field("", description="the result of Wu et al. (2020) or others")
    recipe: str = Field(description="recipe file, relative to the study's folder, or shipped recipe")
    overrides: Words = Field((), description="changes of keys for all runs")
    variants: dict[str, Variant] = Field(description="name -> variant; the others are compared with the first one")
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = Field(description="seeds of each variant")
    folds: dict[str, Words] = Field({}, description="name -> overrides of a fold, such as data.train and data.val")
    margin: float = Field(
        1.0, ge=0, le=100, description="points by which an accuracy may be lower without counting as lower"
    )
    conclusion: str = Field("", description="what the results say about it, written when they are known")

    @model_validator(mode="after")
    def _has_distinct_names(self) -> Study:
        for what, names in (("variants", self.variants), ("seeds", self.seeds)):
            if not names:
                raise ValueError(f"{what} is empty; name at least one")
        short = [plain(name) for name in [*self.variants, *self.folds]]
        if len(set(short)) < len(short) or "" in short or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("variants, folds and seeds must differ in letters or digits; rename one")
        return self


@dataclass(frozen=True, slots=True)
class Run:
    variant: str
    name: str  # of its folder and its result
    recipe: Recipe


def load_study(file: Path) -> Study:
    """Read a study. A `RecipeError` is one line, `file:line: what is wrong, what is allowed`."""
    if not file.is_file():
        raise RecipeError(f"{file}: no such study file; give a YAML file, such as studies/demo.yaml")
    shape = f"a study is a mapping with the keys {', '.join(Study.model_fields)}"
    tree = parse_yaml(read_text(file, "study"), str(file), shape)
    try:
        return Study.model_validate_json(as_json(tree), strict=True)
    except ValidationError as error:
        first, keys, line = first_error(error, tree)
        fields = Study.model_fields if len(first["loc"]) == 1 else Variant.model_fields
        allowed = f"; allowed: {', '.join(fields)}" if first["type"] == "extra_forbidden" else ""
        what = first["msg"].removeprefix("Value error, ")
        raise RecipeError(f"{file}:{line}: {'.'.join(keys) or 'study'}: {what}{allowed}") from None
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{file}:1: cannot be understood: {error}") from None


def runs_of(study: Study, file: Path) -> list[Run]:
    """All runs, seed by seed, so that a busy hour of the machine affects all variants. Raises `RecipeError`."""
    folds: dict[str, Words] = study.folds or {"": ()}
    made = []
    for seed, (fold, fold_words), (name, variant) in product(study.seeds, folds.items(), study.variants.items()):
        recipe = variant.recipe or study.recipe
        beside = file.parent / recipe
        recipe = str(beside if beside.is_file() else find_recipe(recipe))
        words = (*study.overrides, *variant.overrides, *fold_words, f"seed={seed}")
        parts = [plain(name), *([plain(fold)] if fold else []), str(seed)]
        made.append(Run(name, "_".join(parts), load_recipe(recipe, words)))
    if len({run.recipe.data.multi_label for run in made}) > 1:
        raise RecipeError(
            f"{file}: runs with and without data.multi_label have other scores; put them into two studies"
        )
    names = [run.name for run in made]
    if twice := next((run for run in names if names.count(run) > 1), None):
        raise RecipeError(f"{file}: two runs are called {twice}; rename a variant or a fold")
    for name in study.variants:
        seen: dict[str, str] = {}
        for run in (run for run in made if run.variant == name):
            if (same := seen.setdefault(run.recipe.model_dump_json(), run.name)) != run.name:
                raise RecipeError(f"{file}: {same} and {run.name} are the same run; give their folds different videos")
    return made


def plain(name: str) -> str:
    """A name with letters, digits and underscores only, for files.

    >>> plain("epochs x 1.5")
    'epochs_x_1_5'
    """
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
