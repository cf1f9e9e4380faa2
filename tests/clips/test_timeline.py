from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from test_decode import numbers
from videos import SIZE, numbered_picture, write_video

from mgtrain.clips.decode import VideoFile
from mgtrain.clips.prepared import Settings
from mgtrain.clips.prepared.encode import encode_video


def packets_of(encoder: av.VideoStream | av.AudioStream, frames: Iterable[av.VideoFrame | av.AudioFrame]) -> list:
    return [packet for frame in [*frames, None] for packet in encoder.encode(frame) if packet.pts is not None]


def write_with_sound(path: Path, video: str, sound: str, start: int) -> Path:
    """60 numbered pictures in the 2 seconds after `start`, and 10 seconds of silence."""
    with av.open(str(path), "w") as container:
        pictures = container.add_stream(video, rate=30, options={"g": "12", "bf": "0", "threads": "1"})
        pictures.width, pictures.height = SIZE
        pictures.pix_fmt = "yuv420p"
        if path.name == "mkvmerge.mkv":
            pictures.metadata["_STATISTICS_TAGS"] = "BPS NUMBER_OF_FRAMES NUMBER_OF_BYTES"
        rate = 48000 if sound == "libopus" else 44100
        silence = container.add_stream(sound, rate=rate)
        silence.bit_rate = 64_000
        shown, heard = [], []
        for number in range(60):
            shown.append(av.VideoFrame.from_ndarray(numbered_picture(number)))
            shown[-1].pts, shown[-1].time_base = 30 * start + number, Fraction(1, 30)
        packets = packets_of(pictures, shown)
        size = silence.frame_size or 1024
        for pts in range(0, 10 * rate, size):
            samples = np.zeros((silence.layout.nb_channels, size), np.float32)
            heard.append(av.AudioFrame.from_ndarray(samples, format="fltp", layout=silence.layout.name))
            heard[-1].sample_rate, heard[-1].pts, heard[-1].time_base = rate, pts, Fraction(1, rate)
            if silence.format.name == "flt":
                heard[-1] = av.AudioResampler("flt").resample(heard[-1])[0]
        packets += packets_of(silence, heard)
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            container.mux(packet)
    return path


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize(
    ("name", "video", "sound"),
    [
        ("v.mkv", "libx264", "aac"),
        ("tagless.mkv", "libx264", "aac"),
        ("mkvmerge.mkv", "libx264", "aac"),
        ("v.webm", "libvpx-vp9", "libopus"),
        ("v.flv", "libx264", "aac"),
        ("v.mp4", "libx264", "aac"),
        ("v.ts", "libx264", "aac"),
        ("v.wmv", "wmv2", "wmav2"),
        ("v.nut", "libx264", "aac"),
    ],
)
def test_a_video_is_as_long_as_its_pictures_not_its_sound(
    tmp_path: Path, name: str, video: str, sound: str, start: int
) -> None:
    path = write_with_sound(tmp_path / name, video, sound, start)
    data = path.read_bytes()
    if name == "tagless.mkv":
        path.write_bytes(data.replace(b"DURATION", b"ANOTHER_"))
    elif name == "mkvmerge.mkv":  # whose tag has no time before the start
        path.write_bytes(data.replace(b"00:00:05.", b"00:00:02."))
    with VideoFile(path) as file:
        frames = file.info.frames
    assert 60 <= frames <= 61
    assert numbers(path, 0, 30, 59, frames - 1) == [0, 30, 59, 59]


@pytest.mark.parametrize("start", [0, 30, 90])
@pytest.mark.parametrize(
    ("name", "codec"),
    [("v.mkv", "libx264"), ("v.flv", "libx264"), ("v.nut", "libx264"), ("v.wmv", "wmv2")],
)
def test_a_late_start_adds_no_frames(tmp_path: Path, name: str, codec: str, start: int) -> None:
    path = write_video(tmp_path / name, 60, codec=codec, b_frames=0, times=range(start, start + 60))
    with VideoFile(path) as file:
        assert 59 <= file.info.frames <= 60
    assert numbers(path, 0, 30, 58) == [0, 30, 58]


def write_at(path: Path, milliseconds: Iterable[int], codec: str) -> Path:
    """Numbered pictures at these times, by an encoder that does not know the rate."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=1000, options={"g": "12", "bf": "0", "threads": "1"})
        stream.width, stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for number, time in enumerate(milliseconds):
            frame = av.VideoFrame.from_ndarray(numbered_picture(number))
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


TIMES = {
    "jittery": [round(k * 1000 / 30 + 8 * np.sin(k * k)) for k in range(60)],
    "slow": [round(400 * k + 150 * np.sin(k * k)) for k in range(60)],
    "even": [40 * k for k in range(60)],
    "fast": [4 * k for k in range(200)],
}


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("v.mkv", "libx264"),
        ("rateless.webm", "libvpx-vp9"),
        ("v.flv", "libx264"),
        ("v.ts", "libx264"),
        ("v.nut", "libx264"),
        ("v.avi", "mpeg4"),
        ("v.wmv", "wmv2"),
    ],
)
def test_a_rate_that_only_the_clock_of_the_file_has_is_not_that_of_its_frames(
    tmp_path: Path, name: str, codec: str, times: str
) -> None:
    milliseconds = TIMES[times]
    path = write_at(tmp_path / name, milliseconds, codec)
    if name == "rateless.webm":
        data = bytearray(path.read_bytes())
        place = data.find(b"\x23\xe3\x83")  # the duration of each frame, which becomes a void element of the same size
        size = 4 + (data[place + 3] & 0x7F)
        data[place : place + size] = b"\xec" + bytes([0x80 | size - 2]) + bytes(size - 2)
        path.write_bytes(data)
    count = len(milliseconds)
    with VideoFile(path) as file:
        info = file.info
    assert abs(info.frames - count) <= 2
    assert info.fps == pytest.approx((count - 1) / (milliseconds[-1] - milliseconds[0]) * 1000, rel=0.05)
    half = [abs(time - milliseconds[0] - (info.frames // 2 + 0.5) * 1000 / info.fps) for time in milliseconds]
    assert abs(numbers(path, info.frames // 2)[0] - int(np.argmin(half))) <= 1


def test_few_frames_are_prepared_of_a_video_with_a_fine_clock(tmp_path: Path) -> None:
    write_at(tmp_path / "v.mkv", TIMES["jittery"], "libx264")
    record, _ = encode_video(tmp_path, "v.mkv", tmp_path / "to", Settings((32,), 25, None))
    assert abs(record["stored"] - 60) <= 1


@pytest.mark.parametrize("b_frames", [0, 2])
def test_frames_that_an_avi_drops_repeat_the_one_before(tmp_path: Path, b_frames: int) -> None:
    times = [k for k in range(100) if k < 8 or k % 4 != 3]
    path = write_video(tmp_path / "v.avi", len(times), codec="mpeg4", times=times, b_frames=b_frames)
    with VideoFile(path) as file:
        frames, fps = file.info.frames, file.info.fps
    assert fps == 30
    expected = [max(n for n, time in enumerate(times) if time <= k) for k in range(frames)]
    found = numbers(path, *range(frames))
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= (b_frames > 0)
    assert [numbers(path, k)[0] for k in (0, 40, frames - 1)] == [found[k] for k in (0, 40, frames - 1)]
