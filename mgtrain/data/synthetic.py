"""A synthetic data set: encoded videos whose classes differ only by motion, written in seconds.

Every video shows soft coloured waves that drift, grow, shrink or turn, depending on the class. Colours, contrast,
directions, sizes and speed have the same distribution in all classes. So a single frame does not show the class, and a
video played backwards is a sample of the opposite class.
"""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import product
from pathlib import Path

import av
import numpy as np

from mgtrain.console import ShowProgress, no_progress
from mgtrain.errors import DataError
from mgtrain.processes.files import write_whole
from mgtrain.rng import Draw, generator

# Motions per frame at full speed: shift right and down (pixels), log of growth, turn (radians clockwise). Each moves
# the borders by about half a pixel per frame, slow enough to be visible in every 8th frame.
MOTIONS: dict[str, tuple[float, float, float, float]] = {
    "left": (-0.6, 0, 0, 0), "right": (0.6, 0, 0, 0),
    "up": (0, -0.6, 0, 0), "down": (0, 0.6, 0, 0),
    "expand": (0, 0, 0.011, 0), "contract": (0, 0, -0.011, 0),
    "clockwise": (0, 0, 0, 0.014), "anticlockwise": (0, 0, 0, -0.014),
    "up_left": (-0.42, -0.42, 0, 0), "up_right": (0.42, -0.42, 0, 0),
    "down_left": (-0.42, 0.42, 0, 0), "down_right": (0.42, 0.42, 0, 0),
}  # fmt: skip
BASIC_MOTIONS = tuple(MOTIONS)[:8]
# These return about half-way through: the order of the two halves is the class.
RETURNING = {"left_right": "left", "right_left": "right", "up_down": "up", "down_up": "down",
             "clockwise_back": "clockwise", "anticlockwise_back": "anticlockwise"}  # fmt: skip
MOTIONS |= {name: MOTIONS[start] for name, start in RETURNING.items()}
ALL_MOTIONS = tuple(MOTIONS)

WAVES = 24  # per video
WAVELENGTHS = (14.0, 40.0)  # pixels; the smallest, after contraction, is still twice the shift in 8 frames


@dataclass(frozen=True, slots=True)
class Difficulty:
    """Disturbances that make the motion harder to see, the same in all classes. The default is none."""

    distractors: int = 0  # discs that cross the picture in straight lines
    noise: float = 0.0  # standard deviation of each pixel in each frame, of 255
    camera: float = 0.0  # standard deviation, in pixels, of the camera's smooth random path
    pace: float = 0.0  # 0..1: the speed varies within a video between 1 - pace and 1 + pace times its mean


PLAIN = Difficulty()


def synthesize(
    root: Path,
    *,
    videos_per_class: Mapping[str, int],
    classes: Sequence[str] = BASIC_MOTIONS,
    seed: int = 0,
    frames: int = 48,
    size: tuple[int, int] = (112, 84),
    difficulty: Difficulty = PLAIN,
    progress: ShowProgress = no_progress,
) -> None:
    """Write `root/videos/<split>/<class>_<n>.mp4`, a list `root/<split>.csv` per split, and `root/classes.txt`.

    `videos_per_class` is by split. Videos have `frames` frames of `size` (width, height) pixels at 30 frames/s, a key
    frame every 12 frames and no B-frames, so they are fast to decode. A complete set with the same settings is kept;
    `DataError` if the folder contains a set with other settings.
    """
    counts = dict(videos_per_class)
    settings = {"videos_per_class": counts, "classes": [*classes], "seed": seed, "frames": frames, "size": [*size]}
    settings |= {} if difficulty == PLAIN else {"difficulty": asdict(difficulty)}
    record = root / "synthetic.json"  # written last, so it shows that the set is complete
    if record.exists():
        with suppress(ValueError, RecursionError):
            if json.loads(record.read_text()) == settings:
                return
        raise DataError(f"{root}: contains another synthetic set; remove it or choose another folder")

    lists = {
        root / f"{split}.csv": "".join(
            f"{_place(split, name, n)} {label}\n" for label, name in enumerate(classes) for n in range(count)
        )
        for split, count in counts.items()
    }
    lists[root / "classes.txt"] = "".join(f"{name}\n" for name in classes)
    for path, text in lists.items():
        if path.exists() and not (path.is_file() and path.read_bytes() == text.encode()):
            raise DataError(f"{path}: exists with other contents, so this is another set; choose another folder")
    done, total = 0, sum(counts.values()) * len(classes)
    for s, (split, count) in enumerate(counts.items()):
        (root / "videos" / split).mkdir(parents=True, exist_ok=True)
        for name, n in product(classes, range(count)):
            rng = generator(seed, Draw.SYNTHETIC, s, ALL_MOTIONS.index(name), n)
            path = root / _place(split, name, n)
            _write(path, draw_motion(name, rng, frames=frames, size=size, difficulty=difficulty))
            done += 1
            progress("videos written", done, total)
    for path, text in lists.items():
        write_whole(path, text.encode())
    write_whole(record, f"{json.dumps(settings, indent=1)}\n".encode())


def _place(split: str, name: str, n: int) -> str:
    return f"videos/{split}/{name}_{n}.mp4"


def draw_motion(
    motion: str, rng: np.random.Generator, *, frames: int, size: tuple[int, int], difficulty: Difficulty = PLAIN
) -> np.ndarray:
    """Draw a video, uint8 (T, H, W, 3), of a moving field of plane waves, which move without resampling.

    Random numbers do not depend on the motion, so with the same `rng` the opposite motion is the same video backwards,
    unless `difficulty` disturbs it.
    """
    right, down, growth, turn = (rng.uniform(0.5, 1) * velocity for velocity in MOTIONS[motion])
    width, height = size
    # 1. Waves: all directions and phases are equally likely, so a single frame shows no shift or turn.
    direction, phase = rng.uniform(0, 2 * np.pi, (2, WAVES))
    number = 2 * np.pi / rng.uniform(*WAVELENGTHS, WAVES)  # radians per pixel
    colour = rng.normal(0, rng.uniform(30, 50), (WAVES, 3)) * math.sqrt(2 / WAVES)  # amplitude in each channel
    mean = rng.uniform(96, 160, 3)
    # 2. Size: a class that does not grow has the size of some moment of a video that does.
    time = np.arange(frames) - (frames - 1) / 2
    moment = MOTIONS["expand"][2] * rng.uniform(0.5, 1) * rng.choice(time)
    zoom = rng.uniform(-0.1, 0.1)
    progress = _progress(time, motion in RETURNING, rng, difficulty)  # frames at the mean speed: (T,)
    log_size = zoom + (growth * progress if growth else np.full(frames, moment))
    # 3. Wave vectors and phases of every frame, about the centre of the picture.
    camera = difficulty.camera * _smooth_path(frames, rng) if difficulty.camera else np.zeros((2, frames))
    angle = direction + turn * progress[:, None]  # (T, K)
    k = number * np.exp(-log_size[:, None])  # (T, K)
    kx, ky = k * np.cos(angle), k * np.sin(angle)
    shift = phase - kx * (right * progress + camera[0])[:, None] - ky * (down * progress + camera[1])[:, None]
    x, y = np.arange(width) - (width - 1) / 2, np.arange(height) - (height - 1) / 2
    # 4. cos(kx x + ky y + shift) is a product of x and y parts, so their sum over waves is a matrix product.
    across = np.exp(1j * kx[:, :, None] * x)  # (T, K, W)
    along = np.exp(1j * (ky[:, :, None] * y + shift[:, :, None]))  # (T, K, H)
    real = np.concatenate([across.real, -across.imag], axis=1).astype(np.float32)  # (T, 2K, W)
    parts = np.concatenate([along.real, along.imag], axis=1).astype(np.float32)  # (T, 2K, H)
    weighted = parts[:, None] * np.tile(colour, (2, 1)).T[None, :, :, None].astype(np.float32)  # (T, 3, 2K, H)
    picture = weighted.transpose(0, 1, 3, 2) @ real[:, None]  # (T, 3, H, W)
    picture += mean[:, None, None].astype(np.float32)
    # 5. Disturbances: discs, and noise in every frame.
    for _ in range(difficulty.distractors):
        _cross(picture, time, x, y, rng)
    if difficulty.noise:
        picture += rng.normal(0, difficulty.noise, picture.shape).astype(np.float32)
    pixels: np.ndarray = picture.clip(0, 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
    return pixels


def _progress(time: np.ndarray, returns: bool, rng: np.random.Generator, difficulty: Difficulty) -> np.ndarray:
    """The position of the motion in each frame, in frames at its mean speed: (T,)."""
    progress = time.astype(float)
    if difficulty.pace:  # the speed is a wave of one to two periods, with a mean of 1 over a period
        length = len(time) / rng.uniform(1, 2)
        at = rng.uniform(0, 2 * np.pi)
        progress = time + difficulty.pace * length / (2 * np.pi) * np.sin(2 * np.pi * time / length + at)
    if returns:
        progress = -np.abs(progress - len(time) * rng.uniform(-0.1, 0.1))
    return progress


def _smooth_path(frames: int, rng: np.random.Generator) -> np.ndarray:
    """Random x and y that change within about 8 frames, with a standard deviation of 1: (2, T)."""
    steps = rng.normal(0, 1, (2, frames + 16))
    window = np.hanning(17)
    return np.stack([np.convolve(row, window / np.linalg.norm(window), "valid") for row in steps])


def _cross(picture: np.ndarray, time: np.ndarray, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> None:
    """Draw a soft disc that crosses the picture, float32 (T, 3, H, W), in a straight line."""
    colour = rng.uniform(60, 200, 3)
    radius, speed, direction = rng.uniform(5, 12), rng.uniform(0.3, 1.2), rng.uniform(0, 2 * np.pi)
    middle_x, middle_y = rng.uniform(x[0], x[-1]), rng.uniform(y[0], y[-1])
    from_x = x - middle_x - (speed * math.cos(direction) * time)[:, None]  # (T, W)
    from_y = y - middle_y - (speed * math.sin(direction) * time)[:, None]  # (T, H)
    distance = np.hypot(from_y[:, :, None], from_x[:, None, :])  # (T, H, W)
    cover = np.clip(radius + 0.5 - distance, 0, 1)[:, None].astype(np.float32)
    picture += cover * (colour[:, None, None].astype(np.float32) - picture)


def _write(path: Path, pictures: np.ndarray) -> None:
    """Write uint8 (T, H, W, 3) as an mp4: H.264 if PyAV has an encoder for it, else MPEG-4."""
    # x264's macroblock tree is off, because with small pictures its output differs between processes.
    h264 = "libx264" in av.codecs_available
    options = {"preset": "veryfast", "tune": "fastdecode", "crf": "18", "mbtree": "0"} if h264 else {"qscale": "2"}
    with av.open(str(path), "w") as container:
        options |= {"g": "12", "bf": "0", "threads": "1"}
        stream = container.add_stream("libx264" if h264 else "mpeg4", rate=30, options=options)
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for n, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture))
            frame.pts, frame.time_base = n, Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
