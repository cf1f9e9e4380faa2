"""What others wrote (recipes, annotations, checkpoints, run directories) is refused in one line, or harmless."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from mgtrain.datasets import open_videos
from mgtrain.errors import DataError, PlanError, RecipeError
from mgtrain.prepare import prepare
from mgtrain.recipe import MOST_BYTES, Recipe, load_recipe, parse_recipe
from mgtrain.schedule import make_plan

KINETICS = "label,youtube_id,time_start,time_end,split\n"
GOOD_LABELS = '{"a": "0", "b": "1"}'


def refusal(action: Callable[[], object], kind: type[Exception] = DataError) -> str:
    with pytest.raises(kind) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("seed: 3", "seed: 0x_"),
        ("seed: 3", f"seed: {'9' * 5000}"),
        ("seed: 3", "seed: \0"),
        ("seed: 3", 'seed: "\\ud800"'),
        ("train: train.csv", 'train: "\\ud800"'),
        ("frames: 8", f"frames: {'9' * 400}"),
        ("clips: 4, bn", f"clips: {'9' * 400}, bn"),
        ("stages: [6, 3]", "stages: [1e308, 1e308]"),
        ("stages: [6, 3]", f"stages: [{'1, ' * 2000}1]"),
        ("depth: [1, 1, 1, 1]", "depth: [1, 1, 1, 999999999]"),
        ("{name: multigrid}", f"{{name: multigrid, long_cycle: [{'[0.5, 0.5], ' * 500}]}}"),
        ("{name: multigrid}", "{name: multigrid, epoch_factor: 1e308}"),
        ("{name: multigrid}", "{name: multigrid, [3]: 4}"),
        ("{name: multigrid}", "{name: multigrid, x: 2020-01-01}"),
        ("seed: 3", f"seed: {'[' * 5000}{']' * 5000}"),
        ("seed: 3", f"seed: {'{a: ' * 2000}{'}' * 2000}"),
    ],
)
def test_a_recipe_beyond_what_can_be_computed_is_refused(tiny_text: str, old: str, new: str) -> None:
    assert old in tiny_text
    message = refusal(lambda: parse_recipe(tiny_text.replace(old, new), "my.yaml"), RecipeError)
    assert message.startswith("my.yaml:")


def test_a_plan_of_more_steps_than_can_be_made_is_refused(tiny: Callable[..., Recipe]) -> None:
    endless = tiny("optim.stages=[1e9, 1e9]", "batch.clips=1")
    assert "lower optim.stages" in refusal(lambda: make_plan(endless, 10**9), PlanError)


def test_yaml_runs_no_code_and_its_aliases_are_refused(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for text in (
        f"seed: !!python/object/apply:os.system ['touch {canary}']\n",
        f"!!python/object/new:os.system ['touch {canary}']\n",
        f"seed: !!python/object/apply:subprocess.check_output [[touch, {canary}]]\n",
        "a: &a [x]\nb: [*a, *a]\n",
        "&a [*a]\n",
        "a: &a {x: 1}\nb: {<<: *a}\n",
    ):
        assert "are not allowed in a recipe" in refusal(lambda text=text: parse_recipe(text, "my.yaml"), RecipeError)
    for value in (f"!!python/object/apply:os.system ['touch {canary}']", "&a 1", "1\nseed: 2"):
        refusal(lambda value=value: parse_recipe("seed: 0\n", "my.yaml", [f"seed={value}"]), RecipeError)
    assert not canary.exists()


def test_what_is_no_recipe_is_not_read_to_its_end(tmp_path: Path) -> None:
    large = tmp_path / "large.yaml"
    with large.open("wb") as file:
        file.truncate(1 << 40)  # a hole
    assert f"is larger than {MOST_BYTES:,} bytes" in refusal(lambda: load_recipe(large), RecipeError)
    os.mkfifo(tmp_path / "pipe.yaml")
    for name in ("pipe.yaml", ".", "x" * 5000, "a\0b"):
        assert "no such recipe file" in refusal(lambda name=name: load_recipe(tmp_path / name), RecipeError)


@pytest.mark.parametrize(
    ("format", "text", "message"),
    [
        ("list", "a.mp4 99999999999999999999\n", ":1: 'a.mp4 99999999999999999999' does not end in a label"),
        ("list", "a.mp4 99999999\n", ":1: label 99999999 is out of range; it has to be 0 to 999999"),
        ("list", "a.mp4 0\nb\0.mp4 0\n", ":2: has a zero byte"),
        ("list", "a.mp4 0\n/etc/passwd 0\n", ":2: '/etc/passwd' is outside of "),
        ("kinetics", KINETICS + "a,b,1e400,2,train\n", ":2: the times '1e400' and '2' are no numbers of seconds"),
        ("kinetics", KINETICS + "a,b,-1,1e9,train\n", ":2: the times '-1' and '1e9' are no numbers of seconds"),
        ("kinetics", KINETICS + "a,b\n", ":2: the times '' and '' are no numbers of seconds"),
        ("kinetics", KINETICS + "a,b,1,2\n", ": none of its 1 videos is there"),
        ("kinetics", KINETICS + "../..,b,1,2,train\n", ":2: '../..' leads out of "),
        ("kinetics", KINETICS + "a,b,1,2,/etc\n", ":2: '/etc' leads out of "),
        ("kinetics", KINETICS + f"{'a' * 300},b,1,2,train\n", ": none of its 1 videos is there"),
        ("kinetics", KINETICS + f"a,{'b' * 200_000},1,2,train\n", ":1: not a valid CSV: field larger than"),
        ("charades", f"id,actions\nx,c{'9' * 5000}\n", ":2: 'c99"),
        ("charades", f"id,actions\n{'x' * 200_000},c001\n", ":1: not a valid CSV: field larger than"),
        ("something_something", "[" * 100_000, ": not valid JSON: "),
        ("something_something", '[{"id": {}, "template": []}]', ": entry 1: '' is none of the 2 classes"),
        ("something_something", '[{"id": "../../etc/passwd", "template": "a"}]', ": none of its 1 videos is there"),
    ],
)
def test_annotations_that_cannot_be_meant_are_refused(tmp_path: Path, format: str, text: str, message: str) -> None:
    (tmp_path / "train").write_text(text)
    (tmp_path / "labels.json").write_text(GOOD_LABELS)
    assert refusal(lambda: open_videos(format, str(tmp_path), "train")).startswith(f"{tmp_path}/train{message}")


@pytest.mark.parametrize("labels", ['{"a": 1e999}', '{"a": []}', "[" * 100_000, '{"a": NaN}', "3", ""])
def test_labels_that_are_no_numbers_are_refused(tmp_path: Path, labels: str) -> None:
    (tmp_path / "train.json").write_text('[{"id": "1", "template": "a"}]')
    (tmp_path / "labels.json").write_text(labels)
    message = refusal(lambda: open_videos("something_something", str(tmp_path), "train.json"))
    assert message.startswith(f"{tmp_path}/labels.json: ")


def test_what_is_no_file_is_neither_waited_for_nor_read_for_ever(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (64 << 30, limits[1]))
    try:
        for source in ("pipe", "endless", "loop", "large", ".", "x" * 5000):
            for format in ("list", "kinetics", "charades", "something_something"):
                refusal(lambda source=source, format=format: open_videos(format, str(tmp_path), source))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    refusal(lambda: open_videos("folder", str(tmp_path), "large"))


def test_a_class_name_that_is_not_one_line_is_refused(tmp_path: Path) -> None:
    for name in (b"a\nb", b"\xff"):
        folder = os.path.join(os.fsencode(tmp_path), name, name)
        os.makedirs(folder)
        Path(os.fsdecode(folder), "a.mp4").touch()
        assert "has to be one line of UTF-8" in refusal(
            lambda name=name: open_videos("folder", str(tmp_path), os.fsdecode(name))
        )


def test_many_classes_are_looked_through_at_once(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("".join(f"{n}\n" for n in range(100_000)))
    (tmp_path / "train.csv").write_text("a.mp4 7\n")
    assert len(open_videos("list", str(tmp_path), "train.csv").classes) == 100_000


def test_a_list_leads_out_of_the_root_only_where_that_is_allowed(tmp_path: Path, tiny: Callable[..., Recipe]) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "train.csv").write_text("../a.mp4 0\n/b.mp4 1\n")
    message = refusal(lambda: open_videos("list", str(root), "train.csv"))
    assert message == (
        f"{root}/train.csv:1: '../a.mp4' is outside of {root}; set data.root to a folder that holds all videos, "
        "or allow it with data.outside_root=true"
    )
    videos = open_videos("list", str(root), "train.csv", outside_root=True)
    assert [os.path.normpath(videos.path(n)) for n in range(2)] == [str(tmp_path / "a.mp4"), "/b.mp4"]
    assert tiny("data.outside_root=true").data.outside_root
    assert "outside_root is for format: list" in refusal(
        lambda: tiny("data.outside_root=true", "data.format=folder"), RecipeError
    )


def test_a_root_full_of_links_is_a_root(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/a.mp4").touch()
    (tmp_path / "root").mkdir()
    (tmp_path / "root/videos").symlink_to(tmp_path / "disk")
    (tmp_path / "root/train.csv").write_text(f"videos/a.mp4 0\n{tmp_path}/root/videos/a.mp4 0\n")
    videos = open_videos("list", str(tmp_path / "root"), "train.csv")
    assert [Path(videos.path(n)).is_file() for n in range(2)] == [True, True]


def test_videos_outside_of_the_root_are_not_prepared_as_their_files_would_lie_outside_too(tmp_path: Path) -> None:
    from mgtrain.clips.prepared import Settings

    folder = tmp_path / "deep/prepared"
    message = refusal(lambda: prepare(tmp_path, ["../../a.mp4"], folder, Settings((256,), 25, None), workers=1))
    assert "is outside of" in message
    assert not folder.exists()
