"""Where a run shows its curves: TensorBoard always, Weights & Biases and MLflow if the recipe names them.

Each is a `Board`. TensorBoard writes to the run's folder, so its errors are errors of the run. The others are services
that may be slow, unreachable or broken: each runs in its own process (`relay.py`) and cannot stop or delay the run.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np

from mgtrain.errors import MissingCapabilityError
from mgtrain.recipe import Logging

PACKAGES = {"wandb": ("wandb", "wandb"), "mlflow": ("mlflow", "mlflow-skinny")}  # key: module, what pip installs


class Board(Protocol):
    """Shows scalars, parameters and images of a run."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add values to the curves, after `step` finished steps; a tag such as `val/top1` names each."""

    def parameters(self, values: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """Add the run's recipe keys to the table of runs; `metrics` are the tags to show beside them."""

    def image(self, step: int, tag: str, pixels: np.ndarray) -> None:
        """Add a picture, uint8 (H, W, 3)."""

    def close(self, failed: bool) -> None:
        """Write what is pending; `failed`: the run stopped before its end."""


def check_boards(named: Logging) -> None:
    """Raise `MissingCapabilityError` for services whose package is not installed, without importing it."""
    for key in services_of(named):
        module, package = PACKAGES[key]
        if find_spec(module) is None:
            raise MissingCapabilityError(
                f"logging.{key}: the package {module} is not installed; run `pip install {package}`, or set "
                f"logging.{key}=null"
            )


def services_of(named: Logging) -> dict[str, str]:
    """The services that the recipe names: key -> what it names there."""
    return {key: target for key in PACKAGES if (target := getattr(named, key)) is not None}
