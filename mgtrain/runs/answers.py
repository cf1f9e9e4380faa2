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
        """The `top` most probable classes, as plain values.

        >>> [found["number"] for found in Answer("a.mp4", np.array([0.25, 0.5, 0.25])).describe("abc", top=2)["top"]]
        [1, 0]
        """

        def most(probabilities: np.ndarray) -> list[dict[str, Any]]:
            order = np.argsort(-probabilities, kind="stable")[:top].tolist()
            return [{"class": classes[n], "number": n, "probability": float(probabilities[n])} for n in order]

        windows = [{"start": w.start, "end": w.end, "top": most(w.probabilities)} for w in self.windows]
        return {"video": self.video, "top": most(self.probabilities)} | ({"windows": windows} if windows else {})

    def render(self, classes: Sequence[str], top: int) -> str:
        """The `top` most probable classes, as text."""

        def most(found: list[dict[str, Any]]) -> str:
            return ", ".join(f"{one['class']} {100 * one['probability']:.1f} %" for one in found)

        facts = self.describe(classes, top)
        windows = [f"  {w['start']:7.1f} to {w['end']:7.1f} s: {most(w['top'])}" for w in facts.get("windows", ())]
        return "\n".join([f"{self.video}: {most(facts['top'])}", *windows])
