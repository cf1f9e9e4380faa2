"""The project's own studies: that each can be run, and that the pages show what their results say."""

from __future__ import annotations

import runpy
from functools import cache
from pathlib import Path

import pytest

from mgtrain.engine.checks import check_shapes
from mgtrain.grid import Shape
from mgtrain.recipe import Recipe
from mgtrain.runs.study.definition import Run, load_study, runs_of
from mgtrain.runs.study.results import read_result, write_study_page
from mgtrain.schedule import check_world, make_plan

ROOT = Path(__file__).parent.parent
STUDIES = sorted((ROOT / "studies").glob("*.yaml"))


@cache
def runs_in(file: Path) -> list[Run]:
    return runs_of(load_study(file), file)


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_every_variant_can_be_planned(file: Path) -> None:
    for run in runs_in(file):
        check_world(make_plan(run.recipe, run.recipe.data.videos or 160), 1)
    assert {run.variant for run in runs_in(file)} == set(load_study(file).variants)


def test_the_networks_of_all_variants_take_all_their_shapes() -> None:
    networks: dict[str, tuple[Recipe, set[tuple[int, int]]]] = {}
    for run in (run for file in STUDIES for run in runs_in(file)):
        plan = make_plan(run.recipe, run.recipe.data.videos or 160)
        _, sizes = networks.setdefault(f"{run.recipe.model!r} {run.recipe.data.classes}", (run.recipe, set()))
        sizes |= {(shape.frames, shape.crop) for shape in (*plan.shapes(), run.recipe.evaluation_shape)}
    assert len(networks) > 3
    for recipe, sizes in networks.values():
        check_shapes(recipe, [Shape(1, *size) for size in sizes])


def test_every_result_is_a_run_of_its_study_as_it_is_now() -> None:
    found = runpy.run_path(str(ROOT / "scripts/evidence.py"))["found"]
    for folder in (ROOT / "studies/results").iterdir():
        study = ROOT / "studies" / f"{folder.name}.yaml"
        known = [result.outcome.summary for result in found(study)]
        names, variants = {run.name for run in runs_in(study)}, load_study(study).variants
        for file in folder.rglob("*.json"):
            result = read_result(file)
            assert result.variant in variants
            assert file.stem in names
            assert result.outcome.summary.finished
            assert result.outcome.env["git"]
            assert result.outcome.summary in known


def test_a_page_of_a_part_of_the_runs_says_that_the_conclusion_is_of_all_of_them(tmp_path: Path) -> None:
    file = ROOT / "studies/cycles.yaml"
    study, page = load_study(file), tmp_path / "page.html"
    results = [read_result(ROOT / f"studies/results/cycles/{run.name}.json") for run in runs_in(file)]
    for some, words in (
        (results, "<p>Conclusion: "),
        (results[:4], "<p>Conclusion of the complete study, not of these"),
    ):
        write_study_page(study, file, some, page)
        assert words in page.read_text()
