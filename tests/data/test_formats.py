from __future__ import annotations

import json
import pickle
import re
import resource
from pathlib import Path

import numpy as np
import pytest

from mgtrain.data import DATASETS, open_videos
from mgtrain.data.formats.listfile import write_lists
from mgtrain.data.videos import Videos, mirrored_labels, mirrored_pairs
from mgtrain.errors import DataError, UsageError


def rows(videos: Videos) -> list[tuple[str, int]]:
    """(path within the root, label) of all videos."""
    paths = (Path(videos.path(i)).relative_to(Path(videos.root).absolute()).as_posix() for i in range(len(videos)))
    return [(path, videos.label(i)) for i, path in enumerate(paths)]


def write_list(root: Path, text: str | bytes, name: str = "train.csv") -> Path:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def refusal(root: Path, text: str | bytes, classes: list[str] | None = None) -> str:
    """The message with which a list is refused, without the root."""
    write_list(root, text)
    with pytest.raises(DataError) as caught:
        open_videos("list", str(root), "train.csv", classes)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(root), "ROOT")


ENTRIES = [("a b/ü 1.mp4", 2), ("c,d.mp4", 0), ("e.mp4", 1), ("\udcff.mp4", 1)]  # the last is no UTF-8


def test_videos_are_a_list_that_pickles(tmp_path: Path):
    videos = Videos.of(str(tmp_path), ENTRIES, ["x", "y", "z"], missing=3)
    for copy in (videos, pickle.loads(pickle.dumps(videos))):
        assert rows(copy) == ENTRIES
        assert (len(copy), copy.classes, copy.missing) == (4, ("x", "y", "z"), 3)
        assert copy.path(-1) == copy.path(3)
        assert copy.fingerprint == videos.fingerprint
        with pytest.raises(IndexError):
            copy.path(4)


def test_the_fingerprint_tells_data_sets_apart_but_not_where_they_lie():
    def fingerprint(entries=(("a", 0), ("b", 1)), classes=("x", "y"), root="/r") -> str:
        return Videos.of(root, entries, classes).fingerprint

    assert re.fullmatch("[0-9a-f]{16}", fingerprint())
    assert fingerprint() == fingerprint(root="/elsewhere")
    changed = [
        fingerprint([("a", 0), ("c", 1)]),
        fingerprint([("b", 1), ("a", 0)]),
        fingerprint([("a", 0), ("b", 0)]),
        fingerprint([("ab", 0), ("", 1)]),
        fingerprint(classes=("x", "z")),
    ]
    assert len({fingerprint(), *changed}) == 6


def test_a_million_videos_are_three_blocks_of_memory():
    videos = Videos.of("/r", ((f"{n:07}.mp4", n % 400) for n in range(1_000_000)), [str(n) for n in range(400)])
    assert len(pickle.dumps(videos, protocol=5)) < 24_000_000
    assert videos.path(987_654) == "/r/0987654.mp4"
    assert videos.label(987_654) == 987_654 % 400


def test_videos_may_have_several_labels_or_none():
    entries = [("a.mp4", (0, 2)), ("b.mp4", ()), ("c.mp4", 1), ("d.mp4", (1,))]
    videos = Videos.of("/r", entries, ["x", "y", "z"])
    for copy in (videos, pickle.loads(pickle.dumps(videos))):
        assert copy.multi_label
        assert [copy.labels(i) for i in range(4)] == [(0, 2), (), (1,), (1,)]
        assert copy.labels(-1) == (1,)
        assert copy.videos_per_class.tolist() == [1, 2, 1]
        assert copy.fingerprint == videos.fingerprint
    with pytest.raises(AssertionError, match="labels"):
        videos.label(0)
    moved = [("a.mp4", (0,)), ("b.mp4", (2,)), ("c.mp4", 1), ("d.mp4", (1,))]
    assert Videos.of("/r", moved, ["x", "y", "z"]).fingerprint != videos.fingerprint
    single = Videos.of("/r", [("a.mp4", 2)], ["x", "y", "z"])
    assert (single.multi_label, single.labels(0), single.videos_per_class.tolist()) == (False, (2,), [0, 0, 1])


@pytest.mark.parametrize(
    "text",
    [
        "a b.mp4 1\nc,d.mp4 0\nsub/e.mp4 2\n",
        "a b.mp4,1\nc,d.mp4,0\nsub/e.mp4,2",
        "a b.mp4, 1\r\nc,d.mp4, 0\r\nsub/e.mp4, 2\r\n",
        "\ufeff# path label\n\na b.mp4\t1\n  c,d.mp4   0 \n\nsub/e.mp4 2\n",
        "a b.mp4 dog\nc,d.mp4 cat\nsub/e.mp4 red fox\n".replace("red fox", "2"),
        "a b.mp4,dog\nc,d.mp4,cat\nsub/e.mp4,red fox\n",
        "./a b.mp4 1\nx/../c,d.mp4 0\nROOT/sub/e.mp4 2\n",
    ],
)
def test_list_lines_end_in_a_label_after_a_space_or_a_comma(tmp_path: Path, text: str):
    write_list(tmp_path, text.replace("ROOT", str(tmp_path)))
    videos = open_videos("list", str(tmp_path), "train.csv", ["cat", "dog", "red fox"])
    assert rows(videos) == [("a b.mp4", 1), ("c,d.mp4", 0), ("sub/e.mp4", 2)]
    assert videos.classes == ("cat", "dog", "red fox")


def test_list_classes_are_numbers_unless_told(tmp_path: Path):
    write_list(tmp_path, "a.mp4 2\nb.mp4 0\n")
    assert open_videos("list", str(tmp_path), "train.csv").classes == ("0", "1", "2")
    (tmp_path / "classes.txt").write_text("left\nright\nup\ndown\n")
    assert open_videos("list", str(tmp_path), "train.csv").classes == ("left", "right", "up", "down")
    assert open_videos("list", str(tmp_path), "train.csv", ["a", "b", "c"]).classes == ("a", "b", "c")


def test_list_labels_may_be_several_or_none(tmp_path: Path):
    for text in (
        "a b.mp4 2;0;2\nc.mp4 -\nd.mp4 1\n",
        "a b.mp4,z; x\nc.mp4,-\nd.mp4,y\n",
        "a b.mp4 z;x\nc.mp4 -\nd.mp4 y\n",
        "a b.mp4,2; 0\nc.mp4,-\nd.mp4,1; 1\n",
    ):
        write_list(tmp_path, text)
        videos = open_videos("list", str(tmp_path), "train.csv", ["x", "y", "z"])
        assert videos.multi_label
        assert [videos.labels(i) for i in range(3)] == [(0, 2), (), (1,)]
        named = open_videos("list", str(tmp_path), "train.csv", ["x", "-", "z", "y"])  # a class may be called so
        assert named.labels(1) == (1,)
    write_list(tmp_path, "a.mp4 1 9 0;2\nb.mp4 2 8 -\n")
    videos = open_videos("list", str(tmp_path), "train.csv")
    assert [videos.name(0), videos.name(1)] == ["a.mp4#t=1,9", "b.mp4#t=2,8"]
    assert [videos.labels(0), videos.labels(1)] == [(0, 2), ()]
    write_list(tmp_path, "a.mp4 0;12\nb.mp4 3\n")
    assert len(open_videos("list", str(tmp_path), "train.csv").classes) == 13
    assert "label 3 is out of range" in refusal(tmp_path, "a.mp4 0;3\n", ["x", "y", "z"])
    assert refusal(tmp_path, "a.mp4 0;\n").startswith("ROOT/train.csv:1: 'a.mp4 0;' does not end in a label; ")
    assert refusal(tmp_path, "a.mp4 0;1\na.mp4 0\n").startswith("ROOT/train.csv:2: 'a.mp4' has label 0, but (0, 1)")


@pytest.mark.parametrize("classes", [["x", "y", "z"], ["2", "0", "1"], ["0", "1", "10"], ["red fox", "a;b", "1"]])
def test_a_written_list_reads_back_the_same(tmp_path: Path, classes: list[str]):
    single = Videos.of("/r", [("a b/ü 1.mp4", 2), ("c,d,1.mp4", 0), ("# e.mp4", 1), (" f.mp4", 2)], classes)
    multi = Videos.of("/r", [("a,0.mp4", (0, 2)), ("b.mp4", ()), ("c.mp4", (1,))], classes)
    for number, videos in enumerate((single, multi)):
        root = tmp_path / str(number)
        for _ in range(2):  # a second time changes nothing
            files = write_lists(root, {"train": (videos, range(len(videos))), "val": (videos, [1])})
            assert files == [root / "train.csv", root / "val.csv", root / "classes.txt"]
        again = open_videos("list", str(tmp_path), f"{number}/train.csv")  # classes.txt lies beside it
        assert again.fingerprint == videos.fingerprint
        assert [again.labels(i) for i in range(len(again))] == [videos.labels(i) for i in range(len(videos))]
        assert open_videos("list", str(tmp_path), f"{number}/val.csv").name(0) == videos.name(1)


def test_lists_that_cannot_be_written_are_refused(tmp_path: Path):
    for name in ("a\nb.mp4", "\udcff.mp4", "a.mp4 ", "../a.mp4"):
        with pytest.raises(DataError, match="a list cannot contain this path") as caught:
            write_lists(tmp_path / "lists", {"train": (Videos.of("/r", [(name, 0)], ["x"]), [0])})
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "lists").exists()
    videos = Videos.of("/r", [("a.mp4", 0), ("b.mp4", 0)], ["x"])
    write_lists(tmp_path, {"train": (videos, [0])})
    with pytest.raises(UsageError, match=r"train.csv: exists with other contents; choose another folder"):
        write_lists(tmp_path, {"more": (videos, [0]), "train": (videos, [1])})
    assert not (tmp_path / "more.csv").exists()
    with pytest.raises(UsageError, match="cannot be written"):
        write_lists(tmp_path / "train.csv/x", {"train": (videos, [0])})


def test_a_full_disk_costs_no_list_that_was_there(tmp_path: Path):
    videos = Videos.of("/r", [("a.mp4", 0)], ["x"])
    write_lists(tmp_path, {"train": (videos, [0])})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, limits[1]))  # as if the disk were full
    try:
        with pytest.raises(UsageError, match=r"/val\.csv: cannot be written: File too large; choose another folder"):
            write_lists(tmp_path, {"train": (videos, [0]), "val": (videos, [0])})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_list_may_lie_elsewhere(tmp_path: Path):
    write_list(tmp_path / "lists", "a.mp4 0\n")
    (tmp_path / "videos").mkdir()
    videos = open_videos("list", str(tmp_path / "videos"), str(tmp_path / "lists/train.csv"))
    assert videos.path(0) == str(tmp_path / "videos/a.mp4")


def test_a_bad_list_is_refused_with_file_and_line(tmp_path: Path):
    assert refusal(tmp_path, "a.mp4 0\nb.mp4 x\n").startswith("ROOT/train.csv:2: 'b.mp4 x' does not end in a label; ")
    assert refusal(tmp_path, "a.mp4 0\nb c.mp4\n").startswith("ROOT/train.csv:2: 'b c.mp4' does not end in a label; ")
    assert refusal(tmp_path, "a.mp4 0\n7\n").startswith("ROOT/train.csv:2: '7' does not end in a label; ")
    assert refusal(tmp_path, "# x\na.mp4 -1\n") == "ROOT/train.csv:2: label -1 is out of range; it must be 0 to 999999"
    assert (
        refusal(tmp_path, "a.mp4 0\nb.mp4 2\n", ["x", "y"])
        == "ROOT/train.csv:2: label 2 is out of range; it must be 0 to 1"
    )
    assert refusal(tmp_path, "\n# nothing\n") == "ROOT/train.csv: lists no video; write one `path label` per line"
    assert refusal(tmp_path, b"a.mp4 0\n\xff.mp4 1\n").startswith("ROOT/train.csv:2: not UTF-8 ")
    assert (
        refusal(tmp_path, "a.mp4 0\nb.mp4 1\nx/../a.mp4 1\n")
        == "ROOT/train.csv:3: 'a.mp4' has label 1, but 0 in line 1; keep one"
    )


@pytest.mark.parametrize("path", ["../a.mp4", "x/../../a.mp4", "/etc/a.mp4", "..", "http/../../../a"])
def test_a_path_that_leaves_the_root_is_refused(tmp_path: Path, path: str):
    message = refusal(tmp_path / "root", f"b.mp4 0\n{path} 0\n")
    assert message.startswith(f"ROOT/train.csv:2: {path!r} is outside of ROOT; ")


def test_a_missing_list_or_root_is_told_with_what_there_is(tmp_path: Path):
    write_list(tmp_path, "a.mp4 0\n", "train.csv")
    write_list(tmp_path, "a.mp4 0\n", "val.csv")
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}/tran.csv: no such file; {tmp_path} has 'tr")):
        open_videos("list", str(tmp_path), "tran.csv")
    with pytest.raises(DataError, match=r"no such folder of videos; .* has 'train.csv', 'val.csv'$"):
        open_videos("list", str(tmp_path / "0000"), "train.csv")
    assert [*DATASETS] == [
        "list", "kinetics", "folder", "something_something", "charades", "ucf101", "hmdb51"
    ]  # fmt: skip


def test_classes_have_to_differ(tmp_path: Path):
    write_list(tmp_path, "a.mp4 0\n")
    with pytest.raises(DataError, match="class 'x' is listed twice"):
        open_videos("list", str(tmp_path), "train.csv", ["x", "y", "x"])


KINETICS = """label,youtube_id,time_start,time_end,split,is_cc
"riding, a bike",-0aBcDeFgHi,1,11,validate,0
abseiling,xxxxxxxxxxx,20,30,validate,0
abseiling,yyyyyyyyyyy,300,310,validate,0
zumba,zzzzzzzzzzz,0,10,validate,1
zumba,gone_______,5,15,validate,1
"""


def test_kinetics_videos_are_found_where_people_put_them(tmp_path: Path):
    write_list(tmp_path, KINETICS, "val.csv")
    places = [
        "validate/riding,_a_bike/-0aBcDeFgHi_000001_000011.mkv",
        "val/xxxxxxxxxxx_000020_000030.mp4",
        "abseiling/yyyyyyyyyyy_000300_000310.webm",
        "zzzzzzzzzzz_000000_000010.mp4",
    ]
    for place in [*places, "val/._xxxxxxxxxxx_000020_000030.mp4", "gone________000005_000016.mp4"]:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
    videos = open_videos("kinetics", str(tmp_path), "val.csv")
    assert rows(videos) == list(zip(places, [1, 0, 0, 2], strict=True))
    assert videos.classes == ("abseiling", "riding, a bike", "zumba")
    assert videos.missing == 1
    assert videos.missing_names == ("gone________000005_000015",)


def test_replacements_of_broken_kinetics_videos_come_first(tmp_path: Path):
    write_list(tmp_path / "annotations", KINETICS, "val.csv")
    replacement = "replacement/replacement_for_corrupted_k400/yyyyyyyyyyy_000300_000310.mp4"
    for place in ("val/xxxxxxxxxxx_000020_000030.mp4", "val/yyyyyyyyyyy_000300_000310.mp4", replacement):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
    videos = open_videos("kinetics", str(tmp_path), "annotations/val.csv")
    assert rows(videos) == [("val/xxxxxxxxxxx_000020_000030.mp4", 0), (replacement, 0)]
    assert videos.missing == 3


def test_kinetics_errors_say_where_they_looked(tmp_path: Path):
    write_list(tmp_path, KINETICS, "val.csv")
    with pytest.raises(DataError) as caught:
        open_videos("kinetics", str(tmp_path), "val.csv")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/val.csv: none of its 5 videos exists; looked in ")
    assert message.endswith(", for example for -0aBcDeFgHi_000001_000011.*; set data.root to the folder of the videos")
    for place in ("validate/riding, a bike", "val/riding, a bike", "validate", "val", "riding, a bike"):
        assert str(tmp_path / place) in message
    with pytest.raises(DataError, match=r"val.csv:3: 'abseiling' is not one of the 2 classes"):
        open_videos("kinetics", str(tmp_path), "val.csv", ["zumba", "riding, a bike"])
    write_list(tmp_path, "a.mp4 0\n", "val.csv")
    with pytest.raises(
        DataError, match=r"val.csv:1: no column 'label' among 'a.mp4 0'; the first line must be label,youtube_id,"
    ):
        open_videos("kinetics", str(tmp_path), "val.csv")
    write_list(tmp_path, KINETICS.replace("300,310", "soon,310"), "val.csv")
    with pytest.raises(DataError, match=r"val.csv:4: the times 'soon' and '310' are not numbers"):
        open_videos("kinetics", str(tmp_path), "val.csv")


def test_a_folder_per_class(tmp_path: Path):
    for name in ("dog/b.MP4", "dog/a.mkv", "dog/._a.mkv", "dog/notes.txt", "cat/c d.avi", ".hidden/x.mp4", "top.mp4"):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).touch()
    videos = open_videos("folder", str(tmp_path), "train")
    assert rows(videos) == [("train/cat/c d.avi", 0), ("train/dog/a.mkv", 1), ("train/dog/b.MP4", 1)]
    assert videos.classes == ("cat", "dog")
    assert rows(open_videos("folder", str(tmp_path), "train", ["dog", "cow", "cat"]))[0] == ("train/dog/a.mkv", 0)
    with pytest.raises(DataError, match="'dog' is not one of the 1 classes"):
        open_videos("folder", str(tmp_path), "train", ["cat"])
    with pytest.raises(DataError, match=r"/trian: no such folder of classes; .* has 'train'"):
        open_videos("folder", str(tmp_path), "trian")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no videos; put them at"):
        open_videos("folder", str(tmp_path), "empty")


def test_the_classes_of_folders_are_those_beside_them_or_in_the_root(tmp_path: Path):
    (tmp_path / "classes.txt").write_text("walk\nrun\n")  # of another set
    for name in ("sit", "jump"):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "a.mp4").touch()
    assert open_videos("folder", str(tmp_path / "set"), ".").classes == ("jump", "sit")
    (tmp_path / "set" / "classes.txt").write_text("sit\njump\n")
    assert open_videos("folder", str(tmp_path / "set"), ".").classes == ("sit", "jump")
    assert open_videos("folder", str(tmp_path), "set").classes == ("sit", "jump")
    (tmp_path / "set" / "classes.txt").unlink()
    with pytest.raises(DataError, match=rf"'jump' is not one of the 2 classes in {tmp_path}/classes.txt; add it there"):
        open_videos("folder", str(tmp_path), "set")


LABELS = {"Putting something on something": "1", "Moving something up": "0", "Holding something": "2"}
SOMETHING = [
    {"id": "78687", "label": "moving a cup up", "template": "Moving [something] up", "placeholders": ["a cup"]},
    {"id": "42326", "label": "putting tea on tray", "template": "Putting [something] on [something]"},
    {"id": "100904", "label": "holding a pen", "template": "Holding [something]"},
]


def something(root: Path, entries: object, labels: object = LABELS) -> Videos:
    root.joinpath("something-something-v2-train.json").write_text(json.dumps(entries))
    root.joinpath("something-something-v2-labels.json").write_text(json.dumps(labels))
    return open_videos("something_something", str(root), "something-something-v2-train.json")


def test_something_something_templates_are_classes(tmp_path: Path):
    for place in ("20bn-something-something-v2/42326.webm", "78687.mp4"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).touch()
    videos = something(tmp_path, SOMETHING)
    assert rows(videos) == [("78687.mp4", 0), ("20bn-something-something-v2/42326.webm", 1)]
    assert videos.classes == ("Moving something up", "Putting something on something", "Holding something")
    assert (videos.missing, videos.missing_names) == (1, ("100904",))


def test_bad_something_something_files_are_refused(tmp_path: Path):
    with pytest.raises(
        DataError, match=r"train.json: none of its 3 videos exists; looked in .*, for example for 78687.\*; "
    ):
        something(tmp_path, SOMETHING)
    with pytest.raises(DataError, match="entry 1 has no id or no template; use the list of training or validation"):
        something(tmp_path, [{"id": "1420"}])
    with pytest.raises(DataError, match="entry 1: 'Eating something' is not one of the 3 classes"):
        something(tmp_path, [{"id": "1", "template": "Eating [something]"}])
    with pytest.raises(DataError, match=r"labels.json: the classes are not numbered 0, 1, ...; it must be"):
        something(tmp_path, SOMETHING, {"x": "1", "y": "2"})
    with pytest.raises(DataError, match=r"train.json: not a list of videos; it must be \[{"):
        something(tmp_path, {})
    (tmp_path / "something-something-v2-train.json").write_text(json.dumps(SOMETHING))
    (tmp_path / "something-something-v2-labels.json").write_text("{")
    with pytest.raises(DataError, match=r"labels.json: not valid JSON"):
        open_videos("something_something", str(tmp_path), "something-something-v2-train.json")
    (tmp_path / "something-something-v2-labels.json").unlink()
    with pytest.raises(
        DataError, match=r"no something-something-v2-labels.json or labels.json; put the file of labels"
    ):
        open_videos("something_something", str(tmp_path), "something-something-v2-train.json")


CHARADES = """id,subject,scene,script,objects,actions,length
46GP8,HR43,Kitchen,"A person cooks, and eats.",food,c092 11.90 21.20;c147 0.00 12.60;c092 1.00 2.00,24.83
N11GT,0KZ7,Stairs,"Someone runs.",,,18.33
AAAAA,0KZ7,Stairs,"Gone.",,c000 0.00 1.00,18.33
"""


def test_charades_videos_have_the_classes_of_all_their_actions(tmp_path: Path):
    write_list(tmp_path, CHARADES, "Charades_v1_train.csv")
    for place in ("Charades_v1_480/46GP8.mp4", "N11GT.mp4"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).touch()
    videos = open_videos("charades", str(tmp_path), "Charades_v1_train.csv")
    assert [videos.name(i) for i in range(2)] == ["Charades_v1_480/46GP8.mp4", "N11GT.mp4"]
    assert [videos.labels(i) for i in range(2)] == [(92, 147), ()]
    assert (videos.missing, videos.missing_names) == (1, ("AAAAA",))
    assert (len(videos.classes), videos.classes[92]) == (157, "c092")
    (tmp_path / "Charades_v1_classes.txt").write_text("".join(f"c{n:03} Doing {n}\n" for n in range(157)))
    assert open_videos("charades", str(tmp_path), "Charades_v1_train.csv").classes[92] == "c092 Doing 92"


def test_a_charades_clip_has_the_classes_of_the_actions_that_happen_in_it(tmp_path: Path):
    write_list(tmp_path, CHARADES, "Charades_v1_train.csv")
    for name in ("46GP8.mp4", "AAAAA.mp4"):
        (tmp_path / name).touch()
    videos = open_videos("charades", str(tmp_path), "Charades_v1_train.csv")
    seconds = {(0, 0.5): (147,), (0, 1): (92, 147), (2.1, 11.8): (147,), (15, 16): (92,), (21.5, 24): ()}
    for number in range(2):  # as read, and once videos have been left out
        assert {span: videos.labels(number, *span) for span in seconds} == (seconds if not number else {
            (0, 0.5): (0,), (0, 1): (0,), (2.1, 11.8): (), (15, 16): (), (21.5, 24): ()
        })  # fmt: skip
    assert np.flatnonzero(videos.targets(0, 15, 16)).tolist() == [92]
    assert (videos.videos_per_class[[0, 92, 147]].tolist(), int(videos.videos_per_class.sum())) == ([1, 1, 1], 3)
    last = videos.only(np.array([1]))
    assert (last.labels(0, 0, 0.5), last.labels(0, 2, 3)) == ((0,), ())
    shared = videos.with_arrays([np.empty(0)] * 3).with_arrays(videos.arrays())
    assert (shared.labels(0, 15, 16), shared.fingerprint) == ((92,), videos.fingerprint)
    write_list(tmp_path, CHARADES.replace("11.90", "12.90"), "Charades_v1_train.csv")
    assert open_videos("charades", str(tmp_path), "Charades_v1_train.csv").fingerprint != videos.fingerprint


def test_bad_charades_files_are_refused(tmp_path: Path):
    write_list(tmp_path, CHARADES)
    with pytest.raises(DataError, match=r"none of its 3 videos exists; looked in .*, for example for 46GP8.\*; "):
        open_videos("charades", str(tmp_path), "train.csv")
    write_list(tmp_path, CHARADES.replace("c147", "c157"))
    with pytest.raises(DataError, match=r"train.csv:2: 'c157' is not a class; it must be c000 to c156"):
        open_videos("charades", str(tmp_path), "train.csv")
    for times in ("21.20 11.90", "11.90", "a b"):
        write_list(tmp_path, CHARADES.replace("11.90 21.20", times))
        with pytest.raises(
            DataError, match=r"train.csv:2: 'c092 .*': must be a class, and its start and end in seconds"
        ):
            open_videos("charades", str(tmp_path), "train.csv")
    write_list(tmp_path, "a.mp4 0\n")
    with pytest.raises(DataError, match=r"train.csv:1: no column 'id' among 'a.mp4 0'; use the Charades_v1_"):
        open_videos("charades", str(tmp_path), "train.csv")
    write_list(tmp_path, "id,actions\n")
    with pytest.raises(DataError, match=r"train.csv: lists no video"):
        open_videos("charades", str(tmp_path), "train.csv")


def test_files_beside_a_video_do_not_take_its_place(tmp_path: Path):
    write_list(tmp_path, "1 Archery\n2 Bowling\n", "lists/classInd.txt")
    write_list(tmp_path, "Archery/a.avi 1\nArchery/b.avi 1\n", "lists/trainlist01.txt")
    (tmp_path / "UCF-101/Archery").mkdir(parents=True)
    for suffix in (".aac", ".mp4", ".wav", ".json"):
        (tmp_path / f"UCF-101/Archery/a{suffix}").touch()
        (tmp_path / f"UCF-101/Archery/b{'.avi' if suffix == '.mp4' else suffix}").touch()
    train = open_videos("ucf101", str(tmp_path), "lists/trainlist01.txt")
    assert [train.name(n) for n in range(2)] == ["UCF-101/Archery/a.mp4", "UCF-101/Archery/b.avi"]


def test_ucf101s_own_lists(tmp_path: Path):
    write_list(tmp_path, "1 Archery\n2 Bowling\n", "lists/classInd.txt")
    write_list(tmp_path, "Bowling/v_Bowling_g01_c01.avi 2\nArchery/v_Archery_g01_c02.avi 1\n", "lists/trainlist01.txt")
    write_list(tmp_path, "Archery/v_Archery_g01_c01.avi\nArchery/v_Archery_g09_c01.avi\n", "lists/testlist01.txt")
    for name in ("Bowling/v_Bowling_g01_c01", "Archery/v_Archery_g01_c02", "Archery/v_Archery_g01_c01"):
        (tmp_path / "UCF-101" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "UCF-101" / f"{name}.mp4").touch()  # converted, as many have them
    train = open_videos("ucf101", str(tmp_path), "lists/trainlist01.txt")
    assert [(train.name(n), train.label(n)) for n in range(len(train))] == [
        ("UCF-101/Bowling/v_Bowling_g01_c01.mp4", 1), ("UCF-101/Archery/v_Archery_g01_c02.mp4", 0)
    ]  # fmt: skip
    test = open_videos("ucf101", str(tmp_path), "lists/testlist01.txt", train.classes)
    assert (test.classes, test.label(0), test.missing_names) == (("Archery", "Bowling"), 0, ("v_Archery_g09_c01",))
    for bad, words in (("x.avi 1\n", "trainlist01.txt:1: 'x.avi 1' is not one of the 2 classes"), ("", "lists no vid")):
        write_list(tmp_path, bad, "lists/trainlist01.txt")
        with pytest.raises(DataError, match=words):
            open_videos("ucf101", str(tmp_path), "lists/trainlist01.txt")
    write_list(tmp_path, "Archery\n", "lists/classInd.txt")
    with pytest.raises(DataError, match=r"classInd.txt: must have lines such as"):
        open_videos("ucf101", str(tmp_path), "lists/testlist01.txt")


def test_hmdb51s_own_splits(tmp_path: Path):
    folder = "testTrainMulti_7030_splits"
    write_list(tmp_path, "one.avi 1 \ntwo.avi 2 \nthree.avi 0 \n", f"{folder}/wave_test_split1.txt")
    write_list(tmp_path, "on the run.avi 1 \nold.avi 2 \n", f"{folder}/run_test_split1.txt")
    for name in ("wave/one", "wave/two", "wave/three", "run/on the run"):
        (tmp_path / "hmdb51_org" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "hmdb51_org" / f"{name}.avi").touch()
    train, test = (open_videos("hmdb51", str(tmp_path), part) for part in ("train1", "test1"))
    assert [(train.name(n), train.label(n)) for n in range(len(train))] == [
        ("hmdb51_org/run/on the run.avi", 0), ("hmdb51_org/wave/one.avi", 1)
    ]  # fmt: skip
    assert (train.classes, test.name(0), test.missing_names) == (("run", "wave"), "hmdb51_org/wave/two.avi", ("old",))
    with pytest.raises(DataError, match="HMDB51 has no split 'val'; use train1 to"):
        open_videos("hmdb51", str(tmp_path), "val")
    with pytest.raises(DataError, match=r"no file <class>_test_split2.txt; put the data set's splits there"):
        open_videos("hmdb51", str(tmp_path), "train2")
    write_list(tmp_path, "one.avi\n", f"{folder}/wave_test_split1.txt")
    with pytest.raises(DataError, match=r"wave_test_split1.txt:1: 'one.avi' does not end in 0, 1 or 2"):
        open_videos("hmdb51", str(tmp_path), "train1")


def test_a_flip_turns_labels_into_those_of_the_mirrored_classes():
    classes = ("left", "up", "right", "7", "clockwise")
    assert mirrored_labels(classes, []) == (0, 1, 2, 3, 4)
    assert mirrored_labels(classes, [("right", "left"), (3, "clockwise")]) == (2, 1, 0, 4, 3)
    with pytest.raises(
        DataError, match=r"^data.mirrored: 'rigth' is not one of the 5 classes; did you mean 'right'\?$"
    ):
        mirrored_labels(classes, [("left", "rigth")])
    with pytest.raises(DataError, match=r"^data.mirrored: 5 is not one of the 5 classes; use names or numbers 0 to 4$"):
        mirrored_labels(classes, [(5, "left")])


@pytest.mark.parametrize(
    ("classes", "pairs"),
    [
        (["SwipeLeft", "SwipeRight", "Stop"], [("SwipeLeft", "SwipeRight")]),
        (["leftHand", "rightHand"], [("leftHand", "rightHand")]),
        (["TurnClockwise", "TurnCounterclockwise"], [("TurnClockwise", "TurnCounterclockwise")]),
        (["LookLeftThenUp", "look right then up"], [("LookLeftThenUp", "look right then up")]),
        (["Leftovers", "UpRightness", "copyrights"], []),
    ],
)
def test_sides_are_found_in_names_in_camel_case(classes: list[str], pairs: list[tuple[str, str]]):
    assert mirrored_pairs(classes) == (pairs, False)


def test_a_list_of_charades_lacks_the_times_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_list(tmp_path, CHARADES, "Charades_v1_train.csv")
    for place in ("Charades_v1_480/46GP8.mp4", "N11GT.mp4"):
        write_list(tmp_path, "", place)
    videos = open_videos("charades", str(tmp_path), "Charades_v1_train.csv")
    with caplog.at_level("WARNING", "mgtrain"):
        write_lists(tmp_path / "lists", {"train": (videos, range(len(videos)))})
    assert "a list has no times of labels, so each clip gets all labels of its video" in caplog.text


def test_a_list_of_hacs_is_not_taken_for_kinetics(tmp_path: Path) -> None:
    write_list(tmp_path, "classname,youtube_id,subset,start,end,label\nsit,abc,training,1.0,3.0,1\n", "hacs.csv")
    with pytest.raises(DataError) as caught:
        open_videos("list", str(tmp_path), "hacs.csv")
    assert "Kinetics" not in str(caught.value)
