from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from warm import Start

from mgtrain.data import open_splits, open_videos
from mgtrain.data.index import Finding, Index, make_index
from mgtrain.data.videos import Videos
from mgtrain.errors import DataError
from mgtrain.recipe import Recipe

BLOCK = b"0123456789abcdef" * 1024  # 16 KiB, more than the blocks that are compared first


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Files with contents to compare: a, b and c are equal in size, a and b in their first, middle and last block."""
    changed = bytearray(BLOCK)
    changed[5000] ^= 1
    contents = {
        "a.mp4": BLOCK,
        "a copy.mp4": BLOCK,
        "b.mp4": bytes(changed),
        "c.mp4": bytes(len(BLOCK)),
        "d.mp4": b"d",
        "empty.mp4": b"",
        "sub/._a.mp4": b"x",
    }
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def index(root: Path, *, contents: bool = True, **splits: list[tuple[str, int]]) -> Index:
    made = {name: Videos.of(str(root), entries, ("x", "y")) for name, entries in splits.items()}
    return make_index(made, contents=contents)


def found(made: Index, kind: str) -> list[tuple[tuple[str, ...], int, tuple[str, ...]]]:
    return [(f.splits, f.count, f.examples) for f in made.findings if f.kind == kind]


def test_files_that_are_no_videos_are_left_out_and_told(root: Path):
    made = index(root, train=[("gone.mp4", 0), ("a.mp4", 0), ("empty.mp4", 0), ("sub/._a.mp4", 1), ("sub", 1)])
    assert made.usable["train"].tolist() == [1]
    assert found(made, "missing") == [(("train",), 2, ("gone.mp4", "sub"))]
    assert found(made, "empty") == [(("train",), 1, ("empty.mp4",))]
    assert found(made, "apple_double") == [(("train",), 1, ("sub/._a.mp4",))]
    assert made.counts() == {
        "train": {"rows": 5, "matched": 1, "missing": 2, "empty": 1, "apple_double": 1, "repeated": 0, "duplicates": 0}
    }
    assert found(made, "extra") == [((), 4, ("a copy.mp4", "b.mp4", "c.mp4"))]
    assert not found(made, "extra_apple_double")
    assert found(index(root, train=[("a.mp4", 0)]), "extra_apple_double") == [((), 1, ("sub/._a.mp4",))]


def test_rows_that_a_reader_missed_are_counted(root: Path):
    videos = Videos.of(str(root), [("a.mp4", 0), ("gone.mp4", 0)], ("x",), missing=7, missing_names=["p\n", "q"])
    made = make_index({"train": videos})
    assert made.counts()["train"]["rows"] == 9
    assert found(made, "missing") == [(("train",), 8, ("'p\\n'", "q", "gone.mp4"))]


def test_contents_are_compared_to_the_last_byte(root: Path):
    rows = [("c.mp4", 0), ("a.mp4", 0), ("b.mp4", 0), ("d.mp4", 1), ("a copy.mp4", 0), ("d.mp4", 1)]
    made = index(root, train=rows)
    assert found(made, "duplicates") == [(("train",), 1, ("a copy.mp4 = a.mp4",))]
    assert found(made, "repeated") == [(("train",), 1, ("d.mp4",))]
    assert found(made, "conflicts") == []
    assert len(made.usable["train"]) == 6  # told, but kept
    assert not found(index(root, contents=False, train=rows), "duplicates")


def test_equal_contents_with_unequal_labels_are_told(root: Path):
    made = index(root, train=[("a.mp4", 0), ("a copy.mp4", 1)])
    assert found(made, "conflicts") == [(("train",), 1, ("a copy.mp4 = a.mp4",))]
    made = index(root, train=[("a.mp4", 0)], val=[("a.mp4", 1)])
    assert found(made, "conflicts") == [(("train", "val"), 1, ("a.mp4",))]


def test_leakage_is_the_same_path_content_or_source(root: Path):
    clips = ["abcdefghij-_000001_000011.mp4", "abcdefghij-_000020_000030.mp4", "abcdefghij__000001_000011.mp4"]
    for number, clip in enumerate(clips):
        (root / clip).write_bytes(bytes([number]))
    train = [("a.mp4", 0), ("c.mp4", 0), (clips[0], 0)]
    made = index(root, train=train, val=[("d.mp4", 0), ("c.mp4", 0), ("a copy.mp4", 0), (clips[1], 0), (clips[2], 0)])
    assert found(made, "same_path") == [(("train", "val"), 1, ("c.mp4",))]
    assert found(made, "same_content") == [(("train", "val"), 1, ("a copy.mp4 = a.mp4",))]
    assert found(made, "same_source") == [(("train", "val"), 1, (f"{clips[1]} = {clips[0]}",))]
    assert all(f.warns for f in made.findings if f.kind.startswith("same"))
    assert not index(root, train=train, val=[("d.mp4", 0)]).counts()["val"]["duplicates"]


def test_stretches_of_a_file_are_different_rows_and_leak_from_split_to_split(root: Path):
    made = index(
        root,
        train=[("a.mp4#t=0,5", 0), ("a.mp4#t=3,9", 1), ("a.mp4#t=0,5", 0), ("b.mp4#f=2,7", 0)],
        val=[("a.mp4#t=9,12", 0), ("a.mp4#t=3,9", 1), ("a copy.mp4#t=20,30", 0), ("c.mp4#t=0,1", 0), ("d.mp4", 0)],
    )
    assert found(made, "repeated") == [(("train",), 1, ("a.mp4#t=0,5",))]
    assert not found(made, "duplicates")
    assert not found(made, "conflicts")
    assert found(made, "same_path") == [(("train", "val"), 1, ("a.mp4#t=3,9",))]
    assert found(made, "same_file") == [(("train", "val"), 1, ("a.mp4#t=9,12 = a.mp4#t=0,5",))]
    assert found(made, "same_content") == [(("train", "val"), 1, ("a copy.mp4#t=20,30 = a.mp4#t=0,5",))]
    (finding,) = (finding for finding in made.findings if finding.kind == "same_file")
    assert "train and val: leakage, stretches of the same file: 1 (" in str(finding)
    assert made.copies["train"].tolist() == [1, 2]  # the row that val has, and the second of two


def test_equal_stretches_of_equal_files_are_duplicates(root: Path):
    made = index(root, train=[("a.mp4#t=0,5", 0), ("a copy.mp4#t=0,5", 1), ("a copy.mp4#t=0,6", 0)])
    assert found(made, "duplicates") == [(("train",), 1, ("a copy.mp4#t=0,5 = a.mp4#t=0,5",))]
    assert found(made, "conflicts") == [(("train",), 1, ("a copy.mp4#t=0,5 = a.mp4#t=0,5",))]


def test_folders_of_frames_are_compared_by_all_their_bytes(root: Path):
    for name, changed in (("p", None), ("q", None), ("r", 3), ("s", 1), ("u/unlisted", None)):
        for number in range(1, 8):
            file = root / name / f"img_{number:05}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(BLOCK if number != changed else BLOCK[:-1] + b"!")
    (root / "none").mkdir()
    (root / "two").mkdir()
    for name in ("left1.jpg", "left2.jpg", "right1.jpg", "right2.jpg"):
        (root / "two" / name).touch()
    rows = [(f"{name}#f=0,7", 0) for name in ("p", "q", "r", "s", "none", "two", "gone")]
    made = index(root, train=rows)
    assert found(made, "duplicates") == [(("train",), 1, ("q#f=0,7 = p#f=0,7",))]
    assert found(made, "missing") == [(("train",), 3, ("none#f=0,7", "two#f=0,7", "gone#f=0,7"))]
    (missing,) = (finding for finding in made.findings if finding.kind == "missing")
    assert "none: no numbered pictures such as img_00001.jpg" in missing.hint
    extra = index(root, train=[(name, 0) for name in ("a copy.mp4", "a.mp4", "b.mp4", "c.mp4", "d.mp4", "empty.mp4")])
    assert found(extra, "extra") == [((), 6, ("p", "q", "r"))]
    assert found(index(root, train=[("two#f=0,2", 0)]), "missing")[0][1] == 1


def test_a_finding_is_one_printable_line(root: Path):
    assert str(Finding("missing", ("val",), 12_345, ("a", "b"))) == "val: rows without a file: 12,345 (a, b, ...)"
    for name in ("A\nline.mp4", "\udcff.mp4"):
        (root / name).write_bytes(b"x")
    made = index(root, train=[("\udcff.mp4", 0)], val=[("\udcff.mp4", 0)])
    assert found(made, "extra")[0][2][0] == "'A\\nline.mp4'"
    assert found(made, "same_path")[0][2] == ("'\\udcff.mp4'",)
    assert all(str(finding).isprintable() for finding in made.findings)


def test_a_healthy_set_has_no_warning_and_its_index_reads_back(
    tiny: Callable[..., Recipe], mgtrain: Start, tiny_text: str, tmp_path: Path
):
    (tmp_path / "tiny.yaml").write_text(tiny_text)
    done = mgtrain(tmp_path, "data", "index", "tiny.yaml", "--to", "lists", "--strict", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert list(result) == ["schema", "root", "files", "splits", "findings"]
    assert (result["schema"], result["findings"]) == ("mgtrain.data_index/1", [])
    assert [split["matched"] for split in result["splits"].values()] == [24, 12]
    lists = [f"data.{split}={tmp_path}/lists/{split}.csv" for split in ("train", "val")]
    for before, after in zip(open_splits(tiny().data).values(), open_splits(tiny(*lists).data).values(), strict=True):
        assert after.fingerprint == before.fingerprint


def test_any_annotation_becomes_a_list(motions: Path, tmp_path: Path):
    for n, file in enumerate(sorted((motions / "videos/val").iterdir())[:4]):
        (tmp_path / f"train/c{n % 2}").mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / f"train/c{n % 2}" / file.name)
    videos = open_videos("folder", str(tmp_path), "train")
    assert len(make_index({"train": videos}).usable["train"]) == 4


def test_warnings_go_to_stderr_and_fail_only_if_strict(mgtrain: Start, tiny_text: str, root: Path, tmp_path: Path):
    (tmp_path / "r.yaml").write_text(tiny_text)
    (root / "train.csv").write_text("a.mp4 0\ngone.mp4 1\n")
    (root / "val.csv").write_text("a.mp4 0\nd.mp4 1\n")
    words = ("data", "index", "r.yaml", f"data.root={root}", "data.classes=2", "--to")
    done = mgtrain(tmp_path, *words, "lists")
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        f"warning: train: rows without a file: 1 (gone.mp4); {root} has 'd.mp4'; correct data.root or the rows",
        "warning: train and val: leakage, the same videos: 1 (a.mp4)",
    ]
    assert done.stdout.splitlines()[1].split() == ["train", "2", "1", "1", "0", "0", "0", "0"]
    assert (tmp_path / "lists/train.csv").read_text() == "a.mp4 0\n"
    done = mgtrain(tmp_path, *words, "strict", "--strict")
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1] == "mgtrain: warnings: 2, and --strict allows none; fix what they name"
    (root / "val.csv").write_text("empty.mp4 0\n")
    done = mgtrain(tmp_path, *words, "none")
    assert done.returncode == 3
    assert "the val split has no video that can be used" in done.stderr
    assert not (tmp_path / "none").exists()


def test_a_million_rows_need_no_object_each():
    videos = Videos.of("/nowhere", ((f"{n:06}.mp4", 0) for n in range(50_000)), ("x",))
    made = make_index({"train": videos})
    assert found(made, "missing")[0][1] == 50_000
    assert made.usable["train"].nbytes == 0


def test_a_file_that_cannot_be_read_is_named(root: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(path: str, mode: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("mgtrain.data.index.open", refuse, raising=False)
    with pytest.raises(DataError, match=r"\.mp4: cannot be read: Permission denied; correct its permissions"):
        index(root, train=[("a.mp4", 0), ("b.mp4", 0)])
