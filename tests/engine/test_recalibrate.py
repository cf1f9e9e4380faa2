"""Recalibration: BatchNorm's statistics are those of all recalibration clips together, measured layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mgtrain.engine.fit
from mgtrain.clips.loader import BadVideos, recalibration_batches
from mgtrain.data import open_videos
from mgtrain.data.videos import Videos
from mgtrain.engine.checks import make_model
from mgtrain.engine.fit import fit
from mgtrain.engine.recalibrate import batches_needed, recalibrate, recalibrate_bn, remembered
from mgtrain.engine.step import to_device, to_input
from mgtrain.models.norm import GroupBatchNorm3d
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe
from mgtrain.runs.folder import RunDir
from mgtrain.schedule import make_plan

BATCHES = 3


@pytest.fixture
def recipe(tiny: Callable[..., Recipe]) -> Recipe:
    return tiny(f"evaluation.recalibration_batches={BATCHES}", "model.dropout=0")


def batches(recipe: Recipe) -> list[tuple[Tensor, Tensor]]:
    videos = open_videos(recipe.data.format, recipe.data.root, recipe.data.train)
    return list(recalibration_batches(videos, BATCHES, recipe, World(), BadVideos(len(videos), 0)))


def fresh_model(recipe: Recipe) -> Any:
    torch.manual_seed(0)
    model: Any = to_device(make_model(recipe), recipe, World())
    for module in model.modules():
        if isinstance(module, GroupBatchNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_mean.fill_(7)  # to be forgotten
    return model


def inputs_of(layer: nn.Module, model: nn.Module, clips: Tensor, recipe: Recipe) -> Tensor:
    """What the layer is given, float64 (C, values)."""
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().double()))
    with torch.no_grad():
        model(to_input(clips, recipe))
    hook.remove()
    return seen[0].transpose(0, 1).flatten(1)


@pytest.mark.parametrize("bn_clips", [4, 2])
def test_statistics_are_those_of_all_batches_together(tiny: Callable[..., Recipe], bn_clips: int) -> None:
    recipe = tiny(f"evaluation.recalibration_batches={BATCHES}", f"batch.bn_clips={bn_clips}")
    model, clips = fresh_model(recipe), batches(recipe)
    # The stem's norm sees what no other norm has changed, so it can be done by hand.
    stem = model.stem.norm
    values = torch.cat([inputs_of(stem, model, batch, recipe) for batch, _ in clips], dim=1)  # (C, values)
    assert recalibrate_bn(model, clips, recipe, World()) == BATCHES
    torch.testing.assert_close(stem.running_mean.double(), values.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stem.running_var.double(), values.var(1, correction=0), rtol=1e-5, atol=1e-6)


def test_deeper_layers_see_each_group_normalized_by_itself(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny(f"evaluation.recalibration_batches={BATCHES}", "model.dropout=0")
    model, clips = fresh_model(recipe), batches(recipe)
    deep = model.res3[0].norm2
    plain = fresh_model(recipe).train()  # without a part each batch, here one group of 4 clips, is normalized by itself
    values = torch.cat([inputs_of(plain.res3[0].norm2, plain, batch, recipe) for batch, _ in clips], dim=1)
    recalibrate_bn(model, clips, recipe, World())
    torch.testing.assert_close(deep.running_mean.double(), values.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(deep.running_var.double(), values.var(1, correction=0), rtol=1e-4, atol=1e-5)


def test_a_pass_has_no_more_clips_than_one_of_training(tiny: Callable[..., Recipe]) -> None:
    words = (f"evaluation.recalibration_batches={BATCHES}", "batch.bn_clips=2", "model.dropout=0")
    whole, passes = tiny(*words), tiny(*words, "hardware.micro_clips=2")
    models = [fresh_model(recipe) for recipe in (whole, passes)]
    seen: list[int] = []
    models[1].register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    for model, recipe in zip(models, (whole, passes), strict=True):
        recalibrate_bn(model, batches(recipe), recipe, World())
    assert set(seen) == {2}
    ours, theirs = (dict(model.named_buffers()) for model in models)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name])


def test_weights_do_not_change(recipe: Recipe) -> None:
    model = fresh_model(recipe)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    recalibrate_bn(model, batches(recipe), recipe, World())
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_recalibrating_twice_is_recalibrating_once(recipe: Recipe) -> None:
    model, clips = fresh_model(recipe), batches(recipe)
    recalibrate_bn(model, clips, recipe, World())
    once = {name: buffer.clone() for name, buffer in model.named_buffers()}
    recalibrate_bn(model, clips, recipe, World())
    assert all(torch.equal(once[name], buffer) for name, buffer in model.named_buffers())


def test_without_batches_the_running_averages_stay(recipe: Recipe) -> None:
    model = fresh_model(recipe)
    assert recalibrate_bn(model, [], recipe, World()) == 0
    assert model.stem.norm.running_mean.eq(7).all()


def test_afterwards_training_averages_as_before(recipe: Recipe) -> None:
    model = fresh_model(recipe)
    recalibrate_bn(model, batches(recipe), recipe, World())
    norms = [module for module in model.modules() if isinstance(module, GroupBatchNorm3d)]
    assert {(norm.momentum, norm.pool) for norm in norms} == {(0.1, False)}


def counts(recipe: Recipe, videos: int) -> dict[int, int]:
    plan = make_plan(recipe, videos)
    return {step: batches_needed(recipe, plan, step) for step in plan.milestones(recipe.evaluation.times)}


def test_steps_of_the_evaluations_shape_alone_need_no_recalibration(tiny: Callable[..., Recipe]) -> None:
    words = "evaluation.recalibration_batches=200", "evaluation.times=3"
    assert set(counts(tiny(*words, "schedule={name: baseline}"), 240).values()) == {0}
    assert 0 not in counts(tiny(*words, "schedule={name: baseline}", "evaluation.crop=28"), 240).values()
    assert 0 not in counts(tiny(*words), 240).values()
    # Fine-tuning at the base shape alone lasts long enough to forget what was before.
    assert list(counts(tiny(*words, "schedule.fine_tune_short_cycle=false"), 2400).values())[-1] == 0


def test_statistics_that_remember_for_longer_need_it_for_longer(tiny: Callable[..., Recipe]) -> None:
    slow, usual = (nn.Sequential(GroupBatchNorm3d(3, momentum=m)) for m in (0.01, 0.1))
    assert (remembered(slow), remembered(usual), remembered(nn.ReLU())) == (527, 50, 50)
    recipe = tiny("evaluation.recalibration_batches=200", "schedule={name: baseline}")
    plan = make_plan(recipe, 2400)
    assert batches_needed(recipe, plan, 400) == batches_needed(recipe, plan, 600, remembered(slow)) == 0
    assert batches_needed(recipe, plan, 400, remembered(slow)) > 0


def test_recalibration_is_bounded_by_the_steps_it_follows(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny("evaluation.recalibration_batches=200", "evaluation.times=4")
    # A seventh of the steps since the last evaluation, and of all 1,753 before the final one, at most 200.
    assert counts(recipe, 2400) == {438: 62, 876: 62, 1315: 62, 1753: 200}
    assert counts(tiny("evaluation.recalibration_batches=9", "evaluation.times=4"), 2400)[438] == 9
    assert counts(tiny("evaluation.times=4"), 24).keys() == {4, 8, 13, 17}
    assert set(counts(tiny("evaluation.times=4", "evaluation.recalibration_batches=9"), 24).values()) == {5}


def test_a_run_recalibrates_as_often_as_is_needed(
    tiny: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def noted(model: nn.Module, train: Videos, count: int, *rest: Any) -> None:
        asked.append(count)
        recalibrate(model, train, count, *rest)

    monkeypatch.setattr(mgtrain.engine.fit, "recalibrate", noted)
    for schedule, expected in (("baseline", [0, 0]), ("multigrid", [2, 2])):
        recipe = tiny(f"schedule={{name: {schedule}}}", "evaluation.times=2", "optim.stages=[1.5, 0.5]")
        fit(recipe, RunDir(tmp_path / schedule), World())
        assert asked == expected
        asked.clear()


def test_an_average_is_always_recalibrated(tiny: Callable[..., Recipe]) -> None:
    words = ("evaluation.recalibration_batches=200", "schedule={name: baseline}")
    assert set(counts(tiny(*words), 240).values()) == {0}
    assert 0 not in counts(tiny(*words, "optim.ema=0.9"), 240).values()


def test_steps_of_fewer_frames_need_recalibration_whatever_their_crop(tiny: Callable[..., Recipe]) -> None:
    schedule = "schedule={name: multigrid, long_cycle: [[0.5, 1.0]], short_cycle: [], fine_tune: false}"
    assert 0 not in counts(tiny(schedule, "evaluation.recalibration_batches=200"), 240).values()
