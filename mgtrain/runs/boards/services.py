"""TensorBoard, and the services Weights & Biases and MLflow, which may block and raise, as boards."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mgtrain.errors import MissingCapabilityError, one_line
from mgtrain.recipe import Logging

PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}  # a service and its module -> what pip installs
PARAMETERS = 100  # the most that MLflow takes at once
START_SECONDS = 30.0  # to connect to Weights & Biases before logging offline


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


class WandB:
    """A run at Weights & Biases, in the project (or `entity/project`) `target`; offline if that fails."""

    def __init__(self, target: str, name: str, identity: str, folder: str) -> None:
        import wandb

        self._wandb: Any = wandb
        entity, _, project = target.rpartition("/")
        init = partial(
            self._wandb.init, entity=entity or None, project=project, name=name, id=identity, resume="allow",
            dir=folder, settings=wandb.Settings(init_timeout=START_SECONDS, console="off"),
        )  # fmt: skip
        try:
            self._run: Any = init()
        except Exception as error:  # no network, no account, a refused key
            sys.stderr.write(
                f"mgtrain: wandb: {one_line(error, 300)}; logging offline, upload it with "
                f"`wandb sync {folder}/wandb/offline-run-*`\n"
            )
            self._run = init(mode="offline")
        self._run.define_metric("*", step_metric="step")  # a resumed run logs some steps again

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def parameters(self, values: Mapping[str, Any], metrics: Sequence[str]) -> None:
        self._run.config.update(dict(values), allow_val_change=True)

    def image(self, step: int, tag: str, pixels: np.ndarray) -> None:
        self._run.log({tag: self._wandb.Image(pixels), "step": step})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MLflow:
    """A run of the MLflow experiment `target`, at the server that MLFLOW_TRACKING_URI names."""

    def __init__(self, target: str, name: str, identity: str, folder: str) -> None:
        from mlflow import entities
        from mlflow.tracking import MlflowClient

        self._entities: Any = entities
        self._client: Any = MlflowClient()
        found = self._client.get_experiment_by_name(target)
        experiment = found.experiment_id if found else self._client.create_experiment(target)
        runs = self._client.search_runs([experiment], filter_string=f"tags.`mgtrain.id` = '{identity}'")
        tags = {"mgtrain.id": identity}
        run = runs[0] if runs else self._client.create_run(experiment, run_name=name, tags=tags)
        self._run = run.info.run_id
        if runs:
            self._client.set_terminated(self._run, "RUNNING")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        metrics = [self._entities.Metric(tag, float(value), now, step) for tag, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def parameters(self, values: Mapping[str, Any], metrics: Sequence[str]) -> None:
        parameters = [self._entities.Param(key, str(value)) for key, value in values.items()]
        for first in range(0, len(parameters), PARAMETERS):
            self._client.log_batch(self._run, params=parameters[first : first + PARAMETERS])

    def image(self, step: int, tag: str, pixels: np.ndarray) -> None:
        self._client.log_image(self._run, pixels, artifact_file=f"{tag}_step_{step}.png")

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


class TensorBoard:
    """A `Board` that writes to a folder, and hides what earlier processes wrote there from `first_step` on."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=first_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def parameters(self, values: Mapping[str, Any], metrics: Sequence[str]) -> None:
        from torch.utils.tensorboard.summary import hparams

        plain = {k: v if isinstance(v, bool | int | float | str) else json.dumps(v) for k, v in values.items()}
        for summary in hparams(plain, dict.fromkeys(metrics, 0)):  # type: ignore[no-untyped-call]
            self._writer.file_writer.add_summary(summary)

    def image(self, step: int, tag: str, pixels: np.ndarray) -> None:
        self._writer.add_image(tag, pixels, step, dataformats="HWC")

    def close(self, failed: bool) -> None:
        if not failed:  # a failure may be that of this very folder; the writer's thread flushes by itself
            self._writer.close()


def check_boards(named: Logging) -> None:
    """Raise `MissingCapabilityError` for services whose package is not installed, without importing it."""
    for key in services_of(named):
        if find_spec(key) is None:
            raise MissingCapabilityError(
                f"logging.{key}: the package {key} is not installed; run `pip install {PACKAGES[key]}`, or set "
                f"logging.{key}=null"
            )


def services_of(named: Logging) -> dict[str, str]:
    """The services that the recipe names: key -> what it names there."""
    return {key: target for key in PACKAGES if (target := getattr(named, key)) is not None}


SERVICES = {"wandb": WandB, "mlflow": MLflow}
