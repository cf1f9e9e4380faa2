"""Exit codes, each brought about as a user would, and the page that lists them; others are in the tests of commands."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm
from warm import Start

from mgtrain import errors
from mgtrain.errors import MgtrainError

PAGE = Path(__file__).parent.parent.parent / "docs/reference/exit-codes.md"
FIT = ("fit", "tiny.yaml", "--device", "cpu")


@pytest.fixture
def folder(tiny_text: str, tmp_path: Path) -> Path:
    """A folder with the tiny recipe."""
    (tmp_path / "tiny.yaml").write_text(tiny_text)
    return tmp_path


def test_the_page_lists_the_codes_of_all_errors() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, MgtrainError)]
    listed = [int(code) for code in re.findall(r"(?m)^\| (\d+) \|", PAGE.read_text())]
    assert listed == sorted(listed)
    assert set(listed) == {kind.exit_code for kind in kinds} | {0, 129, 130, 137, 138, 141, 143}


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("plan", "tiny.yaml"), 0),
        (("data", "split", "tiny.yaml/x", "--val", "0.4", "--to", "lists"), 2),
        ((*FIT, "optim.lr=1e9", "optim.warmup_lr=1e9"), 5),
        (("fit", "tiny.yaml", "--device", "cuda"), 69),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_what_was_asked_for_cannot_be_done(
    mgtrain: Start, folder: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], code: int
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = mgtrain(folder, *words)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    if code:
        assert done.stdout == ""
        assert [line[:9] for line in done.stderr.splitlines()].count("mgtrain: ") == 1
    assert (folder / "runs").exists() == (code == 5)  # only a run that had begun leaves one


def test_a_mistake_of_ours_has_a_traceback_and_is_to_be_reported(folder: Path) -> None:
    program = (
        "import mgtrain.cli, sys\nsys.modules['mgtrain.cli.plan'].load_recipe = lambda *_: 1 / 0\nmgtrain.cli.main()"
    )
    done = warm.run(["-c", program, "plan", "tiny.yaml"], folder)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.splitlines()[-1] == (
        "mgtrain: unexpected ZeroDivisionError, a bug in mgtrain; please report it with the lines above"
    )


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_command_that_is_ended_says_by_what(folder: Path, sent: signal.Signals, code: int) -> None:
    command = [sys.executable, "-m", "mgtrain", "data", "synthesize", "made", "--train", "1000"]

    def heed_signals() -> None:  # jobs in the background of a script are started with SIGINT ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True, preexec_fn=heed_signals) as process:
        try:
            deadline = time.monotonic() + 60
            while not list(folder.glob("made/videos/train/*_1.mp4")):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(sent)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == code  # a shell shows -15 as 143
    assert said.startswith("mgtrain: interrupted; ") == (code == 130)


def test_whoever_stops_reading_is_not_a_mistake(folder: Path) -> None:
    command = f"{sys.executable} -m mgtrain recipes show demo_baseline | sleep 0; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 141
    assert done.stderr == ""
