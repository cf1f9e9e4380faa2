"""Tiny real videos for tests. Every frame shows its number, in bits that survive lossy compression."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from mgtrain.clips.cut import Cut, VideoInfo
from mgtrain.clips.decode import VideoFile

BITS = 8
SIZE = (128, 64)  # width, height: one block of 16 x 32 pixels per bit


def numbered_picture(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """uint8 (H, W, 3): the number in black and white bars, lowest bit left, above a lower half of grey noise."""
    width, height = size
    column = np.arange(width) * BITS // width
    noise = np.random.default_rng(number).integers(98, 158, (height, width, 1), np.uint8)  # gives frames some bytes
    picture = np.repeat(noise, 3, axis=2)
    picture[: (height + 1) // 2] = np.where(number >> column & 1, 235, 20)[None, :, None]
    return picture


def number_of(picture: np.ndarray) -> int:
    """The number that a whole picture, of whatever size, shows."""
    height, width, _ = picture.shape
    bars = picture[: height // 3, (np.arange(BITS) * 2 + 1) * width // (2 * BITS)].mean(axis=(0, 2))
    return int((bars > 128) @ (1 << np.arange(BITS)))


def write_video(
    path: Path,
    pictures: Sequence[np.ndarray] | int = 30,
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    fps: int = 30,
    gop: int = 12,
    b_frames: int = 2,
    times: Sequence[int] | None = None,
    turn: int = 0,
    mirror: str = "",
    **options: Any,
) -> Path:
    """Write pictures, or that many numbered ones, at `times` (in frames), to be shown `turn` degrees anticlockwise.

    `mirror` is hflip or vflip, which players do after the turn.
    """
    if isinstance(pictures, int):
        pictures = [numbered_picture(number) for number in range(pictures)]
    fixed = {"g": str(gop), "bf": str(b_frames), "threads": "1"}
    header_first = {"movflags": "faststart"} if path.suffix == ".mp4" else {}  # so that a truncated file still opens
    with av.open(str(path), "w", options=header_first) as container:
        stream = container.add_stream(codec, rate=fps, options={**fixed, **options})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if turn or mirror:
            stream.set_display_rotation(turn, **{name: True for name in [mirror] if name})
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture))
            frame.pts, frame.time_base = times[number] if times else number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def decode(path: Path, cut_of: Callable[[VideoInfo], Sequence[Cut]]) -> list[np.ndarray]:
    """The clips that `cut_of` chooses, given the video's `VideoInfo`: each uint8 (T, crop, crop, 3) RGB."""
    with VideoFile(path) as video:
        return video.read(cut_of(video.info))


def write_frames(
    folder: Path, pictures: Sequence[np.ndarray] | int = 30, name: str = "img_{:05}.png", first: int = 1, **options: Any
) -> Path:
    """Write pictures, or that many numbered ones, as the files of a folder of frames."""
    if isinstance(pictures, int):
        pictures = [numbered_picture(number) for number in range(pictures)]
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures, first):
        Image.fromarray(picture).save(folder / name.format(number), **options)
    return folder
