"""Pictures of what the network sees, for the page."""

from __future__ import annotations

import base64
import io
import logging
from typing import Any

from mgtrain.errors import MgtrainError
from mgtrain.runs.folder import RunDir

log = logging.getLogger(__name__)


def example_frames(run: RunDir) -> list[dict[str, Any]]:
    """The same clip at each shape, coarse to fine, some of its frames side by side; none without the data."""
    from PIL import Image

    from mgtrain.data import open_splits
    from mgtrain.engine.examples import examples
    from mgtrain.schedule import make_plan

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
