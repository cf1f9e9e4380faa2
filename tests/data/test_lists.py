"""Lists as people have them, and lists whose videos are missing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mgtrain.data import open_splits, open_videos
from mgtrain.data.formats.listfile import write_lists
from mgtrain.data.index import make_index
from mgtrain.data.missing import check_present, explain, missing_rows
from mgtrain.data.videos import Videos
from mgtrain.engine.start import open_data
from mgtrain.errors import DataError
from mgtrain.recipe import Recipe

MEANT = [("v/left 0.mp4", 0), ("v/left,1.mp4", 0), ("v/up.mp4", 1)]


def read(root: Path, text: str | bytes, classes: list[str] | None = None) -> Videos:
    (root / "list.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return open_videos("list", str(root), "list.csv", classes)


def entries(videos: Videos) -> list[tuple[str, int]]:
    return [(videos.name(row), videos.label(row)) for row in range(len(videos))]


@pytest.mark.parametrize(
    ("text", "remark"),
    [
        ('path,label\nv/left 0.mp4,0\n"v/left,1.mp4",0\nv/up.mp4,1\n', "path from column 'path', label from 'label'"),
        ('label;File\n0;v/left 0.mp4\n0;v/left,1.mp4\n1;"v/up.mp4"\n', "path from column 'file', label from 'label'"),
        (
            ',video,split,class\n0,v/left 0.mp4,train,0\n1,"v/left,1.mp4",train,0.0\n2,v/up.mp4,,1.0\n',
            "path from column 'video', label from 'class'",
        ),
        ("path label\nv/left 0.mp4 0\nv/left,1.mp4 0\nv/up.mp4 1\n", "path from column 'path', label from 'label'"),
        ("path\tlabel\nv/left 0.mp4\t0\nv/left,1.mp4\t0\nv/up.mp4\t1\n", "path from column 'path', label from 'label'"),
        ('"v/left 0.mp4" 0\n"v/left,1.mp4" 0\n"v/up.mp4" 1\n', None),
        ('"v/left 0.mp4","0"\n"v/left,1.mp4","0"\n"v/up.mp4","1"\n', None),
        ('"v/left 0.mp4"\t0\n"v/left,1.mp4"\t0\n"v/up.mp4"\t1\n', None),
        ("v/left 0.mp4;0\nv/left,1.mp4;0\nv/up.mp4;1\n", None),
        ("v/left 0.mp4 0.0\nv/left,1.mp4 0.0\nv/up.mp4 1.00\n", None),
        ("v\\left 0.mp4 0\nv\\left,1.mp4 0\nv\\up.mp4 1\n", "backslashes read as slashes"),
        ("v/left 0.mp4 0\r\nv/left,1.mp4 0\r\nv/up.mp4 1\r\n".encode("utf-16"), None),
        (b"\xfe\xff" + "v/left 0.mp4,0\nv/left,1.mp4,0\nv/up.mp4,1".encode("utf-16-be"), None),
    ],
)
def test_a_list_is_read_in_every_dialect(tmp_path: Path, text: str | bytes, remark: str | None) -> None:
    videos = read(tmp_path, text)
    assert entries(videos) == MEANT
    assert videos.remarks == (() if remark is None else (f"{tmp_path}/list.csv: {remark}",))


def test_a_header_may_name_classes(tmp_path: Path) -> None:
    videos = read(tmp_path, "path,label\na.mp4,dog\nb.mp4,red fox\n", ["red fox", "dog"])
    assert entries(videos) == [("a.mp4", 1), ("b.mp4", 0)]


def test_empty_cells_after_the_last_column_are_ignored(tmp_path: Path) -> None:
    assert entries(read(tmp_path, "path,label\na.mp4,3,\nb.mp4,4, ,\n")) == [("a.mp4", 3), ("b.mp4", 4)]


def test_a_video_and_a_class_may_have_the_names_of_columns(tmp_path: Path) -> None:
    assert entries(read(tmp_path, "path,label\nb.mp4,cat\n", ["cat", "label"])) == [("b.mp4", 0)]
    assert entries(read(tmp_path, "path 1\nlabel 0\n")) == [("path", 1), ("label", 0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.mp4 40 0\nb.mp4 31 1\n", ":1: 'a.mp4 40 0' is `path number label`, which is for folders of frames; write"),
        ("a.mp4,9,2,0\n", ":1: 'a.mp4,9,2,0': 9 to 2 has nothing in it; start and end are seconds, with the end after"),
        ("v/a 1.5 9 0\n", ":1: 'v/a 1.5 9 0': '1.5' is not a number of frames; frames are whole numbers"),
        ("path,start,end,label\na.mp4,soon,9,0\n", ":2: 'a.mp4,soon,9,0': 'soon' is not a time such as 75.5 or"),
        ("label,youtube_id,time_start\nx,y,1\n", "list.csv: is a list of Kinetics; set data.format=kinetics"),
        ("path,start,end,label\na.mp4,1,9,wave\n", "or its name, if classes.txt beside the list has a name per line"),
        ("a.mp4#t=5,5 0\n", "list.csv:1: 'a.mp4#t=5,5': 5 to 5 has nothing in it"),
        (
            "a.mp4,0,left\n",
            ":1: 'a.mp4,0,left' does not end in a label; write `path label`, where the label is the num",
        ),
        ("a.mp4,0,left\n", ", or name the columns in a first line such as `path,label,name`"),
        ("path,label\na.mp4\n", ":2: 'a.mp4' does not end in a label"),
        (
            "path,label\nb.mp4,4\na.mp4,3,17\n",
            ":3: 'a.mp4,3,17': has 3 cells, but the header 2; quote a path with separators (\"a,b.mp4\"), and separate "
            'several labels by semicolons in quotes ("3;17")',
        ),
        ("path;label\na.mp4;3;17\n", ":2: 'a.mp4;3;17': has 3 cells, but the header 2"),
        ("label\tfile\n0\ta.mp4\tb\n", ":2: '0\\ta.mp4\\tb': has 3 cells, but the header 2"),
        ("path,start,end,label\na,b.mp4,1,9,3\n", ":2: 'a,b.mp4,1,9,3': has 5 cells, but the header 4"),
        ("path,frames,label\na,9,30,3\n", ":2: 'a,9,30,3': has 4 cells, but the header 3"),
        ("path,label\n", "list.csv: lists no video"),
        (b"\xff\xfea\x00\x00", "list.csv:1: "),
    ],
)
def test_another_form_is_refused_with_what_to_write(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "names", "remark"),
    [
        ("v/a 40 0\nv/b 31 1\n", ["v/a#f=0,40", "v/b#f=0,31"], "read as `path frames label`"),
        ("v/a,40,0\nv/b,31,1\n", ["v/a#f=0,40", "v/b#f=0,31"], "read as `path frames label`"),
        ("my v/a 9 40 0\nb 0 31 1\n", ["my v/a#f=9,49", "b#f=0,31"], "read as `path start frames label`"),
        ("a b.mp4,1,2.50,0\na b.mp4,2,9,1\n", ["a b.mp4#t=1,2.5", "a b.mp4#t=2,9"], "read as `path start end label`"),
        ("a.mp4 1 1:02.5 0\na.mp4 0 01:00:00 1\n", ["a.mp4#t=1,62.5", "a.mp4#t=0,3600"], "read as `path start end "),
        ("a.mp4#t=1.0,2.50,0\na.mp4#f=3,9,1\n", ["a.mp4#t=1,2.5", "a.mp4#f=3,9"], None),
        ("a.mp4#t=1.0,2.50 0\nb.mp4 1\n", ["a.mp4#t=1,2.5", "b.mp4"], None),
        (
            "label,video,start,end\n0,a.mp4,3,4\n1,a.mp4,,\n",
            ["a.mp4#t=3,4", "a.mp4"],
            "path from column 'video', label from 'label', the part of the video from 'start' and 'end'",
        ),
        (
            "path,start,end,label\na.mp4,3,,0\na.mp4,,1:00,1\n",
            ["a.mp4#t=3", "a.mp4#t=0,60"],
            "path from column 'path', label from 'label', the part of the video from 'start' and 'end'",
        ),
        (
            "file stop_frame start_frame class\na.mp4 30 7 0\nb.mp4 9 0 1\n",
            ["a.mp4#f=7,30", "b.mp4#f=0,9"],
            "path from column 'file', label from 'class', the part of the video from 'start_frame' and 'stop_frame'",
        ),
        (
            "path;start;frames;label\nv/a;7;30;0\nv/b;0;9;1\n",
            ["v/a#f=7,37", "v/b#f=0,9"],
            "path from column 'path', label from 'label', the part of the video from 'start' and 'frames'",
        ),
        (
            "path,frames,label\na.mp4,30,0\nb.mp4,20,1\n",  # what is known of video files beside
            ["a.mp4", "b.mp4"],
            "path from column 'path', label from 'label'",
        ),
    ],
)
def test_a_row_may_be_a_part_of_a_video(tmp_path: Path, text: str, names: list[str], remark: str | None) -> None:
    videos = read(tmp_path, text)
    assert entries(videos) == [*zip(names, (0, 1), strict=True)]
    assert [said.partition(": ")[2].startswith(remark or "") for said in videos.remarks] == [True] * (
        remark is not None
    )
    (file,) = {file for file in write_lists(tmp_path / "lists", {"all": (videos, range(2))}) if file.stem == "all"}
    assert entries(open_videos("list", str(tmp_path), str(file))) == entries(videos)


def test_rows_of_frames_are_counted_in_files_that_have_no_suffix_of_a_video(tmp_path: Path) -> None:
    (tmp_path / "rec").touch()  # a video file, so these are seconds
    assert entries(read(tmp_path, "rec,1,2,0\nrec,2,3,1\n")) == [("rec#t=1,2", 0), ("rec#t=2,3", 1)]


def test_names_that_end_in_numbers_are_not_counts_of_frames(tmp_path: Path) -> None:
    (tmp_path / "dance 1").touch()
    assert entries(read(tmp_path, "dance 1 0\ndance 2 1\n")) == [("dance 1", 0), ("dance 2", 1)]


def test_labels_from_one_are_named_with_what_to_do(tmp_path: Path) -> None:
    (remark,) = read(tmp_path, "a.mp4 1\nb.mp4 2\nc.mp4 3\n").remarks
    assert "labels run from 1 to 3, so class 0 has no video" in remark
    assert f"name the classes 1 to 3, one per line, in {tmp_path}/classes.txt and set data.classes=3" in remark
    assert read(tmp_path, "a.mp4 0\nb.mp4 2\n").remarks == ()
    (tmp_path / "classes.txt").write_text("1\n2\n3\n")  # as the remark says
    videos = read(tmp_path, "a.mp4 1\nb.mp4 2\nc.mp4 3\n")
    assert (entries(videos), len(videos.classes)) == ([("a.mp4", 0), ("b.mp4", 1), ("c.mp4", 2)], 3)
    assert videos.remarks == ()


def test_labels_that_are_names_and_labels_that_count_are_not_mixed(tmp_path: Path) -> None:
    classes = ["1", "2", "3"]
    assert read(tmp_path, "a 1\nb 3\nc 2\n", classes).single_labels.tolist() == [0, 2, 1]
    with pytest.raises(
        DataError, match=r"list.csv: label 1 is the name of a class, but 0 is none, so it may be the nu"
    ):
        read(tmp_path, "a 1\nb 2\nc 0\n", classes)
    videos = read(tmp_path, "a 1\nb 3\nc 2\n", classes)
    write_lists(tmp_path / "lists", {"train": (videos, range(3))})
    assert (tmp_path / "lists/train.csv").read_text() == "a 1\nb 3\nc 2\n"


def test_labels_from_one_explain_a_wrong_number_of_classes(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("a.mp4 1\nb.mp4 2\nc.mp4 3\nd.mp4 4\n")
    data = tiny(f"data.root={tmp_path}").data
    with pytest.raises(DataError, match=r"have 5 classes, data.classes says 4; .*labels run from 1 to 4"):
        open_splits(data)


def test_names_with_quotes_and_backslashes_read_back(tmp_path: Path) -> None:
    names = ['"a".mp4', '"b"', '"c "" d"', "e\\f.mp4", 'g "h" i.mp4']
    for name in names:
        (tmp_path / name).touch()
    written = Videos.of(str(tmp_path), [(name, n % 2) for n, name in enumerate(names)], ("x", "y"))
    write_lists(tmp_path / "lists", {"all": (written, range(len(names)))})
    again = open_videos("list", str(tmp_path), "lists/all.csv")
    assert entries(again) == entries(written)


def lists_of(root: Path, *names: str) -> Videos:
    return Videos.of(str(root), [(name, 0) for name in names], ("x",))


def test_missing_files_are_found_once_with_what_the_rows_could_mean(tmp_path: Path) -> None:
    for name in ("c/s0_color.mp4", "c/t.avi", "v/train/a.mp4"):
        (tmp_path / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "videos" / name).touch()
    root = tmp_path / "videos"
    assert missing_rows(lists_of(root, "c/t.avi", "c/s0", "no/a.mp4")) == [1, 2]
    meant = {
        "c/s0": "has 's0_color.mp4'; write names as they are there, with what follows 's0'",
        "c/t.mp4": "has 't.avi'; write names as they are there, with what follows 't'",
        "train/a.mp4": f"{root}/v/train/a.mp4 exists; write v/ before the paths of this list, or set data.root={root}",
        "videos/c/t.avi": f"{root}/c/t.avi exists; leave out 'videos' at the start of the rows",
        "x/y/c/t.avi": f"{root}/c/t.avi exists; leave out 'x/y' at the start of the rows",
        "no/z.mp4": f"there is no folder {root}/no; correct data.root or the rows",
        "c/s.mp4": f"{root}/c has 's0_color.mp4'; correct data.root or the rows",
        "c/q.mp4": f"{root}/c has 's0_color.mp4'; correct data.root or the rows",
    }
    for name, words in meant.items():
        assert words in explain(lists_of(root, name), 0), name
    outer = lists_of(root / "c", "c/t.avi")
    assert explain(outer, 0) == f"{root}/c/t.avi exists; leave out 'c' at the start of the rows"


def test_too_many_missing_files_end_a_run_before_it_starts(
    tiny: Callable[..., Recipe], motions: Path, tmp_path: Path
) -> None:
    lines = (motions / "train.csv").read_text().splitlines()
    short = [line.replace(".mp4", "") for line in lines]
    (tmp_path / "train.csv").write_text("\n".join(short))
    with pytest.raises(DataError) as caught:
        open_data(tiny(f"data.train={tmp_path}/train.csv"))
    assert f"{len(lines)} of {len(lines)} training videos are not in {motions}: " in str(caught.value)
    assert "write names as they are there" in str(caught.value)


def test_a_few_missing_files_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.mp4").touch()
    videos = lists_of(tmp_path, "a.mp4", "b.mp4")
    with caplog.at_level(logging.WARNING):
        check_present("training", videos, 0.5)
    assert [record.getMessage() for record in caplog.records] == [
        f"1 of 2 training videos are not in {tmp_path}: b.mp4; {tmp_path} has 'a.mp4'; correct data.root or the rows"
    ]
    with pytest.raises(DataError, match=r"1 of 2 training videos are not in"):
        check_present("training", videos, 0.49)


def test_an_index_says_what_missing_rows_could_mean(tmp_path: Path) -> None:
    (tmp_path / "a_color.mp4").write_bytes(b"video")
    index = make_index({"train": lists_of(tmp_path, "a_color.mp4", "a")})
    assert np.array_equal(index.usable["train"], [0])
    (finding,) = index.findings
    assert str(finding).startswith("train: rows without a file: 1 (a); ")
    assert "has 'a_color.mp4'; write names as they are there" in str(finding)
