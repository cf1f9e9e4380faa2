from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner
from videos import write_video

import mgtrain.preflight.check as module
from mgtrain.cli import app
from mgtrain.clips.decode import VideoFile
from mgtrain.data import open_splits, open_videos
from mgtrain.data.manifest import Checked, Manifest
from mgtrain.engine.fit import fit
from mgtrain.errors import CheckpointError, DataError
from mgtrain.preflight.check import check
from mgtrain.processes.distributed import World
from mgtrain.recipe import Clip, parse_recipe
from mgtrain.runs.folder import RunDir

CLIP = Clip(frames=4, stride=2, crop=32, short_side=(32, 40))


def statuses(root: Path, *paths: str, **limits: float) -> dict[str, str]:
    """What is found of each video: `status: message`."""
    given = {"workers": 2, "seconds": 20, "memory": 1 << 32, **limits}
    records = check(str(root), paths, root / "checked.jsonl", CLIP, **given)
    return {record["path"]: f"{record['status']}: {record['message']}".rstrip(": ") for record in records}


@pytest.fixture
def bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one video for each status."""
    write_video(tmp_path / "good.mp4", 20)
    write_video(tmp_path / "brief.mp4", 5)
    data = write_video(tmp_path / "tail.mkv", 60).read_bytes()
    (tmp_path / "tail.mkv").write_bytes(data[: len(data) * 6 // 10])
    data = write_video(tmp_path / "whole.mp4", 60).read_bytes()
    middle = len(data) * 6 // 10
    (tmp_path / "hurt.mp4").write_bytes(data[:middle] + b"\xff" * 4000 + data[middle + 4000 :])
    (tmp_path / "page.mp4").write_text("<html>404</html>")
    os.mkfifo(tmp_path / "fifo.mp4")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    for name in ("kills.mp4", "hangs.mp4", "fills.mp4"):
        (tmp_path / name).symlink_to("good.mp4")

    def hostile(path: str, fps: float | None) -> VideoFile:  # workers are forked and inherit it
        match Path(path).name:
            case "kills.mp4":
                os._exit(9)
            case "hangs.mp4":
                time.sleep(100)
            case "fills.mp4":
                bytearray(1 << 33)
        return VideoFile(path)

    monkeypatch.setattr(module, "open_source", hostile)
    return tmp_path


def test_every_video_gets_its_status(bad: Path):
    names = [*(path.name for path in bad.iterdir()), "nothing.mp4"]
    found = statuses(bad, *names, seconds=1)
    last = found.pop("tail.mkv")
    assert last.startswith("short: ")
    assert last.endswith("of 60 frames decode")
    hurt = found.pop("hurt.mp4")
    assert hurt.startswith("corrupt: Invalid data")
    assert hurt.endswith("of 60 frames")
    assert found == {
        "good.mp4": "ok",
        "whole.mp4": "ok",
        "brief.mp4": "short: 5 frames, the base clip spans 8",
        "page.mp4": "corrupt: Invalid data found when processing input",
        "fifo.mp4": "corrupt: not a regular file",
        "loop.mp4": "corrupt: Too many levels of symbolic links",
        "kills.mp4": "crash: ended with exit code 9",
        "hangs.mp4": "timeout: takes more than 1 s",
        "fills.mp4": "corrupt: out of memory",
        "nothing.mp4": "missing: No such file or directory",
    }


def test_the_manifest_says_what_each_video_is(tmp_path: Path):
    path = write_video(tmp_path / "v.mp4", 20, fps=25)
    statuses(tmp_path, "v.mp4")
    (line,) = (tmp_path / "checked.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert len(record.pop("sha256")) == 64
    assert record == {
        "path": "v.mp4", "status": "ok", "message": "", "frames": 20, "fps": 25.0, "width": 128, "height": 64,
        "bytes": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns,
    }  # fmt: skip


def test_a_file_system_without_locks_is_not_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(DataError, match="cannot be written: No locks available; choose another place"):
        Manifest(tmp_path / "checked.jsonl").__enter__()


def test_another_command_s_manifest_is_refused(tmp_path: Path):
    write_video(tmp_path / "a.mp4", 20)
    (tmp_path / "checked.jsonl").write_text('{"path": "a.mp4", "stored": 20, "levels": []}\n')
    with pytest.raises(DataError, match="not a manifest of `mgtrain data check`; choose another file"):
        statuses(tmp_path, "a.mp4")


def test_lines_that_another_process_has_added_since_are_kept(tmp_path: Path):
    write_video(tmp_path / "a.mp4", 20)
    manifest = Manifest(tmp_path / "checked.jsonl")
    statuses(tmp_path, "a.mp4")
    before = (tmp_path / "checked.jsonl").read_text()
    with pytest.raises(DataError, match="another process has written to it just now"):
        manifest.__enter__()
    assert (tmp_path / "checked.jsonl").read_text() == before


def test_only_what_is_new_or_has_changed_is_looked_at_again(tmp_path: Path):
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, 20)
    statuses(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    write_video(tmp_path / "b.mp4", 9)
    write_video(tmp_path / "c.mp4", 20)
    with (tmp_path / "checked.jsonl").open("a") as file:
        file.write('{"path": "a.mp4", "sta')  # as a crash leaves it
    assert statuses(tmp_path, "a.mp4", "b.mp4", "c.mp4") == dict.fromkeys(("a.mp4", "b.mp4", "c.mp4"), "ok")
    lines = (tmp_path / "checked.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["path"] for line in lines) == ["a.mp4", "b.mp4", "b.mp4", "c.mp4", "c.mp4"]
    with Manifest(tmp_path / "checked.jsonl"), pytest.raises(DataError, match="another process is writing to it"):
        statuses(tmp_path, "a.mp4")


def lists(root: Path, *names: str) -> Path:
    (root / "train.csv").write_text("".join(f"{name} {n % 2}\n" for n, name in enumerate(names)))
    return root


def test_what_cannot_be_used_is_left_out_of_the_videos(bad: Path):
    names = ("good.mp4", "kills.mp4", "brief.mp4", "page.mp4", "nothing.mp4", "whole.mp4", "hangs.mp4")
    statuses(bad, *names, seconds=1)
    videos = open_videos("list", str(lists(bad, *names)), "train.csv")
    usable = Checked(str(bad / "checked.jsonl")).usable(videos)
    assert [(usable.name(n), usable.label(n)) for n in range(len(usable))] == [
        ("good.mp4", 0), ("brief.mp4", 0), ("whole.mp4", 1),
    ]  # fmt: skip
    assert usable.left_out_words == "4 left out (1 corrupt, 1 crash, 1 timeout, 1 missing)"
    assert usable.classes == videos.classes
    assert usable.fingerprint != videos.fingerprint


def test_the_last_line_of_a_video_counts(tmp_path: Path):
    videos = open_videos("list", str(lists(tmp_path, "a.mp4", "b.mp4")), "train.csv")
    lines = [("a.mp4", "missing"), ("b.mp4", "ok"), ("a.mp4", "ok"), ("b.mp4", "crash")]
    text = "".join(json.dumps({"path": path, "status": status}) + "\n" for path, status in lines)
    (tmp_path / "checked.jsonl").write_text(text)
    usable = Checked(str(tmp_path / "checked.jsonl")).usable(videos)
    assert [usable.name(n) for n in range(len(usable))] == ["a.mp4"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"path": "a.mp4", "status": "ok"}\n', r"lacks 1 of 2 videos, the first is b\.mp4"),
        ('{"path": "a.mp4", "status": "fine"}\n', "line 1 does not describe a checked video"),
        ('{"path": "a.mp4"}\n', "line 1 does not describe a checked video"),
        ('{"path": "a.', "has no checked video"),
        (
            '{"path": "a.mp4", "status": "crash"}\n{"path": "b.mp4", "status": "crash"}\n',
            "none of its 2 videos can be used",
        ),
    ],
)
def test_a_manifest_that_does_not_belong_is_refused(tmp_path: Path, text: str, problem: str):
    videos = open_videos("list", str(lists(tmp_path, "a.mp4", "b.mp4")), "train.csv")
    (tmp_path / "checked.jsonl").write_text(text)
    with pytest.raises(DataError, match=rf"checked\.jsonl: {problem}; run `mgtrain data check` with this recipe"):
        Checked(str(tmp_path / "checked.jsonl")).usable(videos)


@pytest.mark.parametrize("text", ['{"step": 1}\n', "[]\n", '{"path": 7}\n', "{\n", "\0\0\n{}", "one line", "\n"])
def test_another_file_is_neither_read_nor_written(tmp_path: Path, text: str):
    (tmp_path / "checked.jsonl").write_text(text)
    for use in (lambda: Checked(str(tmp_path / "checked.jsonl")), lambda: statuses(tmp_path, "v.mp4")):
        with pytest.raises(DataError, match=r"checked\.jsonl:1: not a line of a manifest; choose another file"):
            use()
    assert (tmp_path / "checked.jsonl").read_text() == text


def test_a_manifest_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="has no checked video"):
        Checked(str(tmp_path / "checked.jsonl"))
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        Checked(str(tmp_path))


def test_several_labels_stay_with_their_videos(tmp_path: Path):
    (tmp_path / "train.csv").write_text("a.mp4 0;1\nb.mp4 2\nc.mp4 -\nd.mp4 0;2\n")
    videos = open_videos("list", str(tmp_path), "train.csv")
    text = "".join(json.dumps({"path": f"{c}.mp4", "status": "crash" if c == "b" else "ok"}) + "\n" for c in "abcd")
    (tmp_path / "checked.jsonl").write_text(text)
    usable = Checked(str(tmp_path / "checked.jsonl")).usable(videos)
    assert [(usable.name(n), usable.labels(n)) for n in range(len(usable))] == [
        ("a.mp4", (0, 1)), ("c.mp4", ()), ("d.mp4", (0, 2)),
    ]  # fmt: skip


@pytest.fixture
def hurt(tmp_path: Path, tiny_text: str, motions: Path) -> Path:
    """A folder with the tiny recipe for a copy of its videos, of which a training and a validation video are broken."""
    (tmp_path / "data").mkdir()
    for file in motions.iterdir():
        (tmp_path / "data" / file.name).write_bytes(file.read_bytes()) if file.is_file() else None
    for file in sorted((motions / "videos").rglob("*.mp4")):
        copy = tmp_path / "data" / file.relative_to(motions)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.symlink_to(file)
    for split, name in (("train", "left_0.mp4"), ("val", "up_0.mp4")):
        path = tmp_path / "data/videos" / split / name
        assert path.exists()
        path.unlink()
        path.write_text("<html>")
    (tmp_path / "tiny.yaml").write_text(tiny_text.replace(str(motions), "data"))
    return tmp_path


def test_the_command_writes_the_manifest_and_plan_leaves_out_what_it_says(hurt: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(hurt)
    refused = CliRunner().invoke(app, ["data", "check", "tiny.yaml", "--json"])
    assert isinstance(refused.exception, DataError)
    assert str(refused.exception).startswith(
        "2 of 36 videos cannot be used, more than data.max_bad_fraction 0.01 allows"
    )
    result = json.loads(refused.stdout)
    assert (result["schema"], result["file"]) == ("mgtrain.data_check/1", "data-checked.jsonl")
    assert {split: (of["ok"], of["corrupt"]) for split, of in result["splits"].items()} == {
        "train": (23, 1), "val": (11, 1),
    }  # fmt: skip
    assert sorted(result["unusable"]) == ["videos/train/left_0.mp4", "videos/val/up_0.mp4"]
    done = CliRunner().invoke(app, ["data", "check", "tiny.yaml", "data.max_bad_fraction=0.1"])
    assert done.exit_code == 0
    assert "corrupt: videos/train/left_0.mp4: Invalid data" in done.stderr
    assert "to skip unusable videos: data.checked=data-checked.jsonl" in done.stdout
    plan = CliRunner().invoke(app, ["plan", "tiny.yaml", "data.checked=data-checked.jsonl", "--json"])
    assert json.loads(plan.stdout)["videos"] == 23
    assert "training videos: 1 left out (1 corrupt), as data-checked.jsonl says" in plan.stderr


def test_a_run_trains_on_and_evaluates_what_can_be_used_and_resumes_with_the_same(
    hurt: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(hurt)
    short = ("optim.stages=[1]", "optim.warmup_epochs=0", "evaluation.times=1", "schedule.name=baseline")
    text = (hurt / "tiny.yaml").read_text()
    recipe = parse_recipe(text, "tiny.yaml", [*short, "data.max_bad_fraction=0", "data.checked=c.jsonl"])
    everything = open_splits(recipe.data.model_copy(update={"checked": None}))
    paths = [videos.name(n) for videos in everything.values() for n in range(len(videos))]
    check("data", paths, Path("c.jsonl"), recipe.clip, 2, seconds=20, memory=1 << 32)
    run = RunDir(hurt / "run")
    assert fit(recipe, run, World()).videos == 11
    assert run.read("plan.json")["videos"] == 23
    assert run.read("data.json")["train"]["left_out"] == {"corrupt": 1}
    assert fit(recipe, run, World(), resume=True).videos == 11
    with pytest.raises(CheckpointError, match=r"data\.checked c\.jsonl -> None; training videos 23 "):
        fit(parse_recipe(text, "tiny.yaml", [*short, "data.max_bad_fraction=1"]), run, World(), resume=True)
