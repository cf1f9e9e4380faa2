"""Forecasts: arithmetic by hand, and a real one of a tiny run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from mgtrain.cli import app
from mgtrain.data import open_videos
from mgtrain.data.videos import Videos
from mgtrain.engine.checks import make_model
from mgtrain.errors import DataError
from mgtrain.preflight.costs import multiply_adds
from mgtrain.preflight.forecast import ShapeRate, evaluated_per_second, evaluation_seconds, render, training_time
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe
from mgtrain.schedule import make_plan

GPU = World(device=torch.device("cuda"))  # which shares no cores with the loader


def test_a_step_takes_as_long_as_the_slower_of_computing_and_loading(tiny: Callable[..., Recipe]) -> None:
    plan = make_plan(tiny(), 24)
    fast, slow = ShapeRate(1.0, 0.25, 0.5), ShapeRate(1.0, 3.0, 0.5)
    computing = training_time(plan, dict.fromkeys(plan.shapes(), fast), GPU, 1)
    assert (computing["seconds"], computing["compute"]) == (len(plan), len(plan))
    assert not any(phase["waits"] for phase in computing["phases"])
    loading = training_time(plan, dict.fromkeys(plan.shapes(), slow), GPU, 1)
    assert (loading["seconds"], loading["compute"]) == (3 * len(plan), len(plan))
    assert all(phase["waits"] for phase in loading["phases"])
    assert multiply_adds(plan, dict.fromkeys(plan.shapes(), 2)) == 2 * plan.totals().clips
    # On a CPU the two share the cores: all of one core, and half a core-second of loading for each step.
    together = training_time(plan, dict.fromkeys(plan.shapes(), fast), World(cores=torch.get_num_threads()), 1)
    assert together["seconds"] == pytest.approx(len(plan) * (1 + 0.5 / torch.get_num_threads()))
    alone = training_time(plan, dict.fromkeys(plan.shapes(), fast), GPU, workers=0)  # the training process loads, too
    assert alone["seconds"] == 1.25 * len(plan)
    assert all(phase["waits"] for phase in alone["phases"])


def test_within_a_short_cycle_the_loader_catches_up(tiny: Callable[..., Recipe]) -> None:
    plan = make_plan(tiny(), 24)
    shapes = plan.phases[-1].shapes
    rates = {shape: ShapeRate(1.0, 0.1, 0.0) for shape in plan.shapes()}
    rates[shapes[0]] = ShapeRate(1.0, 2.7, 0.0)  # 2.9 s of loading in a cycle of three steps, 3 s of computing
    assert not training_time(plan, rates, GPU, 1)["phases"][-1]["waits"]


def test_people_are_told_who_waits_and_what_helps(tiny: Callable[..., Recipe]) -> None:
    plan = make_plan(tiny(), 24)
    run = training_time(plan, dict.fromkeys(plan.shapes(), ShapeRate(1.0, 2.0, 0.5)), GPU, 3)
    run |= {"multiply_adds": 2, "evaluation_seconds": 90.0, "clock_seconds": 124.0}
    shape = {"clips": 64, "frames": 2, "crop": 16}
    row = {"shape": shape, "multiply_adds": 2, "compute": 1.0, "load": 2.0, "load_cores": 0.5}
    result = {"workers": 3, "prepared": False, "busy_cores": 0.0, "shapes": [row], "plan": run, "baseline": run,
              "speedup": 1.0, "clock_speedup": 1.75, "speedup_without_waiting": 2.5, "bf16_gain": 1.62}  # fmt: skip
    text = render(result)
    for words in (
        "64x2x16²",
        "32.0",
        "64.0  waits",
        "phases 1, 2, 3, 4, 5, 6 wait for the 3 loader",
        "2.50x",
        "prepare",
        "a step is 1.62x as fast in hardware.precision=bf16 on this CPU",
        "wall-clock time, with evaluations of 1:30 min and 1:30 min but without start-up and checkpoints: "
        "2:04 min against 2:04 min (1.75x less)",
    ):
        assert words in text
    assert "hardware.workers" in render({**result, "prepared": True})
    assert "hardware.workers" in render({**result, "workers": 0})
    assert not any("bf16" in render({**result, "bf16_gain": gain}) for gain in (None, 1.2))
    assert "other processes" not in text
    assert "other processes use 1.5 of" in render({**result, "busy_cores": 1.5})


def test_evaluations_and_recalibration_take_their_time(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny("evaluation.times=4")  # 12 validation videos, 4 evaluations, each on 2 batches of 4 clips
    plan, baseline = make_plan(recipe, 24), make_plan(tiny("schedule={name: baseline}"), 24)
    model = make_model(recipe)
    assert evaluation_seconds(model, recipe, plan, 12, rate=2.0) == 4 * (12 + 8) / 2
    assert evaluation_seconds(model, recipe, baseline, 12, rate=2.0) == 4 * 12 / 2
    assert evaluation_seconds(nn.Linear(2, 2), recipe, plan, 12, rate=2.0) == 4 * 12 / 2  # without BatchNorm


def test_one_batch_of_videos_is_measured_even_if_one_is_broken(
    tiny: Callable[..., Recipe], motions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny("batch.clips=24", "data.max_bad_fraction=0.5")
    val = open_videos("list", str(motions), "val.csv")
    bad = Videos.of(str(motions), [(val.name(0), 0), ("train.csv", 1)], val.classes)
    assert evaluated_per_second(make_model(recipe), recipe, bad, World(), 0.1) > 0
    with pytest.raises(DataError, match="no validation video can be decoded"):
        evaluated_per_second(make_model(recipe), tiny("data.max_bad_fraction=1"), bad.only(np.array([1])), World(), 0.1)


def test_the_plan_is_measured(tiny_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(tiny_text)
    result = CliRunner().invoke(app, ["plan", "tiny.yaml", "--measure", "0.05", "--json", "--no-costs"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    words = ["plan", "tiny.yaml", "--measure", "0.05", "--json", "--no-costs", "--videos", "2400"]
    many = CliRunner().invoke(app, words)
    forecast = json.loads(many.stdout)["forecast"]["plan"]  # of as many videos as the plan
    mean = sum(phase["step"] for phase in forecast["phases"]) / len(forecast["phases"])
    assert forecast["seconds"] > 0.5 * mean * json.loads(many.stdout)["totals"]["steps"]
    assert found["schema"] == "mgtrain.plan/1"
    here = found["forecast"]
    assert here["speedup"] == pytest.approx(here["baseline"]["seconds"] / here["plan"]["seconds"])
    for run in (here["baseline"], here["plan"]):
        assert run["clock_seconds"] == pytest.approx(run["seconds"] + run["evaluation_seconds"])
        assert run["evaluation_seconds"] > 0
    assert all(row["compute"] > 0 and row["load"] > 0 and row["load_cores"] > 0 for row in here["shapes"])
    assert here["baseline"]["multiply_adds"] > here["plan"]["multiply_adds"]
