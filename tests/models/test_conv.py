"""Convolutions: whichever way they are computed, they are torch's 3-D ones."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from operations import Operations
from torch import nn

from mgtrain.models import forms as conv_module
from mgtrain.models.conv import Conv3d, choose
from mgtrain.models.forms import DIRECTIONS, Kind, candidates, fixed_forms, input_grad, output, weight_grad

torch.set_num_threads(1)
KINDS: dict[str, dict[str, Any]] = {
    "pixel": {"kernel_size": 1},
    "strided pixel": {"kernel_size": 1, "stride": (1, 2, 2)},
    "picture": {"kernel_size": (1, 3, 3), "stride": (1, 2, 2), "padding": (0, 1, 1)},
    "stem": {"kernel_size": (1, 7, 7), "stride": (1, 2, 2), "padding": (0, 3, 3)},
    "strip": {"kernel_size": (3, 1, 1), "padding": (1, 0, 0)},
    "strided strip": {"kernel_size": (7, 1, 1), "stride": (4, 1, 1), "padding": (3, 0, 0)},
    "block": {"kernel_size": (5, 7, 7), "stride": (1, 2, 2), "padding": (2, 3, 3)},
    "unpadded block": {"kernel_size": (2, 2, 3), "stride": (2, 1, 2), "padding": (1, 0, 1)},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("channels", "bias"), [((4, 6), True), ((4, 6), False), ((6, 4), True)], ids=str)
@pytest.mark.parametrize("shape", [(1, 5, 9, 9), (2, 8, 8, 8), (3, 1, 5, 5)])
def test_values_and_gradients_are_those_of_the_3d_convolution(
    kind: str, channels: tuple[int, int], bias: bool, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conv_module, "PATCHES", 1500)  # so that two pictures of the smallest size go together
    for many, layout in ((1, torch.channels_last_3d), (128, torch.channels_last_3d), (1, torch.contiguous_format)):
        monkeypatch.setattr(conv_module, "MANY", many)
        check_convolution(kind, channels, bias, shape, layout)


def check_convolution(
    kind: str, channels: tuple[int, int], bias: bool, shape: tuple[int, ...], layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    theirs = nn.Conv3d(*channels, bias=bias, **KINDS[kind]).double()
    ours = Conv3d(*channels, bias=bias, **KINDS[kind]).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(shape[0], channels[0], *shape[1:], dtype=torch.float64).to(memory_format=layout)
    found = []
    for conv in (theirs, ours):
        given = x.clone().requires_grad_()
        y = conv(given)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        found.append([y, given.grad, *(p.grad for p in conv.parameters())])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)
    if layout is torch.channels_last_3d:
        assert found[1][0].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_cpu_and_only_with_channels_last_is_without_3d_convolutions(kind: str) -> None:
    conv = Conv3d(4, 6, **KINDS[kind])
    x = torch.randn(2, 4, 4, 8, 8)
    with mock.patch.object(nn.Conv3d, "forward", autospec=True) as conv3d:
        conv(x.to(memory_format=torch.channels_last_3d))
        assert not conv3d.called
        conv(x)
        assert conv3d.call_count == 1
        conv.to("meta")(x.to("meta", memory_format=torch.channels_last_3d))
        assert conv3d.call_count == 2


@pytest.mark.parametrize("kind", ["pixel", "picture", "stem"])
@pytest.mark.parametrize("clips", [1, 2])
def test_kernels_of_one_frame_copy_nothing(kind: str, clips: int) -> None:
    conv = Conv3d(4, 6, **KINDS[kind]).to(memory_format=torch.channels_last_3d)
    x = torch.randn(clips, 4, 4, 8, 8).to(memory_format=torch.channels_last_3d).requires_grad_()
    y = conv(x)
    above = torch.randn_like(y)
    with Operations() as forward_and_backward:
        conv(x).backward(above)
    assert not {"clone", "copy_", "_to_copy"} & {*forward_and_backward.names}


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_as_close_as_torchs_own(kind: str) -> None:
    torch.manual_seed(0)
    exact = nn.Conv3d(16, 16, **KINDS[kind])
    ours = Conv3d(16, 16, **KINDS[kind])
    ours.load_state_dict(exact.state_dict())
    x = torch.randn(2, 16, 8, 16, 16).to(memory_format=torch.channels_last_3d)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = ours(x)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact(x), atol=0.03, rtol=0.03)


def test_a_traced_graph_has_3d_convolutions() -> None:
    x = torch.randn(2, 4, 4, 8, 8).to(memory_format=torch.channels_last_3d)
    program = torch.export.export(Conv3d(4, 6, 1), (x,))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == ["aten.conv3d.default"]


def kind_of(words: dict[str, Any], channels: tuple[int, int], size: tuple[int, int, int]) -> Kind:
    return Conv3d(*channels, **words).kind(torch.Size((1, channels[0], *size)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(5, 9, 9), (8, 8, 8), (1, 5, 5)], ids=str)
def test_all_forms_of_a_direction_compute_the_same(
    kind: str, size: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conv_module, "PATCHES", 1500)
    torch.manual_seed(0)
    one = kind_of(KINDS[kind], (4, 6), size)
    x = torch.randn(2, *size, 4, dtype=torch.float64)
    weight = torch.randn(6, *one.kernel, 4, dtype=torch.float64)
    rule = fixed_forms(one)
    grad = torch.randn_like(output(x, weight, one, rule[0]))
    for n, direction in enumerate(DIRECTIONS):
        forms = candidates(one, direction)
        assert forms[0] == rule[n]
        assert len(set(forms)) == len(forms) >= 3
        given = (x, weight) if direction == "output" else (grad, x, weight)
        compute = (output, input_grad, weight_grad)[n]
        expected = compute(*given, one, rule[n])
        for form in forms[1:]:
            torch.testing.assert_close(compute(*given, one, form), expected, msg=f"{direction} {form}")


def test_multiply_adds_are_those_of_a_clip() -> None:
    one = kind_of(KINDS["block"], (4, 6), (8, 9, 9))
    made = output(torch.zeros(1, 8, 9, 9, 4), torch.zeros(6, 5, 7, 7, 4), one, "whole")
    assert one.multiply_adds() == made.numel() * 5 * 7 * 7 * 4


@pytest.mark.parametrize("frames", [1, 2, 8])
def test_in_half_precision_gradients_of_short_clips_are_right(frames: int) -> None:
    torch.manual_seed(0)
    conv = Conv3d(16, 64, kernel_size=(5, 3, 3), padding=(2, 1, 1), bias=False).to(memory_format=torch.channels_last_3d)
    x = torch.randn(2, 16, frames, 8, 8).to(memory_format=torch.channels_last_3d).requires_grad_()
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = (conv(x).float() ** 2).mean()
        found.append(torch.autograd.grad(loss, [conv.weight, x]))
    for exact, half in zip(*found, strict=True):
        assert (half - exact).norm() < 0.05 * exact.norm()


def test_the_forms_that_were_chosen_are_used() -> None:
    conv = nn.Sequential(Conv3d(4, 6, **KINDS["strip"])).to(memory_format=torch.channels_last_3d)
    x = torch.randn(2, 4, 8, 8, 8).to(memory_format=torch.channels_last_3d)
    kind = conv[0].kind(x.shape)
    asked = []

    def seen(*given: Any) -> torch.Tensor:
        asked.append(given[-1])
        return output(*given)

    choose(conv, {(kind, torch.float32): ("single rows", "whole", "first")})
    with mock.patch("mgtrain.models.conv.output", seen):
        conv(x)
        conv(x[:, :, :7].contiguous(memory_format=torch.channels_last_3d))
    assert asked == ["single rows", "apart rows"]


def test_in_half_precision_a_kernels_gradient_of_single_pixels_is_a_product_of_patches() -> None:
    for kind in ("picture", "block"):
        one = kind_of(KINDS[kind], (16, 32), (8, 2, 2))
        assert one.leaves_a_pixel
        forms = candidates(one, "weight", torch.bfloat16)
        assert all(form.endswith("patches") for form in forms)
        assert fixed_forms(one, torch.bfloat16)[2] == forms[0]
        assert not all(form.endswith("patches") for form in candidates(one, "weight"))


def test_a_kernel_s_gradient_by_patches_is_a_sum_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_module, "PATCHES", 1)  # a picture at a time
    torch.manual_seed(0)
    kind = Kind((1, 3, 3), (1, 1, 1), (0, 1, 1), (8, 8), (400, 4, 4))
    x, weight, grad = torch.rand(2, 400, 4, 4, 8), torch.rand(8, 1, 3, 3, 8), torch.rand(2, 400, 4, 4, 8)
    exact = weight_grad(grad, x, weight, kind, "beside patches")
    half = weight_grad(*(tensor.bfloat16() for tensor in (grad, x, weight)), kind, "beside patches")
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).norm() < 4e-3 * exact.norm()
