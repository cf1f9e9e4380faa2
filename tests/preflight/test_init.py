"""`mgtrain init`: what videos are there, which belong together, and the recipes for them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mgtrain.cli import app
from mgtrain.data import open_splits
from mgtrain.data.found import find_videos, make_parts
from mgtrain.data.index import make_index
from mgtrain.data.split import groups_by_pattern, groups_of_names
from mgtrain.data.videos import Videos, mirrored_pairs
from mgtrain.errors import DataError, UsageError
from mgtrain.preflight.init import SIZES, Found, propose
from mgtrain.processes.cores import usable_cores
from mgtrain.processes.distributed import World
from mgtrain.recipe import load_recipe, parse_recipe, recipe_differences
from mgtrain.schedule import make_plan

CLASSES = ("bow", "left wave", "right wave")


@pytest.fixture(scope="module")
def clips(motions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 12 videos by 6 persons each, two of one person with the same bytes, and what is no video."""
    root = tmp_path_factory.mktemp("init") / "my clips"
    videos = sorted(motions.rglob("*.mp4"))
    for c, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for n in range(12):
            source = videos[c * 9 + n % 9 % len(videos)] if (c, n) != (0, 3) else videos[0]
            shutil.copy(source, root / name / f"person{n // 2}_take{n % 2}.mp4")
            with (root / name / f"person{n // 2}_take{n % 2}.mp4").open("ab") as file:
                file.write(b"free" if (c, n) in ((0, 0), (0, 3)) else f"{c}-{n}".encode())  # else all are different
        (root / name / "._person0_take0.mp4").write_bytes(b"Mac")
    (root / "bow" / "empty.mp4").touch()
    return root


@pytest.mark.parametrize(
    ("pattern", "of"),
    [
        ("walk/person{g:02d}_walking_d{n}.avi", "person"),  # KTH
        ("v_Bow_g{g:02d}_c{n:02d}.avi", "g"),  # UCF101
        ("train/abcdefghi{g:02d}_{n:06d}_00001{n}.mp4", "YouTube"),  # Kinetics
        ("party/holiday{g:02d} part{n}.mp4", "last number"),
        ("a/{g}-film_clip_{n:03d}.mkv", "last number"),
    ],
)
def test_names_show_groups(pattern: str, of: str) -> None:
    names = [pattern.format(g=g, n=n) for g in range(6) for n in range(3)]
    groups = groups_of_names(names, [n % 2 for n in range(18)])
    assert groups is not None
    assert groups.ids.tolist() == [g for g in range(6) for _ in range(3)]
    assert of in groups.rule + groups.example


@pytest.mark.parametrize("pattern", ["a/clip_{:03d}.mp4", "a/{:08x}z.mp4", "g{}.mp4", "seq1_x{}y.mp4"])
def test_running_numbers_and_one_source_for_all_are_no_groups(pattern: str) -> None:
    assert groups_of_names([pattern.format(7919 * n) for n in range(20)], [0] * 20) is None


def test_groups_have_to_leave_every_class_enough() -> None:
    names = [f"person{n // 2}_{n}x.mp4" for n in range(20)]
    assert groups_of_names(names, [0] * 20) is not None
    assert groups_of_names(names, [0] * 14 + [1] * 6) is None  # class 1 has three persons only


def test_groups_by_a_pattern() -> None:
    groups = groups_by_pattern(["a/x_1_7.mp4", "b/y_1_8.mp4", "c/z_2_7.mp4"], r"_(\d)_")
    assert groups.ids.tolist() == [0, 0, 1]
    with pytest.raises(UsageError, match="does not match"):
        groups_by_pattern(["a_1.mp4", "c.mp4"], r"_\d")
    with pytest.raises(UsageError, match="not a regular expression"):
        groups_by_pattern(["a"], "(")


def test_every_layout_is_found(clips: Path, tmp_path: Path) -> None:
    assert {part: len(of) for part, of in find_videos(clips).items()} == {"all": 37}
    assert find_videos(clips.parent)["all"].classes == CLASSES  # the only folder within
    for part in ("train", "test"):
        shutil.copytree(clips, tmp_path / "split" / part)
    assert {part: len(of) for part, of in find_videos(tmp_path / "split").items()} == {"train": 37, "val": 37}
    listing = tmp_path / "some.csv"
    listing.write_text("bow/person1_take0.mp4 0\nleft wave/person1_take0.mp4 1\n")
    assert find_videos(listing, clips)["all"].root == str(clips)
    lists = tmp_path / "lists"
    lists.mkdir()
    for part in ("train", "valid"):
        shutil.copy(listing, lists / f"{part}.txt")
    assert {part: len(of) for part, of in find_videos(lists, clips).items()} == {"train": 2, "val": 2}
    (lists / "train.txt").rename(lists / "train.csv")  # beside valid.txt
    assert {part: len(of) for part, of in find_videos(lists, clips).items()} == {"train": 2, "val": 2}
    with pytest.raises(UsageError, match=r"--root /nope: is for the paths of lists, and .* has none; leave it out"):
        find_videos(clips, Path("/nope"))


def test_layouts_that_are_easily_misread_are_refused(clips: Path, tmp_path: Path) -> None:
    for part in ("train", "val"):
        (tmp_path / "flat" / part).mkdir(parents=True)
        shutil.copy(clips / "bow/person1_take0.mp4", tmp_path / "flat" / part)
    with pytest.raises(
        DataError, match="flat: train and val hold videos, not a folder for each class; sort the videos"
    ):
        find_videos(tmp_path / "flat")
    shutil.copytree(clips, tmp_path / "half")
    (tmp_path / "half/train.csv").write_text("bow/person1_take0.mp4 0\n")
    with pytest.raises(DataError, match=r"half/train.csv: has no list of validation videos beside it; add .*val.csv"):
        find_videos(tmp_path / "half")


@pytest.mark.parametrize("made", [(), ("a.mp4",), ("only/a.mp4",), ("train/x/a.mp4", "train/y/b.mp4")])
def test_a_folder_without_labelled_videos_says_what_is_wanted(made: tuple[str, ...], tmp_path: Path) -> None:
    for name in made:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    if made == ("train/x/a.mp4", "train/y/b.mp4"):  # is taken for the one folder that holds all
        assert find_videos(tmp_path)["all"].classes == ("x", "y")
        return
    with pytest.raises(DataError, match="no labelled videos"):
        find_videos(tmp_path)
    with pytest.raises(DataError, match="no such file or folder"):
        find_videos(tmp_path / "nothing")


def test_parts_share_no_person_and_no_copy(clips: Path) -> None:
    found = find_videos(clips)
    parts = make_parts(found, make_index(found), val=0.34, group_by=None, seed=0)
    names = {part: [of.name(n) for n in range(len(of))] for part, of in parts.splits.items()}
    persons = {part: {name.rpartition("/")[2].partition("_")[0] for name in of} for part, of in names.items()}
    assert parts.groups == 6
    assert len(persons["val"]) == 2
    assert not persons["train"] & persons["val"]
    assert len(names["train"]) + len(names["val"]) == 35  # of 36, one copy is left out
    assert not [name for of in names.values() for name in of if "empty" in name or "._" in name]


def test_a_given_split_is_kept_and_loses_what_validation_has_too(clips: Path, tmp_path: Path) -> None:
    lists = {"train": ["bow/person0_take0.mp4 0", "bow/person5_take1.mp4 0", "left wave/person1_take0.mp4 1"]}
    lists["val"] = ["bow/person1_take1.mp4 0", "left wave/person2_take0.mp4 1"]  # the first: a copy of train's first
    for part, lines in lists.items():
        (tmp_path / f"{part}.csv").write_text("\n".join(lines))
    found = find_videos(tmp_path, clips)
    parts = make_parts(found, make_index(found), val=0.5, group_by=None, seed=0)
    assert [parts.splits["train"].name(n) for n in range(2)] == [line.rpartition(" ")[0] for line in lists["train"][1:]]
    assert len(parts.splits["val"]) == 2
    assert parts.groups is None
    with pytest.raises(UsageError, match="--group-by person: the videos are already split; leave it out, or"):
        make_parts(found, make_index(found), val=0.5, group_by="person", seed=0)


def test_classes_that_a_flip_turns_into_one_another() -> None:
    assert mirrored_pairs(["Turn Left", "turn right", "bow", "clockwise", "counterclockwise"]) == (
        [("Turn Left", "turn right"), ("clockwise", "counterclockwise")],
        False,
    )
    assert mirrored_pairs(["leftovers", "bright"]) == ([], False)
    assert mirrored_pairs(["left", "bow"]) == ([], True)


def _found(seconds: float = 4.0, short_side: float = 240.0, videos: int = 96) -> Found:
    of = Videos.of("/there/clips", [(f"{n}.mp4", n % 3) for n in range(videos)], CLASSES)
    files = {"train": "/there/train.csv", "val": "/there/val.csv"}
    return Found(of, of, files, np.full(9, seconds), np.full(9, short_side))


@pytest.fixture(autouse=True)
def no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU on which half precision gains nothing, whatever this one is."""
    monkeypatch.setattr("mgtrain.preflight.init.half_precision_gain", lambda *_: None)
    monkeypatch.setattr("mgtrain.preflight.init.MEASURE_SECONDS", 0.1)


@pytest.mark.parametrize(("gain", "precision"), [(None, "fp32"), (1.2, "fp32"), (1.6, "bf16")])
def test_half_precision_is_proposed_where_it_pays(
    gain: float | None, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mgtrain.preflight.init.matrix_product", lambda recipe, world: 1e11)
    plain = propose(_found(), World(), 1, 1)
    monkeypatch.setattr("mgtrain.preflight.init.half_precision_gain", lambda *_: gain)
    made = propose(_found(), World(), 1, 1)
    assert {parse_recipe(text, "text").hardware.precision for text in made.texts.values()} == {precision}
    assert made.recipe.hardware.precision == precision
    assert made.seconds == pytest.approx(plain.seconds / (gain if precision == "bf16" else 1))


@pytest.mark.parametrize("gpus", [1, 3, 8])
def test_recipes_are_valid_whatever_the_videos(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgtrain.preflight.init.matrix_product", lambda recipe, world: 1e11)
    odd = (_found(0.2, 40), _found(600, 1080, videos=30_000), _found(videos=3))
    for found in (_found(), *(odd if gpus == 3 else ())):
        made = propose(found, World(), gpus, None)
        differing = recipe_differences(*(parse_recipe(text, "text").flat() for text in made.texts.values()))
        assert {key.split(".")[0] for key in differing} == {"schedule"}
        assert made.recipe.data.mirrored == (("left wave", "right wave"),)
        assert make_plan(made.recipe, len(found.train)).totals().epochs >= 14.9


def test_size_grows_with_time_and_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def volume(hours: float, rate: float) -> tuple[float, float]:
        monkeypatch.setattr("mgtrain.preflight.init.matrix_product", lambda recipe, world: rate)
        made = propose(_found(), World(), 1, hours)
        return made.seconds, make_plan(made.recipe, 96).totals().voxels * made.recipe.model.width  # type: ignore[union-attr]

    steps = [volume(hours, 1e11) for hours in (0.01, 0.3, 1, 100)]
    assert [work for _, work in steps] == sorted({work for _, work in steps})
    assert all(seconds <= 3600 * hours for (seconds, _), hours in zip(steps[1:], (0.3, 1, 100), strict=True))
    assert volume(1, 1e12)[1] > volume(1, 1e11)[1]


def test_a_short_run_warms_up_for_a_larger_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgtrain.preflight.init.matrix_product", lambda recipe, world: 1e11)
    for hours, share in ((0.01, 1 / 3), (100, 1 / 6)):
        optim = propose(_found(), World(), 1, hours).recipe.optim
        assert optim.warmup_epochs == pytest.approx(share * sum(optim.stages), abs=0.5)


@pytest.mark.slow
def test_gpu_sizes_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgtrain.preflight.init.matrix_product", lambda recipe, world: 4e14)
    world = World(device=torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    made = propose(_found(short_side=256), world, 8, 1000)
    assert (made.recipe.base.clips, made.recipe.base.frames, made.recipe.base.crop) == (64, 32, 224)
    assert made.recipe.hardware.precision == "bf16"
    assert made.recipe.clip.short_side == (256, 320)
    assert len(SIZES["cuda"]) > 1


@pytest.mark.parametrize("network", ["swin3d_t", pytest.param("mvit_v2_s", marks=pytest.mark.slow)])
def test_a_transformer_is_fine_tuned_from_kinetics_weights(network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgtrain.preflight.init.matrix_product", lambda recipe, world: 1e14)
    made = propose(_found(short_side=256), World(), 1, 10, network)
    recipe = made.recipe
    assert (recipe.model.name, recipe.optim.name, recipe.optim.curve) == (network, "adamw", "cosine")
    assert recipe.base.crop == 224
    assert recipe.init.weights is not None
    assert recipe.init.weights.endswith(f"k400_{network}.safetensors")
    differing = recipe_differences(*(parse_recipe(text, "text").flat() for text in made.texts.values()))
    assert {key.split(".")[0] for key in differing} == {"schedule"}


@pytest.mark.slow
def test_a_transformer_has_fewer_epochs_in_less_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgtrain.preflight.init.matrix_product", lambda recipe, world: 1e14)
    few, many = (propose(_found(short_side=256), World(), 1, hours, "swin3d_t").recipe for hours in (0.01, 10))
    assert len(make_plan(few, 96)) < len(make_plan(many, 96))


def test_init_writes_lists_and_recipes_once(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mgtrain.preflight.init.matrix_product", lambda recipe, world: 1e9)  # operations per second
    monkeypatch.setattr(torch, "get_num_threads", usable_cores)  # so loading takes cores from computing
    words = ["init", "--data", str(clips), "--to", "work", "--name", "mine", "--hours", "0.01", "--json"]
    words += ["--device", "cpu"]
    result = CliRunner().invoke(app, words)
    said = json.loads(result.stdout)
    assert said["groups"] == 6
    assert said["videos"] == {"train": 29, "val": 6}
    assert said["classes"] == 3
    assert "AppleDouble" in result.stderr
    recipe = load_recipe("work/mine_multigrid.yaml")
    assert {part: len(of) for part, of in open_splits(recipe.data).items()} == said["videos"]
    assert "only 29 training videos, so the recipes need " in result.stderr
    assert "even the smallest recipe takes about " in result.stderr
    assert ", more than 36.0 s; lower optim.stages, use a GPU or give more --hours" in result.stderr
    assert said["baseline_seconds"] > said["computing_seconds"] > 0
    for more, message in (
        (["--fps", "5"], "--fps 5: is the rate of folders of frames, but "),
        (["--to", "work/train.csv/x"], "--to work/train.csv/x: work/train.csv is not a folder; choose another one"),
    ):
        refused = CliRunner().invoke(app, [*words, "--name", "another", *more])
        assert isinstance(refused.exception, UsageError)
        assert message in str(refused.exception)
    again = CliRunner().invoke(app, words)
    assert isinstance(again.exception, UsageError)
    assert "exists already" in str(again.exception)


def test_init_says_how_long_loading_takes_and_when_the_machine_is_busy(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mgtrain.preflight.init.matrix_product", lambda recipe, world: 1e14)  # computing takes no time
    monkeypatch.setattr("mgtrain.preflight.init.busy_cores", lambda: 9.0)
    result = CliRunner().invoke(app, ["init", "--data", str(clips), "--to", str(tmp_path), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "before    mgtrain data prepare " in result.stdout
    assert "% of that time; then train with data.prepared=prepared" in " ".join(result.stdout.split())
    assert "other processes use 9.0 of" in result.stderr


def test_clips_of_slow_videos_do_not_repeat_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mgtrain.preflight.init.matrix_product", lambda recipe, world: 1e11)
    for rate, written, stride in ((2.0, 2, 1), (12.5, 12.5, 3), (25.0, 30, 4), (60.0, 30, 4)):
        clip = propose(replace(_found(seconds=5.0), rate=rate), World(), 1, None).recipe.clip
        assert (clip.fps, clip.stride) == (written, stride)


def test_init_refuses_what_no_recipe_can_hold(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("one.csv").write_text("".join(f"{file.name} 0\n" for file in sorted((clips / "bow").glob("*.mp4"))))
    (tmp_path / "caf\udce9").symlink_to(clips)
    for data, root, error, message in (
        ("one.csv", clips / "bow", DataError, "one.csv: all videos are of the class '0'; add videos of another one"),
        ("caf\udce9", None, UsageError, "has characters that a recipe cannot hold; rename the folder"),
    ):
        where = ["--root", str(root)] if root else []
        result = CliRunner().invoke(app, ["init", "--data", data, *where, "--to", "work", "--hours", "0.01"])
        assert isinstance(result.exception, error), result.output
        assert message in str(result.exception)
    assert not Path("work").exists()


def test_init_names_classes_without_videos_and_files_without_an_ending(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(clips, "clips")
    Path("clips/jump").mkdir()
    shutil.copy("clips/bow/person0_take0.mp4", "clips/bow/person9")
    result = CliRunner().invoke(app, ["init", "--data", "clips", "--to", "work", "--hours", "0.01"])
    assert result.exit_code == 0, result.output
    assert "train: no video of 1 (jump); add videos, or remove the class's folder or label" in result.stderr
    assert "ignored files: 1 (clips/bow/person9); if they are videos, give them a suffix such as .mp4" in result.stderr
