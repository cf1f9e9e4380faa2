from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest
from videos import write_video
from warm import Start

from mgtrain.clips.sources import open_source
from mgtrain.data import open_splits
from mgtrain.data.videos import Videos
from mgtrain.errors import DataError
from mgtrain.preflight import stats as module
from mgtrain.preflight.stats import draw_picture, make_stats, render
from mgtrain.recipe import Clip, Recipe

CLIP = Clip(frames=8, stride=4, crop=32, short_side=(40, 64))  # spans 32/30 s


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Videos:
    """Three videos that can be opened and one that cannot. The second spans as long as a clip to the frame."""
    root = tmp_path_factory.mktemp("mixed")
    write_video(root / "short.mp4", 20)
    write_video(root / "exact.mp4", 32)
    write_video(root / "slow.avi", 30, fps=15, codec="mpeg4", b_frames=0)
    (root / "broken.mp4").write_bytes(b"no video")
    names = ("short.mp4", "exact.mp4", "slow.avi", "broken.mp4")
    return Videos.of(str(root), [(name, int(name == "slow.avi")) for name in names], ("fast", "slow", "none"))


def test_stats_are_those_of_the_files(mixed: Videos):
    facts = make_stats(mixed, CLIP, workers=0).describe()
    assert facts["frames"] == {"min": 20, "5%": 21, "median": 30, "95%": 31.8, "max": 32}
    assert facts["fps"]["min"] == 15
    assert facts["seconds"]["max"] == 2
    assert (facts["width"]["median"], facts["height"]["median"], facts["short_side"]["max"]) == (128, 64, 64)
    assert facts["sizes"] == {"different": 1, "commonest": {"128x64": 3}}
    assert facts["codecs"] == {"h264": 2, "mpeg4": 1}
    assert facts["videos_per_class"] == {
        "min": 0, "median": 1, "max": 3, "rarest": "none", "commonest": "fast", "empty": 1
    }  # fmt: skip
    root = Path(mixed.root)
    sizes = [(root / name).stat().st_size for name in ("short.mp4", "exact.mp4", "slow.avi")]
    assert facts["bytes"] == round(sum(sizes) / 3 * 4)
    assert facts["hours"] == pytest.approx((20 / 30 + 32 / 30 + 2) / 3 * 4 / 3600, abs=1e-6)
    assert facts["broken"]["count"] == 1
    assert facts["broken"]["examples"][0].startswith(f"{root}/broken.mp4: ")


def test_stats_tell_what_the_recipe_would_do(mixed: Videos):
    stats = make_stats(mixed, CLIP, workers=0)
    assert stats.describe()["recipe"] == {
        "span_seconds": 1.067, "shorter_than_span": 1, "largest_short_side": 64, "enlarged": 0
    }  # fmt: skip
    larger = make_stats(mixed, CLIP.model_copy(update={"short_side": (40, 65)}), workers=0)
    assert larger.describe()["recipe"]["enlarged"] == 3
    text = render(stats)
    assert "1 of 3 (33.3 %)" in text
    assert "0 (none) to 3 (fast) videos, median 1, 1 without any" in text


def test_a_sample_is_drawn_by_the_seed_and_workers_change_nothing(tiny: Callable[..., Recipe]):
    recipe = tiny()
    train = open_splits(recipe.data)["train"]
    facts = [
        make_stats(train, recipe.clip, sample=5, seed=seed, workers=workers).describe()
        for seed, workers in ((0, 0), (0, 2), (1, 0))
    ]
    assert facts[0] == facts[1]
    assert facts[0]["bytes"] != facts[2]["bytes"]
    assert (facts[0]["sample"], facts[0]["videos"]) == (5, 24)
    assert "about" in render(make_stats(train, recipe.clip, sample=5, workers=0))


def test_a_set_in_which_nothing_opens_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"none of 1 videos can be opened; first error: .*gone.mp4: No such file"):
        make_stats(Videos.of(str(tmp_path), [("gone.mp4", 0)], ("x",)), CLIP, workers=0)


def test_a_video_that_kills_its_process_is_broken_and_costs_no_other(mixed: Videos, monkeypatch: pytest.MonkeyPatch):
    def opened(path: str, fps: float | None) -> Any:
        return os._exit(9) if path.endswith("exact.mp4") else open_source(path, fps)

    monkeypatch.setattr(module, "open_source", opened)  # worker processes are forked
    for workers in (0, 2):
        facts, root = make_stats(mixed, CLIP, workers=workers).describe(), mixed.root
        assert (facts["frames"]["min"], facts["frames"]["max"], facts["broken"]["count"]) == (20, 30, 2)
        assert facts["broken"]["examples"][1].startswith(f"{root}/broken.mp4: ")
        assert facts["broken"]["examples"][0] == f"{root}/exact.mp4: crashes the decoder (ended with exit code 9)"


def test_the_picture_is_a_png(mixed: Videos, tmp_path: Path):
    path = tmp_path / "new/stats.png"
    draw_picture(make_stats(mixed, CLIP, workers=0), path)
    with av.open(str(path)) as picture:
        frame = next(picture.decode(video=0))
    assert (frame.width, frame.height) == (1200, 840)
    assert frame.to_ndarray(format="rgb24").std() > 10  # something is drawn


def test_stats_from_the_command_line(mgtrain: Start, tiny_text: str, tmp_path: Path):
    (tmp_path / "tiny.yaml").write_text(tiny_text)
    done = mgtrain(tmp_path, "data", "stats", "tiny.yaml", "--split", "val", "--json", "--workers", 0)
    assert (done.returncode, done.stderr) == (0, "")
    facts = json.loads(done.stdout)
    assert (facts["schema"], facts["split"], facts["videos"]) == ("mgtrain.data_stats/1", "val", 12)
    done = mgtrain(tmp_path, "data", "stats", "tiny.yaml", "--picture", "stats.jpg")
    assert (done.returncode, done.stderr) == (2, "mgtrain: --picture stats.jpg: must end in .png\n")
