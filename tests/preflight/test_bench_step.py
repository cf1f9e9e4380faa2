"""What is measured of a step: consistent with itself, and with the shapes of the plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import mgtrain.preflight.bench_step
from mgtrain.cli import app
from mgtrain.engine.checks import make_model
from mgtrain.engine.machine.memory import USABLE, Memory, fit_memory
from mgtrain.preflight.bench_step import bench_step, convolutions_alone, half_precision_gain, measured
from mgtrain.processes.cores import cpu_name
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe
from mgtrain.schedule import make_plan


def test_every_shape_of_the_plan_is_measured_and_adds_up(tiny: Callable[..., Recipe]) -> None:
    recipe, seen = tiny("augment.mixup=0.5"), []
    plan = make_plan(recipe, 24)
    result = bench_step(recipe, plan, World(), repeats=2, progress=lambda *words: seen.append(words))
    shapes = [tuple(row["shape"].values()) for row in result["shapes"]]
    assert set(shapes) == {(s.clips, s.frames, s.crop) for s in plan.shapes()}
    assert seen[-1] == ("measuring", len(shapes), len(shapes))
    for row in result["shapes"]:
        parts = [row[key] for key in ("copy", "forward", "backward", "update")]
        assert all(part > 0 for part in parts)
        assert row["clips_per_second"] == row["clips"] / row["seconds"]
        assert row["convolutions"] > 0
        assert row["flops"] == pytest.approx(row["peak_share"] * result["peak_flops"])
        assert row["peak_bytes"] > 1 << 20
    assert result["slowest_over_fastest"] >= 1


def test_a_step_is_measured_as_a_run_computes_it(tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny("batch.clips=16")
    plan = make_plan(recipe, 24)
    gib = Memory(recipe, plan.shapes()).most(plan, 1)[0] / USABLE / 2**30
    module, passes, set_ups = mgtrain.preflight.bench_step, [], []
    monkeypatch.setattr(module, "set_up", lambda *given: set_ups.append(given))
    monkeypatch.setattr(module, "tuned_model", lambda recipe, *_: passes.append(recipe.hardware.micro_clips))
    limited = recipe.changed("hardware", memory_gib=0.7 * gib)
    with pytest.raises(AttributeError):  # of the network, which is None
        bench_step(limited, plan, World(), 1, lambda *_: None)
    assert set_ups == [(limited, World().device)]
    assert passes == [fit_memory(limited, plan, World()).hardware.micro_clips]
    assert passes[0] is not None


def test_a_part_of_each_batch_has_the_volume_of_two_clips_and_whole_groups(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny("batch.clips=8", "batch.bn_clips=1")
    plan = make_plan(recipe, 48)
    found = {(s.shape.frames, s.shape.crop): measured(recipe, s, World()) for s in plan}
    assert found[8, 32] == (2, 2)
    assert found[2, 16] == (32, 16)  # groups of two clips in the short cycle
    assert all(clips % groups == 0 for clips, groups in found.values())


def test_convolutions_alone_are_all_of_the_networks(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny()
    model = make_model(recipe)
    assert convolutions_alone(model, recipe, (1, 3, 4, 32, 32), World(), repeats=1) > 0
    timed: list[int] = []

    def one_second(layer: Any, size: Any, *_: Any) -> float:
        timed.append(size[0])
        return 1.0

    monkeypatch.setattr(mgtrain.preflight.bench_step, "_time_layer", one_second)
    layers = sum(isinstance(layer, torch.nn.Conv3d) for layer in model.modules())
    assert convolutions_alone(model, recipe, (16, 3, 4, 32, 32), World(), repeats=1) == layers
    assert 0 < len(timed) < layers  # layers that are alike are timed once
    assert set(timed) == {16}
    assert not any(parameter.grad is not None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_the_command_prints_a_table_or_json(tiny_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(tiny_text)
    words = ["bench", "step", "tiny.yaml", "--repeats", "1"]
    result = CliRunner().invoke(app, [*words, "schedule={name: baseline}", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["schema"] == "mgtrain.bench_step/1"
    result = CliRunner().invoke(app, [*words, "--videos", "24"])
    assert "per voxel, the slowest shape takes" in result.stdout
    assert "64x2x16²" in result.stdout


def test_half_precision_is_timed_where_the_cpu_has_it(
    tiny: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = tmp_path / "cpuinfo"
    monkeypatch.setattr("mgtrain.processes.cores.CPUINFO", flags)
    for found, has in (("flags : avx2", False), ("flags : avx512f avx512_bf16 fma", True), ("flags : amx_bf16", True)):
        flags.write_text(f"processor : 0\nmodel name : One\ncpu family : 6\nmodel : 143\n{found}\n\nprocessor : 1\n")
        gain = half_precision_gain(tiny(), 24, World())
        assert gain is not None if has else gain is None
        assert gain is None or gain > 0
    assert cpu_name() == "One, family 6, model 143"
