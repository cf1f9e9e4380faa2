"""A storage that stops answering in the middle of a video is waited for, and no frame is repeated because of it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from videos import write_frames, write_video

from mgtrain.clips import units
from mgtrain.clips.cut import Cut, VideoInfo
from mgtrain.clips.decode import VideoFile
from mgtrain.clips.prepared import Settings
from mgtrain.clips.prepared.encode import encode_video
from mgtrain.clips.units import Source
from mgtrain.data.videos import Videos
from mgtrain.errors import LackError
from mgtrain.preflight.check import check_video
from mgtrain.recipe import Clip, Recipe

CLIP = Clip(frames=4, stride=2, crop=32, short_side=(32, 40))
CODECS = {"v.mp4": {}, "v.mkv": {}, "v.avi": {"codec": "mpeg4", "b_frames": 0}, "v.webm": {"codec": "libvpx-vp9"}}


class Failing:
    """A container that fails while it is read past a packet, as long as there are `failures`."""

    def __init__(self, container: Any, failures: list[int], packets: int) -> None:
        self._container, self._failures, self._packets = container, failures, packets

    def __getattr__(self, name: str) -> Any:
        return getattr(self._container, name)

    def demux(self, stream: av.VideoStream) -> Iterator[av.Packet[av.VideoStream]]:
        for number, packet in enumerate(self._container.demux(stream)):
            if number >= self._packets and self._failures:
                raise error_of(self._failures.pop())
            yield packet


def error_of(code: int) -> av.FFmpegError:
    """The error that PyAV raises for a code of FFmpeg."""
    try:
        av.error.err_check(-code)
    except av.FFmpegError as error:
        return error
    raise AssertionError(code)


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that makes reading videos fail: with these errors, from a packet on."""
    opened = VideoFile._open

    def failing(failures: list[int], packets: int = 20) -> None:
        def open_failing(self: VideoFile) -> None:
            opened(self)
            self._container = Failing(self._container, failures, packets)  # type: ignore[assignment]
            self._unread = self._decode(self._container.demux(self._stream))

        monkeypatch.setattr(VideoFile, "_open", open_failing)

    return failing


def source(root: Path, name: str, recipe: Recipe) -> Source:
    return Source(Videos.of(str(root), [(name, 0)], ("a", "b")), recipe.data)


def whole(info: VideoInfo) -> list[Cut]:
    return [Cut((10, 30, 50), (0, 0, info.width, info.height), 64, flip=False)]


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("number", [errno.ESTALE, errno.ETIMEDOUT])
def test_a_storage_that_fails_within_a_video_is_waited_for(
    tmp_path: Path, tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, fail: Callable[..., None],
    name: str, number: int,
) -> None:  # fmt: skip
    write_video(tmp_path / name, 60, **CODECS[name])
    videos = source(tmp_path, name, tiny())
    (expected,), *_ = videos.read(0, whole)
    waited: list[float] = []
    monkeypatch.setattr(units.time, "sleep", waited.append)
    fail([number] * 2)
    (found,), *_ = videos.read(0, whole)
    assert np.array_equal(found, expected)
    assert waited == [*units.PAUSES[:2]]
    fail([number] * 100)
    with pytest.raises(OSError, match="the storage of the videos does not answer"):
        videos.read(0, whole)


def test_a_packet_that_the_storage_cuts_short_is_not_damage(
    tmp_path: Path, tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, fail: Callable[..., None]
) -> None:
    write_video(tmp_path / "v.mp4", 60)
    videos = source(tmp_path, "v.mp4", tiny())
    (expected,), *_ = videos.read(0, whole)
    pread, failures, waited = os.pread, [errno.ESTALE], list[float]()

    def at_first_not(*args: int) -> bytes:
        if failures:
            code = failures.pop()
            raise OSError(code, os.strerror(code))
        return pread(*args)

    def pause(seconds: float) -> None:
        waited.append(seconds)
        broken.clear()

    monkeypatch.setattr(units.time, "sleep", pause)
    monkeypatch.setattr(os, "pread", at_first_not)
    broken = [av.error.tag_to_code(b"INDA")] * 100  # invalid data
    fail(broken)
    (found,), *_ = videos.read(0, whole)
    assert np.array_equal(found, expected)
    assert waited == [units.PAUSES[0]]


def test_a_damaged_video_is_still_used_up_to_the_damage(tmp_path: Path, tiny: Callable[..., Recipe]) -> None:
    data = write_video(tmp_path / "v.mkv", 60).read_bytes()
    (tmp_path / "v.mkv").write_bytes(data[: len(data) * 6 // 10])
    (clip,), *_ = source(tmp_path, "v.mkv", tiny()).read(0, whole)
    assert not np.array_equal(clip[0], clip[1])


@pytest.mark.parametrize("work", ["check", "prepare"])
@pytest.mark.parametrize("name", ["v.mp4", "frames"])
def test_no_video_is_recorded_as_broken_for_its_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: Callable[..., None], work: str, name: str
) -> None:
    write_video(tmp_path / "v.mp4", 60)
    write_frames(tmp_path / "frames", 60)
    fail([errno.ESTALE] * 100)
    opened = open

    def not_the_last(path: Any, *args: Any) -> Any:
        if str(path).endswith("00060.png"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return opened(path, *args)

    monkeypatch.setattr("mgtrain.clips.frames.open", not_the_last, raising=False)
    does: dict[str, Callable[[], object]] = {
        "check": lambda: check_video(str(tmp_path), name, CLIP, 30),
        "prepare": lambda: encode_video(tmp_path, name, tmp_path / "to", Settings((32,), 25, None), 30),
    }
    with pytest.raises(LackError, match=f"{name}.*: the storage does not answer .*run the same command again"):
        does[work]()
