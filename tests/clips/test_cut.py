from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgtrain.clips.cut import (
    VideoInfo,
    cut_random,
    cut_views,
    cut_windows,
    frame_indices,
    latest_start,
    resized,
    segment_bounds,
    short_side_at,
    source_region,
    uniform_windows,
)
from mgtrain.grid import Grid
from mgtrain.rng import Draw, generator

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "sampling.json").read_text())
KINETICS = VideoInfo(frames=300, fps=30.0, width=340, height=256)


@pytest.mark.parametrize(("video_frames", "fps", "frames", "stride", "u", "start", "indices"), GOLDEN["train"])
def test_training_frames_are_those_of_the_reference(
    video_frames: int, fps: float, frames: int, stride: int, u: float, start: float, indices: list[int]
):
    in_source = stride * fps / 30
    assert u * latest_start(frames, in_source, video_frames) == pytest.approx(start, abs=1e-9)
    assert frame_indices(start, frames, in_source, video_frames) == tuple(indices)


@pytest.mark.parametrize("video_frames", sorted({row[0] for row in GOLDEN["test"]}))
def test_evaluation_frames_are_those_of_the_reference(video_frames: int):
    grid = Grid(frames=32, crop=224, stride=(2, 2), short_side=(256, 256))
    cuts = cut_views(grid, VideoInfo(video_frames, 30.0, 340, 256), times=10, crops=3)
    for _, _, _, clip, _, indices in (row for row in GOLDEN["test"] if row[0] == video_frames):
        assert [cut.frames for cut in cuts[3 * clip : 3 * clip + 3]] == [tuple(indices)] * 3


@pytest.mark.parametrize(("video_frames", "frames", "which", "indices"), GOLDEN["segments"])
def test_segments_are_those_of_the_reference(video_frames: int, frames: int, which: str, indices: list[int]):
    info, grid = VideoInfo(video_frames, 30.0, 340, 256), Grid(frames, crop=224, stride=(1, 1), short_side=(256, 256))
    if which == "middle":
        assert cut_views(grid, info, times=1, crops=1, segments=True)[0].frames == tuple(indices)
    else:
        assert segment_bounds(frames, video_frames)[which == "last"].tolist() == indices


@pytest.mark.parametrize("video_frames", [1, 5, 90])
def test_a_clip_of_segments_has_a_random_frame_of_each(video_frames: int):
    info, grid = VideoInfo(video_frames, 30.0, 340, 256), Grid(8, crop=112, stride=(1, 8), short_side=(128, 128))
    first, last = segment_bounds(8, video_frames)
    cuts = [cut_random(grid, info, generator(0, Draw.CUT, n), segments=True) for n in range(200)]
    frames = np.array([cut.frames for cut in cuts])
    assert (frames.min(0) == first).all()
    assert (frames.max(0) == last).all()
    assert max(cut.frames[-1] for cut in cuts) == video_frames - 1
    views = cut_views(grid, info, times=4, crops=3, segments=True)
    assert len(views) == 12
    assert all((first <= np.array(cut.frames)).all() and (np.array(cut.frames) <= last).all() for cut in views)
    assert len({cut.frames for cut in views}) == (4 if video_frames == 90 else len({cut.frames for cut in views}))


@pytest.mark.parametrize(
    ("width", "height", "low", "high", "crop", "inverse_uniform", "u", "size", "offsets"), GOLDEN["jitter"]
)
def test_resized_frames_and_room_for_windows_are_those_of_the_reference(
    width: int, height: int, low: int, high: int, crop: int, inverse_uniform: bool, u: float, size: list[int], offsets
):
    got = resized(width, height, short_side_at(u, low, high, inverse_uniform))
    assert got == tuple(size)
    assert [[0, side - crop] for side in got] == offsets


@pytest.mark.parametrize(("width", "height", "crop", "index", "window"), GOLDEN["uniform_crop"])
def test_evaluation_windows_are_those_of_the_reference(
    width: int, height: int, crop: int, index: int, window: list[int]
):
    assert uniform_windows((width, height), crop, crops=3)[index] == tuple(window)
    assert uniform_windows((width, height), crop, crops=1) == [uniform_windows((width, height), crop, crops=3)[1]]


def test_a_region_is_the_window_scaled_back_to_the_source():
    # 340x256 resized to a short side of 128: exactly half, so a window of 112 is 224 source pixels.
    size = resized(340, 256, 128)
    assert size == (170, 128)
    assert source_region(KINETICS, size, 112, left=0, top=0) == (0, 0, 224, 224)
    assert source_region(KINETICS, size, 112, left=58, top=16) == (116, 32, 224, 224)
    assert source_region(KINETICS, (340, 256), 224, left=3, top=5) == (3, 5, 224, 224)


sizes = st.integers(1, 2000)
grids = st.builds(
    lambda frames, crop, strides, sides: Grid(frames, crop, tuple(sorted(strides)), tuple(sorted(sides))),
    st.integers(1, 64),
    st.integers(1, 300),
    st.tuples(st.integers(1, 32), st.integers(1, 32)),
    st.tuples(st.integers(1, 400), st.integers(1, 400)),
)
infos = st.builds(VideoInfo, st.integers(1, 1000), st.floats(0.5, 120), sizes, sizes)


def check_inside(cut, grid: Grid, info: VideoInfo) -> None:
    left, top, width, height = cut.region
    assert width >= 1 <= height
    assert 0 <= left <= info.width - width
    assert 0 <= top <= info.height - height
    assert len(cut.frames) == grid.frames
    assert all(0 <= a <= b < info.frames for a, b in zip(cut.frames, cut.frames[1:], strict=False))
    assert 0 <= cut.frames[0] <= cut.frames[-1] < info.frames
    assert cut.crop == grid.crop


@given(grids, infos, st.integers(0, 99), st.booleans())
def test_a_random_cut_is_inside_the_video(grid: Grid, info: VideoInfo, seed: int, inverse_uniform: bool):
    cut = cut_random(grid, info, generator(seed, Draw.CUT, 0), inverse_uniform=inverse_uniform)
    check_inside(cut, grid, info)
    assert cut == cut_random(grid, info, generator(seed, Draw.CUT, 0), inverse_uniform=inverse_uniform)


@given(grids, infos, st.integers(1, 11), st.integers(1, 4))
def test_views_are_inside_the_video_and_in_order_of_time(grid: Grid, info: VideoInfo, times: int, crops: int):
    cuts = cut_views(grid, info, times, crops)
    assert len(cuts) == times * crops
    for cut in cuts:
        check_inside(cut, grid, info)
        assert not cut.flip
    for i in range(times):
        assert len({cut.frames for cut in cuts[i * crops : i * crops + crops]}) == 1
    assert cuts == sorted(cuts, key=lambda cut: cut.frames)


def test_one_view_is_the_centre_in_time_and_space():
    grid = Grid(frames=8, crop=224, stride=(2, 8), short_side=(256, 320))
    (cut,) = cut_views(grid, KINETICS, times=1, crops=1)
    assert cut.frames == (142, 144, 146, 148, 150, 152, 154, 157)
    assert cut.region == (58, 16, 224, 224)


def test_a_tall_video_has_its_crops_at_top_centre_and_bottom():
    grid = Grid(frames=1, crop=256, stride=(1, 1), short_side=(256, 256))
    regions = [cut.region for cut in cut_views(grid, VideoInfo(9, 30.0, 512, 1024), times=1, crops=3)]
    assert regions == [(0, 0, 512, 512), (0, 256, 512, 512), (0, 512, 512, 512)]


def test_draws_cover_the_grid_evenly():
    grid = Grid(frames=8, crop=112, stride=(2, 8), short_side=(128, 320))
    cuts = [cut_random(grid, KINETICS, generator(0, Draw.CUT, n)) for n in range(4000)]
    spans = np.array([cut.frames[-1] - cut.frames[0] + 1 for cut in cuts])
    strides = np.bincount(np.round(spans / 8).astype(int), minlength=9)
    assert strides[:2].sum() == 0
    assert np.allclose(strides[2:] / 4000, 1 / 7, atol=0.03)
    # The short side is 256 * 112 / (the region's height).
    sides = 256 * 112 / np.array([cut.region[3] for cut in cuts])
    assert sides.min() == pytest.approx(128, abs=1)
    assert sides.max() == pytest.approx(320, abs=3)
    assert sides.mean() == pytest.approx(224, abs=3)
    assert np.mean([cut.flip for cut in cuts]) == pytest.approx(0.5, abs=0.03)
    left = [cut.region[0] / (340 - cut.region[2]) for cut in cuts]
    room = np.array([left, [cut.frames[0] for cut in cuts] / (300 - spans)]).T
    assert np.allclose(room.mean(0), 0.5, atol=0.03)
    assert np.allclose(room.std(0), 12**-0.5, atol=0.03)


def test_inverse_uniform_draws_small_short_sides_more_often():
    grid = Grid(frames=1, crop=112, stride=(1, 1), short_side=(128, 320))
    cuts = [cut_random(grid, KINETICS, generator(0, Draw.CUT, n), inverse_uniform=True) for n in range(2000)]
    # 1 / short side is uniform, and so is the region's height.
    heights = np.array([cut.region[3] for cut in cuts])
    assert heights.mean() == pytest.approx((256 * 112 / 128 + 256 * 112 / 320) / 2, abs=3)


@pytest.mark.parametrize("chance", [0.0, 1.0])
def test_flips_can_be_sure(chance: float):
    grid = Grid(frames=1, crop=112, stride=(1, 1), short_side=(128, 320))
    flips = {cut_random(grid, KINETICS, generator(0, Draw.CUT, n), flip=chance).flip for n in range(50)}
    assert flips == {chance == 1}


def test_a_clip_lasts_equally_long_at_any_frame_rate():
    grid = Grid(frames=8, crop=112, stride=(4, 4), short_side=(128, 128))
    spans = {}
    for fps in (15.0, 30.0, 60.0):
        cut = cut_random(grid, VideoInfo(1000, fps, 340, 256), generator(0, Draw.CUT, 0))
        spans[fps] = cut.frames[-1] - cut.frames[0] + 1
    assert spans == {15.0: 16, 30.0: 32, 60.0: 64}


def test_a_short_side_below_the_crop_is_the_crop():
    grid = Grid(frames=1, crop=128, stride=(1, 1), short_side=(64, 100))
    cut = cut_random(grid, KINETICS, generator(0, Draw.CUT, 0))
    assert cut.region[2:] == (256, 256)


@pytest.mark.parametrize("fps", [15.0, 30.0, 60.0])
def test_views_and_windows_last_equally_long_at_any_frame_rate(fps: float) -> None:
    grid, info = Grid(8, 112, (4, 4), (128, 128)), VideoInfo(1000, fps, 340, 256)
    for cut in [*cut_views(grid, info, 2, 1), *cut_windows(grid, info, every=3)]:
        assert (cut.frames[-1] - cut.frames[0] + 1) / fps == pytest.approx(32 / 30)
