"""Prepared sets in tar files: the same clips as from files, resumed at whole members, verified, refused if damaged."""

from __future__ import annotations

import json
import os
import pickle
import resource
import subprocess
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_loader import assert_same, joined, trained_on, views
from videos import write_video
from warm import Start

from mgtrain.clips.cut import Cut
from mgtrain.clips.decode import VideoFile
from mgtrain.clips.loader import BadVideos
from mgtrain.clips.prepared import PreparedSet, Settings
from mgtrain.errors import DataError, VideoError
from mgtrain.preflight.prepare import prepare, verify
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe

FILES, SHARDS = Settings((48, 32), 25, None), Settings((48, 32), 25, None, 60_000)
CUT = Cut((0, 5, 23), (3, 4, 40, 40), 30, flip=True)


@pytest.fixture(scope="module")
def paths(motions: Path) -> list[str]:
    return sorted(path.relative_to(motions).as_posix() for path in motions.rglob("*.mp4"))


@pytest.fixture(scope="module")
def files(motions: Path, paths: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All videos as files. Not to be changed."""
    folder = tmp_path_factory.mktemp("files") / "out"
    prepare(motions, paths, folder, FILES, 2)
    return folder


@pytest.fixture(scope="module")
def sharded(motions: Path, paths: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All videos in shards. Not to be changed."""
    folder = tmp_path_factory.mktemp("sharded") / "out"
    done = prepare(motions, paths, folder, SHARDS, 2)
    assert (done.videos, done.made) == (len(paths), len(paths))
    assert done.shards == len(list((folder / "shards").iterdir())) > 3
    return folder


def clips(folder: Path, paths: list[str]) -> list[np.ndarray]:
    return read(PreparedSet(folder), paths)


def read(ready: PreparedSet, paths: list[str]) -> list[np.ndarray]:
    return [ready.open(int(ready.find([path])[0]), path).read([CUT])[0] for path in paths]


def open_shards(folder: Path) -> int:
    """How many of a set's shards this process has open."""
    places = [Path("/proc/self/fd") / fd for fd in os.listdir("/proc/self/fd")]
    return sum(str(folder / "shards") in os.readlink(place) for place in places if place.is_symlink())


def names(folder: Path) -> Counter[str]:
    """What `tar tf` says is in all shards."""
    found: Counter[str] = Counter()
    for shard in sorted((folder / "shards").iterdir()):
        done = subprocess.run(["tar", "--quoting-style=literal", "-tf", shard], capture_output=True, check=True)
        assert done.stderr == b""
        found.update(os.fsdecode(done.stdout).splitlines())
    return found


def test_shards_are_plain_tar_files_of_the_files_of_a_set_without_them(files: Path, sharded: Path, tmp_path: Path):
    expected = {path.relative_to(files).as_posix(): path.read_bytes() for path in files.rglob("*.mp4")}
    assert names(sharded) == Counter([*expected])
    assert {path.name for path in sharded.iterdir()} == {
        "prepared.json", "videos.jsonl", "offsets.bin", "index.npy", "shards"
    }  # fmt: skip
    for shard in (sharded / "shards").iterdir():
        assert shard.stat().st_size <= 60_000
        with tarfile.open(shard, "r:") as tar:
            tar.extractall(tmp_path, filter="data")
    assert {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in tmp_path.rglob("*.mp4")} == expected
    with VideoFile(next(tmp_path.rglob("*.mp4"))) as video:
        assert video.info.frames == 24


def test_clips_are_bit_for_bit_those_of_files(files: Path, sharded: Path, paths: list[str]):
    for ours, theirs in zip(clips(sharded, paths), clips(files, paths), strict=True):
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_and_evaluation_see_the_same(
    tiny: Callable[..., Recipe], files: Path, sharded: Path, workers: int
) -> None:
    ours, theirs = (tiny(f"data.prepared={folder}", f"hardware.workers={workers}") for folder in (sharded, files))
    expected = trained_on(theirs)
    assert_same(trained_on(ours), expected)
    assert_same(joined([trained_on(ours, world=World(rank, 2)) for rank in range(2)]), expected)
    assert_same(*(views(recipe, 2, 3, World(), BadVideos(12, 0)) for recipe in (ours, theirs)))


def test_a_shard_is_opened_once_in_a_process_and_forked_ones_read_it_together(sharded: Path, paths: list[str]):
    ready = PreparedSet(sharded)
    expected = clips(sharded, paths)

    def wrong() -> int:
        return sum(not np.array_equal(one, other) for one, other in zip(read(ready, paths), expected, strict=True))

    before = open_shards(sharded)
    assert (wrong(), wrong()) == (0, 0)
    assert (before, open_shards(sharded)) == (0, len(list((sharded / "shards").iterdir())))
    children = []
    for _ in range(3):
        pid = os.fork()
        if not pid:
            os._exit(max(wrong() for _ in range(5)))
        children.append(pid)
    assert wrong() == 0
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0, 0]
    other = pickle.loads(pickle.dumps(ready))
    assert all(map(np.array_equal, read(other, paths), expected))


def test_no_more_shards_stay_open_than_a_quarter_of_the_limit(
    sharded: Path, files: Path, paths: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (8, 8))
    ready = PreparedSet(sharded)
    for path, expected in zip(paths, clips(files, paths), strict=True):
        assert np.array_equal(read(ready, [path])[0], expected)
        assert open_shards(sharded) <= 2
    del ready
    assert open_shards(sharded) == 0


def test_odd_names_are_names_of_members(tmp_path: Path):
    root, out = tmp_path / "in", tmp_path / "out"
    odd = ["a b, é.avi", "long" * 50 + ".mp4", f"{'deep' * 20}/{'er' * 60}.mp4", os.fsdecode(b"\xff\xfe.mp4")]
    root.mkdir()
    for name in odd:
        (root / name).parent.mkdir(exist_ok=True)
        write_video(tmp_path / "v.mp4", 24)
        (tmp_path / "v.mp4").rename(root / name)
    prepare(root, odd, out, Settings((64,), 25, None, 10**9), 1)
    assert names(out) == Counter(f"64/{name}.mp4" for name in odd)
    assert verify(out, 1) == {}
    assert len({clip.tobytes() for clip in clips(out, odd)}) == 1


@pytest.mark.parametrize("after", [1, 5, 9])
def test_interrupted_work_resumes_at_whole_members(motions: Path, files: Path, tmp_path: Path, after: int):
    names_in = [f"videos/train/{name}_{n}.mp4" for name in ("left", "right") for n in range(6)]
    out = tmp_path / "out"

    def stop(_: str, done: int, __: int) -> None:
        if done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(motions, names_in, out, SHARDS, 1, progress=stop)
    with pytest.raises(DataError, match="is incomplete; resume"):
        PreparedSet(out)
    assert sum(names(out).values()) == 2 * after  # half-made shards, too, can be listed
    last = max((out / "shards").iterdir())
    with last.open("ab") as file:
        file.write(b"half a member")  # what a kill leaves behind
    (out / "loose/48").mkdir(parents=True, exist_ok=True)
    (out / "loose/48/torn.mp4").write_bytes(b"torn")
    done = prepare(motions, names_in, out, SHARDS, 1)
    assert (done.made, done.videos) == (12 - after, 12)
    assert names(out) == Counter(f"{level}/{name}.mp4" for level in (48, 32) for name in names_in)
    assert verify(out, 2) == {}
    assert not (out / "loose").exists()
    for ours, theirs in zip(clips(out, names_in), clips(files, names_in), strict=True):
        assert np.array_equal(ours, theirs)
    before = {path.name: path.read_bytes() for path in (out / "shards").iterdir()}
    assert prepare(motions, names_in, out, SHARDS, 1).made == 0
    assert {path.name: path.read_bytes() for path in (out / "shards").iterdir()} == before


def copied(folder: Path, to: Path) -> Path:
    subprocess.run(["cp", "-r", folder, to], check=True)
    return to


def test_a_missing_or_truncated_shard_is_one_error_and_is_made_again(
    motions: Path, sharded: Path, files: Path, paths: list[str], tmp_path: Path
):
    out = copied(sharded, tmp_path / "out")
    first, second = sorted((out / "shards").iterdir())[:2]
    lost = sum(names(out).values())
    first.unlink()
    with pytest.raises(DataError, match=r"00000\.tar: is missing; copy this shard again, or .* its [\d]+ files again"):
        PreparedSet(out)
    lost -= sum(names(out).values())
    assert verify(out, 2) == {str(first): f"is missing, with {lost} members"}
    size = second.stat().st_size
    os.truncate(second, size // 2)
    assert "which cuts off" in verify(out, 2)[str(second)]
    first.write_bytes((sharded / "shards" / first.name).read_bytes())
    with pytest.raises(DataError, match=r"00001\.tar: has [\d,]+ bytes instead of [\d,]+ or more; copy this shard"):
        PreparedSet(out)
    first.unlink()
    second.unlink()
    done = prepare(motions, paths, out, SHARDS, 2)
    assert lost // 2 < done.made < len(paths)
    assert verify(out, 2) == {}
    for ours, theirs in zip(clips(out, paths), clips(files, paths), strict=True):
        assert np.array_equal(ours, theirs)


def test_the_end_of_a_shard_counts(sharded: Path, tmp_path: Path):
    out = copied(sharded, tmp_path / "out")
    shard = out / "shards/00000.tar"
    os.truncate(shard, shard.stat().st_size - 512)
    assert list(verify(out, 1)) == [str(shard)]


def assert_refused_with(folder: Path, key: str, value: object) -> None:
    """A set is refused if a level of its first video has another value."""
    first, *others = (folder / "videos.jsonl").read_text().splitlines(keepends=True)
    record = json.loads(first)
    record["levels"][1][key] = value
    (folder / "videos.jsonl").write_text("".join([json.dumps(record) + "\n", *others]))
    with pytest.raises(DataError, match="lacks keys or has wrong values; prepare the set again"):
        verify(folder, 1)


@pytest.mark.parametrize("value", ["x", -1, None, 1.5])
@pytest.mark.parametrize("key", ["shard", "offset", "bytes"])
def test_a_manifest_with_absurd_places_is_refused(sharded: Path, tmp_path: Path, key: str, value: object):
    assert_refused_with(copied(sharded, tmp_path / "out"), key, value)


@pytest.mark.parametrize(("key", "value"), [("level", 17), ("bytes", "x"), ("width", None)])
def test_a_manifest_with_absurd_levels_is_refused_without_shards_too(
    files: Path, tmp_path: Path, key: str, value: object
):
    assert_refused_with(copied(files, tmp_path / "out"), key, value)


def test_the_command_prepares_and_verifies_shards(mgtrain: Start, tiny_text: str, files: Path, tmp_path: Path):
    (tmp_path / "tiny.yaml").write_text(tiny_text)
    words = ("data", "prepare", "tiny.yaml", "--to", "out", "--levels", "48,32")
    done = mgtrain(tmp_path, *words, "--shards", "1 MB")
    assert done.returncode == 0, done.stderr
    assert "1 shards; " in done.stdout or "2 shards; " in done.stdout
    assert names(tmp_path / "out") == Counter(path.relative_to(files).as_posix() for path in files.rglob("*.mp4"))
    assert mgtrain(tmp_path, "data", "verify", "out").returncode == 0
    for size in ("2", "GiB", "-1GiB", "1e3GB", "nanGiB", "10kB"):
        refused = mgtrain(tmp_path, *words[:-2], "--to", "other", f"--shards={size}")
        assert (refused.returncode, "--shards" in refused.stderr, (tmp_path / "other").exists()) == (2, True, False)
    shard = tmp_path / "out/shards/00000.tar"
    os.truncate(shard, 10_000)
    found = mgtrain(tmp_path, "data", "verify", "out")
    assert (found.returncode, str(Path("out/shards/00000.tar")) in found.stdout) == (3, True)
    refused = mgtrain(tmp_path, "fit", "tiny.yaml", "data.prepared=out", "--device", "cpu")
    assert refused.returncode == 3
    assert "00000.tar: has 10,000 bytes instead of" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_damaged_frame_is_named_by_shard_and_member(sharded: Path, paths: list[str], tmp_path: Path):
    out = copied(sharded, tmp_path / "out")
    for shard in (out / "shards").iterdir():
        shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(VideoError, match=r"out/shards/0000\d\.tar, member 48/videos/\S+\.mp4: frame 0 is damaged"):
        clips(out, paths)


def test_changed_members_and_headers_are_found(sharded: Path, tmp_path: Path):
    out = copied(sharded, tmp_path / "out")
    shard = out / "shards/00001.tar"
    with tarfile.open(shard) as tar:
        members = tar.getmembers()
    data = bytearray(shard.read_bytes())
    data[members[1].offset_data + members[1].size // 2] ^= 1
    shard.write_bytes(data)
    of = len(members)
    assert verify(out, 2) == {
        str(
            shard
        ): f"1 of {of} members have another checksum than when they were written, the first is {members[1].name}"
    }
    data[members[1].offset_data + members[1].size // 2] ^= 1
    data[members[1].offset] ^= 1  # in its name
    shard.write_bytes(data)
    assert verify(out, 2) == {str(shard): f"tar cannot list {of - 1} of {of} members: their headers have changed"}


def test_a_video_that_changed_takes_its_new_place(tmp_path: Path):
    root, out = tmp_path / "in", tmp_path / "out"
    root.mkdir()
    for name in ("a.mp4", "b.mp4"):
        write_video(root / name, 5)
    (root / "broken.mp4").write_bytes(b"no video")
    listed, settings = ["a.mp4", "b.mp4", "broken.mp4"], Settings((64,), 18, None, 10**9)
    assert list(prepare(root, listed, out, settings, 1).broken) == ["broken.mp4"]
    write_video(root / "a.mp4", 4)
    assert prepare(root, listed, out, settings, 1).made == 2
    ready = PreparedSet(out)
    assert [ready.open(int(ready.find([name])[0]), name).info.frames for name in ("a.mp4", "b.mp4")] == [4, 5]
    assert verify(out, 1) == {}


def test_a_set_with_other_shards_is_another_set(sharded: Path, motions: Path, paths: list[str]):
    for settings, words in ((FILES, "--quality 25"), (Settings((48, 32), 25, None, 2**31), "--shards 2GiB")):
        with pytest.raises(DataError, match=rf"made with .* --shards 0\.06MB, not .*{words}; choose"):
            prepare(motions, paths, sharded, settings, 1)


def test_an_index_that_points_elsewhere_is_refused_in_one_line(sharded: Path, paths: list[str], tmp_path: Path):
    for key, value in (("shard", -1), ("shard", 10**6), ("offset", 2**62), ("size", 2**60)):
        out = copied(sharded, tmp_path / f"{key}{value}")
        rows = np.load(out / "index.npy")
        rows["levels"][key][:, :] = value
        np.save(out / "index.npy", rows)
        with pytest.raises((DataError, VideoError)):
            clips(out, paths)
