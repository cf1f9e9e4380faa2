"""The forms in which a CPU computes a convolution of clips: its output, and the gradients of its input and kernel.

Clips are (B, T, H, W, C) and kernels (O, k, kh, kw, C), views of tensors in channels_last_3d. The first word of a form
says how it treats the k frames of the kernel, the second how it computes the 2-D convolutions that are left.

    whole          one 3-D convolution in channels_last_3d
    first          one 3-D convolution in contiguous layout
    strips         one 2-D convolution of images T x (H * W), for kernels of one pixel and several frames
    beside ...     one 2-D convolution with k * C input channels: the k input frames of an output frame, concatenated
    apart ...      one 2-D convolution with k * O output channels, which are then shifted and added (stride 1 only)
    single ...     one 2-D convolution for each frame of the kernel, over only the frames that it applies to
    ... pictures   2-D convolutions
    ... rows       matrix products, for kernels of one pixel
    ... patches    matrix products with patches of the input, for the gradient of a kernel
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MANY = 128  # input channels from which a kernel's gradient is computed from patches
PATCHES = 1 << 20  # numbers in the patches that are copied at a time, so that they stay in the cache
WIDE = 32  # output channels from which a 3-D convolution with a spatial kernel is as fast as any other form
DIRECTIONS = ("output", "input", "weight")  # the output, the gradient of the input, the gradient of the kernel

Places = Sequence[tuple[slice, slice]]  # for each frame of a kernel: its output frames and their input frames
Forms = tuple[str, str, str]  # one for each of the directions


@dataclass(frozen=True, slots=True)
class Kind:
    """A convolution and the size of its input."""

    kernel: tuple[int, ...]  # T, H, W
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    channels: tuple[int, int]  # input, output
    size: tuple[int, ...]  # T, H, W of the input

    @property
    def places(self) -> Places:
        """For each frame of the kernel, the output frames that it contributes to and their input frames.

        >>> Kind(kernel=(3, 1, 1), stride=(1, 1, 1), padding=(1, 0, 0), channels=(4, 4), size=(5, 8, 8)).places
        [(slice(1, 5, 1), slice(0, 4, 1)), (slice(0, 5, 1), slice(0, 5, 1)), (slice(0, 4, 1), slice(1, 5, 1))]
        """
        places, stride, out_frames = [], self.stride[0], self.output_size[0]
        for shift in range(-self.padding[0], self.kernel[0] - self.padding[0]):
            # Output frame i uses input frame stride * i + shift, if it exists.
            first = max(0, -(shift // stride))
            end = max(first, min(out_frames, (self.size[0] - 1 - shift) // stride + 1))
            source = stride * first + shift
            places.append((slice(first, end, 1), slice(source, source + stride * (end - first), stride)))
        return places

    @property
    def pointwise(self) -> bool:
        """Whether the kernel covers one pixel of each frame."""
        return self.kernel[1:] == (1, 1) and self.padding[1:] == (0, 0)

    @property
    def temporal(self) -> bool:
        """Whether the kernel covers several frames of one pixel, at every pixel."""
        return self.pointwise and self.stride[1:] == (1, 1) and self.kernel[0] > 1

    @property
    def output_size(self) -> tuple[int, ...]:
        """T, H, W of the output."""
        sides = zip(self.size, self.kernel, self.stride, self.padding, strict=True)
        return tuple((n + 2 * p - k) // s + 1 for n, k, s, p in sides)

    @property
    def leaves_a_pixel(self) -> bool:
        """Whether the output has one pixel per frame."""
        return self.output_size[1:] == (1, 1)

    def multiply_adds(self) -> int:
        """Multiply-adds per clip in each direction."""
        return torch.Size((*self.kernel, *self.channels, *self.output_size)).numel()


def fixed_forms(kind: Kind, dtype: torch.dtype = torch.float32) -> Forms:
    """Forms that are fast on most machines, chosen by rule instead of by measurement.

    In half precision the rule avoids wrong gradients of some builds of oneDNN: of 3-D convolutions of clips with fewer
    frames than the kernel, and of the kernel where the output has one pixel per frame (uninitialized memory).
    """
    half, frames = dtype.itemsize < 4, "beside"
    if kind.stride[0] == 1 and kind.kernel[0] > 1:
        used = sum(there.stop - there.start for there, _ in kind.places)
        # "apart" discards results beyond the ends of the clip: more than a fifth of them is too many.
        frames = "single" if used < 0.8 * kind.kernel[0] * kind.size[0] else "apart"
    block = kind.kernel[0] > 1 and kind.kernel[1:] != (1, 1)
    if block and kind.channels[1] >= WIDE and not (half and kind.size[0] < kind.kernel[0]):
        return "whole", "whole", f"{frames} patches" if half and kind.leaves_a_pixel else "whole"
    pictures = "rows" if kind.pointwise else "pictures"
    channels = kind.channels[0] * (kind.kernel[0] if frames == "beside" else 1)
    patches = not kind.pointwise and (channels >= MANY or (half and kind.leaves_a_pixel))
    return f"{frames} {pictures}", f"{frames} {pictures}", f"{frames} {'patches' if patches else pictures}"


def candidates(kind: Kind, direction: str, dtype: torch.dtype = torch.float32) -> list[str]:
    """All correct forms of a direction, the one chosen by rule first."""
    frames = ["beside", "single"] if kind.kernel[0] > 1 else ["beside"]
    frames += ["apart"] if kind.kernel[0] > 1 and kind.stride[0] == 1 else []
    pictures = ["rows"] if kind.temporal else ["pictures", "rows"] if kind.pointwise else ["pictures"]
    pictures += ["patches"] if direction == "weight" and not kind.pointwise else []
    fixed = fixed_forms(kind, dtype)[DIRECTIONS.index(direction)]
    strips = ["strips"] if kind.temporal else []
    every = [*strips, *(f"{one} {other}" for one in frames for other in pictures), "whole", "first"]
    if dtype.itemsize < 4 and direction == "weight" and kind.leaves_a_pixel and not kind.pointwise:
        every = [form for form in every if form.endswith("patches")]
    return [fixed, *(form for form in every if form != fixed)]


def output(x: Tensor, weight: Tensor, kind: Kind, form: str) -> Tensor:
    """The convolution of `x` (B, T, H, W, C) with `weight` (O, k, kh, kw, C): (B, T', H', W', O)."""
    frames, _, flat = form.partition(" ")
    if not flat:
        clips, kernel = _channels_first(form, x, weight)
        axes = clips.ndim - 2
        given = clips, kernel, None, kind.stride[:axes], kind.padding[:axes]
        y = F.conv2d(*given) if form == "strips" else F.conv3d(*given)
        return y.movedim(1, -1).contiguous().view(len(x), *kind.output_size, len(weight))
    places, out_frames = kind.places, kind.output_size[0]
    if frames == "beside":
        return _conv2d(_spread(x, places, out_frames).flatten(4), _beside(weight), kind, flat)
    if frames == "single":
        y = x.new_zeros(len(x), *kind.output_size, len(weight))
        for n, there, source in _used(places):
            y[:, there] += _conv2d(x[:, source], weight[:, n], kind, flat)
        return y
    y = _conv2d(x, _apart(weight), kind, flat)
    return _gather(y.view(*y.shape[:4], len(places), -1), _swapped(places), out_frames)


def spread_apart(grad: Tensor, kind: Kind) -> Tensor:
    """The output's gradient for each frame of the kernel, at its input frames: (B, T, H', W', k * O), for "apart"."""
    return _spread(grad, _swapped(kind.places), kind.size[0]).flatten(4)


def input_grad(grad: Tensor, x: Tensor, weight: Tensor, kind: Kind, form: str, apart: Tensor | None = None) -> Tensor:
    """The gradient of `output` by `x`, of which only the size counts: (B, T, H, W, C).

    `apart` is the result of `spread_apart`, if the caller has it.
    """
    frames, _, flat = form.partition(" ")
    if not flat:
        return _conv3d_grad(grad, x, weight, kind, form, of=0).contiguous()
    places, kernel = kind.places, kind.kernel[0]
    if frames == "beside":
        beside = x.new_empty(len(x), kind.output_size[0], *x.shape[2:4], kernel * x.shape[4])  # for its size
        found = _conv2d_input_grad(grad, beside, _beside(weight), kind, flat)
        return _gather(found.view(*found.shape[:4], kernel, x.shape[4]), places, x.shape[1])
    if frames == "single":
        found = torch.zeros_like(x)
        for n, there, source in _used(places):
            found[:, source] += _conv2d_input_grad(grad[:, there], x[:, source], weight[:, n], kind, flat)
        return found
    spread = spread_apart(grad, kind) if apart is None else apart
    return _conv2d_input_grad(spread, x, _apart(weight), kind, flat)


def weight_grad(grad: Tensor, x: Tensor, weight: Tensor, kind: Kind, form: str, apart: Tensor | None = None) -> Tensor:
    """The gradient of `output` by `weight`, of which only the size counts: (O, k, kh, kw, C).

    `apart` is the result of `spread_apart`, if the caller has it.
    """
    frames, _, flat = form.partition(" ")
    if not flat:
        return _conv3d_grad(grad, x, weight, kind, form, of=1)
    places = kind.places
    outs, kernel, high, wide, channels = weight.shape
    if frames == "beside":
        beside = _spread(x, places, kind.output_size[0]).flatten(4)
        found = _conv2d_weight_grad(grad, beside, _beside(weight), kind, flat)
        return found.view(outs, high, wide, kernel, channels).movedim(3, 1)
    if frames == "single":
        found = torch.zeros_like(weight)
        for n, there, source in _used(places):
            found[:, n] = _conv2d_weight_grad(grad[:, there], x[:, source], weight[:, n], kind, flat)
        return found
    spread = spread_apart(grad, kind) if apart is None else apart
    found = _conv2d_weight_grad(spread, x, _apart(weight), kind, flat)
    return found.view(kernel, outs, high, wide, channels).transpose(0, 1)


# 3-D convolutions in either layout, and the gradients of all convolutions.


def _channels_first(form: str, *tensors: Tensor) -> list[Tensor]:
    """(B, T, H, W, C) as (B, C, T, H, W), a view or contiguous ("first"); as images (B, C, T, H * W) for "strips"."""
    moved = [(tensor.flatten(2, 3) if form == "strips" else tensor).movedim(-1, 1) for tensor in tensors]
    return [tensor.contiguous() for tensor in moved] if form == "first" else moved


def _conv3d_grad(grad: Tensor, x: Tensor, weight: Tensor, kind: Kind, form: str, of: int) -> Tensor:
    """The gradient of the input, `of` 0, or of the kernel, `of` 1."""
    tensors = _channels_first(form, grad, x, weight)
    axes = tensors[0].ndim - 2
    found = _conv_grad(of, kind.stride[:axes], kind.padding[:axes], *tensors)
    return found.movedim(1, -1).reshape((x, weight)[of].shape)


def _conv_grad(of: int, stride: Sequence[int], padding: Sequence[int], *tensors: Tensor) -> Tensor:
    """The gradient of the input (`of` 0) or kernel (`of` 1), given the output's gradient, input and kernel."""
    ones, zeros = [1] * len(stride), [0] * len(stride)
    found: Tensor = torch.ops.aten.convolution_backward(
        *tensors, None, stride, padding, ones, False, zeros, 1, (of == 0, of == 1, False)
    )[of]
    return found


# From a kernel of several frames to 2-D kernels, and from clips to their inputs and outputs.


def _beside(weight: Tensor) -> Tensor:
    """(O, k, kh, kw, C) -> (O, kh, kw, k * C), to apply to concatenated frames."""
    return weight.movedim(1, 3).flatten(3)


def _apart(weight: Tensor) -> Tensor:
    """(O, k, kh, kw, C) -> (k * O, kh, kw, C), to apply each frame of the kernel to every frame."""
    return weight.transpose(0, 1).flatten(0, 1)


def _used(places: Places) -> list[tuple[int, slice, slice]]:
    """The kernel's frames that contribute to the output: their numbers, output frames and input frames."""
    return [(n, there, source) for n, (there, source) in enumerate(places) if there.stop > there.start]


def _swapped(places: Places) -> Places:
    return [(source, there) for there, source in places]


def _spread(x: Tensor, places: Places, frames: int) -> Tensor:
    """(B, T, H, W, C) -> (B, frames, H, W, k, C): copy the frames to where `places` says; the others are zero."""
    if len(places) == 1 and places[0] == (slice(0, frames, 1), slice(0, x.shape[1], 1)):
        return x.unsqueeze(4)
    spread = x.new_empty(x.shape[0], frames, *x.shape[2:4], len(places), x.shape[4])
    for index, (there, here) in enumerate(places):
        spread[:, : there.start, :, :, index] = 0
        spread[:, there, :, :, index] = x[:, here]
        spread[:, there.stop :, :, :, index] = 0
    return spread


def _gather(x: Tensor, places: Places, frames: int) -> Tensor:
    """The reverse: (B, T, H, W, k, C) -> (B, frames, H, W, C), the sum of all that belongs to a frame."""
    if len(places) == 1 and places[0] == (slice(0, x.shape[1], 1), slice(0, frames, 1)):
        return x.squeeze(4)
    gathered = x.new_zeros(x.shape[0], frames, *x.shape[2:4], x.shape[5])
    for index, (here, there) in enumerate(places):
        gathered[:, there] += x[:, here, :, :, index]
    return gathered


# 2-D convolutions of every frame: (B, T, H, W, C) with a kernel (O, kh, kw, C) to (B, T, H', W', O).


def _conv2d(x: Tensor, weight: Tensor, kind: Kind, flat: str) -> Tensor:
    _, *stride = kind.stride
    if flat == "rows":
        return F.linear(x[:, :, :: stride[0], :: stride[1]], weight.flatten(1))
    y = F.conv2d(_pictures(x), weight.movedim(3, 1), None, stride, kind.padding[1:])
    y = y.movedim(1, 3).contiguous()  # as oneDNN makes it
    return y.view(*x.shape[:2], *y.shape[1:])


def _conv2d_input_grad(grad: Tensor, x: Tensor, weight: Tensor, kind: Kind, flat: str) -> Tensor:
    _, *stride = kind.stride
    if flat == "rows":
        found = (grad.flatten(0, 3) @ weight.flatten(1)).view(*grad.shape[:4], x.shape[4])
        if stride == [1, 1]:
            return found
        strided = x.new_zeros(x.shape)
        strided[:, :, :: stride[0], :: stride[1]] = found
        return strided
    return _conv2d_grad(grad, x, weight, kind, of=0).movedim(1, 3).contiguous().view(x.shape)


def _conv2d_weight_grad(grad: Tensor, x: Tensor, weight: Tensor, kind: Kind, flat: str) -> Tensor:
    _, *stride = kind.stride
    if flat == "rows":
        grads, rows = grad.flatten(0, 3), x[:, :, :: stride[0], :: stride[1]].flatten(0, 3)  # (M, O), (M, C)
        return (grads.t() @ rows).view(weight.shape)
    if flat == "patches":
        return _patches_grad(grad, x, weight, kind)
    return _conv2d_grad(grad, x, weight, kind, of=1).movedim(1, 3)


def _conv2d_grad(grad: Tensor, x: Tensor, weight: Tensor, kind: Kind, of: int) -> Tensor:
    """The gradient of the input (B * T, C, H, W), `of` 0, or of the kernel (O, C, kh, kw), `of` 1."""
    return _conv_grad(of, kind.stride[1:], kind.padding[1:], _pictures(grad), _pictures(x), weight.movedim(3, 1))


def _patches_grad(grad: Tensor, x: Tensor, weight: Tensor, kind: Kind) -> Tensor:
    """A kernel's gradient as a matrix product of the output's gradient and the patches of the input.

    oneDNN takes up to four times as long with many channels and few pixels.
    """
    (_, down, right), (_, pad_h, pad_w) = kind.stride, kind.padding
    outs, high, wide, channels = weight.shape
    half = weight.dtype.itemsize < 4
    found = torch.zeros(outs, high * wide * channels, dtype=torch.float32 if half else weight.dtype)
    at_once = max(1, PATCHES // (grad.shape[2] * grad.shape[3] * found.shape[1]))
    pictures, grads = x.flatten(0, 1), grad.flatten(0, 1)  # (N, H, W, C), (N, H', W', O)
    for first in range(0, len(pictures), at_once):
        some = slice(first, first + at_once)
        padded = F.pad(pictures[some], (0, 0, pad_w, pad_w, pad_h, pad_h))
        patches = padded.unfold(1, high, down).unfold(2, wide, right)  # (n, H', W', C, kh, kw)
        rows, columns = grads[some].flatten(0, 2).t(), patches.movedim(3, 5).reshape(-1, found.shape[1])
        if half:
            found += rows @ columns  # a sum of many products needs float32
        else:
            found.addmm_(rows, columns)
    return found.to(weight.dtype).view(weight.shape)


def _pictures(x: Tensor) -> Tensor:
    """(B, T, H, W, C) -> (B * T, C, H, W), a view in channels_last."""
    return x.flatten(0, 1).movedim(3, 1)
