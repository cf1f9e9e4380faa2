#!/usr/bin/env python
"""Read mutated videos as training does, and count the results: nothing may crash, hang or fill the memory.

    python scripts/fuzz_videos.py [--files 1000] [--seed 0] [--keep FOLDER] [VIDEO ...]

Mutates the given videos, or small synthetic ones in several containers and codecs. Each mutated file is read in a
separate process, which it may crash: the process opens the file, cuts a coarse and a fine clip at random, reads the
views of an evaluation, and decodes the file to its end. The table has a row for each kind of mutation, and counts these
outcomes:

    ok        the file was read, and nothing else was opened
    refused   the file was reported as broken, in one line
    memory    the process needed more than --memory GB
    hang      the process took longer than --seconds
    crash     the process died, or raised an error that the loader does not expect
    leak      something else was opened: a file that the video names, or a connection to this machine

Exits with 1 if any file has one of the last four outcomes. Seconds and MB are those of the worst file of each kind.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import socket
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch

from mgtrain.clips.cut import cut_random, cut_views
from mgtrain.clips.decode import VideoFile
from mgtrain.data.synthetic import draw_motion
from mgtrain.errors import VideoError
from mgtrain.grid import Grid
from mgtrain.processes.isolated import Lost, isolated
from mgtrain.rng import Draw, generator

COARSE, FINE = Grid(8, 112, (1, 8), (128, 160)), Grid(16, 224, (1, 2), (256, 320))
OUTCOMES = ("ok", "refused", "memory", "hang", "crash", "leak")
WRONG = OUTCOMES[2:]
MOVIES = {  # name -> codec and options
    "h264.mp4": ("libx264", {"bf": "2", "g": "12", "movflags": "faststart"}),
    "h264.mkv": ("libx264", {"bf": "2", "g": "100"}),
    "h264.ts": ("libx264", {"g": "20"}),
    "h264.avi": ("libx264", {"bf": "0"}),
    "hevc.mp4": ("libx265", {"x265-params": "log-level=none:pools=none"}),
    "mpeg4.avi": ("mpeg4", {"bf": "2"}),
    "vp9.webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
    "mpeg1.mpg": ("mpeg1video", {}),
    "mjpeg.avi": ("mjpeg", {}),
    "fragmented.mp4": ("libx264", {"movflags": "frag_keyframe+empty_moov"}),
}
HUGE = (0xFFFFFFFF, 0x7FFFFFFF, 0x80000000, 0x10000000, 0xFFFF, 0)
# Boxes of an mp4 that contain counts, the first of them 8 to 20 bytes after the name.
COUNTED = (b"stsz", b"stts", b"stsc", b"ctts", b"stco", b"stss", b"elst", b"mvhd", b"mdhd", b"tkhd", b"trun", b"dref")
CANARY = "canary.ts"


@dataclass(frozen=True, slots=True)
class Reading:
    """The result of one file."""

    outcome: str
    cause: str
    seconds: float
    bytes: int  # by which the process grew


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", type=Path, nargs="*")
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--memory", type=float, default=2.0, help="GB")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--as-is", action="store_true", help="read the given videos, do not mutate them")
    parser.add_argument("--keep", type=Path, help="folder for copies of the files that go wrong")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, canaries(Path(folder)) as (port, leaked):
        sources = options.videos or make_movies(Path(folder))
        if options.as_is:
            files = [(path, "as it is") for path in sources]
        else:
            files = mutated(Path(folder), sources, options.files, options.seed, port)
        kinds = dict(files)
        readings: dict[Path, Reading] = {}
        begin = time.monotonic()
        read = partial(read_as_training, limit=round(options.memory * 1e9))
        for path, reading in isolated(
            read, list(kinds), options.workers, seconds=options.seconds, memory=round(4 * options.memory * 1e9)
        ):
            if isinstance(reading, Lost):
                kind = {"crash": "crash", "timeout": "hang"}[reading.kind]
                reading = Reading(kind, reading.cause, options.seconds if kind == "hang" else 0.0, 0)
            if leaked():
                reading = Reading("leak", reading.cause, reading.seconds, reading.bytes)
            readings[path] = reading
            if sys.stderr.isatty():
                print(f"\r{len(readings)} of {len(kinds)}", end="", file=sys.stderr)
            if reading.outcome in WRONG and options.keep and path.is_file():
                options.keep.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, options.keep / f"{kinds[path].replace(' ', '_')}_{path.name}")
        print(table(kinds, readings))
        wrong = {path: reading for path, reading in readings.items() if reading.outcome in WRONG}
        for path, reading in wrong.items():
            print(f"{reading.outcome}: {kinds[path]}: {path.name}: {reading.cause}")
        slowest = max(readings, key=lambda path: readings[path].seconds)
        largest = max(readings, key=lambda path: readings[path].bytes)
        print(
            f"{len(readings)} files in {time.monotonic() - begin:.0f} s; slowest {readings[slowest].seconds:.1f} s "
            f"({slowest.name}), largest {readings[largest].bytes / 1e6:.0f} MB ({largest.name})"
        )
    sys.exit(1 if wrong else 0)


def read_as_training(path: Path, limit: int) -> Reading:
    """Read a file as the loader does, and to its end."""
    before, begin = _reset_peak(), time.process_time()
    outcome, cause = "ok", ""
    try:
        with VideoFile(path) as video:
            rng = generator(0, Draw.CUT, 0)
            for grid in (COARSE, FINE):
                video.read([cut_random(grid, video.info, rng)])
            video.read(cut_views(COARSE, video.info, times=3, crops=1))
            video.decodable()
    except VideoError as error:
        outcome, cause = "refused", str(error)
        if "\n" in cause or str(path) not in cause:
            outcome = "crash"
    except MemoryError:
        outcome, cause = "memory", "an allocation failed"
    except Exception as error:
        outcome, cause = "crash", f"{type(error).__name__}: {error}"
    grown = _peak() - before
    if grown > limit:
        outcome, cause = "memory", f"{grown / 1e9:.1f} GB"
    return Reading(outcome, cause, time.process_time() - begin, grown)


def mutated(folder: Path, sources: list[Path], files: int, seed: int, port: int) -> list[tuple[Path, str]]:
    """Write `files` mutated files; returns each with its kind of mutation."""
    sources = [path for path in sources if path.stat().st_size > 64]
    data = [path.read_bytes() for path in sources]
    made = []
    for n in range(files):
        rng = generator(seed, Draw.CHOICE, n)
        kind = [*BYTES, "not a file", "playlist"][n % (len(BYTES) + 2)]
        which = int(rng.integers(len(sources)))
        path = folder / f"{n:06d}{sources[which].suffix}"
        if kind == "not a file":
            _no_file(path, rng)
        elif kind == "playlist":
            path = path.with_suffix(str(rng.choice([".m3u8", ".mp4", ".avi", ".txt", ".mkv"])))
            path.write_bytes(_playlist(rng, port))
        else:
            if kind == "other extension":
                path = path.with_suffix(str(rng.choice([".mp4", ".avi", ".mkv", ".ts", ".jpg", ".m3u8", ".txt", ""])))
            other = data[int(rng.integers(len(data)))]
            path.write_bytes(BYTES[kind](data[which], other, rng))
        made.append((path, kind))
    return made


def _truncated(data: bytes, _: bytes, rng: np.random.Generator) -> bytes:
    return data[: int(rng.integers(len(data)))]


def _beheaded(data: bytes, _: bytes, rng: np.random.Generator) -> bytes:
    return data[int(rng.integers(1, len(data))) :]


def _flipped(data: bytes, _: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for place in rng.integers(len(data), size=int(10 ** rng.uniform(0, 3))):
        changed[place] = int(rng.integers(256))
    return bytes(changed)


def _flipped_header(data: bytes, _: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for place in rng.integers(min(len(data), 4096), size=int(10 ** rng.uniform(0, 2))):
        changed[place] = int(rng.integers(256))
    return bytes(changed)


def _zeroed(data: bytes, _: bytes, rng: np.random.Generator) -> bytes:
    start, end = sorted(rng.integers(len(data), size=2).tolist())
    return data[:start] + bytes(end - start) + data[end:]


def _huge_numbers(data: bytes, _: bytes, rng: np.random.Generator) -> bytes:
    """Replace groups of four bytes near the start of the file by extreme numbers."""
    changed = bytearray(data)
    for place in rng.integers(min(len(data), 4096) - 4, size=int(rng.integers(1, 6))):
        changed[place : place + 4] = struct.pack(">I", int(rng.choice(HUGE)))
    return bytes(changed)


def _huge_counts(data: bytes, _: bytes, rng: np.random.Generator) -> bytes:
    """Make the boxes of an mp4 claim extreme numbers of frames, chunks or seconds."""
    places = [place for name in COUNTED if (place := data.find(name)) >= 0]
    if not places:
        return _huge_numbers(data, b"", rng)
    changed = bytearray(data)
    for place in rng.choice(places, size=int(rng.integers(1, 4))):
        start = place + int(rng.choice([8, 12, 16, 20]))
        changed[start : start + 4] = struct.pack(">I", int(rng.choice(HUGE)))
    return bytes(changed[: len(data)])


def _huge_picture(data: bytes, _: bytes, rng: np.random.Generator) -> bytes:
    """Set a huge width and height in the header of an mp4 or avi; in other files, huge numbers."""
    changed = bytearray(data)
    size = int(rng.choice([65535, 30000, 16384, 4097]))
    for name, offset, form in ((b"avc1", 28, ">HH"), (b"hvc1", 28, ">HH"), (b"hev1", 28, ">HH"), (b"strf", 12, "<ii")):
        place = data.find(name)
        if place >= 0:
            struct.pack_into(form, changed, place + offset, size, size)
    return bytes(changed) if changed != data else _huge_numbers(data, b"", rng)


def _spliced(data: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    return data[: int(rng.integers(len(data)))] + other[int(rng.integers(len(other))) :]


def _repeated(data: bytes, _: bytes, rng: np.random.Generator) -> bytes:
    start, end = sorted(rng.integers(len(data), size=2).tolist())
    return data[:end] + data[start:end] * int(rng.integers(1, 4)) + data[end:]


def _swapped(data: bytes, _: bytes, rng: np.random.Generator) -> bytes:
    a, b, c = sorted(rng.integers(len(data), size=3).tolist())
    return data[:a] + data[b:c] + data[a:b] + data[c:]


BYTES: dict[str, Callable[[bytes, bytes, np.random.Generator], bytes]] = {
    "truncated": _truncated,
    "beheaded": _beheaded,
    "flipped bytes": _flipped,
    "flipped in header": _flipped_header,
    "zeroed stretch": _zeroed,
    "huge numbers": _huge_numbers,
    "huge counts": _huge_counts,
    "huge picture": _huge_picture,
    "spliced": _spliced,
    "repeated stretch": _repeated,
    "swapped stretches": _swapped,
    "other extension": lambda data, other, rng: data,
    "random bytes": lambda data, other, rng: data[: int(rng.integers(64))] + rng.bytes(int(rng.integers(20000))),
}


def _no_file(path: Path, rng: np.random.Generator) -> None:
    """Make anything but a video file: a folder, pipe, socket, empty file, or a link to itself, a device or nowhere."""
    match int(rng.integers(8)):
        case 0:
            path.mkdir()
        case 1:
            os.mkfifo(path)
        case 2:
            path.symlink_to(path.name)
        case 3:
            path.symlink_to("/dev/zero")
        case 4:
            path.symlink_to("nowhere.mp4")
        case 5:
            path.touch()
        case 6:
            path.symlink_to("/proc/self/mem")
        case 7:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(path))


def _playlist(rng: np.random.Generator, port: int) -> bytes:
    """A text file that makes one of FFmpeg's demuxers open the file or address that it names."""
    url = str(rng.choice([CANARY, f"http://127.0.0.1:{port}/v.ts", f"tcp://127.0.0.1:{port}", f"concat:{CANARY}"]))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:1,\n{url}\n#EXT-X-ENDLIST\n"
    texts = [
        playlist,
        f"ffconcat version 1.0\nfile {url}\n",
        f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {port} RTP/AVP 96\n"
        "a=rtpmap:96 H264/90000\n",
        f'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet>'
        f'<Representation id="1" mimeType="video/mp2t"><BaseURL>{url}</BaseURL></Representation></AdaptationSet>'
        "</Period></MPD>",
        f'<SmoothStreamingMedia MajorVersion="2"><StreamIndex Url="{url}"/></SmoothStreamingMedia>',
        f"[playlist]\nFile1={url}\nNumberOfEntries=1\n",
        f"[Reference]\nRef1={url}\n",
        f"RTSPtext\nrtsp://127.0.0.1:{port}/v\n",
    ]
    return _avi_with_subtitles(playlist) if rng.random() < 0.1 else str(rng.choice(texts)).encode()


def _avi_with_subtitles(playlist: str) -> bytes:
    """An avi whose subtitle stream (GAB2) is a playlist, which once made FFmpeg open the files that it names."""
    text = b"GAB2\0" + struct.pack("<HIHHI", 2, 0, 0, 4, len(playlist)) + playlist.encode()
    header = b"strh" + struct.pack("<I4s4s12I", 56, b"txts", b"\0" * 4, 0, 0, 0, 1, 1, 0, 1, 0, 0, 0, 0, 0)
    stream = header + b"strf" + struct.pack("<I", 0)
    main = b"avih" + struct.pack("<I14I", 56, 40000, 0, 0, 16, 1, 0, 1, 0, 64, 64, 0, 0, 0, 0)
    lists = b"hdrl" + main + b"LIST" + struct.pack("<I", len(stream) + 4) + b"strl" + stream
    movie = b"movi" + b"00tx" + struct.pack("<I", len(text)) + text
    body = b"AVI " + b"".join(b"LIST" + struct.pack("<I", len(part)) + part for part in (lists, movie))
    return b"RIFF" + struct.pack("<I", len(body)) + body


@contextmanager
def canaries(folder: Path) -> Iterator[tuple[int, Callable[[], bool]]]:
    """Watch a file and a port that no video may touch.

    Yields the port, and a function that says whether one of them was touched since its last call.
    """
    canary = folder / CANARY
    canary.write_bytes(bytes(1000))
    libc = ctypes.CDLL(None, use_errno=True)
    inotify = libc.inotify_init1(os.O_NONBLOCK)
    libc.inotify_add_watch(inotify, os.fsencode(canary), 0x20)  # IN_OPEN
    with socket.socket() as listener, os.fdopen(inotify, "rb", buffering=0) as events:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)

        def leaked() -> bool:
            try:
                listener.accept()[0].close()
            except BlockingIOError:
                return bool(events.read(4096))
            return True

        with canary.open("rb"):
            assert leaked(), "inotify does not report opened files"
        yield listener.getsockname()[1], leaked


def make_movies(folder: Path) -> list[Path]:
    """Small videos in the containers and codecs that data sets come in."""
    made = []
    for n, (name, (codec, options)) in enumerate(MOVIES.items()):
        pictures = draw_motion("left", generator(0, Draw.SYNTHETIC, n), frames=48, size=(160, 120))
        made.append(folder / name)
        muxer = {key: value for key, value in options.items() if key == "movflags"}
        with av.open(str(made[-1]), "w", options=muxer) as container:
            stream = container.add_stream(codec, rate=24, options={**options, "threads": "1"})
            stream.width, stream.height, stream.pix_fmt = 160, 120, "yuvj420p" if codec == "mjpeg" else "yuv420p"
            for number, picture in enumerate(pictures):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture))
                frame.pts, frame.time_base = number, Fraction(1, 24)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return made


def table(kinds: dict[Path, str], readings: dict[Path, Reading]) -> str:
    """A row for each kind of mutation."""
    rows = [f"{'':20}" + "".join(f"{outcome:>9}" for outcome in OUTCOMES) + f"{'seconds':>10}{'MB':>8}"]
    for kind in [*dict.fromkeys(kinds.values()), "in all"]:
        chosen = [reading for path, reading in readings.items() if kind in (kinds[path], "in all")]
        counts = Counter(reading.outcome for reading in chosen)
        worst = max(r.seconds for r in chosen), max(r.bytes for r in chosen) / 1e6
        rows.append(f"{kind:20}" + "".join(f"{counts[o]:>9}" for o in OUTCOMES) + f"{worst[0]:>10.2f}{worst[1]:>8.0f}")
    return "\n".join(rows)


def _reset_peak() -> int:
    """Reset the peak of this process's memory, and return it in bytes. Linux only."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
