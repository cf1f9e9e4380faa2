"""What the network sees: a clip of every grid of a run's plan."""

from __future__ import annotations

import base64
import io
import logging
from typing import Any

from mgtrain.errors import MgtrainError
from mgtrain.grid import Grid, Shape
from mgtrain.rundir import RunDir

FRAMES = 4  # of a clip that are shown
log = logging.getLogger(__name__)


def example_frames(run: RunDir) -> list[dict[str, Any]]:
    """The same clip at each shape, coarse to fine, some of its frames side by side; none without the data."""
    from PIL import Image

    from mgtrain.clips.loader import RandomClips
    from mgtrain.clips.order import ClipRequest
    from mgtrain.datasets import open_splits
    from mgtrain.schedule import make_plan

    try:
        recipe = run.recipe()
        train = open_splits(recipe.data)["train"]
        plan = make_plan(recipe, len(train))
        grids: dict[Shape, Grid] = {}
        for phase in plan.phases:
            grids |= dict(zip(phase.shapes, phase.grids, strict=True))
        clips = RandomClips(train, recipe)
        found = []
        for shape, grid in grids.items():
            loaded = clips[[ClipRequest(0, 0, grid)]]
            if loaded.given_up:
                return []
            chosen = sorted({round(n * (shape.frames - 1) / max(1, FRAMES - 1)) for n in range(FRAMES)})
            strip = loaded.clips[0][chosen].permute(1, 0, 2, 3).reshape(shape.crop, -1, 3)
            file = io.BytesIO()
            Image.fromarray(strip.numpy()).save(file, "JPEG", quality=80)
            found.append(
                {
                    "shape": f"{shape.clips}x{shape.frames}x{shape.crop}²",
                    "frames": len(chosen),
                    "of": shape.frames,
                    "width": strip.shape[1],
                    "height": shape.crop,
                    "data": base64.b64encode(file.getvalue()).decode(),
                }
            )
        return found
    except MgtrainError as error:
        log.warning("no pictures of clips: %s", error)
        return []
