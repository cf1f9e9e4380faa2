"""A trained network, from a checkpoint of ours or from anybody's weights, ready to be asked."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from mgtrain.data import check_labels, listed_classes, open_videos, usable
from mgtrain.data.manifest import checksum
from mgtrain.data.videos import Videos
from mgtrain.engine.checks import check_shapes, make_model
from mgtrain.engine.step import to_device
from mgtrain.errors import CheckpointError, DataError, UsageError
from mgtrain.models.weights.files import read_tensors
from mgtrain.models.weights.load import freeze, is_ours, load_weights, named, read_classes
from mgtrain.processes.distributed import World
from mgtrain.recipe import Recipe, load_recipe, parse_recipe
from mgtrain.runs.checkpoint import is_checkpoint, load_model, read_info


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained network and what is known of it."""

    model: nn.Module
    recipe: Recipe
    classes: tuple[str, ...]  # their names, or their numbers where nobody has said
    step: int | None  # of the run; None for weights from elsewhere
    recalibrated: bool  # whether BatchNorm's running statistics are for evaluations
    identity: str  # changes with the file and the recipe

    @property
    def named(self) -> bool:
        """Whether the classes have names."""
        return not all(name.isdecimal() for name in self.classes)


def load_trained(path: Path, recipe: str | None, overrides: Sequence[str], world: World) -> Trained:
    """The network in a file, on this rank's device. A checkpoint has its recipe; for other weights `recipe` names one.

    Raises:
        CheckpointError, ThresholdError: it cannot be read, or is of another network than the recipe's.
        UsageError: the recipe is missing, or one too many.
    """
    ours = is_checkpoint(path)
    tensors = {} if ours else read_tensors(path)
    if ours and recipe is not None:
        raise UsageError(f"{path}: has its own recipe; leave out --recipe, and change keys as section.key=value")
    if not ours and recipe is None:
        raise UsageError(
            f"{path}: holds weights without a recipe; say with --recipe how clips are cut for them, such as "
            "--recipe k400_slowfast_8x8_r50_baseline"
        )
    if recipe is not None:
        made = load_recipe(recipe, overrides)
        classes, step, recalibrated = read_classes(path), None, True
    else:
        info = read_info(path)
        made = parse_recipe(info.recipe, str(path), overrides)
        classes, step, recalibrated = tuple(info.classes), info.step, info.recalibrated
        recalibrated = recalibrated or made.evaluation.recalibration_batches == 0
    classes = classes or tuple(map(str, range(made.data.classes)))
    if len(classes) != made.data.classes:
        raise CheckpointError(f"{path}: has {len(classes)} classes, data.classes says {made.data.classes}; set it so")
    check_shapes(made, [made.evaluation_shape])
    model = to_device(make_model(made), made, world)
    if ours:
        load_model(path, model)
    else:
        report = load_weights(model, named(path, tensors, is_ours(model)))
        report.demand(1.0, path)
        if report.resized:
            raise CheckpointError(f"{path}: {report.resized}; set data.classes to what the file has")
    freeze(model, made.init)
    how = made.model_dump_json(exclude={"hardware", "logging", "faults"})
    identity = hashlib.sha256(f"{checksum(path)} {how} {made.hardware.precision}".encode()).hexdigest()
    return Trained(model.eval(), made, classes, step, recalibrated, identity)


def evaluation_videos(trained: Trained) -> Videos:
    """The videos of `data.val`, of the network's classes; the training videos need not be there.

    Raises:
        DataError: their classes are others, or they have several labels each where the recipe says one.
    """
    data = trained.recipe.data
    listed = (listed_classes(data.root, data.val) if trained.named else None) or ()
    for number, (there, here) in enumerate(zip(listed, trained.classes, strict=False)):
        if there != here:
            raise DataError(
                f"{data.root}: class {number} is {there!r} in classes.txt and {here!r} in the network, so labels would "
                "be mistaken; list the same classes in the same order"
            )
    known = trained.named or trained.step is not None  # a run's classes may be numbers, but they are all of them
    videos = open_videos(data.format, data.root, data.val, trained.classes if known else None, data.outside_root)
    if len(videos.classes) != len(trained.classes):
        raise DataError(
            f"{data.root}: {data.val} has {len(videos.classes)} classes, the network {len(trained.classes)}; "
            "list the network's in a classes.txt beside it"
        )
    check_labels(data, data.val, videos)
    (videos,) = usable(data, videos)
    return videos
