"""The doctor's findings: what is seen, and what is advised where it is bad."""

from __future__ import annotations

import json
from collections.abc import Callable

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
def test_tf32_is_named_and_is_no_fault(precision: str, says: str, close: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_in_tf32", lambda: precision == "tf32")
    monkeypatch.setattr(doctor, "_probe", lambda *_: (0.001, 2.5e-3))  # the error of cuDNN in TF32
    monkeypatch.setattr(doctor, "right_gradients", lambda *_: True)
    assert doctor.tf32().found.startswith(says)
    found = {finding.what: finding.level for finding in doctor.convolutions(torch.device("cuda"))}
    assert (found["conv3d fp32, channels last"] == "good") is close


def test_a_convolution_that_is_right_is_close_to_double_precision() -> None:
    seconds, error = doctor._probe(torch.device("cpu"), "fp32", torch.channels_last_3d)
    assert seconds > 0
    assert error < 1e-5


def test_the_command_tells_programs_and_the_quick_start_people() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["schema"] == "mgtrain.doctor/1"
