"""3-D convolutions of clips, computed on a CPU in the form that is fastest there."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from mgtrain.models.forms import Forms, Kind, fixed_forms, input_grad, output, spread_apart, weight_grad

Choices = Mapping[tuple[Kind, torch.dtype], Forms]  # as measured; `fixed_forms` decides about all others


class Conv3d(nn.Conv3d):
    """`nn.Conv3d` that on a CPU, for clips in channels_last_3d, is computed in one of the `forms`.

    oneDNN's 3-D convolutions take up to three times as long as the best form, above all in the backward pass. Results
    differ by rounding.
    """

    choices: Choices = MappingProxyType({})

    def kind(self, size: torch.Size) -> Kind:
        """The key of this convolution in `choices`, for clips of size (B, C, T, H, W)."""
        assert isinstance(self.padding, tuple), self.padding
        channels = self.in_channels, self.out_channels
        return Kind(self.kernel_size, self.stride, self.padding, channels, tuple(size[2:]))

    def forward(self, x: Tensor) -> Tensor:
        plain = x.device.type != "cpu" or torch.compiler.is_compiling()
        if plain or not x.is_contiguous(memory_format=torch.channels_last_3d):
            return super().forward(x)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        kind = self.kind(x.shape)
        forms = self.choices.get((kind, dtype)) or fixed_forms(kind, dtype)
        if forms == ("whole", "whole", "whole"):
            return super().forward(x)
        weight, bias = self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)
        y: Tensor = _Conv.apply(x.to(dtype).movedim(1, 4), weight.movedim(1, 4), bias, kind, forms)
        return y.movedim(4, 1)


def choose(model: nn.Module, choices: Choices) -> None:
    """Compute a network's convolutions in these forms from now on."""
    for layer in model.modules():
        if isinstance(layer, Conv3d):
            layer.choices = choices


class _Conv(torch.autograd.Function):
    """Convolve clips (B, T, H, W, C) with a kernel (O, k, kh, kw, C): (B, T', H', W', O)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, kind: Kind, forms: Forms) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.kind, ctx.forms = kind, forms
        y = output(x, weight, kind, forms[0])
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        kind, (_, of_input, of_weight) = ctx.kind, ctx.forms
        wants_x, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        apart = spread_apart(grad, kind) if "apart" in of_input + of_weight else None
        grad_x = input_grad(grad, x, weight, kind, of_input, apart) if wants_x else None
        grad_weight = weight_grad(grad, x, weight, kind, of_weight, apart) if wants_weight else None
        return grad_x, grad_weight, grad.sum((0, 1, 2, 3)) if wants_bias else None, None, None
