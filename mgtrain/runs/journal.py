"""The results of an unfinished evaluation, so that it can be resumed."""

import json
from pathlib import Path

import numpy as np

from mgtrain.errors import UsageError


class Journal:
    """The results of an unfinished evaluation, next to its output file; an interruption loses at most one batch.

    Each rank appends to its own file, `<file>.part-<rank>`: a line that identifies the evaluation, then binary rows.
    """

    def __init__(self, file: Path, identity: str, classes: int) -> None:
        self.file = file
        self._head = json.dumps({"format": "mgtrain.journal/1", "of": identity}).encode() + b"\n"
        self._row = np.dtype([("number", "<i8"), ("probabilities", "<f4", (classes,))])

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Ascending numbers int64 (V,) and probabilities float32 (V, classes); `UsageError` for another evaluation."""
        rows = [np.empty(0, self._row)]
        for part in self._parts():
            data = part.read_bytes()
            if not data.startswith(self._head) and not self._head.startswith(data):
                raise UsageError(f"{part}: is of another unfinished evaluation; delete it, or choose another --csv")
            whole = max(0, len(data) - len(self._head)) // self._row.itemsize  # the last row may be incomplete
            rows.append(np.frombuffer(data, self._row, whole, len(self._head) if whole else 0))
        joined = np.concatenate(rows)
        numbers, places = np.unique(joined["number"], return_index=True)
        return numbers, joined["probabilities"][places]

    def append(self, rank: int, numbers: np.ndarray, probabilities: np.ndarray) -> None:
        part = self.file.with_name(f"{self.file.name}.part-{rank}")
        rows = np.empty(len(numbers), self._row)
        rows["number"], rows["probabilities"] = numbers, probabilities
        with part.open("ab") as file:
            size = file.tell()
            incomplete = (size - len(self._head)) % self._row.itemsize if size >= len(self._head) else size
            file.truncate(size - incomplete)
            file.write((b"" if size > incomplete else self._head) + rows.tobytes())

    def remove(self) -> None:
        """Delete the files after the evaluation is done."""
        for part in self._parts():
            part.unlink()

    def _parts(self) -> list[Path]:
        start = f"{self.file.name}.part-"
        return sorted(path for path in self.file.parent.iterdir() if path.name.startswith(start))
