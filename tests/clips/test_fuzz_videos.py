"""Mutated and hostile files, read as training does: nothing crashes, hangs or opens anything else."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import av
import pytest

from mgtrain.clips.loader import BadVideos
from mgtrain.clips.order import ClipRequest
from mgtrain.clips.units import RandomClips, ViewClips
from mgtrain.data.videos import Videos
from mgtrain.grid import Grid
from mgtrain.processes.isolated import Lost, isolated
from mgtrain.recipe import Recipe

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "fuzz_videos.py"
spec = importlib.util.spec_from_file_location("fuzz_videos", SCRIPT)
assert spec
assert spec.loader
fuzz = importlib.util.module_from_spec(spec)
sys.modules["fuzz_videos"] = fuzz
spec.loader.exec_module(fuzz)

FILES = 75


def test_no_mutated_video_hurts_the_loader(tmp_path: Path, tiny: Callable[..., Recipe], motions: Path):
    recipe = tiny()
    good = sorted(motions.glob("videos/train/*.mp4"))[0]
    grid = Grid(8, 32, (1, 4), (32, 40))

    def load(path: Path) -> list[str]:
        """The causes, if the video is replaced and left out."""
        videos = Videos.of("/", [(str(path)[1:], 0), (str(good)[1:], 1)], ("a", "b"))
        trained = RandomClips(videos, recipe)[[ClipRequest(0, position, grid) for position in range(3)]]
        evaluated = ViewClips(videos, recipe, times=2, crops=1)[range(2)]
        assert trained.clips.shape == (3, 8, 32, 32, 3)
        assert set(trained.bad) == set(evaluated.bad)
        assert trained.labels.tolist() == ([1, 1, 1] if trained.bad else [0, 0, 0])
        bad = BadVideos(1, 1.0)
        bad.add(trained)
        return [*bad.causes.values()]

    with fuzz.canaries(tmp_path) as (port, leaked):
        files = dict(fuzz.mutated(tmp_path, fuzz.make_movies(tmp_path), FILES, 0, port))
        found = dict(isolated(load, files, workers=2, seconds=30, memory=1 << 31))
        assert not leaked()
    assert {path.name: lost for path, lost in found.items() if isinstance(lost, Lost)} == {}
    for path, causes in found.items():
        for cause in causes:
            assert cause.startswith(f"{path}: ")
            assert "\n" not in cause
    read = [path for path, causes in found.items() if not causes]
    assert FILES / 3 < len(read) < FILES
    assert all(causes for path, causes in found.items() if files[path] in ("not a file", "playlist", "random bytes"))
    assert {kind for path, kind in files.items() if path in read} >= {"other extension", "flipped bytes", "truncated"}


def test_the_canaries_sing(tmp_path: Path):
    with fuzz.canaries(tmp_path) as (port, leaked):
        assert not leaked()
        for target in (fuzz.CANARY, f"http://127.0.0.1:{port}/v.ts"):
            (tmp_path / "list.ffconcat").write_text(f"ffconcat version 1.0\nfile {target}\n")
            whatever = {"safe": "0", "protocol_whitelist": "file,http,tcp"}
            with pytest.raises(av.FFmpegError):  # there is no video in the canary
                av.open(str(tmp_path / "list.ffconcat"), options=whatever, timeout=0.5)
            assert leaked()
        assert not leaked()


def test_what_goes_wrong_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def hostile(path: Path) -> object:
        match path.name:
            case "dies":
                os._exit(3)
            case "waits":
                time.sleep(100)
            case "fills":
                raise MemoryError
        raise KeyError(path.name)

    monkeypatch.setattr(fuzz, "VideoFile", hostile)
    paths = [tmp_path / name for name in ("dies", "waits", "fills", "surprises")]
    monkeypatch.setattr(sys, "argv", ["fuzz", "--as-is", "--seconds=0.5", "--workers=2", *map(str, paths)])
    printed: list[str] = []
    monkeypatch.setattr("builtins.print", lambda text, **_: printed.append(text))
    with pytest.raises(SystemExit) as caught:
        fuzz.main()
    assert caught.value.code == 1
    assert sorted(line.split(": as it is: ")[0] for line in printed if ": as it is: " in line) == [
        "crash", "crash", "hang", "memory",
    ]  # fmt: skip
    assert printed[0].splitlines()[-1].split()[2:8] == ["0", "0", "1", "1", "2", "0"]
