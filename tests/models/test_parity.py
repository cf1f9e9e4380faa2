"""Our networks against the published ones: the same weights, through import, give the same logits and statistics."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
from torch import Tensor, nn

from mgtrain.models import build_model
from mgtrain.models.weights.load import load_weights, read_weights
from mgtrain.models.weights.naming import OWN

CASES = json.loads((Path(__file__).parent.parent / "golden/parity.json").read_text())["cases"]
NETWORKS = {(case["project"], case["title"]): case for case in CASES}
INVERSE = {
    "PySlowFast": lambda name, pathways: foreign.pyslowfast(name),
    "PyTorchVideo": foreign.pytorchvideo,
    "MMAction2": foreign.mmaction2,
}


def published(case: dict[str, Any]) -> tuple[nn.Module, dict[str, Tensor]]:
    """Our model of a case, and the weights of the published one under its names."""
    model = build_model(**case["model"], classes=10, width=case["width"], dropout=0.0).double()
    pathways = 2 if case["model"]["name"] == "slowfast_r50" else 1
    shapes = {}
    for own, tensor in model.state_dict().items():
        common, shape = OWN.common(own), tuple(tensor.shape)
        _, stage, rest = common.split(".", 2)
        if "R101_50_50" in case["title"] and stage == "res4" and "conv1" in rest and int(rest.split(".")[0]) >= 6:
            shape = (*shape[:2], 1, 1, 1)  # only its first six blocks look at more than one frame
        shapes[INVERSE[case["project"]](common, pathways)] = shape
    assert foreign.fingerprint(shapes.items()) == case["names"]
    return model, {name: torch.from_numpy(foreign.value(name, shape)) for name, shape in shapes.items()}


def shapes_of_networks() -> Iterator[Any]:
    """The networks and their clips; quick are the smallest of each, but of three with 101 layers, and 158 pixels."""
    for (project, title), case in NETWORKS.items():
        shapes = sorted(
            {tuple(c["shape"]) for c in CASES if (c["project"], c["title"]) == (project, title)}, key=volume
        )
        for shape in shapes:
            large = case["title"].endswith(("8x8_R101", "101_101_101"))
            quick = shape[2] == 158 if case["title"] == "i3d_r50" else shape == shapes[0] and not large
            yield pytest.param(
                project, title, shape, id=f"{project} {title} {shape}", marks=() if quick else pytest.mark.slow
            )


def volume(shape: tuple[int, int, int]) -> int:
    return shape[0] * shape[1] * shape[2] ** 2


@pytest.mark.parametrize(("project", "title", "shape"), [*shapes_of_networks()])
@torch.no_grad()
def test_logits_and_statistics_are_those_of_the_published_network(
    project: str, title: str, shape: tuple[int, int, int], tmp_path: Path
) -> None:
    model, tensors = published(NETWORKS[project, title])
    torch.save({"state_dict": tensors}, tmp_path / "weights.pth")
    x = torch.from_numpy(foreign.clips(shape[0], 3, shape[1], shape[2], shape[2]))
    for case in CASES:
        if (case["project"], case["title"], tuple(case["shape"])) == (project, title, shape):
            assert load_weights(model, read_weights(tmp_path / "weights.pth")).share == 1
            logits = model.train(case["mode"] == "training")(x)
            torch.testing.assert_close(logits, torch.tensor(case["logits"]).double(), rtol=1e-6, atol=1e-6)
            state = model.state_dict()
            for name, start in case["running"].items():
                torch.testing.assert_close(state[name][:3], torch.tensor(start).double(), rtol=1e-6, atol=1e-6)


def test_every_published_depth_and_mode_is_in_the_golden() -> None:
    assert {case["title"] for case in CASES if case["project"] == "PySlowFast"} == {
        "SLOWFAST_8x8_R50", "SLOWFAST_4x16_R50", "c2/SLOWFAST_8x8_R101_101_101", "c2/SLOWFAST_8x8_R101_50_50",
        "I3D_8x8_R50", "I3D_NLN_8x8_R50", "I3D_8x8_R101", "I3D_NLN_8x8_R101",
    }  # fmt: skip
    for case in NETWORKS.values():
        same = [other for other in CASES if other["title"] == case["title"] and other["project"] == case["project"]]
        assert {other["mode"] for other in same} == {"evaluation", "training"}
        assert {other["shape"][2] for other in same} >= {112}
