from __future__ import annotations

import gc
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from videos import SIZE, decode, number_of, numbered_picture, write_video

from mgtrain.clips.cut import Cut, VideoInfo, cut_random, cut_views
from mgtrain.clips.decode import VideoFile
from mgtrain.clips.pictures import Clip, resample
from mgtrain.clips.timeline import shown
from mgtrain.errors import VideoError
from mgtrain.grid import Grid
from mgtrain.rng import Draw, generator


def whole(info: VideoInfo, *frames: int, crop: int = 64) -> Cut:
    """A cut of whole frames."""
    return Cut(frames, (0, 0, info.width, info.height), crop, flip=False)


def numbers(path: Path, *frames: int) -> list[int]:
    """The numbers shown by these frames."""
    return [number_of(picture) for picture in decode(path, lambda info: [whole(info, *frames)])[0]]


CODECS = {
    "h264.mp4": {},
    "h264-one-key.mp4": {"gop": 250},
    "h264-open-gop.mp4": {"x264-params": "open-gop=1:scenecut=0"},
    "h264.mkv": {},
    "h264.ts": {},
    "h264.h264": {},
    "h264.avi": {"b_frames": 0},
    "h264-b.avi": {},
    "xvid.avi": {"codec": "mpeg4"},
    "hevc.mp4": {"codec": "libx265", "x265-params": "log-level=none:pools=none"},
    "vp9.webm": {"codec": "libvpx-vp9", "deadline": "realtime"},
    "mpeg.mpg": {"codec": "mpeg1video"},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p", "b_frames": 0},
}


@pytest.mark.parametrize("name", CODECS)
def test_frame_k_is_the_kth_picture_written_wherever_decoding_starts(tmp_path: Path, name: str):
    path = write_video(tmp_path / name, 50, **CODECS[name])
    with VideoFile(path) as video:
        # Program streams have no header with a length; it is guessed from the last timestamps.
        assert 50 - 8 * (name == "mpeg.mpg") <= video.info.frames <= 50
        assert (video.info.width, video.info.height) == SIZE
    assert numbers(path, *range(48)) == [*range(48)]
    for first in (1, 11, 12, 13, 14, 23, 24, 25, 26, 35, 36, 37, 47):
        assert numbers(path, first, first + 2) == [first, min(first + 2, 49)]


def test_frame_k_of_a_variable_rate_is_what_is_shown_at_its_time(tmp_path: Path):
    # Pictures 0..9 at these thirtieths of a second: ten in 45, so a frame is 4.5 of them long, its middle at 2.25.
    path = write_video(tmp_path / "vfr.mp4", 10, b_frames=0, times=[0, 1, 2, 10, 11, 20, 30, 40, 42, 44])
    with VideoFile(path) as video:
        assert video.info.frames == 10
        assert video.info.fps == pytest.approx(30 * 10 / 45, rel=0.01)
    #        2.25 6.75 11.25 15.75 20.25 24.75 29.25 33.75 38.25 42.75
    assert numbers(path, *range(10)) == [2, 2, 4, 4, 5, 5, 5, 6, 6, 8]
    assert [numbers(path, k)[0] for k in range(10)] == [2, 2, 4, 4, 5, 5, 5, 6, 6, 8]


def test_shown_takes_one_frame_more_than_it_must():
    frames = iter(enumerate("abcdef"))
    assert list(shown(frames, [1, 3])) == [("b", [1]), ("d", [3])]
    assert next(frames) == (5, "f")


@given(st.lists(st.floats(0, 20), min_size=1, unique=True).map(sorted), st.sets(st.integers(0, 25)).map(sorted))
def test_shown_is_a_lookup_by_time(positions: list[float], wanted: list[int]):
    got = {k: frame for frame, ks in shown(((p, p) for p in positions), wanted) for k in ks}
    assert got == {k: max((p for p in positions if p <= k + 0.5), default=positions[0]) for k in wanted}


def test_clips_read_together_are_those_read_one_by_one(tmp_path: Path):
    path = write_video(tmp_path / "v.mp4", 60)
    grid = Grid(frames=4, crop=48, stride=(1, 6), short_side=(48, 80))
    with VideoFile(path) as video:
        cuts = [cut_random(grid, video.info, generator(0, Draw.CUT, n)) for n in range(6)]
        cuts += cut_views(grid, video.info, times=3, crops=3)
        together = video.read(cuts)
        again = [video.read([cut])[0] for cut in cuts]
    assert [clip.shape for clip in together] == [(4, 48, 48, 3)] * 15
    assert all(np.array_equal(a, b) for a, b in zip(together, again, strict=True))
    assert all(np.array_equal(a, decode(path, lambda _, c=c: [c])[0]) for a, c in zip(together, cuts, strict=True))


def test_a_flip_mirrors_and_nothing_else(tmp_path: Path):
    path = write_video(tmp_path / "v.mp4", 3)
    region = (7, 3, 60, 50)
    plain, flipped = decode(path, lambda _: [Cut((0, 2), region, 40, False), Cut((0, 2), region, 40, True)])
    assert np.array_equal(plain[:, :, ::-1], flipped)


SOURCES = {
    "usual": {},
    "full range": {"pix_fmt": "yuvj420p"},
    "BT.709": {"x264-params": "colormatrix=bt709:colorprim=bt709:transfer=bt709"},
    "chroma sited elsewhere": {"x264-params": "chromaloc=3"},
    "interlaced": {"x264-params": "tff=1"},
    "chroma in full": {"pix_fmt": "yuv444p"},
    "ten bits": {"pix_fmt": "yuv420p10le"},
    "turned": {"turn": 90},
    "mirrored": {"mirror": "hflip"},
    "odd": {"codec": "mpeg4", "b_frames": 0, "size": (65, 51)},
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_region_has_the_pixels_that_it_has_in_the_whole_frame(tmp_path: Path, source: str):
    rng = np.random.default_rng(0)
    options = {"size": (66, 52), **SOURCES[source]}
    width, height = options.pop("size")
    noise = [rng.integers(0, 256, (height, width, 3), np.uint8) for _ in range(12)]
    with VideoFile(write_video(tmp_path / "v.mp4", noise, **options)) as video:
        whole_frames = np.stack([picture.copy() for picture, _ in video.pictures(range(12))])
        for _ in range(20):
            side = int(rng.integers(1, min(width, height) + 1))
            left, top = (int(rng.integers(0, length - side + 1)) for length in (video.info.width, video.info.height))
            frames = np.sort(rng.choice(12, int(rng.integers(1, 13)), replace=False))
            (clip,) = video.read([Cut(tuple(frames.tolist()), (left, top, side, side), side, flip=False)])
            assert np.array_equal(clip, whole_frames[frames, top : top + side, left : left + side])


def test_a_region_of_the_clips_size_is_copied():
    picture = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
    clip = Clip(Cut((7,), (4, 5, 9, 9), 9, False))
    clip.put([7], picture)
    assert np.array_equal(clip.pixels()[0], picture[5:14, 4:13])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40))
def test_resampling_is_antialiased_bilinear(width: int, height: int, crop: int):
    pictures = np.random.default_rng(0).integers(0, 256, (3, height, width, 3), np.uint8)
    part = torch.from_numpy(pictures).permute(0, 3, 1, 2).float()
    exact = torch.nn.functional.interpolate(part, size=(crop, crop), mode="bilinear", antialias=True)
    got = resample(pictures, crop)
    assert np.abs(got - exact.permute(0, 2, 3, 1).numpy()).max() <= 1.5  # two roundings, one per axis


@pytest.mark.parametrize("gop", [1, 4, 12, 250])
@pytest.mark.parametrize("open_gop", [0, 1])
def test_picked_frames_are_those_of_decoding_everything(tmp_path: Path, gop: int, open_gop: int):
    options = {"x264-params": f"open-gop={open_gop}:scenecut=0"}
    path = write_video(tmp_path / "v.mp4", 60, gop=gop, b_frames=3, **options)
    with VideoFile(path) as video:
        everything = video.read([whole(video.info, *range(60))])[0]
        for n in range(30):
            frames = generator(0, Draw.CUT, n).choice(60, 1 + n % 9, replace=False)
            assert np.array_equal(
                video.read([whole(video.info, *sorted(frames.tolist()))])[0], everything[np.sort(frames)]
            )


def test_few_frames_of_a_long_video_are_decoded_for_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from mgtrain.clips import decode as module

    path = write_video(tmp_path / "v.mp4", 60, gop=12, b_frames=3)
    packets = 0

    def counted(codec: av.VideoCodecContext, packet: av.Packet[av.VideoStream] | None) -> list[av.VideoFrame]:
        nonlocal packets
        packets += packet is not None and codec.skip_frame == "DEFAULT"
        return codec.decode(packet)

    with VideoFile(path) as video:
        monkeypatch.setattr(module, "decoded", counted)
        video.read([whole(video.info, 0, 12, 36, 48)])
    assert packets == 4


def test_colours_survive(tmp_path: Path):
    picture = np.zeros((32, 48, 3), np.uint8)
    picture[:, :16, 0], picture[:, 16:32, 1], picture[:, 32:, 2] = 200, 200, 200
    path = write_video(tmp_path / "v.mp4", [picture] * 2, crf="1")
    clip = decode(path, lambda info: [whole(info, 0, crop=48)])[0][0]
    assert np.abs(clip[24, [8, 24, 40]].astype(int) - 200 * np.eye(3, dtype=int)).max() < 12


@pytest.mark.parametrize("pix_fmt", ["yuv444p", "yuv420p10le", "gray", "yuvj420p"])
def test_any_pixel_format_becomes_rgb(tmp_path: Path, pix_fmt: str):
    assert numbers(write_video(tmp_path / "v.mp4", 5, pix_fmt=pix_fmt), 0, 3) == [0, 3]


def test_alpha_is_left_out(tmp_path: Path):
    assert numbers(write_video(tmp_path / "v.mkv", 5, codec="ffv1", pix_fmt="bgra"), 0, 3) == [0, 3]


@pytest.mark.parametrize("size", [(161, 121), (1, 1), (33, 8), (8, 200)])
def test_odd_sizes(tmp_path: Path, size: tuple[int, int]):
    pictures = [np.full((size[1], size[0], 3), level, np.uint8) for level in (50, 200)]
    path = write_video(tmp_path / "v.mp4", pictures, pix_fmt="yuv444p")
    grid = Grid(frames=2, crop=32, stride=(1, 1), short_side=(32, 40))
    clip = decode(path, lambda info: [cut_random(grid, info, generator(0, Draw.CUT, 0))])[0]
    assert (abs(clip[0].astype(int) - 50) < 4).all()
    assert (abs(clip[1].astype(int) - 200) < 4).all()


@pytest.mark.parametrize("mirror", ["", "hflip", "vflip"])
@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_a_rotated_or_mirrored_video_is_seen_upright(tmp_path: Path, turn: int, mirror: str):
    upright = numbered_picture(77)
    seen = np.flip(upright, {"": (), "hflip": 1, "vflip": 0}[mirror])
    stored = np.rot90(seen, -turn // 90)
    path = write_video(tmp_path / "v.mp4", [stored] * 2, turn=turn, mirror=mirror)
    with VideoFile(path) as video:
        assert (video.info.width, video.info.height) == SIZE
        clip = video.read([whole(video.info, 0)])[0]
    assert number_of(clip[0]) == 77
    assert clip[0, :20].std() > 60 > 20 > clip[0, 44:].std()


def test_a_rotation_by_no_quarter_turn_is_ignored(tmp_path: Path):
    path = write_video(tmp_path / "v.mp4", 2, turn=30)
    with VideoFile(path) as video:
        assert (video.info.width, video.info.height) == SIZE
    assert numbers(path, 1) == [1]


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
def test_the_longest_of_several_video_streams_is_shown(tmp_path: Path, suffix: str):
    path = tmp_path / f"v.{suffix}"
    with av.open(str(path), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        video = container.add_stream("libx264", rate=30, options={"threads": "1"})
        cover.width, cover.height = video.width, video.height = SIZE
        cover.pix_fmt, video.pix_fmt = "yuvj420p", "yuv420p"
        container.mux([*cover.encode(av.VideoFrame.from_ndarray(numbered_picture(200))), *cover.encode()])
        for number in range(60):
            container.mux(video.encode(av.VideoFrame.from_ndarray(numbered_picture(number))))
        container.mux(video.encode())
    with VideoFile(path) as file:
        assert (file.info.frames, file.codec) == (60, "h264")
    assert numbers(path, 0, 30, 59) == [0, 30, 59]


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_the_last_frame_of_a_short_video_repeats(tmp_path: Path, frames: int):
    path = write_video(tmp_path / "v.mp4", frames)
    with VideoFile(path) as video:
        assert video.info.frames == frames
    assert numbers(path, 0, frames, 40) == [0, frames - 1, frames - 1]


def test_a_truncated_video_gives_what_there_is(tmp_path: Path):
    path = write_video(tmp_path / "v.mp4", 60)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    with VideoFile(path) as video:
        assert video.info.frames == 60
    read = numbers(path, *range(60))
    last = max(read)
    assert 12 < last < 50
    assert read == [min(k, last) for k in range(60)]
    assert numbers(path, 58) == [last]


def test_damage_in_the_middle_costs_the_frames_after_it_only(tmp_path: Path):
    path = write_video(tmp_path / "v.mp4", 60, gop=60)
    data = bytearray(path.read_bytes())
    middle = len(data) * 6 // 10
    data[middle : middle + 400] = b"\xff" * 400
    path.write_bytes(data)
    assert numbers(path, 0, 5, 10) == [0, 5, 10]
    assert len(numbers(path, 0, 59)) == 2


@pytest.mark.parametrize("name", ["v.ts", "v.mkv", "v.h264"])
def test_a_recording_that_starts_between_key_frames_starts_with_its_first_key_frame(tmp_path: Path, name: str):
    write_video(tmp_path / "whole.mp4", 120, gop=60, fps=5, sc_threshold="0")  # FFmpeg looks 5 s ahead
    with av.open(str(tmp_path / "whole.mp4")) as whole_file, av.open(str(tmp_path / name), "w") as cut:
        stream = whole_file.streams.video[0]
        copy = cut.add_stream_from_template(stream)
        for number, packet in enumerate(whole_file.demux(stream)):
            if number > 10 and packet.size:
                packet.stream = copy
                cut.mux(packet)
    with VideoFile(tmp_path / name) as video:
        frames = video.info.frames
        assert 105 <= frames <= 110
        assert (video.decodable(), video.damage) == (60, "")
        if name == "v.ts":  # elsewhere FFmpeg's decoder leaves them out itself
            assert video.lacking.startswith("the frames before the first key frame cannot be decoded (Invalid data")
    assert numbers(tmp_path / name, frames - 1) == [119]
    read = numbers(tmp_path / name, *range(frames))
    assert (read[0], read[-1]) == (60, 119)
    assert read == sorted(read)


def test_frames_are_counted_where_no_header_tells(tmp_path: Path):
    for name in ("v.h264", "v.webm"):
        codec = "libvpx-vp9" if name == "v.webm" else "libx264"
        path = write_video(tmp_path / name, 20, codec=codec, **({"live": "1"} if name == "v.webm" else {}))
        with VideoFile(path) as video:
            assert video.info.frames == 20
            assert number_of(video.read([whole(video.info, 13)])[0][0]) == 13


def test_a_video_that_starts_late_starts_with_its_first_frame(tmp_path: Path):
    path = write_video(tmp_path / "v.mkv", 20, times=range(300, 320))
    with VideoFile(path) as video:
        assert video.info.frames == 20
    assert numbers(path, 0, 19) == [0, 19]
    assert numbers(path, 17) == [17]


def test_names_with_spaces_commas_percents_and_foreign_letters(tmp_path: Path):
    for name in ("a b, c é %03d.mp4", "file:x?y#z.mp4", "-.mp4"):
        assert numbers(write_video(tmp_path / "v.mp4", 3).rename(tmp_path / name), 2) == [2]


def test_a_link_to_a_video_is_a_video(tmp_path: Path):
    write_video(tmp_path / "v.mp4", 3)
    (tmp_path / "link.mp4").symlink_to("v.mp4")
    assert numbers(tmp_path / "link.mp4", 2) == [2]


def refusal(path: Path | str) -> str:
    """The message with which something is refused as a video."""
    with pytest.raises(VideoError) as caught:
        VideoFile(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert message.endswith("; replace this video or remove it from the list")
    return message


def test_what_is_no_video_is_refused_by_name_and_cause(tmp_path: Path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "garbage.avi").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "page.mp4").write_text("<html>404</html>")
    os.mkfifo(tmp_path / "fifo.mp4")
    assert "Invalid data" in refusal(tmp_path / "empty.mp4")
    assert "Invalid" in refusal(tmp_path / "garbage.avi")
    assert "Invalid" in refusal(tmp_path / "page.mp4")
    assert "not a regular file" in refusal(tmp_path / "fifo.mp4")
    assert "not a regular file" in refusal(tmp_path)
    assert "not a regular file" in refusal("/dev/null")
    assert "No such file" in refusal(tmp_path / "nothing.mp4")
    assert "No such file" in refusal("http://127.0.0.1:9/v.mp4")
    assert "No such file" in refusal("concat:a.mp4|b.mp4")


def test_what_takes_the_place_of_a_file_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    os.mkfifo(tmp_path / "v.mp4")
    before = os.stat(__file__)
    monkeypatch.setattr(os, "stat", lambda path: before)
    assert "not a regular file" in refusal(tmp_path / "v.mp4")


def test_a_video_stays_the_file_that_was_opened(tmp_path: Path):
    path = write_video(tmp_path / "v.h264", 20)  # is opened anew for each reading
    with VideoFile(path) as video:
        write_video(tmp_path / "other.h264", 3).rename(path)
        assert [number_of(picture) for picture in video.read([whole(video.info, 2, 19)])[0]] == [2, 19]


def test_files_are_closed(tmp_path: Path):
    path = write_video(tmp_path / "v.h264", 5)
    (tmp_path / "page.mp4").write_text("<html>404</html>")
    before = os.listdir("/dev/fd")
    for _ in range(3):
        numbers(path, 0, 4)
        refusal(tmp_path / "page.mp4")
        refusal(tmp_path)
    assert os.listdir("/dev/fd") == before


@pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv", "h264.ts", "mjpeg.avi", "vp9.webm", "h264.h264", "hevc.mp4"])
def test_pictures_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    path = write_video(tmp_path / name, 3, **CODECS.get(name, {}))
    assert numbers(path, 2) == [2]
    monkeypatch.setattr("mgtrain.clips.decode.MAX_PIXELS", SIZE[0] * SIZE[1] - 1)
    assert re.search(
        "its pictures have 128 x 64 pixels, more than the allowed 8,191|no frame of it can be decoded", refusal(path)
    )


def test_a_picture_that_grows_on_the_way_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small = [write_video(tmp_path / f"{n}.h264", 5, b_frames=0) for n in "ab"]
    large = write_video(tmp_path / "c.h264", [numbered_picture(n, (256, 128)) for n in range(5)], b_frames=0)
    path = tmp_path / "v.h264"
    path.write_bytes(b"".join(file.read_bytes() for file in [*small, large]))
    monkeypatch.setattr("mgtrain.clips.decode.MAX_PIXELS", SIZE[0] * SIZE[1])
    with VideoFile(path) as video:
        assert 9 <= video.decodable() <= 10
        assert video.damage


def test_metadata_in_another_encoding_is_no_damage(tmp_path: Path):
    path = tmp_path / "v.mkv"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "an old title"
        stream = container.add_stream("libx264", rate=30, options={"g": "4"})
        stream.height, stream.width = numbered_picture(0).shape[:2]
        for n in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered_picture(n))))
        container.mux(stream.encode())
    data = path.read_bytes()
    assert b"an old title" in data
    path.write_bytes(data.replace(b"an old title", b"an old titl\xe9"))
    assert numbers(path, 0, 4) == [0, 4]


def test_without_a_duration_times_say_how_many_frames_there_are(tmp_path: Path):
    times = [n if n < 20 else 20 + 6 * (n - 20) for n in range(40)]
    path = write_video(tmp_path / "v.mkv", 40, b_frames=0, times=times)
    with VideoFile(path) as video:
        seconds = video.info.frames / video.info.fps
    data = bytearray(path.read_bytes())
    place = data.find(b"\x44\x89\x88")  # the duration, which becomes a void element of the same size
    data[place : place + 11] = b"\xec\x89" + bytes(9)
    path.write_bytes(data)
    with VideoFile(path) as video:
        assert video.info.frames / video.info.fps == pytest.approx(seconds, rel=0.1)
        assert number_of(video.read([whole(video.info, video.info.frames - 1)])[0][0]) == 39


def test_no_file_has_more_frames_than_bytes(tmp_path: Path):
    data = bytearray(write_video(tmp_path / "v.mkv", 5).read_bytes())
    struct.pack_into(">d", data, data.find(b"\x44\x89\x88") + 3, 1e12)  # the duration in milliseconds
    (tmp_path / "long.mkv").write_bytes(data)
    with VideoFile(tmp_path / "long.mkv") as video:
        assert video.info.frames == len(data)
        assert number_of(video.read([whole(video.info, len(data) - 1)])[0][0]) == 4


def test_more_packets_than_may_be_held_are_decoded_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_video(tmp_path / "v.mp4", 60, gop=60, b_frames=3)
    exact = numbers(path, 7, 40, 59)
    monkeypatch.setattr("mgtrain.clips.decode.MAX_HELD", 1000)
    assert numbers(path, 7, 40, 59) == exact == [7, 40, 59]


def test_all_frames_are_counted_up_to_the_damage(tmp_path: Path):
    path = write_video(tmp_path / "v.mp4", 60, gop=60)
    with VideoFile(path) as video:
        assert (video.decodable(), video.damage) == (60, "")
        assert number_of(video.read([whole(video.info, 7)])[0][0]) == 7
    data = bytearray(path.read_bytes())
    data[len(data) * 6 // 10 :] = b"\xff" * (len(data) - len(data) * 6 // 10)
    path.write_bytes(data)
    with VideoFile(path) as video:
        assert 20 < video.decodable() < 50
        assert video.damage == "Invalid data found when processing input"


def test_a_file_that_names_other_files_is_refused(tmp_path: Path):
    write_video(tmp_path / "v.ts", 3)
    texts = {
        "list.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nv.ts\n#EXT-X-ENDLIST\n",
        "list.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nv.ts\n#EXT-X-ENDLIST\n",
        "list.ffconcat": "ffconcat version 1.0\nfile v.ts\n",
        "list.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        assert "Invalid" in refusal(tmp_path / name)


def test_no_picture_in_the_file(tmp_path: Path):
    import av

    path = tmp_path / "audio.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    del container, stream, frame
    gc.collect()  # an encoder of sound has threads: collected in a process that is forked later, it would wait for them
    assert "no video stream" in refusal(path)


def test_decoding_prints_nothing(tmp_path: Path):
    path = write_video(tmp_path / "v.mp4", 60)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    cut = "Cut((0, 50), (0, 0, 9, 9), 9, False)"
    code = f"from mgtrain.clips.decode import *; VideoFile({str(path)!r}).read([{cut}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
