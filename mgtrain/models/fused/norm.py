"""BatchNorm of any number of groups in six kernel launches: three forward, three backward.

In channels_last_3d all groups are one dense tensor (groups, rows, C), and each kernel handles all of them.
`torch.batch_norm` needs about nine launches for each group, which in a coarse step take the host longer than the GPU.
"""

import logging
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mgtrain.errors import MgtrainError, one_line

log = logging.getLogger(__name__)

NUMBERS = 4096  # in a tile, the block of numbers that a program loads at a time
CHANNELS = 128  # in a tile, at most
JOINED_CHANNELS = 16  # in a program that joins partial sums
PROGRAMS = 1024  # for the sums of all groups together, about: enough to occupy any GPU
MOST_SPLITS = 512  # of a group's rows among programs
WARPS = 8


@lru_cache
def works(device: torch.device) -> bool:
    """Whether Triton can compile and run the kernels on this device, for which it waits; if not, log a warning.

    Triton comes with torch's CUDA builds. It needs a C compiler, a folder to write to and a GPU that it supports.
    """
    x = torch.zeros(2, 8, 1, 4, 4, device=device).contiguous(memory_format=torch.channels_last_3d)
    ones, slots = torch.ones(8, device=device), torch.zeros(2, 8, device=device)
    try:
        _, stats = _forward(x, ones, ones, slots, slots, 0.0, 1.0, relu=True)
        _backward(x, x, ones, ones, stats, relu=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # a kernel that fails does so here, not in a later call
    except (MgtrainError, torch.OutOfMemoryError):  # the run is asked to stop, or Triton is not the cause
        raise
    except Exception as error:  # Triton raises RuntimeError, OSError, CalledProcessError and its own
        cause = f"{type(error).__name__}: {one_line(error, 300)}"
        log.warning("BatchNorm groups are normalized one by one, which is slow where a step has many: %s", cause)
        return False
    return True


def usable(x: Tensor) -> bool:
    """Whether `norm_groups` accepts these activations (B, C, T, H, W)."""
    return (
        x.device.type == "cuda"
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and x.is_contiguous(memory_format=torch.channels_last_3d)
        and (torch.compiler.is_compiling() or works(x.device))  # torch.compile itself needs Triton
    )


def norm_groups(
    x: Tensor, weight: Tensor, bias: Tensor, means: Tensor, variances: Tensor, momentum: float, eps: float, relu: bool
) -> Tensor:
    """Normalize each group of (B, C, T, H, W), channels_last_3d, separately; with `relu`, apply ReLU.

    Updates the groups' running `means` and (unbiased) `variances`, float32 (groups, C), in place.
    """
    given = x, weight, bias, means, variances, momentum, eps, relu
    if torch.compiler.is_compiling():
        normed: Tensor
        normed, _, *now = compiled_forward(*given)
        with torch.no_grad():
            for slots, updated in zip((means, variances), now, strict=True):
                slots.copy_(updated)
    else:
        normed = _NormGroups.apply(*given)
    return normed


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Start a kernel. All kernels start here, so that tests without a GPU can count them."""
    with torch.cuda.device_of(args[0]):  # type: ignore[no-untyped-call]  # Triton takes the current device
        kernel[grid](*args, **constants)


class _NormGroups(torch.autograd.Function):
    """`norm_groups`. For the backward pass it saves only `x`, not the input or output of ReLU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, *others: Any) -> Tensor:
        y, stats = _forward(x, weight, bias, *others)
        ctx.save_for_backward(x, weight, bias, stats)
        *_, ctx.relu = others
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, stats = ctx.saved_tensors
        return *_backward(grad, x, weight, bias, stats, ctx.relu), *[None] * 5


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, means: Tensor, variances: Tensor, momentum: float, eps: float, relu: bool
) -> tuple[Tensor, Tensor]:
    """The normalized values, and each group's mean and 1 / deviation (groups, 2, C)."""
    from mgtrain.models.fused import kernels  # here, because it imports Triton, which CPU builds of torch lack

    x = x.contiguous(memory_format=torch.channels_last_3d)  # which it is, unless torch.compile has changed it
    groups, channels = means.shape
    rows_of_group = x.numel() // (groups * channels)
    rows, splits = _split(groups, rows_of_group, channels)
    tile = {**_tiles(channels), "C": channels, "num_warps": WARPS}
    tiles, blocks = -(-rows_of_group // tile["TILE"]), -(-channels // tile["WIDE"])
    y, stats = torch.empty_like(x), means.new_empty(groups, 2, channels)
    partial = means.new_empty(groups, splits, 2, channels)
    launch(kernels.sum_values, (splits, blocks, groups), x, partial, rows_of_group, rows, splits, **tile)
    launch(
        kernels.join_values, (-(-channels // JOINED_CHANNELS), groups), partial, stats, means, variances, momentum,
        eps, rows_of_group, rows, splits, channels, JOINED=kernels.JOINED, WIDE=JOINED_CHANNELS,
    )  # fmt: skip
    grid = tiles, blocks, groups
    launch(kernels.normalize, grid, x, y, stats, weight, bias, rows_of_group, RELU=relu, **tile)
    return y, stats


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, stats: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of input, weight and bias."""
    from mgtrain.models.fused import kernels

    grad, x = (tensor.contiguous(memory_format=torch.channels_last_3d) for tensor in (grad, x))
    groups, _, channels = stats.shape
    rows_of_group = x.numel() // (groups * channels)
    rows, splits = _split(groups, rows_of_group, channels)
    tile = {**_tiles(channels), "C": channels, "num_warps": WARPS}
    tiles, blocks = -(-rows_of_group // tile["TILE"]), -(-channels // tile["WIDE"])
    partial, sums = stats.new_empty(groups, splits, 2, channels), torch.empty_like(stats)
    grad_x, grad_weight, grad_bias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
    launch(
        kernels.sum_gradients, (splits, blocks, groups), x, grad, partial, stats, weight, bias, rows_of_group, rows,
        splits, RELU=relu, **tile,
    )  # fmt: skip
    launch(
        kernels.join_gradients, (-(-channels // JOINED_CHANNELS),), partial, sums, grad_weight, grad_bias, groups,
        rows_of_group, splits, channels, JOINED=kernels.JOINED, WIDE=JOINED_CHANNELS,
    )  # fmt: skip
    grid = tiles, blocks, groups
    launch(kernels.input_gradient, grid, x, grad, grad_x, stats, sums, weight, bias, rows_of_group, RELU=relu, **tile)
    return grad_x, grad_weight, grad_bias


# The same as custom operators: in a graph that torch.compile makes, one node for all groups. To be differentiable, they
# must not change their inputs, so the first returns the new running statistics.
@torch.library.custom_op("mgtrain::norm_groups", mutates_args=())
def compiled_forward(
    x: Tensor, weight: Tensor, bias: Tensor, means: Tensor, variances: Tensor, momentum: float, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The normalized values, the groups' statistics (groups, 2, C), and their running means and variances."""
    now = means.clone(), variances.clone()
    return *_forward(x, weight, bias, *now, momentum, eps, relu), *now


@torch.library.custom_op("mgtrain::norm_groups_backward", mutates_args=())
def compiled_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, stats: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of input, weight and bias."""
    return _backward(grad, x, weight, bias, stats, relu)


@compiled_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, means: Tensor, variances: Tensor, *_: Any) -> tuple[Tensor, ...]:
    stats = means.new_empty(len(means), 2, len(weight))
    return torch.empty_like(x), stats, torch.empty_like(means), torch.empty_like(variances)


@compiled_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:3], output[1])
    *_, ctx.relu = inputs


def _differentiated(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return *compiled_backward(grad, *ctx.saved_tensors, ctx.relu), *[None] * 5


compiled_forward.register_autograd(_differentiated, setup_context=_keep)


def _tiles(channels: int) -> dict[str, int]:
    """Rows (TILE) and channels (WIDE) of a tile, powers of two.

    >>> _tiles(8), _tiles(96), _tiles(2048)
    ({'TILE': 512, 'WIDE': 8}, {'TILE': 32, 'WIDE': 128}, {'TILE': 32, 'WIDE': 128})
    """
    wide = min(CHANNELS, 1 << (channels - 1).bit_length())
    return {"TILE": NUMBERS // wide, "WIDE": wide}


def _split(groups: int, rows_of_group: int, channels: int) -> tuple[int, int]:
    """Rows per split of a group, a multiple of a tile's rows, and the number of splits; no split is empty.

    >>> _split(groups=1, rows_of_group=3_211_264, channels=8), _split(groups=64, rows_of_group=100, channels=512)
    ((6656, 483), (32, 4))
    """
    tiles = _tiles(channels)
    programs = groups * -(-channels // tiles["WIDE"])  # per split
    wanted = max(1, min(MOST_SPLITS, PROGRAMS // programs))
    rows = -(-rows_of_group // (wanted * tiles["TILE"])) * tiles["TILE"]
    return rows, -(-rows_of_group // rows)
