"""Flat convolutions: whichever way they are computed, they are torch's 3-D ones."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from operations import Operations
from torch import nn

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
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 4, 5, 9, 9), (2, 4, 8, 8, 8), (3, 4, 1, 5, 5)])
@pytest.mark.parametrize("layout", [torch.channels_last_3d, torch.contiguous_format], ids=["last", "first"])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_the_3d_convolution(
    kind: str, shape: tuple[int, ...], layout: torch.memory_format, bias: bool
) -> None:
    torch.manual_seed(0)
    theirs = nn.Conv3d(4, 6, bias=bias, **KINDS[kind]).double()
    ours = Conv3d(4, 6, bias=bias, **KINDS[kind]).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(shape, dtype=torch.float64).to(memory_format=layout)
    found = []
    for conv in (theirs, ours):
        given = x.clone().requires_grad_()
        y = conv(given)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        found.append([y, given.grad, *(p.grad for p in conv.parameters())])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)
    if layout is torch.channels_last_3d and kind != "block":
        assert found[1][0].is_contiguous(memory_format=layout)


@pytest.mark.parametrize(("kind", "flat"), [(kind, kind != "block") for kind in KINDS])
def test_on_a_cpu_flat_kernels_are_2d_and_copy_nothing(kind: str, flat: bool) -> None:
    conv = Conv3d(4, 6, **KINDS[kind])
    x = torch.randn(2, 4, 4, 8, 8).to(memory_format=torch.channels_last_3d)
    with mock.patch.object(F, "conv2d", wraps=F.conv2d) as conv2d:
        conv(x)
        assert conv2d.called == flat
        if flat:
            picture = conv2d.call_args.args[0]
            assert (picture.data_ptr() == x.data_ptr()) == (kind != "strided pixel")  # which takes every other pixel
            assert picture.is_contiguous(memory_format=torch.channels_last)
    with mock.patch.object(F, "conv2d", wraps=F.conv2d) as conv2d:
        conv.to("meta")(x.to("meta"))
        assert not conv2d.called


def test_the_strides_of_one_clip_say_that_its_channels_are_last() -> None:
    conv = Conv3d(4, 6, **KINDS["strip"]).to(memory_format=torch.channels_last_3d)
    x = torch.randn(1, 4, 4, 8, 8).to(memory_format=torch.channels_last_3d).requires_grad_()
    with mock.patch.object(F, "conv2d", wraps=F.conv2d) as conv2d:
        y = conv(x)
    assert conv2d.call_args.args[0].stride() == (4 * 4 * 64, 1, 4 * 64, 4)  # by all four torch chooses the layout
    with Operations() as forward_and_backward:
        conv(x).backward(torch.randn_like(y))
    assert not {"clone", "copy_", "_to_copy"} & {*forward_and_backward.names}


def test_a_traced_graph_has_3d_convolutions() -> None:
    x = torch.randn(2, 4, 4, 8, 8).to(memory_format=torch.channels_last_3d)
    program = torch.export.export(Conv3d(4, 6, 1), (x,))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets == ["aten.conv3d.default"]
