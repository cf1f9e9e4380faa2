"""The page's VideoMAE of Hugging Face's transformers as a network of one's own."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mgtrain import make_model
from mgtrain.engine.fit import fit
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe
from mgtrain.runs.folder import RunDir

PAGE = Path(__file__).parent.parent.parent / "docs/how-to/networks.md"
SIZE: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "num_frames": 8,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The page's module, in the current folder."""
    (code,) = re.findall(r"```python\n(# my_transformers\.py\n.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "my_transformers.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("my_transformers", None)
    return "my_transformers"


def section(module: str) -> str:
    options = ", ".join(f"{key}: {value}" for key, value in SIZE.items())
    return f"model={{name: own, module: {module}, network: videomae, options: {{{options}}}}}"


def test_at_full_size_it_is_that_of_transformers_and_its_weights_are_loaded(
    module: str, tiny: Callable[..., Recipe]
) -> None:
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification  # takes seconds

    torch.manual_seed(0)
    published = VideoMAEForVideoClassification(VideoMAEConfig(num_labels=4, use_mean_pooling=True, **SIZE)).eval()
    published.save_pretrained("published")
    ours = __import__(module).MODELS["videomae"](4, pretrained="published").eval()
    clips = torch.randn(2, 3, 8, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(clips), published(clips.transpose(1, 2)).logits)
        assert ours(clips[:, :, :2, :16, :16]).shape == (2, 4)
    save_file(ours.state_dict(), "videomae.safetensors")
    loaded = make_model(tiny(section(module), "init.weights=videomae.safetensors"), "cpu").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in ours.state_dict().items())


def test_it_is_trained_by_multigrid_and_evaluated(module: str, tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny(section(module), "optim={name: adamw, lr: 0.001, stages: [4, 2], layer_decay: 0.8, clip_norm: 1.0}")
    run = RunDir(tmp_path / "run")
    fit(recipe, run, World())
    shapes = {(row["clips"], row["frames"], row["crop"]) for row in run.rows("steps.jsonl")}
    assert len(shapes) > 3
    assert run.rows("evals.jsonl")[-1]["videos"] == 12
