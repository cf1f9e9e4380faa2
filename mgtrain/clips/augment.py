"""Change pixels after clips are cut: RandAugment, normalizing, colour, erasing, the same in all frames of a clip.

RandAugment runs in the loader's workers: its operations differ from clip to clip, which on a GPU would take thousands
of small kernels per step. Colour and erasing are the same arithmetic for all clips, so they run on the device. Their
random numbers, and those of MixUp (see `engine.mix`), are drawn for a step's global batch, sliced, and copied to the
device together. scripts/bench_augment.py measures all of this.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, RandAugment

from mgtrain.recipe import Augment
from mgtrain.recipe.model import MEAN, STD
from mgtrain.rng import Draw, seed_of

FRAMES = 4  # to apply RandAugment to at a time: 1.5 times as fast as 32, which do not fit into the processor's cache
BLACK, WHITE = -MEAN / STD, (1 - MEAN) / STD  # of normalized pixels
GREY = np.array([0.299, 0.587, 0.114])  # of red, green and blue
YUV = np.array([GREY, [-0.147, -0.289, 0.436], [0.615, -0.515, -0.1]])
ERASED_AREA = (0.02, 0.33)  # of the frame (Zhong et al. 2020)
ERASED_RATIO = (0.3, 1 / 0.3)  # height to width


def rand_augment(clip: np.ndarray, augment: Augment, seed: int, position: int) -> np.ndarray:
    """Apply RandAugment (Cubuk et al. 2020) to the clip at a position of the run: uint8 (T, S, S, 3) to the same.

    All frames get the same operations; only Contrast, AutoContrast and Equalize depend on each frame's values.
    """
    if not augment.rand_augment:
        return clip
    change = RandAugment(
        augment.rand_augment, augment.magnitude, interpolation=InterpolationMode.BILINEAR, fill=round(255 * MEAN)
    )
    changed = []
    for frames in torch.split(torch.from_numpy(clip).permute(0, 3, 1, 2), FRAMES):  # (FRAMES, 3, S, S)
        with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's global generator only
            torch.default_generator.manual_seed(seed_of(seed, Draw.RAND_AUGMENT, position))  # the same operations
            changed.append(change(frames))
    pixels: np.ndarray = torch.cat(changed).permute(0, 2, 3, 1).numpy()
    return pixels


def normalize(clips: Tensor, memory_format: torch.memory_format) -> Tensor:
    """Normalize pixels 0..255 by `MEAN` and `STD`: uint8 (B, 3, T, S, S) -> float32 (B, 3, T, S, S)."""
    return clips.to(torch.float32, memory_format=memory_format).mul_(1 / (255 * STD)).sub_(MEAN / STD)


def restandardize(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Change the normalization of clips (B, 3, T, S, S), in place, to a mean and deviation for each channel."""
    for channel, (m, s) in enumerate(zip(mean, std, strict=True)):
        if (m, s) != (MEAN, STD):
            x[:, channel].mul_(STD / s).add_((MEAN - m) / s)  # Python numbers are not copied to the device
    return x


def sent(rows: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Copy rows (B, n) of numbers to the device as float32, all at once and without waiting."""
    if not rows:
        return {}
    together = torch.from_numpy(np.concatenate(list(rows.values()), axis=1, dtype=np.float32))
    if device.type == "cuda":
        together = together.pin_memory()  # a copy from other memory would wait for all work queued on the GPU
    there = torch.split(together.to(device, non_blocking=True), [array.shape[1] for array in rows.values()], dim=1)
    return dict(zip(rows, there, strict=True))


def colour_rows(draws: np.ndarray, augment: Augment) -> np.ndarray:
    """The parameters of `jitter_colour` for each clip, (B, 14), from uniform `draws` (B, 4) in [0, 1).

    They choose brightness, contrast, saturation and hue, which in this order are one affine map of a pixel's channels:
    hue rotates at constant luma (as in YUV), and contrast is relative to the mean grey of the whole clip. torchvision's
    ColorJitter rotates hue in HSV, which takes several times as long.
    """
    strengths = (augment.brightness, augment.contrast, augment.saturation, augment.hue)
    brightness, contrast, saturation, turns = ((2 * draws - 1) * strengths + (1, 1, 1, 0)).T  # (B) each
    factor = saturation[:, None, None]
    saturate = factor * np.eye(3) + (1 - factor) * np.ones((3, 1)) * GREY  # (B, 3, 3) on RGB: the distance from grey
    scale = (brightness * contrast)[:, None, None] * _hue(turns) @ saturate  # (B, 3, 3)
    # Hue and saturation do not change greys, so the offset is the same for all channels.
    offset, of_grey = (brightness - 1) * -BLACK, (1 - contrast) * brightness  # (B)
    grey = np.broadcast_to(GREY, (len(draws), 3))
    return np.concatenate([scale.reshape(-1, 9), offset[:, None], of_grey[:, None], grey], axis=1)


def jitter_colour(x: Tensor, rows: Tensor) -> Tensor:
    """Change the colours of normalized clips (B, 3, T, S, S) to the same; `rows` are those of `colour_rows`."""
    matrix = rows[:, :9].contiguous().view(-1, 3, 3)
    grey = x.mean((2, 3, 4)) @ rows[0, 11:]  # (B)
    offset = rows[:, 9] + rows[:, 10] * grey
    pixels = x.movedim(1, -1).flatten(1, 3)  # (B, T * S * S, 3)
    pixels = torch.baddbmm(offset[:, None, None], pixels, matrix.mT).clamp_(BLACK, WHITE)
    return pixels.view(len(x), *x.shape[2:], 3).movedim(-1, 1)


def _hue(turns: np.ndarray) -> np.ndarray:
    """Matrices on RGB (B, 3, 3) that rotate the chroma by a number of turns (B)."""
    cos, sin = np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)
    turn = np.zeros((len(turns), 3, 3))
    turn[:, 0, 0] = 1
    turn[:, 1, 1], turn[:, 1, 2], turn[:, 2, 1], turn[:, 2, 2] = cos, -sin, sin, cos
    maps: np.ndarray = np.linalg.inv(YUV) @ turn @ YUV
    return maps


def erase_rows(draws: np.ndarray, probability: float, size: int) -> np.ndarray:
    """The box that `erase` makes grey in each clip, (B, 4) as in `box_rows`, from uniform `draws` (B, 5) in [0, 1).

    The draws choose whether to erase, area, ratio of height to width, and place (Zhong et al. 2020).
    """
    erased = draws[:, 0] < probability
    area = ERASED_AREA[0] + draws[:, 1] * (ERASED_AREA[1] - ERASED_AREA[0])
    ratio = ERASED_RATIO[0] * (ERASED_RATIO[1] / ERASED_RATIO[0]) ** draws[:, 2]
    extent = np.minimum(1, np.sqrt([area * ratio, area / ratio])).T * erased[:, None]  # (B, 2): height, width
    first = draws[:, 3:] * (1 - extent)
    return box_rows(first, first + extent, size)


def erase(x: Tensor, rows: Tensor) -> Tensor:
    """Make each clip's box of `erase_rows` grey in all frames: normalized (B, 3, T, S, S), changed in place."""
    return x.masked_fill_(inside(rows, x.shape[-1]), 0)


def box_rows(first: np.ndarray, last: np.ndarray, size: int) -> np.ndarray:
    """Boxes in pixels (B, 4), from fractions of the frame: `first` (top, left) and `last` (bottom, right), (B, 2)."""
    return np.round(size * np.concatenate([first, last], axis=1))


def inside(rows: Tensor, size: int) -> Tensor:
    """Whether each pixel is inside the boxes of `box_rows`, which are clipped to the frame: (B, 1, 1, size, size)."""
    pixel = torch.arange(size, device=rows.device)
    low, high = rows[:, :2, None], rows[:, 2:4, None]
    across = (low <= pixel) & (pixel < high)  # (B, 2, size)
    return across[:, 0, None, None, :, None] & across[:, 1, None, None, None, :]
