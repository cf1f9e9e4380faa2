from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from warm import Start

from mgtrain.data import open_videos
from mgtrain.data.split import groups_of_names, joined, make_split, read_groups
from mgtrain.data.videos import Videos
from mgtrain.errors import DataError

PARTS = ("train", "val")


def labelled(*counts: int, root: str = "/r") -> Videos:
    """So many videos of each class."""
    entries = [(f"{label}/{n}.mp4", label) for label, count in enumerate(counts) for n in range(count)]
    return Videos.of(root, entries, [f"class {label}" for label in range(len(counts))])


def per_class(videos: Videos, rows: np.ndarray) -> list[int]:
    return videos.only(rows).videos_per_class.tolist()


@settings(deadline=None, max_examples=40)
@given(
    counts=st.lists(st.integers(2, 40), min_size=1, max_size=8), val=st.floats(0.05, 0.95), seed=st.integers(0, 2**32)
)
def test_every_class_is_shared_alike(counts: list[int], val: float, seed: int):
    videos = labelled(*counts)
    lists = make_split(videos, val=val, seed=seed)
    assert sorted(np.concatenate([*lists.values()]).tolist()) == list(range(sum(counts)))
    for count, held_out in zip(counts, per_class(videos, lists["val"]), strict=True):
        assert 1 <= held_out <= count - 1
        assert abs(held_out - val * count) < 1 or held_out in (1, count - 1)
    again = make_split(videos, val=val, seed=seed)
    assert all(np.array_equal(lists[name], again[name]) for name in lists)


def test_small_classes_add_up_to_the_share():
    videos = labelled(*[7] * 30)
    assert len(make_split(videos, val=0.5)["val"]) == 105
    lists = make_split(labelled(*[4] * 30), folds=3)
    assert [len(lists[f"val_{fold}"]) for fold in range(3)] == [40, 40, 40]


def test_another_seed_draws_others():
    videos = labelled(20, 20)
    drawn = {tuple(make_split(videos, val=0.2, seed=seed)["val"].tolist()) for seed in range(5)}
    assert len(drawn) == 5


@pytest.mark.parametrize("grouped", [False, True])
def test_each_fold_validates_once(grouped: bool):
    videos = labelled(12, 9, 15)
    groups = np.arange(36) // 2 if grouped else None
    lists = make_split(videos, folds=3, groups=groups)
    assert list(lists) == ["train_0", "val_0", "train_1", "val_1", "train_2", "val_2"]
    assert sorted(np.concatenate([lists[f"val_{fold}"] for fold in range(3)]).tolist()) == list(range(36))
    for fold in range(3):
        assert set(lists[f"train_{fold}"].tolist()) == set(range(36)) - set(lists[f"val_{fold}"].tolist())
        for count, held_out in zip((12, 9, 15), per_class(videos, lists[f"val_{fold}"]), strict=True):
            assert abs(held_out - count / 3) <= (1 if grouped else 0)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32), val=st.sampled_from([0.2, 0.3, 0.5]))
def test_groups_stay_together(seed: int, val: float):
    videos = labelled(20, 20, 20)
    groups = np.tile(np.arange(20), 3)  # a group has a video of each class, as a scene has several actions
    lists = make_split(videos, val=val, seed=seed, groups=groups)
    assert not set(groups[lists["train"]]) & set(groups[lists["val"]])
    assert per_class(videos, lists["val"]) == [round(20 * val)] * 3


def test_uneven_groups_come_near_to_the_share():
    rng = np.random.default_rng(0)
    videos = labelled(100, 60, 40)
    groups = rng.integers(0, 30, 200)
    held_out = per_class(videos, make_split(videos, val=0.25, groups=groups)["val"])
    assert all(abs(n - share) <= 4 for n, share in zip(held_out, (25, 15, 10), strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_two_sources_of_a_class_are_enough_for_two_parts(seed: int):
    videos = labelled(8, 8, 6)
    groups = np.array([0, 1] * 4 + [2, 3] * 4 + [4] * 2 + [5] * 4)
    parts = make_split(videos, val=0.2, seed=seed, groups=groups)
    for rows in parts.values():
        assert np.unique(videos.single_labels[rows]).tolist() == [0, 1, 2]
    assert not set(groups[parts["train"]]) & set(groups[parts["val"]])


def test_what_cannot_be_shared_out_is_refused():
    with pytest.raises(DataError, match=r"too few videos for 2 parts in class 'class 1' \(1\); add videos, or drop it"):
        make_split(labelled(5, 1), val=0.2)
    with pytest.raises(DataError, match=r"too few videos for 6 parts in class 'class 0' \(5\)"):
        make_split(labelled(5, 8), folds=6)
    with pytest.raises(DataError, match=r"too few groups of videos for 2 parts in class 'class 0' \(1\)"):
        make_split(labelled(5, 8), val=0.2, groups=np.array([0] * 5 + [1] * 4 + [2] * 4))
    with pytest.raises(DataError, match=r"in classes 'class 1' \(1\), 'class 2' \(1\); add videos, or drop them"):
        make_split(labelled(5, 1, 1), val=0.2)
    # Each class is in two groups, but each two classes share one: no way to have all three in both parts.
    three = labelled(2, 2, 2)
    with pytest.raises(DataError, match="found no way to put every class into each of 2 parts with these groups"):
        make_split(three, val=0.5, groups=np.array([0, 1, 1, 2, 2, 0]))
    with pytest.raises(DataError, match="several labels cannot be split by class"):
        joined([Videos.of("/r", [("a.mp4", (0, 1)), ("b.mp4", 1)], ("x", "y"))])


def test_a_path_is_split_once():
    one, other = (Videos.of("/r", [("a", 0), ("a", 0), (name, 1)], ("x", "y")) for name in ("b", "c"))
    both = joined([one, other])
    assert [(both.name(i), both.label(i)) for i in range(len(both))] == [("a", 0), ("b", 1), ("c", 1)]
    with pytest.raises(DataError, match="/r/b: is 'x' in one list and 'y' in another; correct one of them"):
        joined([one, Videos.of("/r", [("b", 0)], ("x", "y"))])


def test_stretches_of_a_file_stay_together(mgtrain: Start, tmp_path: Path):
    lines = [f"{v}.mp4,{10 * n},{10 * n + 9},{(v + n) % 2}" for v in range(8) for n in range(4)]
    (tmp_path / "all.csv").write_text("path,start,end,label\n" + "\n".join(lines))
    recipe = "demo_multigrid"
    sets = (f"data.root={tmp_path}", "data.train=all.csv", "data.val=all.csv", "data.classes=2")
    done = mgtrain(tmp_path, "data", "split", recipe, *sets, "--to", "lists", "--val", "0.25")
    assert done.returncode == 0, done.stderr
    files = {part: {line[0] for line in (tmp_path / f"lists/{part}.csv").read_text().split()[::2]} for part in PARTS}
    assert (len(files["train"]), len(files["val"])) == (6, 2)
    assert not files["train"] & files["val"]


def test_videos_whose_names_show_one_source_stay_together(mgtrain: Start, tmp_path: Path):
    for n in range(40):
        file = tmp_path / f"v/{'bow' if n % 2 else 'wave'}/person{n // 4}_take{n % 4}.mp4"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    done = mgtrain(tmp_path, "data", "split", "v", "--to", "lists", "--folds", "5")
    assert done.returncode == 0, done.stderr
    assert "split by the words for a source in names: 10 groups, each in one part" in done.stderr
    for fold in range(5):
        train, val = (set(re.findall("person[0-9]+", (tmp_path / f"lists/{p}_{fold}.csv").read_text())) for p in PARTS)
        assert train
        assert val
        assert not train & val
    assert mgtrain(tmp_path, "data", "split", "v", "--to", "l", "--val", "0.2", "--group-by", "none").stderr == ""
    lone = mgtrain(tmp_path, "data", "split", "v", "--to", "m", "--val", "0.2", "--by", "person")
    assert (lone.returncode, "give the CSV with --groups" in lone.stderr) == (2, True)
    both = mgtrain(tmp_path, "data", "split", "v", "--to", "m", "--val", "0.2", "--group-by", "x", "--groups", "g.csv")
    assert both.returncode == 2
    assert "--groups and --group-by: give one of them" in both.stderr


@pytest.mark.parametrize("digits", [3, 6, 13])
def test_numbers_alone_do_not_name_a_source(digits: int):
    numbers = np.random.default_rng(0).choice(10**digits, 600, replace=False)
    names = [f"c{n % 6}/{number:0{digits}}.mp4" for n, number in enumerate(numbers)]
    assert groups_of_names(names, [n % 6 for n in range(600)]) is None
    parts = [f"c{n % 6}/{n // 4}_{n % 4}.mp4" for n in range(600)]
    found = groups_of_names(parts, [n % 6 for n in range(600)])
    assert found is not None
    assert (len(np.unique(found.ids)), found.example) == (150, "0_0.mp4 is of 0")


def test_groups_are_read_by_path(tmp_path: Path):
    file = tmp_path / "groups.csv"
    videos = labelled(2, 2)
    file.write_text(
        "path,label,scene\n1/1.mp4,1,car park\n./0/0.mp4,0,lawn\n0/1.mp4,0,lawn\n1/0.mp4,1,car park\nx,0,y\n"
    )
    found = read_groups(file, "scene", videos)
    assert (found.ids.tolist(), str(found)[: len("scene in")]) == ([1, 1, 0, 0], "scene in")
    file.write_text("path,scene\n 1/1.mp4,car park\n0/0.mp4,lawn \n0/1.mp4,lawn\n1/0.mp4, car park\n")
    assert read_groups(file, "scene", videos).ids.tolist() == [1, 1, 0, 0]
    file.write_text(f"{file.read_text()}./0/0.mp4,car park\n")
    with pytest.raises(DataError, match=r"groups.csv:6: '0/0.mp4' is of group 'lawn' and of 'car park'; keep one"):
        read_groups(file, "scene", videos)
    file.write_text("path,label,scene\n1/1.mp4,1,car park\n")
    with pytest.raises(
        DataError, match=r"groups.csv:1: no column 'group' among 'path', 'label', 'scene'; .* with --by$"
    ):
        read_groups(file, "group", videos)
    file.write_text("path,group\n0/0.mp4,1\n1/0.mp4,\n")
    with pytest.raises(
        DataError, match=r"no group for 3 of 4 videos: 0/1.mp4, 1/0.mp4, 1/1.mp4; add a line with the path"
    ):
        read_groups(file, "group", videos)
    with pytest.raises(DataError, match=r"none.csv: no such file; .* has 'groups.csv'"):
        read_groups(tmp_path / "none.csv", "group", videos)


def test_a_recipes_videos_are_split_into_lists_that_it_can_use(mgtrain: Start, tiny_text: str, tmp_path: Path):
    (tmp_path / "tiny.yaml").write_text(tiny_text)
    words = ("data", "split", "tiny.yaml", "--all", "--folds", 3, "--to", "folds", "--json")
    done = mgtrain(tmp_path, *words)
    assert (done.returncode, done.stderr.startswith("split by class only: names show no sources")) == (0, True)
    result = json.loads(done.stdout)
    assert list(result) == ["schema", "root", "files", "videos", "videos_per_class"]
    assert result["schema"] == "mgtrain.data_split/1"
    assert result["videos"] == {f"{part}_{fold}": n for fold in range(3) for part, n in (("train", 24), ("val", 12))}
    assert result["videos_per_class"]["left"]["val_2"] == 3
    again = open_videos("list", result["root"], str(tmp_path / "folds/val_1.csv"))
    assert again.classes == ("left", "right", "up", "down")
    assert again.videos_per_class.tolist() == [3] * 4
    assert mgtrain(tmp_path, *words).returncode == 0  # the same again


def test_a_folder_of_classes_is_split(mgtrain: Start, tmp_path: Path):
    for name in (f"{kind}/{n}.mp4" for kind in ("cat", "dog") for n in range(5)):
        (tmp_path / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "videos" / name).touch()
    done = mgtrain(tmp_path, "data", "split", "videos", "--val", 0.2, "--to", "lists")
    assert done.returncode == 0, done.stderr
    assert [line.split() for line in done.stdout.splitlines()[:4]] == [
        ["class", "train", "val"], ["cat", "4", "1"], ["dog", "4", "1"], ["total", "8", "2"]
    ]  # fmt: skip
    lines = [line for part in ("train", "val") for line in (tmp_path / f"lists/{part}.csv").read_text().splitlines()]
    assert sorted(lines) == [f"{kind}/{n}.mp4 {label}" for label, kind in enumerate(("cat", "dog")) for n in range(5)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--val 1", "--val 1: must be above 0 and below 1, such as 0.2"),
        ("--val 0.2 --folds 2", "give either --val SHARE or --folds NUMBER"),
        ("--val 0.2 --all", "videos: a folder takes neither overrides nor --all; all of it is split"),
    ],
)
def test_a_mistake_is_told(mgtrain: Start, tmp_path: Path, words: str, message: str):
    (tmp_path / "videos").mkdir()
    done = mgtrain(tmp_path, "data", "split", "videos", "--to", "lists", *words.split())
    assert (done.returncode, done.stderr) == (2, f"mgtrain: {message}\n")
