"""The command line: what it prints, and the one line and the exit code with which it refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner
from warm import Start

from mgtrain import __version__
from mgtrain.cli import app
from mgtrain.engine.evaluate import evaluate
from mgtrain.engine.recalibrate import recalibrate
from mgtrain.engine.start import open_data
from mgtrain.engine.trained import evaluation_videos, load_trained, predict_videos
from mgtrain.errors import UsageError
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe, shipped_recipes
from mgtrain.runs.checkpoint import read_info
from mgtrain.runs.folder import RunDir


@pytest.fixture(scope="module")
def here(tiny: Callable[..., Recipe], tiny_text: str, straight: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny recipe, a finished run of it, and files that are no checkpoints. Not to be changed."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "tiny.yaml").write_text(tiny_text)
    (folder / "garbage.safetensors").write_bytes(b"garbage")
    run = RunDir(Path(shutil.copytree(straight, folder / "runs/tiny")))
    for path in run.checkpoints()[:-3]:
        path.unlink()
    (folder / "runs/tiny/log.txt").touch()  # `mgtrain fit` makes it
    stored = load_file(run.checkpoints()[-1])
    save_file(stored, folder / "foreign.safetensors")
    RunDir(folder / "runs/begun").write("recipe.yaml", tiny().to_yaml())
    return folder


def result(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    value: dict[str, Any] = json.loads(done.stdout)
    return value


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("plan none.yaml", 2, "none.yaml: no such recipe file"),
        ("plan tiny.yaml optim.lrr=1", 2, "override 'optim.lrr=1': unknown key 'optim.lrr'; did you mean 'lr'?"),
        ("plan tiny.yaml model.name=r3d_18", 2, "; to change the name, replace the section: 'model={name: r3d_18}'"),
        ("plan tiny.yaml --gpus 3", 2, "which 3 GPUs cannot share equally"),
        ("plan tiny.yaml --gpus 0", 2, "--gpus"),
        ("plan tiny.yaml data.root=nowhere", 3, "nowhere: no such folder of videos"),
        ("plan", 2, "Missing argument 'RECIPE'"),
        ("plann tiny.yaml", 2, "plann"),
        ("fit tiny.yaml --devcie cpu", 2, "--devcie"),
        ("fit tiny.yaml --device cpu", 2, "runs/tiny: holds a run already; add --resume to continue it, or --name"),
        ("fit tiny.yaml --dry-run --resume", 2, "--dry-run --resume: a dry run starts from the first step"),
        ("fit tiny.yaml --device cpu --name new --baseline none", 2, "none: not a run directory"),
        ("fit tiny.yaml --device cpu --resume optim.lr=0.01", 4, "changed since: optim.lr 0.002 -> 0.01; undo"),
        ("eval garbage.safetensors", 4, "garbage.safetensors: cannot be read as weights: "),
        ("eval foreign.safetensors", 2, "foreign.safetensors: contains weights without a recipe; name the recipe "),
        ("eval begun", 4, "runs/begun: no checkpoint yet; train it with `mgtrain fit`"),
        ("eval none", 2, "none: not a run directory"),
        ("eval tiny --views 3", 2, "--views 3: write clips in time x crops, with 1 or 3 crops, such as 1x1 or 10x3"),
        ("eval tiny --views 1x2", 2, "--views 1x2: write clips in time x crops"),
        ("eval tiny --views 0x1", 2, "--views 0x1: write clips in time x crops"),
        ("eval tiny --device cpu data.val=none.csv", 3, "none.csv: no such file"),
        ("data check tiny.yaml --memory inf", 2, "--memory inf: must be a finite number"),
        ("plan tiny.yaml --picture s.gif", 2, "s.gif: the file's name must end in .svg, .png or .pdf"),
        ("compare tiny begun --fail-under sped=1", 2, "--fail-under sped: allowed are speedup, clock, steps, acc"),
        ("compare begun tiny ./runs/tiny", 2, "./runs/tiny: is named twice, but counts as one run; name each run once"),
        ("eval tiny --csv runs", 2, "--csv runs: is a folder; name a file in it"),
        ("export foreign.safetensors --to safetensors", 2, "foreign.safetensors: is the checkpoint itself; give ano"),
        ("weights import foreign.safetensors --to foreign.safetensors", 2, "is the file to convert; give another one"),
        ("compare tiny none", 2, "none: not a run directory, because it has no recipe.yaml; runs here: begun, tiny"),
        ("compare tiny", 2, "Missing argument 'RUN...'"),
        ("predict tiny -5KQ66BBWC4.mp4", 2, "write ./-5KQ66BBWC4.mp4, or -- before the names, for a file whose name"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_an_exit_code(
    mgtrain: Start, here: Path, words: str, code: int, message: str
) -> None:
    before = contents(here / "runs/tiny")
    done = mgtrain(here, *words.split())
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("mgtrain: ")
    assert message in line
    assert [text for text in done.stderr.splitlines() if text.startswith("mgtrain: ")] == [line]
    assert contents(here / "runs/tiny") == before


def test_without_words_the_help_is_shown(mgtrain: Start, tmp_path: Path) -> None:
    done = mgtrain(tmp_path)
    assert done.stderr.splitlines()[0].startswith("Usage: ")
    assert any(line.split()[:1] == ["fit"] for line in done.stderr.splitlines())
    assert mgtrain(tmp_path, "recipes").stderr.splitlines()[0].startswith("Usage: ")
    assert mgtrain(tmp_path, "--version").stdout == f"{__version__}\n"


def test_a_plan_as_json(mgtrain: Start, here: Path) -> None:
    plan = result(mgtrain(here, "plan", "tiny.yaml", "--json"))
    assert list(plan) == ["schema", "videos", "steps", "epochs", "phases", "totals", "baseline", "ratios"]
    assert (plan["schema"], plan["videos"], plan["steps"], plan["epochs"]) == ("mgtrain.plan/1", 24, 17, 13.5)
    phase_keys = {"index", "stage", "first_step", "steps", "end_epoch", "lr", "stride", "shapes"}
    shape_keys = {"clips", "frames", "crop", "short_side", "bn_clips"}
    for phase in plan["phases"]:
        assert set(phase) == phase_keys
        assert all(set(shape) == shape_keys for shape in phase["shapes"])
    for sums in ("totals", "baseline", "ratios"):
        assert set(plan[sums]) == {"steps", "epochs", "clips", "voxels"}
    assert plan["phases"][0] == {
        "index": 0, "stage": 0, "first_step": 0, "steps": 3, "end_epoch": 128 / 24, "lr": pytest.approx(0.002 * 8),
        "stride": [2, 8],
        "shapes": [
            {"clips": 64, "frames": 2, "crop": 16, "short_side": [16, 40], "bn_clips": 8},
            {"clips": 32, "frames": 2, "crop": 23, "short_side": [23, 40], "bn_clips": 4},
            {"clips": 32, "frames": 2, "crop": 23, "short_side": [23, 40], "bn_clips": 4},
        ],
    }  # fmt: skip
    assert plan["baseline"] == {"steps": 54, "epochs": 9.0, "clips": 216, "voxels": 216 * 8 * 32**2}
    assert plan["ratios"]["epochs"] == 1.5


def test_a_plan_as_a_table(mgtrain: Start, here: Path) -> None:
    done = mgtrain(here, "plan", "tiny.yaml", "--gpus", 2)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[1][:5] == ["1", "64/32/32", "2", "16/23/23", "3"]
    assert lines[1][-1] == "32/16/16"
    assert [line[0] for line in lines[7:11]] == ["clips", "frames", "crop", "lr"]  # drawn
    assert ["steps", "17", "1/3.176"] in [line[:3] for line in lines[11:]]
    assert done.stderr == ""


def test_a_plan_without_the_data_needs_the_number_of_videos(mgtrain: Start, here: Path) -> None:
    nowhere = ("plan", "tiny.yaml", "data.root=nowhere", "--json")
    assert "give --videos to plan without the data" in mgtrain(here, *nowhere).stderr
    assert result(mgtrain(here, *nowhere, "--videos", 1000))["videos"] == 1000
    assert result(mgtrain(here, *nowhere, "data.videos=500"))["videos"] == 500


def test_recipes_show_prints_the_files_bytes(mgtrain: Start, tmp_path: Path) -> None:
    for name, file in list(shipped_recipes().items())[:3]:
        assert mgtrain(tmp_path, "recipes", "show", name).stdout.encode() == file.read_bytes()


def test_recipes_copy_writes_a_file_once(mgtrain: Start, tmp_path: Path) -> None:
    text = shipped_recipes()["demo_baseline"].read_text()
    (tmp_path / "recipes").mkdir()
    for target, file in (
        ((), "demo_baseline.yaml"),
        (("my.yaml",), "my.yaml"),
        (("recipes",), "recipes/demo_baseline.yaml"),
    ):
        done = mgtrain(tmp_path, "recipes", "copy", "demo_baseline", *target)
        assert (done.returncode, done.stdout) == (0, "")
        assert f"{file}: train it with `mgtrain fit {file}`" in done.stderr
        assert (tmp_path / file).read_text() == text
        (tmp_path / file).write_text("mine")
        again = mgtrain(tmp_path, "recipes", "copy", "demo_baseline", *target)
        assert again.returncode == 2
        assert f"{file}: exists already; give another file, or delete this one" in again.stderr
        assert (tmp_path / file).read_text() == "mine"
    for target in ("nowhere/my.yaml", "nowhere/"):
        assert mgtrain(tmp_path, "recipes", "copy", "demo_baseline", target).returncode == 2
        assert not (tmp_path / "nowhere").exists()


def test_recipes_list_names_every_shipped_recipe(mgtrain: Start, tmp_path: Path) -> None:
    listed = mgtrain(tmp_path, "recipes", "list").stdout.splitlines()
    assert [line.split()[0] for line in listed] == list(shipped_recipes())
    assert list(result(mgtrain(tmp_path, "recipes", "list", "--json"))["recipes"]) == list(shipped_recipes())


def test_fit_prints_its_scores_and_logs_to_stderr(mgtrain: Start, here: Path, tmp_path: Path) -> None:
    words = ("fit", here / "tiny.yaml", "--device", "cpu", "--name", "mine", "--baseline", here / "runs/tiny", "--json")
    done = mgtrain(tmp_path, *words)
    scores = result(done)
    assert list(scores) == ["schema", "run", "top1", "mean_class", "top5", "loss", "videos"]
    assert (scores["schema"], scores["run"], scores["videos"]) == ("mgtrain.fit/1", "runs/mine", 12)
    run, alike = RunDir(tmp_path / "runs/mine"), RunDir(here / "runs/tiny")
    assert [row["loss"] for row in run.rows("steps.jsonl")] == [row["loss"] for row in alike.rows("steps.jsonl")]
    assert scores["top1"] == alike.rows("evals.jsonl")[-1]["top1"]
    assert "step 17/17, epoch 13.5, phase 6/6" in done.stderr
    assert re.search(r"[0-9]x (less|more) training time than tiny at equal accuracy", done.stderr)
    assert (tmp_path / "runs/mine/log.txt").read_text().count("top-1") == 6


def test_resuming_a_finished_run_says_so_and_trains_nothing(mgtrain: Start, here: Path, tmp_path: Path) -> None:
    shutil.copytree(here / "runs", tmp_path / "runs")
    before, last = contents(tmp_path), RunDir(here / "runs/tiny").rows("evals.jsonl")[-1]
    words = ("fit", here / "tiny.yaml", "--device", "cpu", "--resume", "data.root=gone", "hardware.workers=2")
    done = mgtrain(tmp_path, *words, "--json")
    assert result(done)["top1"] == last["top1"]
    assert done.stderr == "runs/tiny: this run is finished; nothing is left to train\n"
    assert f"top-1 {100 * last['top1']:.2f} %" in mgtrain(tmp_path, *words).stdout
    assert contents(tmp_path) == before


def test_a_run_whose_last_evaluation_is_due_is_not_finished(mgtrain: Start, here: Path, tmp_path: Path) -> None:
    run = RunDir(Path(shutil.copytree(here / "runs/tiny", tmp_path / "runs/tiny")))
    run.checkpoints()[-1].unlink()
    done = mgtrain(tmp_path, "fit", here / "tiny.yaml", "--device", "cpu", "--resume")
    assert done.returncode == 0
    assert "resumed after step 16" in done.stderr
    assert "step 17/17" in done.stderr


def test_a_dry_run_shows_every_shape_and_leaves_nothing(mgtrain: Start, here: Path, tmp_path: Path) -> None:
    words = ("fit", here / "tiny.yaml", "--device", "cpu", "--dry-run")
    found = result(mgtrain(tmp_path, *words, "--json"))
    plan = result(mgtrain(tmp_path, "plan", here / "tiny.yaml", "--json", "--costs"))
    assert found["schema"] == "mgtrain.dry_run/1"
    assert [row["shape"] for row in found["shapes"]] == [row["shape"] for row in plan["costs"]["shapes"]]
    assert sum(row["steps"] for row in found["shapes"]) == plan["steps"] == 17
    for row, cost in zip(found["shapes"], plan["costs"]["shapes"], strict=True):
        assert row["estimated_bytes"] == cost["memory_bytes"]
        assert row["peak_bytes"] > 2**26
        assert row["step_seconds"] > 0
        assert row["data_seconds"] > 0
    assert list(tmp_path.iterdir()) == []
    table = mgtrain(here, *words).stdout  # beside a finished run, which it leaves alone
    assert [line.split()[0] for line in table.splitlines()] == [
        "shape", *("{clips}x{frames}x{crop}²".format(**row["shape"]) for row in found["shapes"])
    ]  # fmt: skip
    assert RunDir(here / "runs/tiny").rows("evals.jsonl")[-1]["step"] == 17


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ("data.root=nowhere", 3, "nowhere: no such folder of videos"),
        ("init.weights=none.safetensors", 4, "none.safetensors"),
        ("optim.lr=1e30", 5, "is not finite"),
    ],
)
def test_a_dry_run_fails_as_the_run_would(
    mgtrain: Start, here: Path, tmp_path: Path, change: str, code: int, message: str
) -> None:
    words = ("fit", here / "tiny.yaml", "--device", "cpu", "--dry-run", change, "optim.warmup_epochs=0")
    done = mgtrain(tmp_path, *words)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_on_two_ranks(mgtrain: Start, here: Path, tmp_path: Path) -> None:
    done = mgtrain(tmp_path, "fit", here / "tiny.yaml", "--device", "cpu", "--dry-run", "--procs", 2, "--json")
    assert (result(done)["ranks"], len(result(done)["shapes"])) == (2, 7)
    assert list(tmp_path.iterdir()) == []


def test_eval_as_json(mgtrain: Start, here: Path) -> None:
    scores = result(mgtrain(here, "eval", "tiny", "--device", "cpu", "--views", "2x3", "--json"))
    assert set(scores) == {
        "schema", "checkpoint", "step", "views", "top1", "top1_interval", "mean_class", "top5", "loss", "videos",
        "weights", "per_class", "counts", "confusion", "calibration_error", "calibration",
    }  # fmt: skip
    assert (scores["schema"], scores["step"], scores["views"]) == ("mgtrain.eval/2", 17, "2x3")
    assert sum(map(sum, scores["confusion"])) == 12
    assert scores["checkpoint"] == "runs/tiny/checkpoints/step_00000017.safetensors"
    assert list(scores["per_class"]) == ["left", "right", "up", "down"]
    assert scores["top1"] == scores["mean_class"] == pytest.approx(sum(scores["per_class"].values()) / 4)
    assert (scores["videos"], scores["top5"]) == (12, 1.0)


def test_eval_of_one_view_is_the_runs_last_evaluation(mgtrain: Start, here: Path) -> None:
    last = RunDir(here / "runs/tiny").rows("evals.jsonl")[-1]
    newest = RunDir(here / "runs/tiny").checkpoints()[-1]
    scores = result(mgtrain(here, "eval", newest, "--device", "cpu", "--views", "1x1", "--json"))
    assert scores["top1"] == last["top1"]
    assert scores["loss"] == pytest.approx(last["loss"], rel=1e-6)


def test_eval_for_a_reader(mgtrain: Start, here: Path) -> None:
    done = mgtrain(here, "eval", "tiny", "--device", "cpu", "--views", "1x1", "--per-class", really=True)
    *classes, confused, calibration, total = done.stdout.splitlines()
    assert [line.split()[0] for line in classes] == ["left", "right", "up", "down"]
    assert all(line.endswith("of 3") for line in classes)
    assert confused.startswith("most frequent mistakes: ")
    assert calibration.startswith("calibration: ")
    assert total.startswith("top-1 ")
    assert "on 12 videos, 1 view each; 95 % interval of top-1: " in total


def test_predict_names_what_is_in_videos(mgtrain: Start, here: Path, motions: Path, tmp_path: Path) -> None:
    videos = [str(motions / f"videos/val/{name}_0.mp4") for name in ("left", "up")]
    found = result(mgtrain(here, "predict", "tiny", *videos, "--views", "1x1", "--top", "2", "--json"))
    assert (found["schema"], found["failed"]) == ("mgtrain.predict/1", {})
    assert [answer["video"] for answer in found["videos"]] == videos
    assert [len(answer["top"]) for answer in found["videos"]] == [2, 2]
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    done = mgtrain(here, "predict", "tiny", videos[0], str(tmp_path / "bad.mp4"), "--every", "0.2")
    assert done.returncode == 3
    assert done.stdout.startswith(f"{videos[0]}: ")
    assert " s: " in done.stdout
    assert f"{tmp_path / 'bad.mp4'}: " in done.stderr
    assert "1 of 2 videos cannot be used; see the lines above" in done.stderr


def test_predict_as_json_keeps_the_answers_before_a_ctrl_c(
    here: Path, motions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> Iterator[Any]:
        yield next(predict_videos(*args))
        raise KeyboardInterrupt

    monkeypatch.setattr("mgtrain.engine.trained.predict_videos", interrupted)
    video = str(motions / "videos/val/left_0.mp4")
    words = ["predict", str(here / "runs/tiny"), video, video, "--views", "1x1", "--device", "cpu", "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code != 0
    assert [answer["video"] for answer in json.loads(done.stdout)["videos"]] == [video]


def test_compare_as_json_and_for_a_reader(mgtrain: Start, here: Path) -> None:
    compared = result(mgtrain(here, "compare", "tiny", "tiny", "--json"))
    assert compared["schema"] == "mgtrain.compare/3"
    assert compared["speedups"]["steps"] == 1
    shown = mgtrain(here, "compare", "tiny", "runs/tiny")
    assert shown.stdout.splitlines()[-1] == compared["verdict"]


def test_a_data_set_to_try_things_with(mgtrain: Start, tmp_path: Path) -> None:
    done = mgtrain(tmp_path, "data", "synthesize", "motions", "--train", 1, "--val", 1)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "motions/train.csv").read_text().splitlines()) == 8


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set, but not RANK, MASTER_ADDR, MASTER_PORT; set all, as torchrun does"),
        (
            {"WORLD_SIZE": "1"},
            "--procs 2: WORLD_SIZE is set, as by torchrun, so this is one of the processes; leave out",
        ),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "srun has started several tasks without RANK, LOCAL_RANK and WORLD_SIZE; set"),
    ],
)
def test_ranks_that_are_half_described_are_refused(
    given: dict[str, str], message: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here)
    for key, value in given.items():
        monkeypatch.setenv(key, value)
    result = CliRunner().invoke(app, ["fit", "tiny.yaml", "--name", "another", "--procs", "2", "--device", "cpu"])
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)


def test_a_checkpoint_between_evaluations_is_recalibrated_before_it_is_evaluated(
    mgtrain: Start, straight: Path, tmp_path: Path
) -> None:
    path = RunDir(straight).checkpoint_path(16)
    assert not read_info(path).recalibrated
    done = mgtrain(tmp_path, "eval", path, "--views", "1x1", "--device", "cpu", "--json")
    trained = load_trained(path, None, (), World())
    raw = evaluate(trained.model, evaluation_videos(trained), trained.recipe, World()).scores().loss
    trained.model.train()
    recalibrate(trained.model, open_data(trained.recipe)[0], 2, trained.recipe, World())
    expected = evaluate(trained.model, evaluation_videos(trained), trained.recipe, World()).scores().loss
    assert json.loads(done.stdout)["loss"] == pytest.approx(expected, rel=1e-6) != pytest.approx(raw, rel=1e-4)
