"""Changes to training clips after they are cut: RandAugment, colour, erasing. All frames of a clip change alike.

RandAugment works on pixels in the loader's workers, keyed by the clip's position: its operations differ from clip to
clip, which on a GPU would be thousands of small kernels in a step. Colour and erasing are the same arithmetic for all
clips, so they work on the whole batch on the device, where the loader's cores, the bottleneck of coarse phases, are not
needed; their draws, and MixUp's (see `engine.mix`), are made for a step's global batch and sliced. Measured with
scripts/bench_augment.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, RandAugment

from mgtrain.clips.pixels import BLACK, WHITE
from mgtrain.recipe import Augment
from mgtrain.recipe.model import MEAN
from mgtrain.rng import Draw, seed_of

FRAMES = 4  # that RandAugment works on at a time: 1.5 times as fast as 32, which leave the processor's cache
GREY = np.array([0.299, 0.587, 0.114])  # of red, green and blue
YUV = np.array([GREY, [-0.147, -0.289, 0.436], [0.615, -0.515, -0.1]])
ERASED_AREA = (0.02, 0.33)  # of the frame (Zhong et al. 2020)
ERASED_RATIO = (0.3, 1 / 0.3)  # height to width


def rand_augment(clip: np.ndarray, augment: Augment, seed: int, position: int) -> np.ndarray:
    """RandAugment (Cubuk et al. 2020) of the clip at a position of the run: uint8 (T, S, S, 3) to the same.

    What an operation leaves empty is grey. Contrast, AutoContrast and Equalize alone go by each frame's own values.
    """
    if not augment.rand_augment:
        return clip
    change = RandAugment(
        augment.rand_augment, augment.magnitude, interpolation=InterpolationMode.BILINEAR, fill=round(255 * MEAN)
    )
    changed = []
    for frames in torch.split(torch.from_numpy(clip).permute(0, 3, 1, 2), FRAMES):  # (FRAMES, 3, S, S)
        with _seeded(seed_of(seed, Draw.RAND_AUGMENT, position)):  # all with the same operations
            changed.append(change(frames))
    pixels: np.ndarray = torch.cat(changed).permute(0, 2, 3, 1).numpy()
    return pixels


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's own CPU generator, the only one that torchvision draws from, with this seed for a while."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def jitter_colour(x: Tensor, draws: np.ndarray, augment: Augment) -> Tensor:
    """Change brightness, contrast, saturation and hue of each clip: normalized (B, 3, T, S, S) to the same.

    `draws` (B, 4), in 0..1, are where in their ranges they lie. The four, in this order, are one affine map of a
    pixel's channels, so hue turns at constant luma (as in YUV), and contrast is about the mean grey of the whole clip.
    torchvision's ColorJitter turns hue in HSV, which takes several times as long.
    """
    strengths = (augment.brightness, augment.contrast, augment.saturation, augment.hue)
    brightness, contrast, saturation, turns = ((2 * draws - 1) * strengths + (1, 1, 1, 0)).T  # (B) each
    scale = (brightness * contrast)[:, None, None] * _hue(turns) @ _saturation(saturation)  # (B, 3, 3)
    matrix = torch.from_numpy(scale).to(x.device, x.dtype)
    # Neither hue nor saturation changes a grey, so the offset is the same for all channels.
    offset = torch.from_numpy((brightness - 1) * -BLACK).to(x.device, x.dtype)  # (B)
    grey = x.mean((2, 3, 4)) @ torch.from_numpy(GREY).to(x.device, x.dtype)  # (B)
    offset += torch.from_numpy((1 - contrast) * brightness).to(x.device, x.dtype) * grey
    pixels = x.movedim(1, -1).flatten(1, 3)  # (B, T * S * S, 3)
    pixels = torch.baddbmm(offset[:, None, None], pixels, matrix.mT).clamp_(BLACK, WHITE)
    return pixels.view(len(x), *x.shape[2:], 3).movedim(-1, 1)


def _hue(turns: np.ndarray) -> np.ndarray:
    """Maps of RGB (B, 3, 3) that turn the chroma by so many turns (B)."""
    cos, sin = np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)
    turn = np.zeros((len(turns), 3, 3))
    turn[:, 0, 0] = 1
    turn[:, 1, 1], turn[:, 1, 2], turn[:, 2, 1], turn[:, 2, 2] = cos, -sin, sin, cos
    maps: np.ndarray = np.linalg.inv(YUV) @ turn @ YUV
    return maps


def _saturation(factor: np.ndarray) -> np.ndarray:
    """Maps of RGB (B, 3, 3) that move colours away from their grey by a factor (B)."""
    f = factor[:, None, None]
    maps: np.ndarray = f * np.eye(3) + (1 - f) * np.ones((3, 1)) * GREY
    return maps


def erase(x: Tensor, draws: np.ndarray, probability: float) -> Tensor:
    """Make a box of some clips grey, the same box in all frames: normalized (B, 3, T, S, S), changed in place.

    `draws` (B, 5), in 0..1: whether, area, ratio of height to width, place (Zhong et al. 2020).
    """
    erased = draws[:, 0] < probability
    area = ERASED_AREA[0] + draws[:, 1] * (ERASED_AREA[1] - ERASED_AREA[0])
    ratio = ERASED_RATIO[0] * (ERASED_RATIO[1] / ERASED_RATIO[0]) ** draws[:, 2]
    size = np.minimum(1, np.sqrt([area * ratio, area / ratio])).T * erased[:, None]  # (B, 2): height, width
    first = draws[:, 3:] * (1 - size)
    return x.masked_fill_(inside(first, first + size, x.shape[-1]).to(x.device), 0)


def inside(first: np.ndarray, last: np.ndarray, size: int) -> Tensor:
    """Which pixels lie in a box: True in (B, 1, 1, size, size).

    The boxes' corners (B, 2), top and left, bottom and right, are fractions of the frame; what is outside is cut off.
    """
    pixel = np.arange(size)
    low, high = (np.round(size * corner)[:, :, None] for corner in (first, last))
    rows, columns = ((low <= pixel) & (pixel < high)).transpose(1, 0, 2)  # (B, size) each
    return torch.from_numpy(rows[:, None, None, :, None] & columns[:, None, None, None, :])
