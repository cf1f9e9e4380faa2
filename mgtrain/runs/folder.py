"""The folder of a run: its recipe, logs, checkpoints and results.

    recipe.yaml     the complete recipe                plan.json    phases, totals, FLOPs per clip of each shape
    env.json        versions, device, ranks, git       data.json    fingerprint and size of the data
    steps.jsonl     a line per logged step             evals.jsonl  a line per evaluation
    log.txt         messages                           checkpoints/, TensorBoard's events
    .lock           locked by the process that writes here

Reading imports neither torch nor TensorBoard.
"""

import errno
import fcntl
import json
import logging
import math
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from mgtrain.errors import CheckpointError, UsageError
from mgtrain.processes.files import write_whole
from mgtrain.recipe import Logging, Recipe, load_recipe
from mgtrain.runs.boards.relay import Relay
from mgtrain.runs.boards.services import Board, TensorBoard, services_of

log = logging.getLogger(__name__)

RUNS = Path("runs")
BOARDS = "boards.json"  # the run's identity at services
NUMBERS = {"steps.jsonl": ("step",), "evals.jsonl": ("step", "top1", "train_seconds")}  # required in every line
LOCK_SECONDS = 10.0  # to wait until the processes of a killed run have ended


class RunDir:
    """A run's folder. With `writes=False`, for all ranks except the main one, methods that write do nothing."""

    def __init__(self, path: str | Path, writes: bool = True) -> None:
        self.path, self.writes = Path(path), writes
        self.name = self.path.name
        self._board: Board | None = None  # TensorBoard
        self.other_boards: list[Board] = []  # see `open_boards`
        self._first_step = 0  # that this process writes to TensorBoard

    def recipe(self) -> Recipe:
        """The run's recipe."""
        return load_recipe(self.path / "recipe.yaml", saved=True)

    def read(self, name: str) -> dict[str, Any]:
        """The contents of a JSON file, such as `plan.json`."""
        try:
            value = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.path / name}: cannot be read: {error}") from None
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.path / name}: damaged: it must be a JSON object")
        return value

    @property
    def started(self) -> bool:
        """Whether the folder holds a run that has made a step."""
        return bool(self.checkpoints() or self.rows("steps.jsonl"))

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The lines of `steps.jsonl` or `evals.jsonl`, up to the first damaged one."""
        path = self.path / name
        if not path.is_file():
            return []
        rows = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                break  # incomplete after a crash
            if not (isinstance(row, dict) and all(is_number(row.get(key)) for key in NUMBERS[name])):
                break
            rows.append(row)
        return rows

    @contextmanager
    def locked(self, patience: float | None = None) -> Iterator[None]:
        """Lock the folder against other writers; the system releases the lock when the process ends or dies.

        Waits `patience` seconds, by default `LOCK_SECONDS`, for another writer to end, then raises `CheckpointError`.
        Removes the lock's folder if it is new and stays empty.
        """
        if not self.writes:
            yield
            return
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        deadline = time.monotonic() + (LOCK_SECONDS if patience is None else patience)
        while (file := self._lock()) is None:
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"{self.path}: another process is training in this run directory; "
                    "wait for it or stop it, or start another run with --name"
                )
            time.sleep(0.2)
        with file:
            try:
                yield
            finally:
                if made and os.listdir(self.path) == [".lock"]:  # the run has not started
                    (self.path / ".lock").unlink()
                    with suppress(OSError):  # another run uses one of the folders
                        for folder in made:
                            folder.rmdir()

    @property
    def in_use(self) -> bool:
        """Whether a process has locked the folder; True if the file system cannot tell."""
        try:
            with (self.path / ".lock").open(encoding="utf-8") as file:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return not isinstance(error, FileNotFoundError)
        return False

    def _lock(self) -> TextIO | None:
        """The locked file; None if another process has locked it, or removed it meanwhile."""
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                file = (self.path / ".lock").open("w", encoding="utf-8")
            except FileNotFoundError:  # another process has just removed the folder
                return None
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by loader processes
            if os.path.samestat(os.fstat(file.fileno()), os.stat(self.path / ".lock")):
                return file
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN, errno.ENOENT):  # such as a file system without locks
                file.close()
                raise CheckpointError(
                    f"{self.path}: cannot be locked: {error.strerror}; choose a folder on another file system"
                ) from None
        file.close()
        return None

    def write(self, name: str, value: dict[str, Any] | str) -> None:
        """Write a file atomically: text, or a dict as JSON."""
        if self.writes:
            text = value if isinstance(value, str) else json.dumps(value, indent=1) + "\n"
            with self._writing():
                write_whole(self.path / name, text.encode())

    def append(self, name: str, row: dict[str, Any]) -> None:
        """Add a line to `steps.jsonl` or `evals.jsonl`."""
        if self.writes:
            with self._writing(), (self.path / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
                if name == "evals.jsonl":  # on the disk before the checkpoint that says that the evaluation is done
                    file.flush()
                    os.fsync(file.fileno())

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Show values on all boards, after `step` finished steps."""
        self._show(lambda board: board.scalars(step, values))

    def image(self, step: int, tag: str, pixels: np.ndarray) -> None:
        """Show a picture, uint8 (H, W, 3), on all boards."""
        self._show(lambda board: board.image(step, tag, pixels))

    def parameters(self, values: dict[str, Any], metrics: Sequence[str]) -> None:
        """Add the run to the boards' tables of runs: its recipe's `values` and the tags of its `metrics`."""
        self._show(lambda board: board.parameters(values, metrics))

    def open_boards(self, named: Logging) -> None:
        """Show the run on the services that its recipe names, too; resumed, it continues there."""
        if not (self.writes and services_of(named)):
            return
        if not (self.path / BOARDS).is_file():
            self.write(BOARDS, {"id": uuid.uuid4().hex[:16]})
        identity, folder = str(self.read(BOARDS).get("id")), str(self.path.absolute())
        facts = {"name": self.name, "identity": identity, "folder": folder}
        for key, target in services_of(named).items():
            try:
                self.other_boards.append(Relay(key, {"target": target, **facts}))
            except OSError as error:
                log.warning("%s: cannot be started: %s; the run continues without it", key, error)

    def _show(self, write: Callable[[Board], None]) -> None:
        """Call `write` with TensorBoard and the other boards, if this process writes."""
        if self.writes:
            with self._writing():
                self._board = self._board or TensorBoard(self.path, self._first_step)
                write(self._board)
            for board in self.other_boards:
                write(board)

    def close(self, failed: bool = False) -> None:
        """Flush and close the boards; `failed`: before the run's end."""
        boards = ([self._board] if self._board else []) + self.other_boards
        self._board, self.other_boards = None, []
        for board in boards:
            board.close(failed)

    def rewind(self, step: int, evaluated: bool = True) -> None:
        """Delete the log rows after `step` finished steps, so that a resumed run logs each step once.

        If not `evaluated`, delete the evaluation at this step, too. Checkpoints of later steps are damaged, so they are
        renamed to `.damaged`. What a killed process has left of a checkpoint is deleted.
        """
        self._first_step = step + 1 if evaluated else step
        for name, last in (("steps.jsonl", step), ("evals.jsonl", step if evaluated else step - 1)):
            if (self.path / name).is_file():
                self.write(name, "".join(json.dumps(row) + "\n" for row in self.rows(name) if row["step"] <= last))
        if self.writes:
            with self._writing():
                for path in self.checkpoints():
                    if path > self.checkpoint_path(step):
                        path.replace(path.with_suffix(".damaged"))
                for path in (self.path / "checkpoints").glob(".step_*.tmp"):
                    path.unlink()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn an `OSError`, as from a full disk, into a `CheckpointError`."""
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot be written: {error}; its checkpoints are unchanged; "
                "free some space or fix the permissions, then run again with --resume"
            ) from None

    def checkpoint_path(self, step: int) -> Path:
        """The path of the checkpoint after `step` finished steps."""
        return self.path / "checkpoints" / f"step_{step:08d}.safetensors"

    def checkpoints(self) -> list[Path]:
        """The run's checkpoints, oldest first."""
        return sorted((self.path / "checkpoints").glob("step_*.safetensors"))

    def prune(self, keep: int, also: Iterable[Path]) -> None:
        """Delete all checkpoints except the newest `keep` and those in `also`."""
        if self.writes:
            for path in set(self.checkpoints()[:-keep]) - set(also):
                path.unlink(missing_ok=True)


def find_run(name: str | Path) -> RunDir:
    """The run at a path, or with that name under `runs/`. Raises `UsageError` if there is none."""
    for path in (Path(name), RUNS / name):
        if (path / "recipe.yaml").is_file():
            return RunDir(path)
    started = sorted(p.parent.name for p in RUNS.glob("*/recipe.yaml"))
    known = f"runs here: {', '.join(started)}" if started else f"no runs in {RUNS}/ yet"
    raise UsageError(f"{name}: not a run directory, because it has no recipe.yaml; {known}")


def is_number(value: object) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)
