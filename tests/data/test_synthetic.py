from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mgtrain.clips.cut import Cut
from mgtrain.clips.decode import VideoFile
from mgtrain.data import open_videos
from mgtrain.data.synthetic import ALL_MOTIONS, BASIC_MOTIONS, PLAIN, RETURNING, Difficulty, draw_motion, synthesize
from mgtrain.errors import DataError
from mgtrain.rng import Draw, generator

OPPOSITES = [("left", "right"), ("up", "down"), ("expand", "contract"), ("clockwise", "anticlockwise")]
SIZE = (56, 42)


HARD = Difficulty(distractors=2, noise=8, camera=1.5, pace=0.5)


def draw(motion: str, n: int, frames: int = 9, difficulty: Difficulty = PLAIN) -> np.ndarray:
    return draw_motion(motion, generator(0, Draw.SYNTHETIC, n), frames=frames, size=SIZE, difficulty=difficulty)


@pytest.mark.parametrize(("motion", "opposite"), OPPOSITES)
def test_a_video_backwards_is_a_draw_of_the_opposite_motion(motion: str, opposite: str):
    for n in range(3):
        forwards, backwards = draw(motion, n).astype(int), draw(opposite, n)[::-1].astype(int)
        assert np.abs(forwards - backwards).max() <= 1  # rounding
        assert np.abs(forwards - backwards[::-1]).max() > 20


@pytest.mark.parametrize("difficulty", [PLAIN, HARD])
def test_single_frames_look_alike_in_all_classes(difficulty: Difficulty):
    # Mean, contrast, and sharpness across and down, of random frames of 100 videos of each class.
    moment = np.random.default_rng(0)
    looks = []
    for m, motion in enumerate(ALL_MOTIONS):
        frames = [
            draw(motion, 1000 * m + n, difficulty=difficulty)[moment.integers(9)].astype(float) for n in range(100)
        ]
        looks.append([(f.mean(), f.std(), np.diff(f, axis=0).std(), np.diff(f, axis=1).std()) for f in frames])
    by_class = np.array(looks)  # (18, 100, 4)
    error = by_class.std(axis=1) / 100**0.5
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


def test_motion_tells_the_basic_classes_apart():
    for m, motion in enumerate(BASIC_MOTIONS):
        for n in range(5):
            speeds = measured_motion(draw(motion, n)) / (0.6, 0.6, 0.011, 0.014)
            signed = np.stack([-speeds, speeds], axis=1)  # (left, right), (up, down), ...
            signed[2:] = signed[2:, ::-1]  # ..., (expand, contract), (clockwise, anticlockwise)
            assert signed.ravel().argmax() == m
            assert 0.4 < signed.max() < 1.1


def test_the_others_go_aslant_or_there_and_back():
    signs = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
    for name in ("up_left", "up_right", "down_left", "down_right"):
        (x, y), words = measured_motion(draw(name, 1))[:2], name.split("_")
        assert (np.sign(x), np.sign(y)) == (signs[words[1]][0], signs[words[0]][1])
        assert 0.2 < min(abs(x), abs(y)) < max(abs(x), abs(y)) < 0.5
    for name in RETURNING:
        video = draw(name, 2, frames=40)
        there, back = measured_motion(video[:14]), measured_motion(video[-14:])
        moves = {"clockwise_back": (3, 1), "anticlockwise_back": (3, -1)}.get(name)
        axis, sign = moves or (0 if "left" in name else 1, sum(signs[name.split("_")[0]]))
        assert np.sign(there[axis]) == sign == -np.sign(back[axis]), name
        assert there[axis] == pytest.approx(-back[axis], rel=0.3)


def test_difficulty_hides_what_it_says():
    plain = draw("left", 3, 24).astype(float)
    noisy = draw("left", 3, 24, Difficulty(noise=10)).astype(float)
    assert 9.5 < (noisy - plain).std() < 10.2
    covered = np.abs(draw("left", 3, 24, Difficulty(distractors=3)).astype(float) - plain).max(axis=3) > 2
    assert 0.02 < covered.mean() < 0.5
    assert len({frame.tobytes() for frame in covered}) > 20  # they move

    def speeds(difficulty: Difficulty) -> np.ndarray:
        video = draw("left", 3, 49, difficulty)
        return np.array([measured_motion(video[n : n + 3])[:2] for n in range(0, 48, 3)])

    assert np.abs(speeds(PLAIN) - speeds(PLAIN).mean(0)).max() < 0.05
    steady, varied, shaken = (-speeds(d)[:, 0] for d in (PLAIN, Difficulty(pace=0.8), Difficulty(camera=2)))
    assert 0.1 < varied.min() / steady.mean() < 0.4
    assert 1.6 < varied.max() / steady.mean() < 1.9
    assert 0.2 < shaken.std() < 0.8
    assert 0.2 < speeds(Difficulty(camera=2))[:, 1].std() < 0.8


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
    with pytest.raises(DataError, match="contains another synthetic set; remove it or choose another folder"):
        synthesize(made, **same, seed=1)
    with pytest.raises(DataError, match="contains another synthetic set"):
        synthesize(made, **same, difficulty=HARD)


def test_lists_of_other_videos_are_not_overwritten(tmp_path: Path):
    (tmp_path / "train.csv").write_text("mine.mp4 0\n")
    with pytest.raises(DataError, match=r"train.csv: exists with other contents, so this is another set; choose"):
        synthesize(tmp_path, videos_per_class={"train": 1, "val": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["train.csv"]


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
        progress=lambda what, done, total: told.append((done, total)),
    )
    assert told == [(n, 6) for n in range(1, 7)]
    assert (made / "videos/val/left_0.mp4").stat().st_size > 500
    assert json.loads((made / "synthetic.json").read_text())["seed"] == 0
