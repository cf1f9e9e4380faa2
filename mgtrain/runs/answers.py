"""Predictions for unlabelled videos: the most probable classes, as text and as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """A clip of a video, from `start` to `end` in seconds."""

    start: float
    end: float
    probabilities: np.ndarray  # float32 (classes,)


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """The class probabilities of a video, and of its windows with `mgtrain predict --every`."""

    video: str
    probabilities: np.ndarray  # float32 (classes,), mean or maximum over the views or windows
    windows: Sequence[Window] = ()

    def describe(self, classes: Sequence[str], top: int) -> dict[str, Any]:
        """The `top` most probable classes, as plain values."""

        def most(probabilities: np.ndarray) -> list[dict[str, Any]]:
            return [{"class": classes[n], "number": n, "probability": p} for n, p in ranked(probabilities, top)]

        windows = [{"start": w.start, "end": w.end, "top": most(w.probabilities)} for w in self.windows]
        return {"video": self.video, "top": most(self.probabilities)} | ({"windows": windows} if windows else {})

    def render(self, classes: Sequence[str], top: int) -> str:
        """The `top` most probable classes, as text."""

        def most(probabilities: np.ndarray) -> str:
            return ", ".join(f"{classes[n]} {100 * p:.1f} %" for n, p in ranked(probabilities, top))

        windows = [f"  {w.start:7.1f} to {w.end:7.1f} s: {most(w.probabilities)}" for w in self.windows]
        return "\n".join([f"{self.video}: {most(self.probabilities)}", *windows])


def ranked(probabilities: np.ndarray, top: int) -> list[tuple[int, float]]:
    """The most probable classes and their probabilities.

    >>> ranked(np.array([0.25, 0.5, 0.25]), top=2)
    [(1, 0.5), (0, 0.25)]
    """
    return [(n, float(probabilities[n])) for n in np.argsort(-probabilities, kind="stable")[:top].tolist()]
