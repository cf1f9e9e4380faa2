"""The project's own studies: that each can be run, and that the pages show what their results say."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from mgtrain.engine.checks import check_shapes
from mgtrain.runs.study.definition import load_study, runs_of
from mgtrain.runs.study.results import read_result
from mgtrain.schedule import check_world, make_plan

ROOT = Path(__file__).parent.parent
STUDIES = sorted((ROOT / "studies").glob("*.yaml"))


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_every_variant_can_be_planned_and_its_network_takes_all_shapes(file: Path) -> None:
    study = load_study(file)
    seen = set()
    for run in runs_of(study, file):
        if run.variant not in seen:
            seen.add(run.variant)
            plan = make_plan(run.recipe, run.recipe.data.videos or 480)
            check_world(plan, 1)
            check_shapes(run.recipe, [*plan.shapes(), run.recipe.evaluation_shape])
    assert seen == set(study.variants)


@pytest.mark.parametrize("file", sorted((ROOT / "studies/results").rglob("*.json")), ids=lambda file: file.stem)
def test_every_result_is_a_run_of_its_study_as_it_is_now(file: Path) -> None:
    result, study = read_result(file), ROOT / "studies" / f"{file.parent.name}.yaml"
    known = runpy.run_path(str(ROOT / "scripts/evidence.py"))["found"](study)
    assert result.variant in load_study(study).variants
    assert file.stem in {run.name for run in runs_of(load_study(study), study)}
    assert result.outcome.summary.finished
    assert result.outcome.env["git"]
    assert result in known
