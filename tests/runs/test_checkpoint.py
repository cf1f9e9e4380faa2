"""Checkpoints: whole or not at all, and only into the model they belong to."""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mgtrain.engine.checks import make_model
from mgtrain.engine.update.optim import make_optimizer
from mgtrain.errors import CheckpointError, NonFiniteError
from mgtrain.models.weights.load import save_weights
from mgtrain.recipe import Recipe
from mgtrain.runs.checkpoint import CheckpointInfo, load_model, load_optimizer, read_info, save_checkpoint, verify

Pair = tuple[nn.Module, torch.optim.Optimizer]
INFO = CheckpointInfo(
    step=7, recipe="seed: 0\n", classes=("left", "größer"), plan="p", data="d", train_seconds=1.5, scaler={"scale": 2.0}
)


def trained(recipe: Recipe, seed: int = 0, steps: int = 1) -> Pair:
    torch.manual_seed(seed)
    model = make_model(recipe)
    optimizer = make_optimizer(model, recipe.optim)
    for _ in range(steps):
        model(torch.randn(2, 3, 2, 32, 32)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def momenta(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [optimizer.state[parameter]["momentum_buffer"] for parameter in model.parameters()]


def test_a_checkpoint_gives_back_what_was_saved(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    path = tmp_path / "checkpoints/step_00000007.safetensors"
    model, optimizer = trained(tiny())
    save_checkpoint(path, model, optimizer, INFO)
    other, other_optimizer = trained(tiny(), seed=1, steps=0)
    load_model(path, other)
    load_optimizer(path, other, other_optimizer)
    assert read_info(path) == replace(INFO, classes=["left", "größer"])
    state, theirs = other.state_dict(), model.state_dict()
    assert state.keys() == theirs.keys()
    assert all(torch.equal(state[name], theirs[name]) for name in theirs)
    buffers = zip(momenta(other, other_optimizer), momenta(model, optimizer), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in buffers)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_tied_weights_are_saved_and_stay_tied(tmp_path: Path) -> None:
    def tied() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        model[2].weight = model[0].weight
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    path, (model, optimizer), (other, _) = tmp_path / "a.safetensors", tied(), tied()
    save_checkpoint(path, model, optimizer, INFO)
    verify(path)
    load_model(path, other)
    assert torch.equal(other[2].weight, model[0].weight)
    assert other[2].weight is other[0].weight
    save_weights(tmp_path / "w.safetensors", model, {})
    assert len(load_file(tmp_path / "w.safetensors")) == 4


def test_names_in_the_file_say_what_they_are(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    model, optimizer = trained(tiny())
    save_checkpoint(path, model, optimizer, INFO)
    stored = load_file(path)
    assert torch.equal(stored["model.head.linear.weight"], model.state_dict()["head.linear.weight"])
    assert "optimizer.momentum_buffer.head.linear.weight" in stored
    assert "model.stem.norm.running_mean" in stored
    assert {name.partition(".")[0] for name in stored} == {"model", "optimizer"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.name=i3d_nln_r50", "is of another model: "),
        ("model.depth=[2, 1, 1, 1]", "is of another model: 18 tensors differ, such as 'res2.1.conv1.weight'"),
        ("model.width=16", "stem.conv.weight has shape (8, 3, 5, 7, 7), but (16, 3, 5, 7, 7) in the model"),
        ("data.classes=5", "head.linear.weight has shape (4, 256), but (5, 256) in the model"),
    ],
)
def test_another_model_is_refused_and_a_tensor_named(
    tiny: Callable[..., Recipe], tmp_path: Path, override: str, message: str
) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, *trained(tiny("model.depth=[1, 2, 2, 1]") if "nln" in override else tiny()), INFO)
    other, _ = trained(tiny(override, *(["model.depth=[1, 2, 2, 1]"] if "nln" in override else [])), steps=0)
    with pytest.raises(CheckpointError) as caught:
        load_model(path, other)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert caught.value.exit_code == 4


def test_a_checkpoint_cut_short_and_a_missing_one_are_refused(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, *trained(tiny()), INFO)
    path.write_bytes(path.read_bytes()[:-1000])
    for file in (path, tmp_path / "none.safetensors"):
        with pytest.raises(CheckpointError, match="not a readable checkpoint"):
            read_info(file)


def test_foreign_safetensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for metadata in (None, {"format": "pt"}, {"format": "mgtrain.checkpoint/99"}):
        save_file({"weight": torch.zeros(2)}, path, metadata=metadata)
        with pytest.raises(CheckpointError, match=r"a safetensors file, but not a checkpoint of mgtrain"):
            read_info(path)


def test_a_write_that_fails_midway_leaves_the_old_checkpoint(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    model, optimizer = trained(tiny())
    save_checkpoint(path, model, optimizer, INFO)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))  # as if the disk were full
    try:
        with pytest.raises(CheckpointError, match="cannot be written") as caught:
            save_checkpoint(path, model, optimizer, INFO)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "free some space, then run again with --resume" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("part", ["weight", "running_var", "momentum", "groups"])
def test_what_is_not_finite_is_not_written(tiny: Callable[..., Recipe], tmp_path: Path, part: str) -> None:
    model, optimizer = trained(tiny())
    groups = {"stem.norm": torch.ones(2, 2, 8)}
    model.register_buffer("mask", torch.full((2,), -torch.inf))  # as attention has
    save_checkpoint(tmp_path / "good", model, optimizer, INFO, groups)
    spoilt = {
        "weight": model.stem.conv.weight,
        "running_var": model.stem.norm.running_var,
        "momentum": momenta(model, optimizer)[0],
        "groups": groups["stem.norm"],
    }
    spoilt[part].data.view(-1)[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"not written, because 1 of \d+ tensors holds NaN or infinity, such as"):
        save_checkpoint(tmp_path / "bad", model, optimizer, INFO, groups)
    assert [file.name for file in tmp_path.iterdir()] == ["good"]


def test_a_folder_that_cannot_be_made_is_one_line(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot be written") as caught:
        save_checkpoint(tmp_path / "file/checkpoints/a.safetensors", *trained(tiny()), INFO)
    assert "\n" not in str(caught.value)
