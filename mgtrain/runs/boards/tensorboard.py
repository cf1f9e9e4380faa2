"""TensorBoard's events in the run's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams


class TensorBoard:
    """A `Board` that writes to a folder, and hides what earlier processes wrote there from `first_step` on."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self._writer: Any = SummaryWriter(str(folder), purge_step=first_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def parameters(self, values: Mapping[str, Any], metrics: Sequence[str]) -> None:
        plain = {k: v if isinstance(v, bool | int | float | str) else json.dumps(v) for k, v in values.items()}
        for summary in hparams(plain, dict.fromkeys(metrics, 0)):  # type: ignore[no-untyped-call]
            self._writer.file_writer.add_summary(summary)

    def image(self, step: int, tag: str, pixels: np.ndarray) -> None:
        self._writer.add_image(tag, pixels, step, dataformats="HWC")

    def close(self, failed: bool) -> None:
        if not failed:  # a failure may be that of this very folder; the writer's thread flushes by itself
            self._writer.close()
