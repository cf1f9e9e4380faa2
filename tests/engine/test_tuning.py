"""Convolutions in the forms that were measured: right, kept with the run, and the same after a resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mgtrain.engine.checks import make_model
from mgtrain.engine.fit import fit
from mgtrain.engine.machine import tuning
from mgtrain.engine.machine.tuning import FILE, measure, tune, uses_of
from mgtrain.errors import CheckpointError, StoppedError
from mgtrain.models.conv import Conv3d
from mgtrain.models.forms import candidates, fixed_forms
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe
from mgtrain.runs.folder import RunDir
from mgtrain.schedule import make_plan

FAST = "hardware.deterministic=false"


def other_forms(compute: Any, given: Any, kind: Any, forms: list[str], right: Any, most: float) -> Any:
    """The last form is the fastest."""
    return ((form, 1.0 / n) for n, form in enumerate(forms, start=1))


def test_a_network_meets_all_its_convolutions(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny()
    plan = make_plan(recipe, 24)
    uses = uses_of(recipe, plan, World())
    model = make_model(recipe)
    layers = [layer for layer in model.modules() if isinstance(layer, Conv3d)]
    stem = layers[0]
    sizes = {(s.frames, s.crop, s.crop) for s in (*plan.shapes(), recipe.evaluation_shape)}
    of_stem = {kind: use for kind, use in uses.items() if kind.channels == (3, stem.out_channels)}
    assert {kind.size for kind in of_stem} == sizes
    assert not any(use.needs_input_grad for use in of_stem.values())
    assert any(use.needs_input_grad and use.trained for use in uses.values())
    trained = sum(use.clips for kind, use in of_stem.items())
    assert trained == pytest.approx(plan.totals().clips + 1)


def test_forms_are_measured_and_borrowed_for_every_convolution(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny(FAST)
    plan = make_plan(recipe, 24)
    for seconds in (1e9, 0.0):
        monkeypatch.setattr(tuning, "LEAST_SECONDS", seconds)
        monkeypatch.setattr(tuning, "SHARE", 0.0)
        choices = measure(recipe, plan, World())
        assert {kind for kind, _ in choices} == set(uses_of(recipe, plan, World()))
        for (kind, dtype), forms in choices.items():
            assert dtype == torch.float32
            assert all(form in candidates(kind, way) for form, way in zip(forms, tuning.DIRECTIONS, strict=True))
    assert sum(forms != fixed_forms(kind) for (kind, _), forms in choices.items()) <= len(plan.shapes()) + 1
    assert measure(tiny("hardware.deterministic=true"), plan, World()) == {}


def test_a_form_that_computes_something_else_is_not_taken(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny(FAST)
    plan = make_plan(recipe, 24)
    real = tuning.weight_grad

    def wrong(*given: Any) -> torch.Tensor:
        return real(*given) * (1 if given[-1] == fixed_forms(given[-2])[2] else 1.1)

    monkeypatch.setattr(tuning, "weight_grad", wrong)
    for (kind, _), forms in measure(recipe, plan, World()).items():
        assert forms[2] == fixed_forms(kind)[2]


def test_a_run_keeps_its_forms_and_resumes_with_them_bit_for_bit(
    tiny: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny(FAST, "logging.checkpoint_steps=1", "optim.stages=[2, 1]", "evaluation.times=1")
    monkeypatch.setattr(tuning, "_timed", other_forms)
    fit(recipe, RunDir(tmp_path / "straight"), World())
    table = (tmp_path / "straight" / FILE).read_text()
    assert any("first" in row["forms"] for row in json.loads(table)["convolutions"])
    steps = iter(range(1000))
    with monkeypatch.context() as patch:
        patch.setattr("mgtrain.engine.fit.Agreement", lambda world: lambda yes: next(steps) == 2)
        with pytest.raises(StoppedError):
            fit(recipe, RunDir(tmp_path / "stopped"), World())
    monkeypatch.setattr(tuning, "measure", None)  # is not called again
    fit(recipe, RunDir(tmp_path / "stopped"), World(), resume=True)
    assert (tmp_path / "stopped" / FILE).read_text() == table
    one, other = (RunDir(tmp_path / name).rows("steps.jsonl") for name in ("straight", "stopped"))
    assert [row["loss"] for row in one] == [row["loss"] for row in other]


def test_on_another_machine_they_are_measured_again(
    tiny: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = tiny(FAST)
    plan, run, model = make_plan(recipe, 24), RunDir(tmp_path), make_model(recipe)
    monkeypatch.setattr(tuning, "_timed", other_forms)
    tune(model, run, recipe, plan, World())
    table = json.loads((tmp_path / FILE).read_text())
    monkeypatch.setattr(tuning, "cpu_name", lambda: "another")
    with caplog.at_level("INFO"):
        tune(model, run, recipe, plan, World())
    assert "measuring convolutions again: this is another machine, or another number of threads" in caplog.text
    again = json.loads((tmp_path / FILE).read_text())
    assert again["machine"]["cpu"] == "another"
    assert again["convolutions"] == table["convolutions"]
    again["convolutions"][0]["forms"][0] = "round"
    (tmp_path / FILE).write_text(json.dumps(again))
    with pytest.raises(CheckpointError, match=r"convolutions.json: damaged .*; delete it to measure again"):
        tune(model, run, recipe, plan, World())


def test_losses_are_those_of_the_rule_up_to_rounding(
    tiny: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = ("optim.lr=0.0001", "optim.warmup_lr=0.0001", "model.dropout=0", "optim.stages=[2, 1]", "evaluation.times=1")
    fit(tiny(*slow), RunDir(tmp_path / "rule"), World())
    monkeypatch.setattr(tuning, "_timed", other_forms)
    fit(tiny(FAST, *slow), RunDir(tmp_path / "measured"), World())
    assert not (tmp_path / "rule" / FILE).exists()
    rule, measured = (RunDir(tmp_path / name).rows("steps.jsonl") for name in ("rule", "measured"))
    assert [row["loss"] for row in measured] == pytest.approx([row["loss"] for row in rule], rel=1e-4)


def test_a_measurement_draws_no_random_numbers(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny(FAST)
    before = torch.random.get_rng_state()
    measure(recipe, make_plan(recipe, 24), World())
    assert torch.equal(torch.random.get_rng_state(), before)
