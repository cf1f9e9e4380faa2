"""A data set to try things with: real videos, made in seconds, whose classes differ in nothing but motion.

Every video shows soft coloured waves. In one class they drift to the left, in another to the right, they grow, or turn;
colours, contrast, directions, sizes and speed are drawn alike for all classes. So a single frame says nothing about the
class, and reversing a video in time turns it into a draw of the opposite class.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from mgtrain.errors import DataError
from mgtrain.rng import Draw, generator

# What a motion does to the picture per frame at full speed: shift right and down (pixels), log of growth, turn (radians
# clockwise). Each moves the borders by about half a pixel per frame, little enough that every 8th frame still shows it.
MOTIONS: dict[str, tuple[float, float, float, float]] = {
    "left": (-0.6, 0, 0, 0),
    "right": (0.6, 0, 0, 0),
    "up": (0, -0.6, 0, 0),
    "down": (0, 0.6, 0, 0),
    "expand": (0, 0, 0.011, 0),
    "contract": (0, 0, -0.011, 0),
    "clockwise": (0, 0, 0, 0.014),
    "anticlockwise": (0, 0, 0, -0.014),
}
ALL_MOTIONS = tuple(MOTIONS)

WAVES = 24  # per video
WAVELENGTHS = (14.0, 40.0)  # pixels; the least that growth makes of them is still twice the shift in 8 frames


def synthesize(
    root: Path,
    *,
    videos_per_class: Mapping[str, int] | None = None,
    classes: Sequence[str] = ALL_MOTIONS,
    seed: int = 0,
    frames: int = 48,
    size: tuple[int, int] = (112, 84),
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write `root/videos/<split>/<class>_<n>.mp4`, a list `root/<split>.csv` per split, and `root/classes.txt`.

    `videos_per_class` is by split, 60 train and 20 val unless told; videos have `frames` frames of `size` (width,
    height) pixels at 30 frames/s, a key frame every 12 frames and no B-frames, so they are quick to decode. `progress`
    is called with the videos done and their total. A set that is complete and the same is kept.
    """
    counts = dict(videos_per_class or {"train": 60, "val": 20})
    for name in classes:
        if name not in MOTIONS:
            raise DataError(f"no motion {name!r}; choose among {', '.join(ALL_MOTIONS)}")
    made = {"videos_per_class": counts, "classes": [*classes], "seed": seed, "frames": frames, "size": [*size]}
    record = root / "synthetic.json"  # written last: it says that the set is complete
    if record.exists():
        with suppress(ValueError, RecursionError):
            if json.loads(record.read_text()) == made:
                return
        raise DataError(f"{root}: holds another synthetic set; remove it or choose another folder")

    done, total = 0, sum(counts.values()) * len(classes)
    for s, (split, count) in enumerate(counts.items()):
        folder = root / "videos" / split
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for label, name in enumerate(classes):
            for n in range(count):
                rng = generator(seed, Draw.SYNTHETIC, s, ALL_MOTIONS.index(name), n)
                path = folder / f"{name}_{n}.mp4"
                _write(path, draw_motion(name, rng, frames=frames, size=size))
                lines.append(f"{path.relative_to(root).as_posix()} {label}\n")
                done += 1
                if progress:
                    progress(done, total)
        (root / f"{split}.csv").write_text("".join(lines))
    (root / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    record.write_text(json.dumps(made, indent=1) + "\n")


def draw_motion(motion: str, rng: np.random.Generator, *, frames: int, size: tuple[int, int]) -> np.ndarray:
    """One video, uint8 (T, H, W, 3), of a field of plane waves that moves.

    Moving plane waves needs no resampling: turning, growing and shifting the plane turns, shrinks and shifts the wave
    vectors and phases. Whatever is drawn does not depend on the motion, so with the same `rng` the opposite motion is
    the same video backwards.
    """
    right, down, growth, turn = (rng.uniform(0.5, 1) * velocity for velocity in MOTIONS[motion])
    width, height = size
    # 1. Waves: every direction and phase alike, so that no shift or turn can be told from a single frame.
    direction, phase = rng.uniform(0, 2 * np.pi, (2, WAVES))
    number = 2 * np.pi / rng.uniform(*WAVELENGTHS, WAVES)  # radians per pixel
    colour = rng.normal(0, rng.uniform(30, 50), (WAVES, 3)) * math.sqrt(2 / WAVES)  # amplitude in each channel
    mean = rng.uniform(96, 160, 3)
    # 2. Size: the classes that do not grow have that of some moment of a video that does.
    time = np.arange(frames) - (frames - 1) / 2
    moment = MOTIONS["expand"][2] * rng.uniform(0.5, 1) * rng.choice(time)
    log_size = rng.uniform(-0.1, 0.1) + (growth * time if growth else np.full(frames, moment))
    # 3. Wave vectors and phases of every frame, about the centre of the picture.
    angle = direction + turn * time[:, None]  # (T, K)
    k = number * np.exp(-log_size[:, None])  # (T, K)
    kx, ky = k * np.cos(angle), k * np.sin(angle)
    shift = phase - time[:, None] * (kx * right + ky * down)
    x, y = np.arange(width) - (width - 1) / 2, np.arange(height) - (height - 1) / 2
    # 4. cos(kx x + ky y + shift) is a product of x and y parts, so their sum over waves is a matrix product.
    across = np.exp(1j * kx[:, :, None] * x)  # (T, K, W)
    along = np.exp(1j * (ky[:, :, None] * y + shift[:, :, None]))  # (T, K, H)
    real = np.concatenate([across.real, -across.imag], axis=1).astype(np.float32)  # (T, 2K, W)
    parts = np.concatenate([along.real, along.imag], axis=1).astype(np.float32)  # (T, 2K, H)
    weighted = parts[:, None] * np.tile(colour, (2, 1)).T[None, :, :, None].astype(np.float32)  # (T, 3, 2K, H)
    picture = weighted.transpose(0, 1, 3, 2) @ real[:, None]  # (T, 3, H, W)
    picture += mean[:, None, None].astype(np.float32)
    pixels: np.ndarray = picture.clip(0, 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
    return pixels


def _write(path: Path, pictures: np.ndarray) -> None:
    """Write uint8 (T, H, W, 3) as an mp4: H.264 where PyAV has an encoder for it, else MPEG-4.

    x264's macroblock tree stays off: on pictures this small its output is not the same in every process.
    """
    h264 = "libx264" in av.codecs_available
    options = {"preset": "veryfast", "tune": "fastdecode", "crf": "18", "mbtree": "0"} if h264 else {"qscale": "2"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264" if h264 else "mpeg4", rate=30, options={**options, "g": "12", "bf": "0", "threads": "1"}
        )
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for n, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture))
            frame.pts, frame.time_base = n, Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
