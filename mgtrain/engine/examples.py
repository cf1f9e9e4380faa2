"""Pictures of the network's input: a clip of one video at every shape of a plan, after loading and augmentation."""

import base64
import io
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mgtrain.clips.order import Order
from mgtrain.clips.units import RandomClips
from mgtrain.data import open_splits
from mgtrain.data.videos import Videos
from mgtrain.engine.step import augmented
from mgtrain.errors import DataError, MgtrainError
from mgtrain.grid import Shape
from mgtrain.models.part import Part
from mgtrain.recipe import Recipe
from mgtrain.recipe.model import pixel_statistics
from mgtrain.runs.folder import RunDir
from mgtrain.schedule import Plan, make_plan

log = logging.getLogger(__name__)

FRAMES = 4  # frames of a clip to show


def examples(train: Videos, recipe: Recipe, plan: Plan) -> Iterator[tuple[Shape, Tensor]]:
    """Each shape and up to `FRAMES` frames of its clip of the run's first video side by side, uint8 (S, n * S, 3).

    Clips are not mixed. Raises `DataError` if no video can be decoded.
    """
    unmixed = recipe.changed("augment", mixup=0.0, cutmix=0.0)
    loader, order = RandomClips(train, recipe), Order.of(train, recipe)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1, 1) for values in pixel_statistics(recipe.model))
    for shape, step in plan.first_steps().items():
        loaded = loader[[*order.requests([0], step.grid)]]
        if loaded.given_up:
            raise DataError(f"{train.root}: no video can be decoded, the first: {loaded.bad[0][1]}")
        alone = Part(0, 1, shape.clips, shape.clips)
        x, _ = augmented(loaded.clips.permute(0, 4, 1, 2, 3), loaded.labels, alone, step, unmixed)
        pixels = (255 * (x * std + mean)).round().clamp(0, 255).to(torch.uint8)[0]  # (3, T, S, S)
        chosen = sorted({round(n * (shape.frames - 1) / (FRAMES - 1)) for n in range(FRAMES)})
        yield shape, pixels[:, chosen].permute(2, 1, 3, 0).flatten(1, 2)


def example_frames(run: RunDir) -> list[dict[str, Any]]:
    """The pictures of `examples` as JPEGs in base64 with their sizes, for a report; empty if there are no videos."""
    from PIL import Image

    found = []
    try:
        recipe = run.recipe()
        train = open_splits(recipe.data)["train"]
        for shape, strip in examples(train, recipe, make_plan(recipe, len(train))):
            file = io.BytesIO()
            Image.fromarray(strip.numpy()).save(file, "JPEG", quality=80)
            height, width, _ = strip.shape
            facts = {"shape": str(shape), "frames": width // height, "of": shape.frames}
            data = base64.b64encode(file.getvalue()).decode()
            found.append({**facts, "width": width, "height": height, "data": data})
    except MgtrainError as error:
        log.warning("no pictures of clips: %s", error)
    return found
