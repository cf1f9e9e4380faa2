"""What a machine runs out of has a message and an exit code of its own, wherever it shows."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from safetensors import SafetensorError

from mgtrain.clips import units
from mgtrain.clips.loader import BadVideos, _units_of, train_batches
from mgtrain.clips.order import Order, step_requests
from mgtrain.data import open_splits
from mgtrain.engine.checks import make_model
from mgtrain.engine.trained import Trained
from mgtrain.engine.trained.export import export
from mgtrain.errors import CheckpointError, DataError, LackError, MgtrainError, VideoError, lack_of
from mgtrain.models.weights.files import read_tensors
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe
from mgtrain.runs.checkpoint import newest_whole
from mgtrain.runs.folder import RunDir
from mgtrain.schedule import make_plan

OF_A_WORKER = "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "out of memory; "),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "out of memory; "),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "out of memory; "),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), "out of memory; "),
        (RuntimeError("std::bad_alloc"), "out of memory; "),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of the GPU's memory; end other "),
        (RuntimeError("CUDA error: out of memory"), "out of the GPU's memory; "),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE), "a.mp4"), "too many open files; "),
        (OSError(errno.ENFILE, os.strerror(errno.ENFILE)), "too many open files; "),
        (RuntimeError("received 0 items of ancdata"), "too many open files; "),
        (RuntimeError("can't start new thread"), "no further process or thread can be started; "),
        (BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)), "no further process or thread can be started; "),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "no disk space left; "),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "no disk space left; "),
        (
            RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"),
            "out of shared memory; ",
        ),
        (RuntimeError("DataLoader worker (pid 1) is killed by signal: Bus error."), "out of shared memory; "),
        (RuntimeError(f'{OF_A_WORKER} "a.py", line 1\nMemoryError: std::bad_alloc'), "out of memory; "),
    ],
)
def test_a_lack_is_recognized(error: Exception, words: str) -> None:
    lack = lack_of(error)
    assert lack is not None
    assert str(lack).startswith(words)
    assert "\n" not in str(lack)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no such key"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "a.mp4"),
        VideoError("a.mp4: Cannot allocate memory; replace this video"),
        ImportError("cannot import name 'x'"),
    ],
)
def test_anything_else_is_no_lack(error: Exception) -> None:
    assert lack_of(error) is None


def test_too_little_address_space_to_import_torch_is_said_in_a_line(tiny_text: str, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(tiny_text)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (500_000_000, 500_000_000))"
    program = f"{limit}; from mgtrain.cli import main; main()"
    words = [sys.executable, "-c", program, "fit", "tiny.yaml", "--device", "cpu"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == LackError.exit_code == 71
    assert done.stderr.startswith("mgtrain: out of memory; "), done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_too_few_file_descriptors_for_the_loader_are_said(tiny_text: str, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(tiny_text)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))"
    program = f"{limit}; from mgtrain.cli import main; main()"
    words = ("schedule={name: baseline}", "hardware.workers=2")
    done = warm.run(["-c", program, "fit", "tiny.yaml", "--device", "cpu", *words], tmp_path)
    assert done.returncode == 71, done.stderr
    said = "\nmgtrain: too many open files; raise the limit (ulimit -n"
    assert said in done.stderr  # the fork server may print its own end at the same time, before or after


def batch_of(recipe: Recipe) -> None:
    train = open_splits(recipe.data)["train"]
    next(train_batches(train, recipe, make_plan(recipe, len(train)), World(), BadVideos(len(train), 1.0)))


def test_a_video_is_not_replaced_for_a_lack_of_file_descriptors(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny()
    train = open_splits(recipe.data)["train"]
    clips = units.RandomClips(train, recipe)

    def none_left(*_: object, **__: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "a.mp4")

    with monkeypatch.context() as patch:
        patch.setattr("mgtrain.clips.decode.os.open", none_left)
        with pytest.raises(OSError, match="Too many open files"), clips.source.open(0):
            pass
    with clips.source.open(0) as file:
        assert file.info.frames


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ESHUTDOWN])
def test_a_video_is_not_replaced_while_its_storage_does_not_answer(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    recipe = tiny()
    train = open_splits(recipe.data)["train"]
    unit = list(step_requests(make_plan(recipe, len(train))[0], Order.of(train, recipe), 0, 1))[:1]
    clips, opened, waited = units.RandomClips(train, recipe), os.open, list[float]()
    expected = clips[unit]
    failures = iter([number, number])

    def at_first_not(*args: Any, **kwargs: Any) -> int:
        if failing := next(failures, None):
            raise OSError(failing, os.strerror(failing), "a.mp4")
        return opened(*args, **kwargs)

    monkeypatch.setattr("mgtrain.clips.units.time.sleep", waited.append)
    monkeypatch.setattr("mgtrain.clips.decode.os.open", at_first_not)
    found = clips[unit]
    assert waited == [*units.PAUSES[:2]]
    assert torch.equal(found.clips, expected.clips)
    assert found.bad == ()
    failures = repeat(number)
    with pytest.raises(OSError, match="the storage of the videos does not answer") as caught:
        clips[unit]
    assert str(lack_of(caught.value)).startswith("check its mount and its servers, then run again with --resume (")
    assert not isinstance(caught.value, ConnectionError)  # which would mean that a loader process was killed


@pytest.mark.parametrize("memory_left", [True, False])
def test_a_video_is_not_replaced_for_a_lack_of_memory(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, memory_left: bool
) -> None:
    recipe = tiny()
    clips = units.RandomClips(open_splits(recipe.data)["train"], recipe)

    def none_left(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    if not memory_left:
        monkeypatch.setattr("mgtrain.errors.mmap.mmap", none_left)
    with pytest.raises(VideoError if memory_left else MemoryError), clips.source.open(0):
        raise VideoError("a.mp4: Cannot allocate memory; replace this video")


def test_a_checkpoint_is_not_passed_over_for_a_lack(straight: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = RunDir(straight).checkpoints()
    assert newest_whole(files) == files[-1]

    def failing(*_: object, **__: object) -> None:
        raise SafetensorError("Cannot allocate memory (os error 12)")

    monkeypatch.setattr("mgtrain.runs.checkpoint.safe_open", failing)
    with pytest.raises(LackError, match=r"step_\d+.safetensors: cannot be read: out of memory; "):
        newest_whole(files)


def test_weights_are_not_refused_for_a_lack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "garbage.pth"
    file.write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        read_tensors(file)
    monkeypatch.setattr("mgtrain.models.weights.files.short_of_memory", lambda: True)
    with pytest.raises(MemoryError):
        read_tensors(file)


def test_shared_memory_is_taken_where_its_lack_is_seen(
    tiny: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny("hardware.workers=1")
    batch_of(recipe)
    loaded = units.Loaded(torch.zeros(2, 3), torch.zeros(2))
    assert not units._sendable(loaded).clips.is_shared()
    monkeypatch.setattr("mgtrain.clips.units.get_worker_info", lambda: True)
    sent = units._sendable(loaded)
    assert sent.clips.is_shared()
    assert sent.labels.is_shared()


def test_what_a_loader_process_lacks_is_said_once(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny()
    source = units.RandomClips(open_splits(recipe.data)["train"], recipe).source

    class Failing:
        def __init__(self, error: Exception) -> None:
            self.error = error

        def __iter__(self) -> Iterator[Any]:
            raise self.error
            yield

    of_memory = f"{OF_A_WORKER}\nRuntimeError: unable to allocate shared memory(shm) for file </torch_1>: x (28)"
    kinds: list[tuple[Exception, type[MgtrainError], str]] = [
        (RuntimeError(of_memory), LackError, "out of shared memory; "),
        (RuntimeError("DataLoader worker (pid(s) 1234) exited unexpectedly"), DataError, "a loader process died "),
        (EOFError(), LackError, "too many open files; .* or a loader process was killed: no answer"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), LackError, "too many .* reset by peer"),
    ]
    before = signal.getsignal(signal.SIGCHLD)
    for error, kind, words in kinds:
        with pytest.raises(kind, match=words):
            next(_units_of(Failing(error), source))  # type: ignore[arg-type]
    assert signal.getsignal(signal.SIGCHLD) == before


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses to write more to a file, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "suffix", [".safetensors", *(pytest.param(suffix, marks=pytest.mark.slow) for suffix in (".pt2", ".onnx"))]
)
def test_an_export_onto_a_full_disk_leaves_nothing(tiny: Callable[..., Recipe], tmp_path: Path, suffix: str) -> None:
    recipe = tiny()
    trained = Trained(make_model(recipe).eval(), recipe, ("a", "b", "c", "d"), 1, True, "")
    with largest_file(20_000), pytest.raises((LackError, CheckpointError)) as caught:
        export(trained, tmp_path / f"network{suffix}")
    assert str(caught.value).startswith(f"{tmp_path}/network{suffix}: ")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
