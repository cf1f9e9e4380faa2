"""What is exported computes what the network computes, in the program that reads it."""

from __future__ import annotations

import builtins
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import mgtrain.engine.trained.export
from mgtrain.clips.loader import BadVideos, view_batches
from mgtrain.engine.checks import make_model
from mgtrain.engine.evaluate import evaluate
from mgtrain.engine.step import to_input
from mgtrain.engine.trained import Trained, evaluation_videos, load_trained
from mgtrain.engine.trained.export import Exported, clips_of, export
from mgtrain.errors import MissingCapabilityError, ThresholdError, UsageError
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe

MODELS = {
    "i3d_r50": "{name: i3d_r50, width: 8, depth: [1, 1, 1, 1]}",
    "i3d_nln_r50": "{name: i3d_nln_r50, width: 8, depth: [1, 2, 2, 1]}",
    "slowfast_r50": "{name: slowfast_r50, width: 8, depth: [1, 1, 1, 1], alpha: 4}",
}
SIZE = ("evaluation.crop=64", "evaluation.short_side=72")
CLASSES = ("left", "right", "up", "down")


class Positions(nn.Module):
    """A table of fixed size."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 8, 16, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table


@pytest.fixture
def trained(tiny: Callable[..., Recipe], request: pytest.FixtureRequest) -> Trained:
    """A network with random weights and statistics, whose logits differ from clip to clip."""
    name = getattr(request, "param", "slowfast_r50")
    recipe = tiny(f"model={MODELS.get(name, MODELS['i3d_r50'])}", "clip.frames=16", *SIZE)
    torch.manual_seed(0)
    model = make_model(recipe)
    if name == "fixed":
        model.stem = nn.Sequential(model.stem, Positions())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
    nn.init.normal_(model.head.linear.weight, std=0.3)
    return Trained(model.eval(), recipe, CLASSES, 17, True, "")


def assert_equal_at_any_size(done: Exported) -> None:
    assert done.free == ("clips", "frames", "pixels")
    assert all(parity.error < 1e-5 for parity in done.parity)
    shapes = {parity.shape for parity in done.parity}
    assert shapes == {(1, 3, 16, 64, 64), (3, 3, 16, 64, 64), (2, 3, 16, 96, 96), (1, 3, 8, 64, 64), (1, 3, 32, 64, 64)}
    assert [file.name for file in done.path.parent.iterdir()] == [done.path.name]
    assert done.describe()["bytes"] == done.path.stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trained", "suffix"),
    [("slowfast_r50", ".onnx"), ("i3d_nln_r50", ".onnx"), ("i3d_r50", ".pt2"), ("i3d_nln_r50", ".safetensors")],
    indirect=["trained"],
)
def test_the_other_networks_are_equal_at_any_size_too(trained: Trained, suffix: str, tmp_path: Path) -> None:
    assert_equal_at_any_size(export(trained, tmp_path / f"network{suffix}"))


@pytest.mark.parametrize("trained", ["fixed"], indirect=True)
def test_of_a_network_that_fixes_sizes_only_the_clips_are_free(trained: Trained, tmp_path: Path) -> None:
    done = export(trained, tmp_path / "network.pt2")
    assert done.free == ("clips",)
    assert {parity.shape for parity in done.parity} == {(1, 3, 16, 64, 64), (3, 3, 16, 64, 64)}


@pytest.mark.parametrize("trained", ["i3d_r50"], indirect=True)
def test_onnx_gives_the_networks_probabilities_of_real_clips_and_says_how_to_make_them(
    trained: Trained, tmp_path: Path
) -> None:
    done = export(trained, tmp_path / "deep" / "network.onnx")
    assert_equal_at_any_size(done)
    session = onnxruntime.InferenceSession(done.path, providers=["CPUExecutionProvider"])
    (declared,) = session.get_inputs()
    assert declared.name == "clips"
    assert [isinstance(size, str) for size in declared.shape] == [True, False, True, True, True]
    notes = json.loads(session.get_modelmeta().custom_metadata_map["mgtrain"])
    assert tuple(notes["classes"]) == CLASSES
    assert (notes["frames"], notes["stride"], notes["crop"], notes["short_side"]) == (16, 2, 64, 72)
    videos = evaluation_videos(trained)
    batches = view_batches(videos, range(4), trained.recipe, 1, 1, World(), BadVideos(4, 0))
    for clips, _ in batches:
        by_notes = ((clips.numpy().swapaxes(1, -1) / 255 - notes["mean"]) / notes["std"]).swapaxes(1, -1)
        logits = session.run(["logits"], {"clips": by_notes.astype(np.float32)})[0]
        with torch.no_grad():
            expected = trained.model(to_input(clips, trained.recipe)).numpy()
        assert np.allclose(logits, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_a_torch_program_needs_no_mgtrain_and_has_the_notes(trained: Trained, tmp_path: Path) -> None:
    assert_equal_at_any_size(export(trained, tmp_path / "network.pt2"))
    notes = {"mgtrain.json": ""}
    program = torch.export.load(tmp_path / "network.pt2", extra_files=notes)
    assert json.loads(notes["mgtrain.json"])["classes"] == list(CLASSES)
    clips = clips_of(2, 16, 80)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(clips), trained.model(clips), rtol=1e-5, atol=1e-5)


def test_exported_weights_are_evaluated_as_the_network(trained: Trained, tmp_path: Path) -> None:
    assert_equal_at_any_size(export(trained, tmp_path / "w.safetensors"))
    with safe_open(tmp_path / "w.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["model"])["name"] == "slowfast_r50"
    (tmp_path / "r.yaml").write_text(trained.recipe.to_yaml())
    again = load_trained(tmp_path / "w.safetensors", str(tmp_path / "r.yaml"), (), World())
    assert again.classes == CLASSES
    ours, theirs = (evaluate(t.model, evaluation_videos(t), t.recipe, World()) for t in (trained, again))
    assert np.allclose(ours.probabilities, theirs.probabilities, atol=1e-6)


def test_a_file_that_computes_something_else_is_not_kept(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: nn.Module, example: Any, free: Any, path: Path, notes: Any) -> Any:
        path.write_bytes(b"half")
        return lambda clips: model(clips) + 0.1

    monkeypatch.setitem(mgtrain.engine.trained.export.FORMATS, ".onnx", wrong)
    with pytest.raises(ThresholdError, match=r"network\.onnx: for clips .* logits differ from"):
        export(trained, tmp_path / "network.onnx")
    assert not list(tmp_path.iterdir())


def test_nan_of_a_file_counts_as_a_difference(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: nn.Module, example: Any, free: Any, path: Path, notes: Any) -> Any:
        path.write_bytes(b"half")
        return lambda clips: model(clips) + (math.nan if len(clips) > 1 else 0.0)

    monkeypatch.setitem(mgtrain.engine.trained.export.FORMATS, ".onnx", wrong)
    assert export(trained, tmp_path / "network.onnx").free == (), "right for one clip only"


def test_without_the_packages_of_onnx_the_way_to_them_is_said(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported = builtins.__import__

    def without(name: str, *words: Any, **more: Any) -> Any:
        if name == "onnxruntime":
            raise ImportError("no such package", name=name)
        return imported(name, *words, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingCapabilityError, match=r"ONNX needs the package onnxruntime; .* 'mgtrain\[onnx\]'"):
        export(trained, tmp_path / "network.onnx")
    with pytest.raises(UsageError, match=r"must end in \.onnx, \.pt2, \.safetensors"):
        export(trained, tmp_path / "network.txt")
    assert not list(tmp_path.iterdir())
