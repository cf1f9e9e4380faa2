from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mgtrain.clips.cut import Cut
from mgtrain.clips.decode import VideoFile
from mgtrain.data import open_videos
from mgtrain.data.synthetic import ALL_MOTIONS, draw_motion, synthesize
from mgtrain.errors import DataError
from mgtrain.rng import Draw, generator

OPPOSITES = [("left", "right"), ("up", "down"), ("expand", "contract"), ("clockwise", "anticlockwise")]
SIZE = (56, 42)


def draw(motion: str, n: int, frames: int = 9) -> np.ndarray:
    return draw_motion(motion, generator(0, Draw.SYNTHETIC, n), frames=frames, size=SIZE)


@pytest.mark.parametrize(("motion", "opposite"), OPPOSITES)
def test_a_video_backwards_is_a_draw_of_the_opposite_motion(motion: str, opposite: str):
    for n in range(3):
        forwards, backwards = draw(motion, n).astype(int), draw(opposite, n)[::-1].astype(int)
        assert np.abs(forwards - backwards).max() <= 1  # rounding
        assert np.abs(forwards - backwards[::-1]).max() > 20


def test_single_frames_look_alike_in_all_classes():
    # Mean, contrast, and sharpness across and down, of random frames of 150 videos of each class.
    moment = np.random.default_rng(0)
    looks = []
    for m, motion in enumerate(ALL_MOTIONS):
        frames = [draw(motion, 1000 * m + n)[moment.integers(9)].astype(float) for n in range(150)]
        looks.append([(f.mean(), f.std(), np.diff(f, axis=0).std(), np.diff(f, axis=1).std()) for f in frames])
    by_class = np.array(looks)  # (8, 150, 4)
    error = by_class.std(axis=1) / 150**0.5
    deviation = (by_class.mean(axis=1) - by_class.mean(axis=(0, 1))) / error
    assert np.abs(deviation).max() < 3.5


def measured_motion(video: np.ndarray) -> np.ndarray:
    """Shift right, shift down, growth and clockwise turn per frame: least squares of brightness constancy."""
    grey = video.mean(axis=3)  # (T, H, W)
    middle = (grey[1:] + grey[:-1]) / 2
    change, down, right = grey[1:] - grey[:-1], np.gradient(middle, axis=1), np.gradient(middle, axis=2)
    y, x = np.mgrid[: grey.shape[1], : grey.shape[2]]
    y, x = y - y.mean(), x - x.mean()
    system = np.stack([right, down, x * right + y * down, x * down - y * right], axis=-1).reshape(-1, 4)
    return np.linalg.lstsq(-system, change.ravel(), rcond=None)[0]


def test_motion_tells_all_classes_apart():
    for m, motion in enumerate(ALL_MOTIONS):
        for n in range(5):
            speeds = measured_motion(draw(motion, n)) / (0.6, 0.6, 0.011, 0.014)
            signed = np.stack([-speeds, speeds], axis=1)  # (left, right), (up, down), ...
            signed[2:] = signed[2:, ::-1]  # ..., (expand, contract), (clockwise, anticlockwise)
            assert signed.ravel().argmax() == m
            assert 0.4 < signed.max() < 1.1


@pytest.fixture
def made(tmp_path: Path) -> Path:
    synthesize(tmp_path, videos_per_class={"train": 2, "val": 1}, classes=("left", "expand"), frames=12, size=SIZE)
    return tmp_path


def test_a_set_is_a_list_of_real_videos(made: Path):
    train, val = (open_videos("list", str(made), f"{split}.csv") for split in ("train", "val"))
    assert train.classes == val.classes == ("left", "expand")
    assert [train.label(i) for i in range(len(train))] == [0, 0, 1, 1]
    assert [val.path(i) for i in range(2)] == [f"{made}/videos/val/{name}_0.mp4" for name in ("left", "expand")]
    with VideoFile(train.path(1)) as video:
        assert (video.info.frames, video.info.fps, video.info.width, video.info.height) == (12, 30.0, *SIZE)
        clip = video.read([Cut((0, 11), (0, 0, 42, 42), 42, False)])[0]
    rng = generator(0, Draw.SYNTHETIC, 0, ALL_MOTIONS.index("left"), 1)
    drawn = draw_motion("left", rng, frames=12, size=SIZE)[[0, 11], :, :42]
    assert np.abs(clip.astype(int) - drawn).mean() < 8  # lossy
    assert b"mbtree=0" in Path(train.path(1)).read_bytes()  # with it, some processes write other pixels than others


def test_a_complete_set_is_kept_and_another_one_refused(made: Path):
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    same = {"videos_per_class": {"train": 2, "val": 1}, "classes": ("left", "expand"), "frames": 12, "size": SIZE}
    synthesize(made, **same)
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before
    with pytest.raises(DataError, match="holds another synthetic set; remove it or choose another folder"):
        synthesize(made, **same, seed=1)


def test_an_interrupted_set_is_finished(made: Path):
    (made / "synthetic.json").unlink()
    (made / "videos/val/left_0.mp4").write_bytes(b"half")
    told: list[tuple[int, int]] = []
    synthesize(
        made,
        videos_per_class={"train": 2, "val": 1},
        classes=("left", "expand"),
        frames=12,
        size=SIZE,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(n, 6) for n in range(1, 7)]
    assert (made / "videos/val/left_0.mp4").stat().st_size > 500
    assert json.loads((made / "synthetic.json").read_text())["seed"] == 0


def test_an_unknown_motion_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="no motion 'sideways'; choose among left, right"):
        synthesize(tmp_path, classes=("sideways",))
