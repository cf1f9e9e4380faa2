"""How many videos to plan for, on a machine with or without the data. Needs no torch."""

from __future__ import annotations

from mgtrain.console import note
from mgtrain.data import open_videos, usable
from mgtrain.errors import DataError
from mgtrain.recipe import Recipe


def count_training_videos(recipe: Recipe) -> int:
    """How many usable training videos the data has, or `data.videos` says if the data is not on this machine.

    Raises:
        DataError: the data is not here and the recipe does not say how many videos there are.
    """
    data = recipe.data
    try:
        videos = open_videos(data.format, data.root, data.train, None, data.outside_root)
    except DataError as error:
        if data.videos is None:
            raise DataError(f"{error}; give --videos to plan without the data") from None
        return data.videos
    (videos,) = usable(data, videos)
    if videos.left_out:
        note(f"training videos: {videos.left_out_words}, as {data.checked} says")
    return len(videos)
