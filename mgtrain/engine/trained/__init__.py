"""Trained networks: load a checkpoint or another project's weights, predict, and export."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mgtrain.clips.cut import Cut, cut_windows
from mgtrain.clips.loader import BadVideos, view_batches
from mgtrain.clips.sources import Reader, open_source
from mgtrain.clips.units import evaluation_grid
from mgtrain.data import check_labels, listed_classes, open_videos, usable
from mgtrain.data.manifest import checksum
from mgtrain.data.missing import check_present
from mgtrain.data.videos import Videos
from mgtrain.engine.checks import check_shapes, make_model
from mgtrain.engine.evaluate import predict, refuse_non_finite
from mgtrain.engine.machine.warmup import set_up
from mgtrain.engine.step import to_device
from mgtrain.errors import CheckpointError, DataError, UsageError, VideoError
from mgtrain.models.weights.files import read_tensors
from mgtrain.models.weights.load import freeze, is_ours, load_weights, read_classes, read_weights
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe, load_recipe, parse_recipe
from mgtrain.recipe.model import OwnOptions
from mgtrain.runs.checkpoint import is_checkpoint, load_average, load_model, verify

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained network, its recipe and its classes."""

    model: nn.Module
    recipe: Recipe
    classes: tuple[str, ...]  # names, or numbers if they have no names
    step: int | None  # of the run; None for other weights
    recalibrated: bool  # whether BatchNorm's running statistics are those of the evaluation's shape
    identity: str  # hash of the file and the recipe
    averaged: bool = False  # whether these are a checkpoint's averaged weights, not those of its last step

    @property
    def named(self) -> bool:
        """Whether the classes have names."""
        return not all(name.isdecimal() for name in self.classes)


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


def load_trained(
    path: Path, recipe: str | None, overrides: Sequence[str] | None, world: World, trust: Sequence[str] | None = ()
) -> Trained:
    """Load the network in a file to this rank's device; if a checkpoint has averaged weights (`optim.ema`), these.

    A checkpoint contains its recipe; other weights need `recipe`. A checkpoint may come from anywhere, so a Python
    module in its recipe is imported only if it is in `trust`. Raises `CheckpointError` or `ThresholdError` if the file
    cannot be read, does not fit the recipe's network, or needs a module that is not trusted, and `UsageError` if there
    is no recipe, or one beside that of a checkpoint.
    """
    ours = is_checkpoint(path)
    tensors = {} if ours else read_tensors(path)
    if ours and recipe is not None:
        raise UsageError(f"{path}: contains its recipe; leave out --recipe, and change keys with section.key=value")
    if not ours and recipe is None:
        raise UsageError(
            f"{path}: contains weights without a recipe; name the recipe that cuts clips for them, such as "
            "--recipe k400_slowfast_8x8_r50_baseline"
        )
    if recipe is not None:
        made = load_recipe(recipe, overrides)
        classes, step, recalibrated = read_classes(path), None, True
    else:
        info = verify(path)
        made = parse_recipe(info.recipe, str(path), overrides, saved=True)
        classes, step = tuple(info.classes), info.step
        recalibrated = info.recalibrated or made.evaluation.recalibration_batches == 0
        if isinstance(made.model, OwnOptions) and made.model.module not in (trust or ()):
            raise CheckpointError(
                f"{path}: loading it runs the Python module {made.model.module!r} of its recipe; if you trust that "
                f"module, as installed here or in {Path.cwd()}, add --trust {made.model.module}"
            )
    classes = classes or tuple(map(str, range(made.data.classes)))
    if len(classes) != made.data.classes:
        raise CheckpointError(
            f"{path}: has {len(classes)} classes, but data.classes is {made.data.classes}; set it to {len(classes)}"
        )
    check_shapes(made, [made.evaluation_shape])
    set_up(made, world.device)
    model, averaged = to_device(make_model(made), made, world), False
    if ours:
        load_model(path, model)
        averaged = load_average(path, dict(model.named_parameters()))
    else:
        report = load_weights(model, read_weights(path, is_ours(model), tensors))
        report.demand(1.0, path)
        if report.resized:
            raise CheckpointError(f"{path}: {report.resized}; set data.classes to the file's number of classes")
    freeze(model, made.init)
    how = made.model_dump_json(exclude={"hardware", "logging", "faults"})
    identity = hashlib.sha256(f"{checksum(path)} {how} {made.hardware.precision}".encode()).hexdigest()
    return Trained(model.eval(), made, classes, step, recalibrated, identity, averaged)


def evaluation_videos(trained: Trained) -> Videos:
    """The videos of `data.val`. Raises `DataError` if they have other classes or labels than the network."""
    data = trained.recipe.data
    listed = (listed_classes(data.root, data.val) if trained.named else None) or ()
    for number, (there, here) in enumerate(zip(listed, trained.classes, strict=False)):
        if there != here:
            raise DataError(
                f"{data.root}: class {number} is {there!r} in classes.txt but {here!r} in the network; list the same "
                "classes in the same order"
            )
    known = trained.named or trained.step is not None  # a run knows all its classes, even if they are numbers
    videos = open_videos(data.format, data.root, data.val, trained.classes if known else None, data.outside_root)
    if len(videos.classes) != len(trained.classes):
        raise DataError(
            f"{data.root}: {data.val} has {len(videos.classes)} classes, but the network has {len(trained.classes)}; "
            "list the network's classes in a classes.txt in the same folder"
        )
    check_labels(data, data.val, videos)
    (videos,) = usable(data, videos)
    if not data.prepared:
        check_present("validation", videos, data.max_bad_fraction)
    return videos


def predict_videos(
    trained: Trained, paths: Sequence[str], world: World, views: tuple[int, int], every: float | None = None
) -> Iterator[tuple[str, Answer | str]]:
    """Each path with the prediction for its video or, if it cannot be decoded, the cause; as soon as they are known.

    Each video has `views` (times, crops) as in an evaluation or, with `every`, a clip every so many seconds.
    """
    recipe, (times, crops) = trained.recipe, views
    if every is None:
        videos = Videos.of("", [(path, 0) for path in paths], trained.classes)
        bad = BadVideos(len(videos), 1)
        batches = view_batches(videos, range(len(videos)), recipe, times, crops, world, bad)
        for numbers, rows in predict(trained.model, batches, times * crops, recipe, world):
            names, found = [paths[number] for number in numbers.tolist()], rows.cpu().numpy()
            refuse_non_finite(found, names)
            yield from zip(names, map(Answer, names, found), strict=True)
        yield from bad.causes.items()
        return
    for path in paths:
        try:
            yield path, _predict_windows(trained, path, world, every)
        except VideoError as error:
            log.warning("video left out: %s", error)
            yield path, str(error)


def _predict_windows(trained: Trained, path: str, world: World, every: float) -> Answer:
    """Predict a clip of a video every so many seconds, of the whole file; one batch is in memory at a time."""
    recipe = trained.recipe
    if recipe.clip.sampling == "segments":
        raise UsageError("--every: with clip.sampling segments, a clip covers the whole video; leave out --every")
    with open_source(path, recipe.data.fps) as file:
        cuts = cut_windows(evaluation_grid(recipe), file.info, every, fps=recipe.clip.fps)
        batches = _batches(file, cuts, max(1, recipe.batch.clips), world)
        rows = torch.cat([rows for _, rows in predict(trained.model, batches, 1, recipe, world)]).cpu().numpy()
        fps, first = file.info.fps, file.first
    spans = [((first + cut.frames[0]) / fps, (first + cut.frames[-1] + 1) / fps) for cut in cuts]
    refuse_non_finite(rows, [f"{path}, {start:.1f} s" for start, _ in spans])
    windows = [Window(*span, row) for span, row in zip(spans, rows, strict=True)]
    return Answer(path, rows.max(0) if recipe.evaluation.views == "max" else rows.mean(0), windows)


def _batches(file: Reader, cuts: Sequence[Cut], size: int, world: World) -> Iterator[tuple[Tensor, Tensor]]:
    for first in range(0, len(cuts), size):
        clips = torch.from_numpy(np.stack(file.read(cuts[first : first + size])))  # (b, T, S, S, 3)
        yield clips.to(world.device).permute(0, 4, 1, 2, 3), torch.arange(first, first + len(clips))
