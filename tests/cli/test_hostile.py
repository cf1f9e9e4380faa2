"""What others wrote (recipes, annotations, checkpoints, run directories) is refused in one line, or harmless."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import resource
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mgtrain.clips.cut import Cut
from mgtrain.clips.prepared import PreparedSet, Settings
from mgtrain.data import open_videos
from mgtrain.engine.checks import make_model
from mgtrain.engine.record import _git_revision
from mgtrain.engine.update.optim import make_optimizer
from mgtrain.errors import CheckpointError, DataError, MgtrainError, PlanError, RecipeError, VideoError
from mgtrain.preflight.prepare import PreparedManifest, prepare
from mgtrain.preflight.prepare import verify as verify_prepared
from mgtrain.recipe import Recipe, load_recipe, parse_recipe
from mgtrain.recipe.load import MOST_BYTES
from mgtrain.runs.checkpoint import CheckpointInfo, load_model, load_optimizer, read_info, save_checkpoint, verify
from mgtrain.runs.compare import compare
from mgtrain.runs.folder import RunDir
from mgtrain.runs.study.definition import load_study
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
        ("seed: 3", f"seed: {'[' * 5000}{']' * 5000}"),  # takes ruamel a minute
        ("seed: 3", f"seed: {'{a: ' * 5000}{'}' * 5000}"),
        ("seed: 3", f"seed:\n{''.join(f'{n * chr(32)} - {chr(10)}' for n in range(200))}"),
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
    assert f"larger than {MOST_BYTES:,} bytes" in refusal(lambda: load_recipe(large), RecipeError)
    os.mkfifo(tmp_path / "pipe.yaml")
    for name in ("pipe.yaml", ".", "x" * 5000, "a\0b"):
        assert "no such recipe file" in refusal(lambda name=name: load_recipe(tmp_path / name), RecipeError)
    assert f"larger than {MOST_BYTES:,} bytes, so not a study" in refusal(lambda: load_study(large), RecipeError)
    assert "no such study file" in refusal(lambda: load_study(tmp_path / "pipe.yaml"), RecipeError)


@pytest.mark.parametrize(
    ("format", "text", "message"),
    [
        ("list", "a.mp4 99999999999999999999\n", ":1: 'a.mp4 99999999999999999999' does not end in a label"),
        ("list", "a.mp4 99999999\n", ":1: label 99999999 is out of range; it must be 0 to 999999"),
        ("list", "a.mp4 0\nb\0.mp4 0\n", ":2: has a zero byte"),
        ("list", "a.mp4 0\n/etc/passwd 0\n", ":2: '/etc/passwd' is outside of "),
        ("kinetics", KINETICS + "a,b,1e400,2,train\n", ":2: the times '1e400' and '2' are not numbers of seconds"),
        ("kinetics", KINETICS + "a,b,-1,1e9,train\n", ":2: the times '-1' and '1e9' are not numbers of seconds"),
        ("kinetics", KINETICS + "a,b\n", ":2: the times '' and '' are not numbers of seconds"),
        ("kinetics", KINETICS + "a,b,1,2\n", ": none of its 1 videos exists"),
        ("kinetics", KINETICS + "../..,b,1,2,train\n", ":2: '../..' leads out of "),
        ("kinetics", KINETICS + "a,b,1,2,/etc\n", ":2: '/etc' leads out of "),
        ("kinetics", KINETICS + f"{'a' * 300},b,1,2,train\n", ": none of its 1 videos exists"),
        ("kinetics", KINETICS + f"a,{'b' * 200_000},1,2,train\n", ":1: not valid CSV: field larger than"),
        ("charades", f"id,actions\nx,c{'9' * 5000}\n", ":2: 'c99"),
        ("charades", f"id,actions\n{'x' * 200_000},c001\n", ":1: not valid CSV: field larger than"),
        ("something_something", "[" * 100_000, ": not valid JSON: "),
        ("something_something", '[{"id": {}, "template": []}]', ": entry 1: '' is not one of the 2 classes"),
        ("something_something", '[{"id": "../../etc/passwd", "template": "a"}]', ": none of its 1 videos exists"),
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
        assert "must be one line of UTF-8" in refusal(
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
        f"{root}/train.csv:1: '../a.mp4' is outside of {root}; set data.root (--root of init) to a folder with all "
        "videos, or allow it with data.outside_root=true"
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
    folder = tmp_path / "deep/prepared"
    message = refusal(lambda: prepare(tmp_path, ["../../a.mp4"], folder, Settings((256,), 25, None), workers=1))
    assert "is outside of" in message
    assert not folder.exists()


class Canary:
    """What a malicious pickle holds: loaded, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_as_a_checkpoint_runs_nothing(tmp_path: Path) -> None:
    evil = pickle.dumps(Canary(tmp_path / "canary"))
    (tmp_path / "plain.safetensors").write_bytes(evil)
    with zipfile.ZipFile(tmp_path / "zip.safetensors", "w") as file:  # as torch.save writes it
        file.writestr("archive/data.pkl", evil)
        file.writestr("archive/version", "3\n")
    for name in ("plain", "zip"):
        for look in (read_info, verify):
            assert "not a readable checkpoint" in refusal(
                lambda look=look, name=name: look(tmp_path / f"{name}.safetensors"), CheckpointError
            )
    assert not (tmp_path / "canary").exists()
    pickle.loads(evil)
    assert (tmp_path / "canary").exists()  # the canary works


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        b"\xff" * 100,
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 10**8) + b" ",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        struct.pack("<Q", 8) + b"{}      ",
        struct.pack("<Q", 60) + b'{"a":{"dtype":"F32","shape":[99999999],"data_offsets":[0,4]}}',
    ],
)
def test_absurd_headers_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    for look in (read_info, verify):
        assert refusal(lambda look=look: look(tmp_path / "a.safetensors"), CheckpointError).startswith(f"{tmp_path}/a")


@pytest.fixture(scope="module")
def checkpoint(tiny: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the tiny recipe. Not to be changed."""
    path = tmp_path_factory.mktemp("checkpoint") / "a.safetensors"
    model = make_model(tiny())
    optimizer = make_optimizer(model, tiny().optim)
    model(torch.zeros(2, 3, 2, 32, 32)).sum().backward()
    optimizer.step()
    save_checkpoint(path, model, optimizer, CheckpointInfo(1, tiny().to_yaml(), ("a", "b", "c", "d"), "p", "d"))
    return path


def rewritten(checkpoint: Path, folder: Path, info: str | None, **tensors: torch.Tensor) -> Path:
    """The checkpoint with other words in its header, or other tensors."""
    with safe_open(checkpoint, framework="pt") as file:
        metadata = file.metadata()
    words = {"format": metadata["format"], **({} if info is None else {"info": info})}
    save_file({**load_file(checkpoint), **tensors}, folder / "b.safetensors", metadata=words)
    return folder / "b.safetensors"


@pytest.mark.parametrize(
    "change",
    [{"step": "x"}, {"step": -1}, {"step": 1e300}, {"recipe": 3}, {"classes": 3}, {"classes": [3]}, {"extra": 3},
     {"scaler": 3}, {"train_seconds": "x"}, {"recalibrated": "x"}, {"plan": None}],
    ids=str,
)  # fmt: skip
def test_facts_of_a_wrong_kind_are_refused(checkpoint: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    with safe_open(checkpoint, framework="pt") as file:
        facts = json.loads(file.metadata()["info"])
    path = rewritten(checkpoint, tmp_path, json.dumps({**facts, **change}))
    assert next(iter(change)) in refusal(lambda: read_info(path), CheckpointError)


@pytest.mark.parametrize("info", [None, "", "3", "[]", "{}", "null", "[" * 100_000, '{"step": 1}', "\0"])
def test_headers_without_the_facts_are_refused(checkpoint: Path, tmp_path: Path, info: str | None) -> None:
    path = rewritten(checkpoint, tmp_path, info)
    for look in (read_info, verify):
        assert refusal(lambda look=look: look(path), CheckpointError).startswith(f"{path}: ")


@pytest.mark.parametrize(
    "name",
    ["model.stem.conv.weight", "groups.stem.norm", "groups.nowhere", "groups.stem.conv", "optimizer.nowhere",
     "optimizer.momentum_buffer.nowhere", "optimizer.momentum_buffer.stem.conv.weight"],
)  # fmt: skip
def test_tensors_that_fit_nowhere_are_refused(
    checkpoint: Path, tmp_path: Path, tiny: Callable[..., Recipe], name: str
) -> None:
    path = rewritten(checkpoint, tmp_path, "", **{name: torch.zeros(3)})
    model = make_model(tiny())
    optimizer = make_optimizer(model, tiny().optim)

    def load() -> None:
        load_model(path, model)
        load_optimizer(path, model, optimizer)

    assert name.removeprefix("model.") in refusal(load, CheckpointError)


def test_weights_of_another_type_are_refused(checkpoint: Path, tmp_path: Path, tiny: Callable[..., Recipe]) -> None:
    weight = load_file(checkpoint)["model.stem.conv.weight"]
    path = rewritten(checkpoint, tmp_path, "", **{"model.stem.conv.weight": weight.to(torch.int8)})
    message = refusal(lambda: load_model(path, make_model(tiny())), CheckpointError)
    assert message == f"{path}: stem.conv.weight is torch.int8, but torch.float32 in the model"


EVAL = {"step": 17, "top1": 0.5, "top5": 1.0, "train_seconds": 2.0, "data_seconds": 1.0, "eval_seconds": 1.0,
        "videos": 12}  # fmt: skip


def sound_run(folder: Path, recipe: Recipe) -> RunDir:
    """A run directory as `fit` leaves it, as far as `compare` reads it."""
    run, plan = RunDir(folder), make_plan(recipe, 24)
    per_clip = [{"frames": s.frames, "crop": s.crop, "multiply_adds": 1} for s in plan.shapes()]
    run.write("recipe.yaml", recipe.to_yaml())
    run.write("plan.json", {**plan.describe(), "flops_per_clip": per_clip})
    run.write("data.json", {})
    run.write("env.json", {"device": "x", "ranks": 1, "threads": 1, "mgtrain": "0.1.0", "torch": "2.14.1"})
    run.append("evals.jsonl", EVAL)
    return run


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "null", "{}", "[" * 100_000, '{"videos": "x"}', '{"videos": 1e400}', "\0"]
)
@pytest.mark.parametrize("name", ["plan.json", "env.json", "data.json"])
def test_damaged_records_are_refused(tmp_path: Path, tiny: Callable[..., Recipe], name: str, text: str) -> None:
    run = sound_run(tmp_path / "run", tiny())
    other = RunDir(Path(shutil.copytree(run.path, tmp_path / "other")))
    assert compare(run, other)["speedups"]["steps"] == 1
    (other.path / name).write_text(text)
    if (name, text[:1]) != ("data.json", "{"):  # of which only the equality counts
        assert str(other.path) in refusal(lambda: compare(run, other), MgtrainError)


@pytest.mark.parametrize(
    "line",
    ["", "3", "[]", "{}", "[" * 100_000, '{"step": 1}', *(json.dumps({**EVAL, key: value}) for key, value in [
        ("step", "x"), ("step", 10**30), ("top1", None), ("top1", float("nan")), ("train_seconds", [1]),
        ("data_seconds", "x"), ("top5", float("inf")), ("videos", {}), ("train_seconds", 0), ("eval_seconds", "x"),
        ("mean_class", "x"), ("mean_class", float("nan")), ("correct", [1])])],
)  # fmt: skip
def test_damaged_logs_are_refused(tmp_path: Path, tiny: Callable[..., Recipe], line: str) -> None:
    run = sound_run(tmp_path / "run", tiny())
    other = RunDir(Path(shutil.copytree(run.path, tmp_path / "other")))
    (other.path / "evals.jsonl").write_text(f"{line}\n")
    assert str(other.path) in refusal(lambda: compare(run, other), MgtrainError)


@pytest.fixture(scope="module")
def prepared(motions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared set of two videos. Not to be changed."""
    folder = tmp_path_factory.mktemp("prepared") / "set"
    names = ["videos/val/left_0.mp4", "videos/val/left_1.mp4"]
    prepare(motions, names, folder, Settings((32, 16), 25, None), workers=1)
    return folder


def npy(value: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, value, allow_pickle=True)
    return file.getvalue()


def test_damaged_prepared_sets_are_refused_and_run_nothing(prepared: Path, motions: Path, tmp_path: Path) -> None:
    settings = json.loads((prepared / "prepared.json").read_text())
    canary = np.array([Canary(tmp_path / "canary")], object)
    damages = [
        *(("prepared.json", text.encode()) for text in ("", "3", "[]", "{}", "[" * 100_000)),
        *(("prepared.json", json.dumps({**settings, "levels": levels}).encode()) for levels in (3, ["x"], None)),
        *(("index.npy", bytes_) for bytes_ in (b"", b"x", npy(canary), npy(np.zeros(3)), npy(np.zeros((0, 2))))),
        ("offsets.bin", b""),
    ]
    for number, (name, content) in enumerate(damages):
        folder = Path(shutil.copytree(prepared, tmp_path / str(number)))
        (folder / name).write_bytes(content)
        assert str(folder) in refusal(lambda folder=folder: PreparedSet(folder))
        if name != "offsets.bin":
            refusal(lambda folder=folder: verify_prepared(folder, 1))
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("key", "value"), [("frames", -5), ("fps", float("nan")), ("width", 0), ("height", -3), ("stored", -5)]
)
def test_an_index_of_absurd_numbers_breaks_videos_not_the_loader(
    prepared: Path, tmp_path: Path, key: str, value: float
) -> None:
    folder = Path(shutil.copytree(prepared, tmp_path / "set"))
    rows = np.load(folder / "index.npy")
    rows[key] = value
    np.save(folder / "index.npy", rows)
    opened = PreparedSet(folder)

    def read() -> None:
        with opened.open(0, "videos/val/left_0.mp4") as video:
            video.read([Cut((0, video.info.frames - 1), (0, 0, 8, 8), 8, False)])

    refusal(read, VideoError)


def test_manifests_of_something_else_are_refused(prepared: Path, tmp_path: Path) -> None:
    for number, line in enumerate(["3", "{}", '{"path": 3}', '{"path": "a"}', "[" * 100_000,
                                   '{"path": "../a", "error": ""}', '{"path": "a", "levels": [3]}']):  # fmt: skip
        folder = Path(shutil.copytree(prepared, tmp_path / str(number)))
        (folder / "videos.jsonl").write_text(f"{line}\n")
        assert str(folder) in refusal(lambda folder=folder: PreparedManifest(folder))


def test_no_process_imports_from_the_current_folder(tiny_text: str, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(tiny_text)
    for name in ("random", "queue", "select", "calendar", "secrets", "torch"):
        (tmp_path / f"{name}.py").write_text("open('imported', 'w').close()\n")
    few = ("schedule={name: baseline}", "optim.stages=[0.3]", "optim.warmup_epochs=0", "evaluation.times=1",
           "hardware.workers=1")  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "mgtrain", "fit", "tiny.yaml", "--procs", "2", "--device", "cpu", *few],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "imported").exists()


def test_asking_git_for_the_commit_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.sh").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "evil.sh").chmod(0o755)
    (tmp_path / ".gitattributes").write_text("* filter=evil\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "evil.sh"], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    for key in ("core.fsmonitor", "core.pager", "filter.evil.clean", "filter.evil.process"):
        subprocess.run(["git", "config", key, str(tmp_path / "evil.sh")], check=True)
    (tmp_path / "evil.sh").touch()
    revision = _git_revision()
    assert revision is not None
    assert re.fullmatch("[0-9a-f]{12}", revision)
    assert not (tmp_path / "ran").exists()
