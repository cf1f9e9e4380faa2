"""The doctor's findings: what is seen, and what is advised where it is bad."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import mgtrain.preflight.doctor as doctor
from mgtrain.cli import app
from mgtrain.preflight.doctor import examine
from mgtrain.recipe import Recipe

pytestmark = pytest.mark.usefixtures("quick_doctor")


def test_this_machine_can_train_and_its_data_are_looked_at(tiny: Callable[..., Recipe]) -> None:
    found = {finding.what: finding for finding in examine(torch.device("cpu"), tiny())}
    assert {"versions", "devices", "ranks", "decoders", "encoder", "disk", "layout", "data", "loading"} <= set(found)
    assert not [finding for finding in found.values() if finding.level == "missing"]
    assert found["data"].found == "24 training and 12 validation videos"
    assert "h264" in found["decoders"].found
    assert all(finding.advice for finding in found.values() if finding.level != "good")
    assert "hardware.precision=" in found["layout"].advice
    assert {"conv3d fp32, channels last", "conv3d bf16, channels first"} <= set(found)
    assert found["half precision"].found == "a step of demo_baseline is 1.50x as fast in bf16 as in fp32"


def test_what_is_bad_ends_in_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.av, "__version__", "18.0.0")
    monkeypatch.setattr(doctor, "_has_codec", lambda name, mode: name not in ("h264", "libx264"))
    monkeypatch.setattr(doctor, "_probe", lambda device, precision, layout: (1.0, 0.5))
    found = {finding.what: finding for finding in examine(torch.device("cpu"))}
    assert "18.0.0 crashes on a truncated mp4: pip install 'av>=18.1'" in found["versions"].advice
    assert (found["decoders"].level, found["encoder"].level) == ("missing", "could be better")
    assert "no h264 (most videos)" in found["decoders"].found
    assert "do not train with hardware.precision=bf16" in found["conv3d bf16, channels last"].advice
    assert "layout" not in found  # nothing can be trusted


@pytest.mark.parametrize(("precision", "says", "close"), [("tf32", "on: ", True), ("ieee", "off: ", False)])
def test_tf32_is_named_and_is_no_fault(
    precision: str, says: str, close: bool, monkeypatch: pytest.MonkeyPatch, tiny: Callable[..., Recipe]
) -> None:
    monkeypatch.setattr(doctor, "_in_tf32", lambda: precision == "tf32")
    monkeypatch.setattr(doctor, "_probe", lambda *_: (0.001, 2.5e-3))  # the error of cuDNN in TF32
    monkeypatch.setattr(doctor, "right_gradients", lambda *_: True)
    assert doctor.tf32().found.startswith(says)
    found = {finding.what: finding.level for finding in doctor.convolutions(torch.device("cuda"), tiny())}
    assert (found["conv3d fp32, channels last"] == "good") is close


def test_bad_videos_and_recipes_are_findings(tiny: Callable[..., Recipe], motions: Path, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("".join(f"cut{n}.mp4 {n % 2}\n" for n in range(30)) + "whole.mp4 0\n")
    for name in ("classes.txt", "val.csv"):
        shutil.copy(motions / name, tmp_path)
    shutil.copytree(motions / "videos", tmp_path / "videos")
    whole = (motions / (motions / "train.csv").read_text().split()[0]).read_bytes()
    (tmp_path / "whole.mp4").write_bytes(whole)
    for n in range(30):
        (tmp_path / f"cut{n}.mp4").write_bytes(whole[:500])
    recipe = tiny(f"data.root={tmp_path}")
    (found,) = (finding for finding in examine(torch.device("cpu"), recipe) if finding.what == "videos")
    assert (found.level, found.advice) == ("missing", "find them with mgtrain data check")
    bad, tried = map(int, re.findall(r"[0-9]+", found.found)[:2])
    assert 4 < bad <= tried
    absent = [*examine(torch.device("cpu"), tiny("data.root=nowhere"))][-1]
    assert (absent.what, absent.level, absent.found) == ("recipe", "missing", "nowhere: no such folder of videos")


def test_no_precision_is_advised_whose_gradients_are_wrong(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_probe", lambda _, precision, __: (1.0 if precision == "bf16" else 2.0, 0.0))
    asked: list[Recipe] = []
    monkeypatch.setattr(doctor, "right_gradients", lambda recipe, _: asked.append(recipe))
    found = {
        finding.what: finding for finding in doctor.convolutions(torch.device("cpu"), tiny("model.name=i3d_nln_r50"))
    }
    assert found["layout"].advice.endswith("computes wrong gradients of i3d_nln_r50 with it: use fp32")
    assert (asked[0].model.name, asked[0].hardware.precision) == ("i3d_nln_r50", "bf16")


def test_a_convolution_that_is_right_is_close_to_double_precision() -> None:
    seconds, error = doctor._probe(torch.device("cpu"), "fp32", torch.channels_last_3d)
    assert seconds > 0
    assert error < 1e-5


def test_the_command_tells_programs_and_the_quick_start_people() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["schema"] == "mgtrain.doctor/1"
