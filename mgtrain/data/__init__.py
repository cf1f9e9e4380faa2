"""The videos of a data set and their labels.

In comes the `data` section of a recipe or a file of annotations in one of the formats in use, out goes `Videos`: paths
and labels in a fixed order; this room also splits, indexes, checks and makes data sets. To add a format, add a function
and a line in `DATASETS`. Nothing here decodes a video or imports torch.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from mgtrain.console import note
from mgtrain.data.charades import read_charades
from mgtrain.data.folder import read_folder
from mgtrain.data.kinetics import read_kinetics
from mgtrain.data.listfile import read_list
from mgtrain.data.manifest import Checked
from mgtrain.data.reading import check_exists, numbered_lines
from mgtrain.data.something_something import read_something_something
from mgtrain.data.ucf_hmdb import read_hmdb51, read_ucf101
from mgtrain.data.videos import Videos
from mgtrain.errors import DataError
from mgtrain.recipe import Data, Recipe

DATASETS: dict[str, Callable[..., Videos]] = {
    "list": read_list,
    "kinetics": read_kinetics,
    "folder": read_folder,
    "something_something": read_something_something,
    "charades": read_charades,
    "ucf101": read_ucf101,
    "hmdb51": read_hmdb51,
}


def open_videos(
    format: str, root: str, source: str, classes: Sequence[str] | None = None, outside_root: bool = False
) -> Videos:
    """The videos of one split: `source` (a file or a folder, relative to `root` or absolute) in one of `DATASETS`.

    Without `classes` they are the lines of a `classes.txt` beside `source` or in the root if there is one, and
    otherwise what the format defines. With `outside_root` a list may name videos outside of the root.
    """
    if format not in DATASETS:
        near = difflib.get_close_matches(format, DATASETS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(map(repr, DATASETS))}"
        raise DataError(f"no data set format {format!r}; {hint}")
    options = {"outside_root": True} if outside_root else {}
    try:
        check_exists(Path(root), "folder of videos")
        if classes is None:
            classes = listed_classes(root, source)
        repeated = [name for name, count in Counter(classes or ()).items() if count > 1]
        if repeated:
            raise DataError(f"class {min(repeated)!r} is listed twice; name every class of {root} once")
        videos = DATASETS[format](root, source, classes, **options)
    except OSError as error:
        raise DataError(
            f"{error.filename or source}: cannot be read: {error.strerror}; correct the path or its permissions"
        ) from None
    for name in videos.classes:
        if re.search(r"[\r\n\ud800-\udfff]", name):
            raise DataError(f"{root}: class {name!r}: a class name must be one line of UTF-8; rename it")
    return videos


def listed_classes(root: str, source: str) -> list[str] | None:
    """The lines of the `classes.txt` beside `source` or in the root; None if there is none."""
    beside = (folder / "classes.txt" for folder in (Path(root, source).parent, Path(root)))
    names = next((file for file in beside if file.is_file()), None)
    return None if names is None else [text for _, text in numbered_lines(names)]


def open_splits(data: Data) -> dict[str, Videos]:
    """The videos of a recipe, `train` and `val`, with the same classes, without those that `data.checked` rules out."""
    train = open_videos(data.format, data.root, data.train, None, data.outside_root)
    if len(train.classes) != data.classes:
        raise DataError(
            f"{data.root}: the training videos have {len(train.classes)} classes, data.classes says {data.classes}; "
            f"set data.classes={len(train.classes)}, or correct {data.train}"
        )
    val = open_videos(data.format, data.root, data.val, train.classes, data.outside_root)
    return dict(zip(("train", "val"), usable(data, train, val), strict=True))


def check_labels(data: Data, name: str, videos: Videos) -> None:
    """Raise `DataError` if videos have several labels each and the recipe expects one."""
    if videos.multi_label and not data.multi_label:
        raise DataError(
            f"{data.root}: the {name} videos have several labels each; set data.multi_label=true to train with all of "
            "them, or list one per video"
        )


def usable(data: Data, *splits: Videos) -> list[Videos]:
    """Of each split the videos that can be used, according to `data.checked`; without it, all."""
    if data.checked is None:
        return [*splits]
    checked = Checked(data.checked)
    return [checked.usable(videos) for videos in splits]


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
