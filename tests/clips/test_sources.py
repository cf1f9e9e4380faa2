"""Folders of frames, and stretches of videos: the clips are those of the same frames in a file of their own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loader import assert_same, trained_on
from videos import number_of, numbered_picture, write_frames, write_video

import mgtrain.clips.frames as module
from mgtrain.clips.cut import Cut, cut_random, cut_views
from mgtrain.clips.decode import VideoFile
from mgtrain.clips.frames import FrameFolder
from mgtrain.clips.pictures import Clip
from mgtrain.clips.sources import Reader, open_source
from mgtrain.clips.units import Source
from mgtrain.data import open_videos
from mgtrain.data.frames import list_frames
from mgtrain.data.videos import Videos
from mgtrain.errors import DataError, VideoError
from mgtrain.grid import Grid
from mgtrain.recipe import Recipe
from mgtrain.rng import Draw, generator

LOSSLESS = {"codec": "libx264rgb", "pix_fmt": "rgb24", "qp": "0"}
GRIDS = (Grid(8, 32, (1, 3), (32, 48)), Grid(4, 64, (2, 2), (64, 64)), Grid(16, 20, (1, 1), (20, 90)))


def same_clips(one: Reader, other: Reader) -> None:
    """Assert that all clips of both are the same, bit for bit."""
    assert one.info == other.info
    for seed, grid in enumerate(GRIDS):
        drawn = [cut_random(grid, one.info, generator(seed, Draw.CUT, n)) for n in range(8)]
        for cuts in (drawn, cut_views(grid, one.info, times=3, crops=3)):
            for ours, theirs in zip(one.read(cuts), other.read(cuts), strict=True):
                assert np.array_equal(ours, theirs)


def shown(source: Reader) -> list[int]:
    """The numbers that all frames show."""
    frames = {k: number_of(picture) for picture, indices in source.pictures(range(source.info.frames)) for k in indices}
    return [frames[k] for k in range(source.info.frames)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 100 frames as lossless files, as a lossless video, and, for parts of it, videos of their own."""
    root = tmp_path_factory.mktemp("whole")
    write_video(root / "v.mkv", 100, fps=25, gop=8, **LOSSLESS)
    write_frames(root / "v", 100)
    return root


def test_frames_give_the_clips_of_the_same_video(whole: Path) -> None:
    with open_source(whole / "v", 25) as frames, open_source(whole / "v.mkv") as video:
        assert isinstance(frames, FrameFolder)
        assert isinstance(video, VideoFile)
        same_clips(frames, video)
        assert shown(frames) == [*range(100)]


@pytest.mark.parametrize("of", ["v", "v.mkv"])
@pytest.mark.parametrize(
    ("stretch", "first", "end"),
    [
        ("#f=20,45", 20, 45),
        ("#t=0.8,1.8", 20, 45),
        ("#f=0,7", 0, 7),
        ("#t=3.6,9", 90, 100),
        ("#t=3.6", 90, 100),
        ("#f=7", 7, 100),
        ("#t=1.999,2", 50, 51),
    ],
)
def test_a_stretch_gives_the_clips_of_a_file_of_its_own(
    whole: Path, tmp_path: Path, of: str, stretch: str, first: int, end: int
) -> None:
    own = [numbered_picture(number) for number in range(first, end)]
    cut_out = write_video(tmp_path / "v.mkv", own, fps=25, gop=8, **LOSSLESS)
    with open_source(f"{whole / of}{stretch}", 25) as part, open_source(cut_out) as alone:
        same_clips(part, alone)
        assert part.first == first
        assert shown(part) == [*range(first, end)]
        assert part.decodable() == end - first
        assert (part.damage, bool(part.lacking)) == ("", stretch.endswith(",9"))


@pytest.mark.parametrize("options", [{"b_frames": 2}, {"b_frames": 0, "codec": "mpeg4"}])
@settings(deadline=None)
@given(first=st.integers(0, 70), frames=st.integers(1, 29))
def test_the_frames_of_a_stretch_are_the_files(
    tmp_path_factory: pytest.TempPathFactory, options: dict[str, object], first: int, frames: int
) -> None:
    suffix = ".avi" if "codec" in options else ".mp4"
    path = tmp_path_factory.getbasetemp() / f"stretches{suffix}"
    if not path.exists():
        write_video(path, 100, gop=9, **options)  # type: ignore[arg-type]
    with open_source(f"{path}#f={first},{first + frames}") as part:
        assert shown(part) == [*range(first, first + frames)]
        assert part.decodable() == frames


def test_a_stretch_after_the_end_is_refused(whole: Path) -> None:
    with pytest.raises(
        VideoError, match=r"v\.mkv#t=5,9: starts after the end, which is at frame 100, 4\.00 s; correct"
    ):
        open_source(f"{whole / 'v.mkv'}#t=5,9")
    for nothing in ("#t=2,1", "#t=1,1", f"#t={'9' * 400}"):
        with pytest.raises(VideoError, match="has nothing in it; the end must be after the start"):
            open_source(f"{whole / 'v.mkv'}{nothing}")


@pytest.mark.parametrize(
    ("name", "first"),
    [("img_{:05}.png", 1), ("{:06}.png", 0), ("frame_{:010}.png", 7), ("a 1-{}.png", 95), ("{:02}.png", 95)],
)
def test_names_and_first_numbers_are_recognized(tmp_path: Path, name: str, first: int) -> None:
    write_frames(tmp_path / "v", 12, name, first)
    write_frames(tmp_path / "v", 12, "flow_x_{:05}.png")
    for other in (".img_00001.png", "cover.png", "notes1.txt"):
        (tmp_path / "v" / other).touch()
    with open_source(tmp_path / "v", 10) as frames:
        assert shown(frames) == [*range(12)]


def test_a_missing_frame_repeats_the_one_before(tmp_path: Path) -> None:
    write_frames(tmp_path / "v", 12)
    for number in (4, 5, 9):
        (tmp_path / "v" / f"img_{number:05}.png").unlink()
    with open_source(tmp_path / "v", 10) as frames:
        assert shown(frames) == [0, 1, 2, 2, 2, 5, 6, 7, 7, 9, 10, 11]
        assert frames.decodable() == 12
        assert (frames.damage, frames.lacking) == ("", "img_00004.png and 2 more are missing")
    with open_source(tmp_path / "v#f=5,8", 10) as part:
        assert (part.decodable(), part.lacking) == (3, "")


def test_numbers_may_have_a_step(tmp_path: Path) -> None:
    write_frames(tmp_path / "v", [numbered_picture(n // 5) for n in range(50)])
    for number in range(1, 51):
        if number % 5 != 1:
            (tmp_path / "v" / f"img_{number:05}.png").unlink()
    assert len(list_frames(str(tmp_path / "v"))) == 10
    with open_source(tmp_path / "v", 10) as frames:
        assert shown(frames) == [*range(10)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no numbered pictures such as img_00001.jpg; put the frames of one video there"),
        (
            ["left_1.png", "left_2.png", "right_1.png", "right_2.png"],
            r"several sequences of pictures, left_\*.png and right_\*.png;",
        ),
        (["1.png", "01.png", "2.png"], r"the numbers of \*.png do not count frames"),
        (["1.png", "17.png", "1000.png"], r"the numbers of \*.png do not count frames; number them 1, 2, 3"),
    ],
)
def test_a_folder_that_is_not_one_video_is_refused(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        write_frames(tmp_path, [numbered_picture(1)], name)
    with pytest.raises(VideoError, match=message):
        open_source(tmp_path, 10)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "img_00003.png: not a picture that can be read; replace this frame, or leave the video out"),
        (b"half", "img_00003.png: .*truncated"),
    ],
)
def test_a_damaged_frame_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    folder = write_frames(tmp_path / "v", 6)
    file = folder / "img_00003.png"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if data else b"")
    with open_source(folder, 10) as frames:
        with pytest.raises(VideoError, match=message):
            shown(frames)
        assert frames.decodable() == 2
        assert frames.damage.startswith("img_00003.png: ")


def test_frames_of_another_size_are_resized(tmp_path: Path) -> None:
    write_frames(tmp_path / "v", [numbered_picture(n, (128, 64) if n < 3 else (200, 90)) for n in range(6)])
    with open_source(tmp_path / "v", 10) as frames:
        assert shown(frames) == [*range(6)]
        assert {picture.shape for picture, _ in frames.pictures(range(6))} == {(64, 128, 3)}


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_pictures_of_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    from PIL import Image

    (tmp_path / "v").mkdir()
    suffix = "jpg" if mode == "CMYK" else "png"
    for n in range(4):
        Image.fromarray(numbered_picture(n)).convert(mode).save(tmp_path / "v" / f"{n}.{suffix}")
    with open_source(tmp_path / "v", 10) as frames:
        assert shown(frames) == [*range(4)]


@pytest.mark.parametrize("decoder", ["pillow", "simplejpeg"])
def test_a_jpeg_is_shrunk_as_far_as_no_clip_is_enlarged(
    tmp_path: Path, decoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if decoder == "pillow":
        monkeypatch.setattr(module, "decode_jpeg", None)
    elif module.decode_jpeg is None:
        pytest.skip("simplejpeg is not installed")
    pictures = [numbered_picture(n, (642, 358)) for n in range(8)]
    for picture in pictures:
        picture[190:] = 90 + 60 * np.sin(np.arange(642) / 25)[None, :, None]  # smooth, so that sizes can be compared
    sizes: list[tuple[int, ...]] = []
    put = Clip.put
    monkeypatch.setattr(Clip, "put", lambda clip, k, picture: (sizes.append(picture.shape), put(clip, k, picture)))
    write_frames(tmp_path / "v", pictures, "img_{:05}.jpg", quality=95)
    write_frames(tmp_path / "w", pictures)
    with open_source(tmp_path / "v", 10) as frames, open_source(tmp_path / "w", 10) as lossless:
        assert (frames.codec, lossless.codec) == ("jpeg", "png")
        for crop, by in ((40, 8), (41, 8), (46, 4), (80, 4), (112, 2), (180, 1), (224, 1)):
            region = (24, 16, 592, 328)
            sizes.clear()
            (clip,) = frames.read([Cut((0, 3, 7), region, crop, flip=True)])
            assert set(sizes) == {(-(-358 // by), -(-642 // by), 3)}
            (exact,) = lossless.read([Cut((0, 3, 7), region, crop, flip=True)])
            assert [number_of(p[:, ::-1]) for p in clip] == [number_of(p[:, ::-1]) for p in exact]
            smooth = slice(crop * 6 // 10, None)
            assert np.abs(clip[:, smooth].astype(int) - exact[:, smooth]).max() < 8  # of 255


def test_both_decoders_of_jpeg_give_the_same_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("simplejpeg")
    rng = np.random.default_rng(0)
    write_frames(tmp_path / "a", [rng.integers(0, 255, (97, 131, 3), np.uint8)] * 2, "{}.jpg", quality=80)
    write_frames(tmp_path / "b", [numbered_picture(5, (301, 200))] * 2, "{}.jpg", quality=60, progressive=True)
    cuts = [Cut((0, 1), (0, 0, 131, 97), crop, flip=False) for crop in (10, 20, 40, 80)]
    for name in ("a", "b"):
        with open_source(tmp_path / name, 10) as frames:
            monkeypatch.undo()
            fast = frames.read(cuts)
            monkeypatch.setattr(module, "decode_jpeg", None)
            for ours, theirs in zip(fast, frames.read(cuts), strict=True):
                assert np.array_equal(ours, theirs)


def test_only_the_wanted_frames_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_frames(tmp_path / "v", 30, "img_{:05}.jpg")
    read: list[int] = []
    picture = FrameFolder._picture
    monkeypatch.setattr(FrameFolder, "_picture", lambda self, k, by: (read.append(k), picture(self, k, by))[1])
    with open_source(folder, 10) as frames:
        frames.read(cut_views(Grid(4, 32, (5, 5), (32, 32)), frames.info, times=2, crops=3))
    assert len(read) == 8  # once for all crops


def test_a_frame_rate_must_be_given(tmp_path: Path, tiny: Callable[..., Recipe]) -> None:
    write_frames(tmp_path / "v", 4)
    with pytest.raises(VideoError, match=r"v: a folder of frames has no frame rate; set data\.fps"):
        open_source(tmp_path / "v")
    with pytest.raises(DataError, match=r"v: is a folder of frames, so set data\.fps"):
        Source(Videos.of(str(tmp_path), [("v", 0)], ("x",)), tiny().data)


def lossless(motions: Path, root: Path) -> None:
    """The training videos as lossless files, as frames, and as stretches of a recording of each class."""
    videos = open_videos("list", str(motions), "train.csv")
    root.mkdir()
    rows: dict[str, list[str]] = {"files": [], "frames": [], "stretches": ["path,start,end,label"]}
    pictures: dict[int, list[np.ndarray]] = {}
    for n in range(len(videos)):
        label = videos.label(n)
        with VideoFile(videos.path(n)) as video:
            own = [np.ascontiguousarray(picture) for picture, _ in video.pictures(range(video.info.frames))]
        write_video(root / f"{n}.mkv", own, fps=25, **LOSSLESS)
        write_frames(root / f"f{n}", own)
        start = len(pictures.setdefault(label, [])) / 25
        pictures[label] += own
        rows["files"].append(f"{n}.mkv {label}")
        rows["frames"].append(f"f{n} {len(own)} {label}")
        rows["stretches"].append(f"rec{label}.mkv,{start},{start + len(own) / 25},{label}")
    for label, own in pictures.items():
        write_video(root / f"rec{label}.mkv", own, fps=25, **LOSSLESS)
    for name, lines in rows.items():
        (root / name).mkdir()
        (root / name / "train.csv").write_text("\n".join(lines))


@pytest.mark.parametrize("kind", ["frames", pytest.param("stretches", marks=pytest.mark.slow)])
def test_the_loader_makes_the_same_batches_from_any_step_on(
    tiny: Callable[..., Recipe], motions: Path, tmp_path: Path, kind: str
) -> None:
    root = tmp_path / "all"
    lossless(motions, root)

    def recipe(of: str, *overrides: str) -> Recipe:
        shutil.copy(root / of / "train.csv", root / "train.csv")  # which `opened` reads
        return tiny(f"data.root={root}", "data.fps=25", *overrides)

    straight = trained_on(recipe("files"))
    assert_same(trained_on(recipe(kind)), straight)
    assert_same(trained_on(recipe(kind, "hardware.workers=2"), 4), straight[4:])


def test_a_video_is_closed_when_its_stretch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "v.mp4", 10)
    closed: list[str] = []
    monkeypatch.setattr(VideoFile, "__exit__", lambda self, *_: closed.append(self.path))
    with pytest.raises(VideoError):
        open_source(f"{tmp_path / 'v.mp4'}#f=10,20")
    assert closed == [str(tmp_path / "v.mp4")]
