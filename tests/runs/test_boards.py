"""Where curves are shown: the same calls reach TensorBoard, Weights & Biases and MLflow, and none can stop a run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, call

import numpy as np
import pytest

import mgtrain.runs.boards.relay
from mgtrain.engine.fit import fit
from mgtrain.errors import MissingCapabilityError
from mgtrain.processes.distributed import World
from mgtrain.recipe import Logging, Recipe
from mgtrain.runs.boards.services import Board, MLflow, WandB, check_boards
from mgtrain.runs.folder import RunDir

PIXELS = np.zeros((4, 8, 3), np.uint8)
FACTS = {"target": "us/motions", "name": "tiny", "identity": "abc", "folder": "/runs/tiny"}
# A service as a module: what reaches it is appended to a file, unless it fails as TROUBLE says.
FAKE = """
import json, os, sys, time
trouble = os.environ.get("TROUBLE")
def note(*words):
    if trouble == "call" and words[0] == "log": raise ConnectionError("the service is gone")
    if trouble == "crash" and words[0] == "log": os.abort()
    if trouble == "hang" and words[0] == "log": time.sleep(600)
    if trouble == "end" and words[0] == "finish": time.sleep(600)
    with open(os.environ["NOTES"], "a") as file: file.write(json.dumps(words) + "\\n")
class Settings:
    def __init__(self, **options): pass
class Image:
    def __init__(self, pixels): self.pixels = pixels
class Run:
    config = property(lambda self: self)
    def update(self, values, allow_val_change): note("config", values)
    def define_metric(self, name, step_metric): note("metric", name, step_metric)
    def log(self, values):
        note("log", {k: list(v.pixels.shape) if isinstance(v, Image) else v for k, v in values.items()})
    def finish(self, exit_code): note("finish", exit_code)
def init(mode=None, **options):
    print("the service talks")
    if trouble == "start" or trouble == "online" and mode != "offline": raise ConnectionError("no network here")
    if trouble == "start hangs": time.sleep(600)
    note("init", mode, options["entity"], options["project"], options["name"], options["id"], options["resume"])
    note("stdin", sys.stdin.read())
    return Run()
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[Any]]]:
    """What has reached a fake wandb, which is a module of the service's process."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/wandb.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    monkeypatch.setattr(mgtrain.runs.boards.relay, "SECONDS_TO_END", 20.0)

    def notes() -> list[list[Any]]:
        file = tmp_path / "notes"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    return notes


def opened(run: RunDir, named: Logging) -> list[Board]:
    run.open_boards(named)
    return run.other_boards


def test_a_run_reaches_the_service_as_it_reaches_tensorboard(
    tiny: Callable[..., Recipe], straight: Path, tmp_path: Path, fake: Callable[..., list[list[Any]]],
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    fit(tiny("logging.wandb=us/motions"), RunDir(tmp_path / "run"), World())
    notes, rows = fake(), RunDir(tmp_path / "run").rows("steps.jsonl")
    identity = RunDir(tmp_path / "run").read("boards.json")["id"]
    assert notes[0] == ["init", None, "us", "motions", "run", identity, "allow"]
    assert notes[1] == ["stdin", ""], "a service that asks for a key gets none, and not the messages"
    assert notes[2] == ["metric", "*", "step"]
    assert notes[-1] == ["finish", 0]
    (config,) = (words[1] for words in notes if words[0] == "config")
    assert config["optim.lr"] == 0.002
    logged = [words[1] for words in notes if words[0] == "log"]
    assert [(v["step"], v["train/loss"]) for v in logged if "train/loss" in v] == [(r["step"], r["loss"]) for r in rows]
    assert [row["loss"] for row in rows] == [row["loss"] for row in RunDir(straight).rows("steps.jsonl")]
    assert [v["step"] for v in logged if "val/top1" in v] == [r["step"] for r in RunDir(straight).rows("evals.jsonl")]
    pictures = {tag: value for v in logged for tag, value in v.items() if tag.startswith("clips/")}
    assert pictures["clips/4x8x32²"] == [32, 128, 3]
    assert capfd.readouterr().out == "", "what the service prints goes to stderr"


def test_nothing_is_started_unless_asked_for(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    assert opened(RunDir(tmp_path), tiny().logging) == []
    assert opened(RunDir(tmp_path, writes=False), tiny("logging.wandb=motions").logging) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ("start", "mgtrain: wandb: ConnectionError: no network here; nothing is logged there, the run continues"),
        ("online", "mgtrain: wandb: no network here; logging offline, upload it with `wandb sync "),
        ("call", "mgtrain: wandb: ConnectionError: the service is gone; some of what the run logs is missing there"),
        *((trouble, "") for trouble in ("crash", "hang", "end", "start hangs")),
    ],
)
def test_a_service_in_trouble_neither_stops_nor_delays(
    tiny: Callable[..., Recipe], tmp_path: Path, fake: Callable[..., list[list[Any]]], trouble: str, said: str,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setenv("TROUBLE", trouble)
    hangs = trouble in ("hang", "end", "start hangs")
    if hangs:
        monkeypatch.setattr(mgtrain.runs.boards.relay, "SECONDS_TO_END", 2.0)
    run = RunDir(tmp_path)
    run.open_boards(tiny("logging.wandb=motions").logging)
    (board,) = run.other_boards
    begun = time.monotonic()
    for step in range(300):  # more than a pipe holds
        board.image(step, "clips/a", np.zeros((64, 64, 3), np.uint8))
    assert time.monotonic() - begun < 30  # not forever
    run.close()
    assert time.monotonic() - begun < 60
    assert said in capfd.readouterr().err
    assert board._process.poll() is not None  # type: ignore[attr-defined]
    assert ("has not finished in 2 s and is ended; the run is complete" in caplog.text) == hangs
    assert ("has ended and logs nothing more (see its messages)" in caplog.text) == (trouble in ("start", "crash"))
    if trouble == "online":
        assert fake()[0][1] == "offline"
        assert len([words for words in fake() if words[0] == "log"]) == 300
    run.other_boards = [board]
    run.other_boards[0].scalars(1, {"train/loss": 1.0})  # nor afterwards


def test_a_slow_service_loses_the_latest_messages(
    tiny: Callable[..., Recipe], tmp_path: Path, fake: object, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(mgtrain.runs.boards.relay, "WAITING", 10)
    monkeypatch.setattr(mgtrain.runs.boards.relay, "SECONDS_TO_END", 0.5)
    monkeypatch.setenv("TROUBLE", "start hangs")
    (board,) = opened(RunDir(tmp_path), tiny("logging.wandb=motions").logging)
    for step in range(1000):
        board.image(step, "clips/a", np.zeros((64, 64, 3), np.uint8))
    board.close(failed=False)
    assert caplog.text.count("wandb: is too slow: some of what the run logs is missing there") == 1


def test_a_run_that_is_killed_ends_its_service_as_failed(
    tiny: Callable[..., Recipe], tmp_path: Path, fake: Callable[..., list[list[Any]]]
) -> None:
    program = (
        "import os, signal\nfrom pathlib import Path\nfrom mgtrain.recipe import load_recipe\n"
        "from mgtrain.runs.folder import RunDir\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "run = RunDir(folder)\nrun.open_boards(load_recipe(folder / 'tiny.yaml').logging)\n"
        "run.other_boards[0].scalars(1, {'train/loss': 1.0})\n"
        "import time\nnotes = Path(os.environ['NOTES'])\n"
        "while not notes.exists() or 'train/loss' not in notes.read_text(): time.sleep(0.05)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    (tmp_path / "tiny.yaml").write_text(tiny("logging.wandb=motions").to_yaml())
    subprocess.run([sys.executable, "-c", program], check=False, timeout=60)
    for _ in range(100):
        if fake() and fake()[-1][0] == "finish":
            break
        time.sleep(0.1)
    assert fake()[-2:] == [["log", {"train/loss": 1.0, "step": 1}], ["finish", 1]]


@pytest.mark.parametrize(("key", "package"), [("wandb", "wandb"), ("mlflow", "mlflow-skinny")])
def test_a_missing_package_is_said_before_anything_is_written(
    tiny: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, package: str
) -> None:
    monkeypatch.setattr("mgtrain.runs.boards.services.find_spec", lambda module: None if module == key else object())
    message = (
        f"logging.{key}: the package {key} is not installed; run `pip install {package}`, or set logging.{key}=null"
    )
    with pytest.raises(MissingCapabilityError, match=message):
        fit(tiny(f"logging.{key}=motions"), RunDir(tmp_path / "run"), World())
    assert not (tmp_path / "run").exists()
    check_boards(tiny().logging)


def test_what_mlflow_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    client = MagicMock()
    client.get_experiment_by_name.return_value, client.search_runs.return_value = None, []
    client.create_experiment.return_value = "7"
    client.create_run.return_value.info.run_id = "r"
    modules = {name: types.ModuleType(name) for name in ("mlflow", "mlflow.entities", "mlflow.tracking")}
    modules["mlflow"].entities = modules["mlflow.entities"]  # type: ignore[attr-defined]
    modules["mlflow.entities"].Metric = modules["mlflow.entities"].Param = lambda *words: words  # type: ignore[attr-defined]
    modules["mlflow.tracking"].MlflowClient = lambda: client  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    board = MLflow(**FACTS)
    assert client.create_run.call_args == call("7", run_name="tiny", tags={"mgtrain.id": "abc"})
    board.scalars(3, {"val/top1": 0.5})
    ((key, value, _, step),) = client.log_batch.call_args.kwargs["metrics"]
    assert (key, value, step) == ("val/top1", 0.5, 3)
    board.parameters({f"key.{n}": n for n in range(250)}, ["val/top1"])
    assert [len(c.kwargs["params"]) for c in client.log_batch.call_args_list[1:]] == [100, 100, 50]
    board.image(0, "clips/a", PIXELS)
    assert client.log_image.call_args == call("r", PIXELS, artifact_file="clips/a_step_0.png")
    board.close(failed=True)
    assert client.set_terminated.call_args == call("r", "FAILED")
    client.search_runs.return_value = [client.create_run.return_value]
    MLflow(**FACTS)
    assert client.set_terminated.call_args == call("r", "RUNNING"), "a resumed run continues there"
    assert client.create_run.call_count == 1


def test_the_real_mlflow_has_the_curves_of_a_resumed_run(
    tiny: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    recipe = tiny("logging.mlflow=motions", "logging.wandb=null")
    for step, failed in ((1, True), (2, False)):
        run = RunDir(tmp_path / "run")
        run.open_boards(recipe.logging)
        if step == 1:
            run.other_boards[0].parameters({"optim.lr": 0.002}, [])
            run.other_boards[0].image(0, "clips/4x8x32²", PIXELS)
        run.other_boards[0].scalars(step, {"train/loss": 1.0 / step, "step_seconds/4x8x32²": 0.25})
        run.close(failed=failed)
    (one,) = (tmp_path / "mlruns").glob("*/*/meta.yaml")
    assert "status: 3" in one.read_text()  # finished
    lines = (one.parent / "metrics/train/loss").read_text().splitlines()
    assert [line.split()[1:3] for line in lines] == [["1.0", "1"], ["0.5", "2"]]
    assert (one.parent / "params/optim.lr").read_text() == "0.002"
    assert (one.parent / "metrics/step_seconds/4x8x32²").exists()
    assert (one.parent / "artifacts/clips/4x8x32²_step_0.png").exists()


def test_the_real_wandb_writes_offline(
    tiny: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = RunDir(tmp_path / "run")
    run.open_boards(tiny("logging.wandb=us/motions").logging)
    (board,) = run.other_boards
    board.parameters({"optim.lr": 0.002}, [])
    board.image(0, "clips/4x8x32²", PIXELS)
    board.scalars(1, {"train/loss": 1.0})
    run.close()
    assert board._process.returncode == 0  # type: ignore[attr-defined]
    (folder,) = (tmp_path / "run/wandb").glob("offline-run-*")
    identity = run.read("boards.json")["id"]
    data = (folder / f"run-{identity}.wandb").read_bytes()
    assert b"train/loss" in data
    assert b"optim.lr" in data
    assert [path.suffix for path in (folder / "files/media").rglob("*") if path.is_file()] == [".png"]


def test_wandb_takes_a_project_with_or_without_an_entity(monkeypatch: pytest.MonkeyPatch) -> None:
    module = MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", module)
    for target, entity, project in (("motions", None, "motions"), ("us/motions", "us", "motions")):
        WandB(**{**FACTS, "target": target})
        options = module.init.call_args.kwargs
        assert (options["entity"], options["project"], options["id"]) == (entity, project, "abc")
