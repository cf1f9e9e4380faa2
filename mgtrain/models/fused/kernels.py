"""The Triton kernels of `fused.norm`. They treat activations as rows of channels, a dense tensor (groups, rows, C).

Each program of the first kernel of a pass sums `rows` rows of a group (a split); the second joins these partial sums,
in float32 and in a fixed order. `C` is a compile-time constant, so that even 8 channels are read in whole words. Sizes
that depend on the shape are not, so that a new shape compiles nothing.
"""

import triton
import triton.language as tl

JOINED = 64  # partial sums that are joined at a time


@triton.jit
def _place(group, first, channel, rows_of_group, C: tl.constexpr, TILE: tl.constexpr):
    """The offsets of a tile's numbers, int64 (TILE, channels), and its rows' numbers within the group (TILE, 1)."""
    row = first + tl.arange(0, TILE)[:, None]
    return (group.to(tl.int64) * rows_of_group + row) * C + channel, row


@triton.jit(do_not_specialize=["rows_of_group", "rows", "splits"])
def sum_values(x, partial, rows_of_group, rows, splits, C: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr):
    """Write each split's mean and sum of squared deviations to `partial` (groups, splits, 2, C)."""
    split, group = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * WIDE + tl.arange(0, WIDE)[None, :]
    there = channel < C
    begin = split * rows
    end = tl.minimum(begin + rows, rows_of_group)
    # Sum differences from one of the values, so that a mean far from zero loses no precision.
    start = x + (group.to(tl.int64) * rows_of_group + begin) * C + channel
    usual = tl.load(start, mask=there, other=0.0).to(tl.float32)
    ones = tl.zeros((TILE, WIDE), tl.float32)
    squares = tl.zeros((TILE, WIDE), tl.float32)
    for first in range(begin, end, TILE):
        place, row = _place(group, first, channel, rows_of_group, C, TILE)
        inside = (row < end) & there
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        off = tl.where(inside, value - usual, 0.0)
        ones += off
        squares += off * off
    count = (end - begin).to(tl.float32)
    one = tl.sum(ones, axis=0, keep_dims=True)
    square = tl.sum(squares, axis=0, keep_dims=True)
    to = partial + (group * splits + split) * 2 * C + channel
    tl.store(to, usual + one / count, mask=there)
    tl.store(to + C, tl.maximum(square - one * one / count, 0.0), mask=there)


@triton.jit(do_not_specialize=["rows_of_group", "rows", "splits", "C"])
def join_values(
    partial, stats, means, variances, momentum, eps, rows_of_group, rows, splits, C, JOINED: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Write each group's mean and 1 / deviation to `stats` (groups, 2, C), and update the running statistics."""
    group = tl.program_id(1)
    channel = tl.program_id(0) * WIDE + tl.arange(0, WIDE)[None, :]
    there = channel < C
    total = rows_of_group.to(tl.float32)
    sums = tl.zeros((JOINED, WIDE), tl.float32)
    for first in range(0, splits, JOINED):
        split = first + tl.arange(0, JOINED)[:, None]
        count = tl.minimum(rows, rows_of_group - split * rows).to(tl.float32)
        inside = (split < splits) & there
        mean = tl.load(partial + (group * splits + split) * 2 * C + channel, mask=inside, other=0.0)
        sums += tl.where(inside, count * mean, 0.0)
    whole = tl.sum(sums, axis=0, keep_dims=True) / total
    squares = tl.zeros((JOINED, WIDE), tl.float32)
    for first in range(0, splits, JOINED):
        split = first + tl.arange(0, JOINED)[:, None]
        count = tl.minimum(rows, rows_of_group - split * rows).to(tl.float32)
        inside = (split < splits) & there
        place = partial + (group * splits + split) * 2 * C + channel
        off = tl.load(place, mask=inside, other=0.0) - whole
        squares += tl.where(inside, tl.load(place + C, mask=inside, other=0.0) + count * off * off, 0.0)
    square = tl.sum(squares, axis=0, keep_dims=True)
    tl.store(stats + group * 2 * C + channel, whole, mask=there)
    tl.store(stats + group * 2 * C + C + channel, 1.0 / tl.sqrt(square / total + eps), mask=there)
    running = means + group * C + channel
    before = tl.load(running, mask=there, other=0.0)
    tl.store(running, before + momentum * (whole - before), mask=there)
    running = variances + group * C + channel
    before = tl.load(running, mask=there, other=0.0)
    tl.store(running, before + momentum * (square / (total - 1.0) - before), mask=there)


@triton.jit
def _normalized(x, stats, weight, bias, group, channel, there, C: tl.constexpr):
    """The normalized values, weight / deviation, and the normalized values times weight plus bias."""
    mean = tl.load(stats + group * 2 * C + channel, mask=there, other=0.0)
    inv_std = tl.load(stats + group * 2 * C + C + channel, mask=there, other=0.0)
    scale = tl.load(weight + channel, mask=there, other=0.0)
    normed = (x - mean) * inv_std
    return normed, inv_std * scale, normed * scale + tl.load(bias + channel, mask=there, other=0.0)


@triton.jit
def _own_tile(x, rows_of_group, C: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr):
    """This program's group and channels, which of them exist, its tile's offsets, which are inside, and its values."""
    group = tl.program_id(2)
    channel = tl.program_id(1) * WIDE + tl.arange(0, WIDE)[None, :]
    place, row = _place(group, tl.program_id(0) * TILE, channel, rows_of_group, C, TILE)
    there = channel < C
    inside = (row < rows_of_group) & there
    return group, channel, there, place, inside, tl.load(x + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows_of_group"])
def normalize(
    x, y, stats, weight, bias, rows_of_group, RELU: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Write normalized values times weight plus bias to `y`, with RELU after ReLU."""
    group, channel, there, place, inside, value = _own_tile(x, rows_of_group, C, TILE, WIDE)
    _, _, result = _normalized(value, stats, weight, bias, group, channel, there, C)
    if RELU:
        result = tl.where(result <= 0.0, 0.0, result)  # NaN stays NaN
    tl.store(y + place, result.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows_of_group", "rows", "splits"])
def sum_gradients(
    x, grad, partial, stats, weight, bias, rows_of_group, rows, splits, RELU: tl.constexpr, C: tl.constexpr,
    TILE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write each split's sums of the gradient, and of gradient times value, to `partial` (groups, splits, 2, C)."""
    split, group = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * WIDE + tl.arange(0, WIDE)[None, :]
    there = channel < C
    end = tl.minimum(split * rows + rows, rows_of_group)
    ones = tl.zeros((TILE, WIDE), tl.float32)
    products = tl.zeros((TILE, WIDE), tl.float32)
    for first in range(split * rows, end, TILE):
        place, row = _place(group, first, channel, rows_of_group, C, TILE)
        inside = (row < end) & there
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        above = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        normed, _, result = _normalized(value, stats, weight, bias, group, channel, there, C)
        if RELU:
            above = tl.where(result <= 0.0, 0.0, above)
        ones += above
        products += tl.where(inside, above * normed, 0.0)
    to = partial + (group * splits + split) * 2 * C + channel
    tl.store(to, tl.sum(ones, axis=0, keep_dims=True), mask=there)
    tl.store(to + C, tl.sum(products, axis=0, keep_dims=True), mask=there)


@triton.jit(do_not_specialize=["groups", "rows_of_group", "splits", "C"])
def join_gradients(
    partial, sums, grad_weight, grad_bias, groups, rows_of_group, splits, C, JOINED: tl.constexpr, WIDE: tl.constexpr
):
    """Write each group's two sums, divided by its rows, to `sums` (groups, 2, C); their totals are the gradients."""
    channel = tl.program_id(0) * WIDE + tl.arange(0, WIDE)[None, :]
    there = channel < C
    total = rows_of_group.to(tl.float32)
    of_bias = tl.zeros((1, WIDE), tl.float32)
    of_weight = tl.zeros((1, WIDE), tl.float32)
    for group in range(groups):
        ones = tl.zeros((JOINED, WIDE), tl.float32)
        products = tl.zeros((JOINED, WIDE), tl.float32)
        for first in range(0, splits, JOINED):
            split = first + tl.arange(0, JOINED)[:, None]
            inside = (split < splits) & there
            place = partial + (group * splits + split) * 2 * C + channel
            ones += tl.load(place, mask=inside, other=0.0)
            products += tl.load(place + C, mask=inside, other=0.0)
        one = tl.sum(ones, axis=0, keep_dims=True)
        product = tl.sum(products, axis=0, keep_dims=True)
        tl.store(sums + group * 2 * C + channel, one / total, mask=there)
        tl.store(sums + group * 2 * C + C + channel, product / total, mask=there)
        of_bias += one
        of_weight += product
    tl.store(grad_bias + channel, of_bias, mask=there)
    tl.store(grad_weight + channel, of_weight, mask=there)


@triton.jit(do_not_specialize=["rows_of_group"])
def input_gradient(
    x, grad, grad_x, stats, sums, weight, bias, rows_of_group, RELU: tl.constexpr, C: tl.constexpr,
    TILE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the input to `grad_x`."""
    group, channel, there, place, inside, value = _own_tile(x, rows_of_group, C, TILE, WIDE)
    above = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    normed, factor, result = _normalized(value, stats, weight, bias, group, channel, there, C)
    if RELU:
        above = tl.where(result <= 0.0, 0.0, above)
    one = tl.load(sums + group * 2 * C + channel, mask=there, other=0.0)
    product = tl.load(sums + group * 2 * C + C + channel, mask=there, other=0.0)
    made = factor * (above - one - normed * product)
    tl.store(grad_x + place, made.to(grad_x.dtype.element_ty), mask=inside)
