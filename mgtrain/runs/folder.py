"""The folder of a run: what it was told, what it did, what came out.

    recipe.yaml     the complete recipe                plan.json    phases, totals, FLOPs per clip of each shape
    env.json        versions, device, ranks, git       data.json    fingerprint and size of the data
    steps.jsonl     a line per logged step             evals.jsonl  a line per evaluation
    log.txt         what was said                      checkpoints/, TensorBoard's events
    .lock           held by the process that writes here

Reading needs neither torch nor TensorBoard.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgtrain.errors import CheckpointError, UsageError
from mgtrain.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    import numpy as np
    from torch.utils.tensorboard import SummaryWriter

RUNS = Path("runs")
NUMBERS = {"steps.jsonl": ("step",), "evals.jsonl": ("step", "top1", "train_seconds")}  # that every line has
LOCK_SECONDS = 10.0  # to wait for the processes of a run that was killed to be gone


def find_run(name: str | Path) -> RunDir:
    """The run at a path, or of that name under `runs/`."""
    for path in (Path(name), RUNS / name):
        if (path / "recipe.yaml").is_file():
            return RunDir(path)
    started = sorted(p.parent.name for p in RUNS.glob("*/recipe.yaml"))
    known = f"runs here: {', '.join(started)}" if started else f"no runs in {RUNS}/ yet"
    raise UsageError(f"{name}: no run directory (it would hold a recipe.yaml); {known}")


class RunDir:
    """A run's folder. `writes=False` for the ranks that only compute: everything they would write is left out."""

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self._board: SummaryWriter | None = None
        self._first_step = 0  # of those that TensorBoard gets from this process

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    def recipe(self) -> Recipe:
        """The recipe that the run was made from."""
        return load_recipe(self.path / "recipe.yaml")

    def read(self, name: str) -> dict[str, Any]:
        """One of the JSON files, such as `plan.json`."""
        try:
            value = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.path / name}: cannot be read: {error}") from None
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.path / name}: is damaged: it must be a JSON object")
        return value

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The lines of `steps.jsonl` or `evals.jsonl`; from the first damaged one on, they are passed over."""
        path = self.path / name
        if not path.is_file():
            return []
        rows = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                break  # cut short by a crash
            if not (isinstance(row, dict) and all(is_number(row.get(key)) for key in NUMBERS[name])):
                break
            rows.append(row)
        return rows

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process from writing here. The system frees the lock when the process ends, however it does.

        A folder that was made for the lock and has got nothing else is removed.

        Raises:
            CheckpointError: another process writes here.
        """
        if not self.writes:
            yield
            return
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".lock").open("w", encoding="utf-8")
        with file:
            patience = time.monotonic() + LOCK_SECONDS
            while True:
                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by loader processes
                    break
                except OSError:
                    if time.monotonic() > patience:
                        raise CheckpointError(
                            f"{self.path}: another process is training in this run directory; "
                            "wait for it or stop it, or start another run with --name"
                        ) from None
                    time.sleep(0.2)
            try:
                yield
            finally:
                if made and os.listdir(self.path) == [".lock"]:  # what was to run here has been refused
                    (self.path / ".lock").unlink()
                    with suppress(OSError):  # somebody else has begun in one of the folders above
                        for folder in made:
                            folder.rmdir()

    def write(self, name: str, value: dict[str, Any] | str) -> None:
        """Write a file whole or not at all: JSON out of a dict, or text."""
        if self.writes:
            text = value if isinstance(value, str) else json.dumps(value, indent=1) + "\n"
            temporary = self.path / f".{name}.tmp"
            with self._writing():
                self.path.mkdir(parents=True, exist_ok=True)
                temporary.write_text(text, encoding="utf-8")
                os.replace(temporary, self.path / name)

    def append(self, name: str, row: dict[str, Any]) -> None:
        """Add a line to `steps.jsonl` or `evals.jsonl`."""
        if self.writes:
            with self._writing(), (self.path / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Add values to TensorBoard's curves, at a number of finished steps."""

        def write(board: SummaryWriter) -> None:
            for tag, value in values.items():
                board.add_scalar(tag, value, step)

        self._on_board(write)

    def histogram(self, step: int, tag: str, values: np.ndarray) -> None:
        """Add a distribution to TensorBoard."""
        self._on_board(lambda board: board.add_histogram(tag, values, step))

    def image(self, step: int, tag: str, pixels: np.ndarray) -> None:
        """Add a picture, uint8 (H, W, 3), to TensorBoard."""
        self._on_board(lambda board: board.add_image(tag, pixels, step, dataformats="HWC"))

    def parameters(self, values: dict[str, Any], metrics: Iterable[str]) -> None:
        """Enter the run into TensorBoard's table of runs: what it was told, and the tags of what comes out."""

        def enter(board: Any) -> None:
            from torch.utils.tensorboard.summary import hparams

            plain = {k: v if isinstance(v, bool | int | float | str) else json.dumps(v) for k, v in values.items()}
            for summary in hparams(plain, dict.fromkeys(metrics, 0)):  # type: ignore[no-untyped-call]
                board.file_writer.add_summary(summary)

        self._on_board(enter)

    def _on_board(self, write: Callable[[SummaryWriter], object]) -> None:
        """Let something be written by TensorBoard's writer, if this process writes."""
        if self.writes:
            with self._writing():
                if self._board is None:
                    from torch.utils.tensorboard import SummaryWriter

                    # What an earlier process wrote about these steps is not shown any more.
                    self._board = SummaryWriter(str(self.path), purge_step=self._first_step)
                write(self._board)

    def close(self) -> None:
        """Write out what TensorBoard still holds."""
        if self._board is not None:
            self._board.close()

    def rewind(self, step: int, evaluated: bool = True) -> None:
        """Forget what was logged after `step` finished steps, so that a resumed run logs each step once.

        Not `evaluated`, the run is to evaluate at this step again. Checkpoints of later steps, which were passed over,
        get another name.
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

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Say what a full disk or a folder without permission means."""
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot be written: {error}; the checkpoints there are as they were; "
                "free some space or fix the permissions, then run again with --resume"
            ) from None

    def checkpoint_path(self, step: int) -> Path:
        """Where the checkpoint after `step` finished steps is."""
        return self.path / "checkpoints" / f"step_{step:08d}.safetensors"

    def checkpoints(self) -> list[Path]:
        """The checkpoints there are, oldest first."""
        return sorted((self.path / "checkpoints").glob("step_*.safetensors"))

    def prune(self, keep: int, also: Iterable[Path]) -> None:
        """Delete all checkpoints but the newest `keep` and those in `also`."""
        if self.writes:
            for path in set(self.checkpoints()[:-keep]) - set(also):
                path.unlink(missing_ok=True)


def is_number(value: object) -> bool:
    """Whether what was read from JSON is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def accuracy(row: dict[str, Any]) -> float:
    """What an evaluation is judged by: mean average precision where videos have several labels, else top-1."""
    value: float = row["mean_ap"] if row.get("mean_ap") is not None else row["top1"]
    return value


def accuracy_name(row: dict[str, Any]) -> str:
    """What `accuracy` is called."""
    return "top-1" if row.get("mean_ap") is None else "mAP"


def best_until(evals: Sequence[dict[str, Any]], key: str, limit: float) -> float | None:
    """The best accuracy of the evaluations up to a `limit` of `train_seconds`, `step` or `epoch`; None before them all.

    >>> best_until([{"top1": 0.2, "step": 10}, {"top1": 0.6, "step": 20}], "step", 15)
    0.2
    """
    return max((accuracy(row) for row in evals if row[key] <= limit), default=None)


def time_to_accuracy(evals: list[dict[str, Any]], target: float) -> float | None:
    """Seconds of training until `target` was first reached, interpolated between evaluations; None if it never was.

    >>> time_to_accuracy([{"top1": 0.2, "train_seconds": 10.0}, {"top1": 0.6, "train_seconds": 20.0}], target=0.5)
    17.5
    """
    before, before_seconds = 0.0, 0.0
    for row in evals:
        seconds: float = row["train_seconds"]
        now = accuracy(row)
        if now >= target:
            part = (target - before) / (now - before) if now > before else 1.0
            return before_seconds + max(0.0, part) * (seconds - before_seconds)
        before, before_seconds = max(before, now), seconds
    return None


def speedup_at_equal_accuracy(baseline: list[dict[str, Any]], run: list[dict[str, Any]]) -> float | None:
    """How many times faster `run` reached the highest accuracy that both have reached; None while there is none.

    >>> slow = [{"top1": 0.5, "train_seconds": 40.0}]
    >>> speedup_at_equal_accuracy(slow, [{"top1": 0.5, "train_seconds": 10.0}])
    4.0
    """
    if not baseline or not run:
        return None
    both = min(max(map(accuracy, baseline)), max(map(accuracy, run)))
    theirs, ours = time_to_accuracy(baseline, both), time_to_accuracy(run, both)
    return theirs / ours if theirs and ours else None
