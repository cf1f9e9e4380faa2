"""Convolutions: whichever way they are computed, they are torch's 3-D ones."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from operations import Operations
from torch import nn

from mgtrain.models import conv as conv_module
from mgtrain.models.conv import Conv3d

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
@pytest.mark.parametrize("channels", [(4, 6), (6, 4)], ids=str)
@pytest.mark.parametrize("shape", [(1, 5, 9, 9), (2, 8, 8, 8), (3, 1, 5, 5)])
@pytest.mark.parametrize("layout", [torch.channels_last_3d, torch.contiguous_format], ids=["last", "first"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("many", [1, 128], ids=["many", "few"])
def test_values_and_gradients_are_those_of_the_3d_convolution(
    kind: str,
    channels: tuple[int, int],
    shape: tuple[int, ...],
    layout: torch.memory_format,
    bias: bool,
    many: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(conv_module, "MANY", many)
    monkeypatch.setattr(conv_module, "PATCHES", 1500)  # so that two pictures of the smallest size go together
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
