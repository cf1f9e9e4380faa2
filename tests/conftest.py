"""A tiny real data set and recipes for it, made once per session."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import nullgpu
import pytest
import torch
import warm

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's kernels run on a CPU; read when it is imported

import mgtrain.engine.start
import mgtrain.preflight.costs
import mgtrain.preflight.init
from mgtrain.data.synthetic import synthesize
from mgtrain.engine.checks import check_shapes
from mgtrain.engine.fit import fit
from mgtrain.grid import Shape
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe, parse_recipe
from mgtrain.runs.folder import RunDir

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # in them, too: under `nohup` they would ignore it
torch.set_num_threads(1)

# The learning rate is low, because a high one makes rounding grow a hundredfold in a few steps.
# 17 steps in 6 phases: long-cycle batches of 32, 16, 8 and 4 clips in 8, 4, 2 and 1 BatchNorm groups, then fine-tuning.
TINY = """\
seed: 3
data:
  format: list
  root: {root}
  train: train.csv
  val: val.csv
  classes: 4
clip: {{frames: 8, stride: 2, crop: 32, short_side: [32, 40]}}
evaluation: {{crop: 32, short_side: 36, recalibration_batches: 2, times: 6}}
model: {{name: i3d_r50, width: 8, depth: [1, 1, 1, 1], dropout: 0.5}}
batch: {{clips: 4, bn_clips: 4}}
optim: {{lr: 0.002, stages: [6, 3], warmup_epochs: 1, warmup_lr: 0.001}}
schedule: {{name: multigrid}}
hardware: {{workers: 0, deterministic: true}}
logging: {{steps: 1}}
"""


@pytest.fixture(scope="session")
def motions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes of 6 training and 3 validation videos, 64 x 48 pixels, 24 frames. Not to be changed."""
    root = tmp_path_factory.mktemp("data") / "motions"
    classes = ("left", "right", "up", "down")
    synthesize(root, videos_per_class={"train": 6, "val": 3}, classes=classes, frames=24, size=(64, 48))
    return root


@pytest.fixture(scope="session")
def tiny_text(motions: Path) -> str:
    """The tiny multigrid recipe's YAML."""
    return TINY.format(root=motions)


@pytest.fixture(scope="session")
def tiny(tiny_text: str) -> Callable[..., Recipe]:
    """Makes the tiny multigrid recipe, with overrides."""

    def make(*overrides: str) -> Recipe:
        return parse_recipe(tiny_text, "tiny.yaml", overrides)

    return make


@pytest.fixture(scope="session", autouse=True)
def shapes_tried_once() -> Iterator[None]:
    """A run first tries its network at every shape; here runs of the same network and shapes take the same answer."""
    known: dict[tuple[str, tuple[Shape, ...]], dict[Shape, int]] = {}

    def check(recipe: Recipe, shapes: Iterable[Shape]) -> dict[Shape, int]:
        key = f"{recipe.model!r} {recipe.data.classes} {recipe.hardware.recompute}", tuple(shapes)
        if key not in known or recipe.model.name == "own":
            known[key] = check_shapes(recipe, key[1])
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        for module in (mgtrain.engine.start, mgtrain.preflight.init, mgtrain.preflight.costs):
            patch.setattr(module, "check_shapes", check)
        yield


@pytest.fixture(scope="session")
def straight(tiny: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe's run, never cut, with the checkpoints of all its steps. Not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    fit(tiny("logging.checkpoint_steps=1", "logging.keep_checkpoints=100"), RunDir(folder), World())
    return folder


@pytest.fixture(scope="session", name="mgtrain")
def start_mgtrain() -> warm.Start:
    """Runs `python <launcher> -m mgtrain <words>` in a folder, to its end.

    In a process that is forked (see `warm`), unless there is a launcher or it has to be `really` started.
    """

    def start(
        folder: Path, *words: object, launcher: tuple[str, ...] = (), really: bool = False
    ) -> subprocess.CompletedProcess[str]:
        command = [*launcher, "-m", "mgtrain", *map(str, words)]
        if not launcher and not really:
            return warm.run(command, folder)
        return subprocess.run(
            [sys.executable, *command], cwd=folder, capture_output=True, text=True, check=False, timeout=240
        )

    return start


@pytest.fixture
def quick_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor measures a convolution of few channels, for a moment, and no step of the demo."""
    from mgtrain.preflight import doctor

    loading = doctor.cut_on_one_core
    monkeypatch.setattr(doctor, "PROBE", (1, 8, 4, 28, 28))
    monkeypatch.setattr(doctor, "half_precision_gain", lambda *_: 1.5)
    monkeypatch.setattr(doctor, "cut_on_one_core", lambda *what, seconds: loading(*what, 0.05))


@pytest.fixture(scope="session")
def null_gpu(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs a program with a GPU that computes nothing; what it prints."""
    environment = nullgpu.environment(tmp_path_factory.mktemp("null_gpu"))

    def run(program: str, *words: str) -> str:
        # Torch's threads for a GPU sometimes abort at the end of the interpreter, which is not tested here.
        ended = f"{program}\nimport os, sys; sys.stdout.flush(); os._exit(0)"
        command = [sys.executable, "-c", ended, *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run
