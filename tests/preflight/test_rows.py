"""Folders of frames and stretches of videos in the commands around training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from videos import number_of, numbered_picture, write_frames, write_video
from warm import Start

from mgtrain.clips.cut import Cut
from mgtrain.clips.prepared import PreparedSet, Settings
from mgtrain.clips.sources import open_source
from mgtrain.clips.units import Source
from mgtrain.data import open_splits, open_videos
from mgtrain.data.found import find_videos, make_parts
from mgtrain.data.index import make_index
from mgtrain.data.videos import Videos
from mgtrain.errors import DataError
from mgtrain.preflight.check import check
from mgtrain.preflight.prepare import prepare, verify
from mgtrain.preflight.stats import make_stats
from mgtrain.recipe import Clip, Recipe, load_recipe

CLIP = Clip(frames=4, stride=2, crop=32, short_side=(32, 40))
SETTINGS = Settings(levels=(64, 32), quality=18, fps=None)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A recording of 90 frames, 30 a second, and a folder of 30 frames."""
    (tmp_path / "in").mkdir()
    write_video(tmp_path / "in" / "long.mp4", 90)
    write_frames(tmp_path / "in" / "f", 30, "img_{:05}.jpg", quality=95)
    return tmp_path / "in"


def test_rows_are_checked_each_with_its_own_frames(root: Path) -> None:
    write_video(root / "hurt.mkv", 90)
    data = (root / "hurt.mkv").read_bytes()
    (root / "hurt.mkv").write_bytes(data[: len(data) // 2] + b"\xff" * 3000 + data[len(data) // 2 + 3000 :])
    (root / "f" / "img_00012.jpg").unlink()
    (root / "f" / "img_00025.jpg").write_bytes(b"")
    rows = [
        "long.mp4#t=0,1", "long.mp4#f=85,90", "long.mp4#t=2,9", "long.mp4#t=5,9", "hurt.mkv#f=0,20", "hurt.mkv#f=40,60",
        "f#f=0,10", "f#f=0,20", "f", "gone.mp4#t=0,1",
    ]  # fmt: skip
    records = check(str(root), rows, root / "c.jsonl", CLIP, 2, seconds=20, memory=1 << 32, fps=30)
    found = {record["path"]: (record["status"], record["message"]) for record in records}
    assert found["long.mp4#t=0,1"] == ("ok", "")
    assert found["long.mp4#f=85,90"] == ("short", "5 frames, the base clip spans 8")
    assert found["long.mp4#t=2,9"] == ("short", "the video ends 180 frames before the stretch")
    assert found["long.mp4#t=5,9"][0] == "corrupt"
    assert found["long.mp4#t=5,9"][1].startswith("long.mp4#t=5,9: starts after the end") or "starts after" in str(found)
    assert found["hurt.mkv#f=0,20"] == ("ok", "")
    assert found["hurt.mkv#f=40,60"][0] in ("corrupt", "short")
    assert found["f#f=0,10"] == ("ok", "")
    assert found["f#f=0,20"] == ("short", "img_00012.jpg is missing")
    assert found["f"][0] == "corrupt"
    assert found["f"][1].startswith("img_00025.jpg: ")
    assert found["gone.mp4#t=0,1"][0] == "missing"
    facts = {record["path"]: record["frames"] for record in records}
    assert (facts["long.mp4#t=0,1"], facts["f#f=0,20"], facts["f"]) == (30, 20, 24)


def test_stats_are_those_of_the_rows(root: Path) -> None:
    videos = Videos.of(str(root), [("long.mp4#t=1,2", 0), ("f", 1), ("long.mp4#t=0,0.5", 1)], ("x", "y"))
    facts = make_stats(videos, CLIP, workers=0, fps=10).describe()
    assert (facts["frames"]["min"], facts["frames"]["max"], facts["seconds"]["max"]) == (15, 30, 3)
    assert facts["codecs"] == {"h264": 2, "jpeg": 1}
    frames = sum(file.stat().st_size for file in (root / "f").iterdir())
    assert facts["bytes"] == pytest.approx((root / "long.mp4").stat().st_size / 2 + frames, rel=0.01)


def test_a_prepared_set_holds_the_rows_only(root: Path) -> None:
    rows, out = ["long.mp4#t=1,2", "long.mp4#f=40,50", "f"], root.with_name("out")
    made = prepare(root, rows, out, SETTINGS, 1, fps=12)
    assert (made.videos, made.broken) == (3, {})
    ready = PreparedSet(out)
    for name, numbers in zip(rows, (range(30, 60), range(40, 50), range(30)), strict=True):
        with ready.open(int(ready.find([name])[0]), name) as video, open_source(root / name, 12) as original:
            assert video.info == original.info
            cut = Cut(tuple(range(len(numbers))), (0, 0, video.info.width, video.info.height), 64, flip=False)
            assert [number_of(picture) for picture in video.read([cut])[0]] == [*numbers]
    assert (out / "64" / "long.mp4#t=1,2.mp4").exists()
    assert verify(out, 1) == {}
    assert prepare(root, rows, out, SETTINGS, 1, fps=12).made == 0
    assert prepare(root, rows, out, SETTINGS, 1, fps=24).made == 1  # the frames have another rate
    (root / "f" / "img_00031.jpg").write_bytes((root / "f" / "img_00030.jpg").read_bytes())
    assert prepare(root, rows, out, SETTINGS, 1, fps=24).made == 1


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    """Twelve recordings, each with stretches of both classes, in a list."""
    root = tmp_path / "rec"
    root.mkdir()
    lines = ["path,start,end,label"]
    for n in range(12):
        write_video(root / f"{chr(97 + n)}.mp4", [numbered_picture((7 * n + k) % 256) for k in range(60)])
        lines += [f"{chr(97 + n)}.mp4,{k / 2},{k / 2 + 0.7:.1f},{k % 2}" for k in range(3)]
    (root / "times.csv").write_text("\n".join(lines))
    return root


def test_init_splits_stretches_by_file(recordings: Path) -> None:
    found = find_videos(recordings / "times.csv")
    parts = make_parts(found, make_index(found), val=0.25, group_by=None, seed=0)
    names = {part: {name.partition("#")[0] for name in of.names()} for part, of in parts.splits.items()}
    assert (len(names["train"]), len(names["val"])) == (9, 3)
    assert not names["train"] & names["val"]
    assert parts.rule.startswith("the file of a stretch: 12 groups")


def test_init_and_what_it_writes_know_stretches(recordings: Path, mgtrain: Start, tmp_path: Path) -> None:
    done = mgtrain(tmp_path, "init", "--data", recordings / "times.csv", "--to", "w", "--name", "r", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    splits = open_splits(load_recipe(str(tmp_path / "w" / "r_multigrid.yaml")).data)
    assert len(splits["train"]) + len(splits["val"]) == 36
    assert all("#t=" in name for name in splits["val"].names())
    planned = mgtrain(tmp_path, "plan", "w/r_multigrid.yaml", "--json")
    assert planned.returncode == 0, planned.stderr


def test_init_asks_for_the_rate_of_frames(tmp_path: Path, mgtrain: Start) -> None:
    for name in "ab":
        for n in range(10):
            write_frames(tmp_path / "set" / name / f"v{n}", [numbered_picture((40 * n + ord(name)) % 256)] * (6 + n))
    assert open_videos("folder", str(tmp_path / "set"), ".").names()[:2] == ["a/v0", "a/v1"]
    words = ("init", "--data", "set", "--to", "w", "--name", "r", "--device", "cpu")
    asked = mgtrain(tmp_path, *words)
    assert (asked.returncode, "is a folder of frames; give --fps" in asked.stderr) == (2, True)
    done = mgtrain(tmp_path, *words, "--fps", "8")
    assert done.returncode == 0, done.stderr
    recipe = load_recipe(str(tmp_path / "w" / "r_baseline.yaml"))
    assert recipe.data.fps == 8
    videos = open_splits(recipe.data)["train"]
    with Source(videos, recipe.data).open(0) as video:
        assert video.info.fps == 8


def test_predict_tells_the_times_of_the_recording(
    straight: Path, tiny: Callable[..., Recipe], mgtrain: Start, root: Path
) -> None:
    checkpoint = max((straight / "checkpoints").glob("step_*.safetensors"))
    videos = (root / "long.mp4#t=1,2", root / "f")
    words = ("predict", checkpoint, *videos, "--set", "data.fps=10", "--device", "cpu", "--json")
    done = mgtrain(root, *words, "--every", "0.2")
    assert done.returncode == 0, done.stderr
    part, frames = json.loads(done.stdout)["videos"]
    assert part["video"] == str(root / "long.mp4#t=1,2")
    starts = [window["start"] for window in part["windows"]]
    assert starts == pytest.approx([1, 1.2, 1.4, 1 + 14 / 30], abs=0.04)
    assert part["windows"][-1]["end"] == pytest.approx(2)
    assert frames["windows"][0]["start"] == 0
    whole = mgtrain(root, *words)
    assert [video["video"] for video in json.loads(whole.stdout)["videos"]] == [part["video"], frames["video"]]


def test_frames_are_found_where_data_sets_keep_files(tmp_path: Path) -> None:
    for name in ("1", "2"):
        write_frames(tmp_path / "20bn-something-something-v2" / name, 3)
    (tmp_path / "20bn-something-something-v2" / "2.webm").touch()  # a file comes first
    (tmp_path / "labels.json").write_text('{"Doing something": "0"}')
    (tmp_path / "t.json").write_text(json.dumps([{"id": n, "template": "Doing [something]"} for n in (1, 2)]))
    videos = open_videos("something_something", str(tmp_path), "t.json")
    assert videos.names() == [f"20bn-something-something-v2/{name}" for name in ("1", "2.webm")]


def test_a_set_that_lacks_a_stretch_is_refused(root: Path, tiny: Callable[..., Recipe]) -> None:
    prepare(root, ["long.mp4#t=0,1"], root.with_name("out"), SETTINGS, 1)
    data = tiny(f"data.prepared={root.with_name('out')}").data
    with pytest.raises(DataError, match=r"lacks 1 of 2 videos, the first is long\.mp4#t=0,2"):
        Source(Videos.of(str(root), [("long.mp4#t=0,1", 0), ("long.mp4#t=0,2", 0)], ("x",)), data)
    assert np.array_equal(Source(Videos.of(str(root), [("long.mp4#t=0,1", 0)], ("x",)), data)._rows, [0])
