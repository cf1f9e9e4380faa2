"""The videos of a data set and their labels.

The input is the `data` section of a recipe, or annotations in a known format. The output is `Videos` (paths and labels
in a fixed order), splits, an index of the files, and a synthetic set. Nothing here decodes a video or imports torch.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from mgtrain.console import note
from mgtrain.data.formats.charades import read_charades
from mgtrain.data.formats.folder import read_folder
from mgtrain.data.formats.kinetics import read_kinetics
from mgtrain.data.formats.listfile import read_list
from mgtrain.data.formats.reading import check_exists, classes_file, numbered_lines
from mgtrain.data.formats.something_something import read_something_something
from mgtrain.data.formats.ucf_hmdb import read_hmdb51, read_ucf101
from mgtrain.data.manifest import Checked
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
    """Read the videos of a split from `source`, a file or folder in a format of `DATASETS`.

    `source` is absolute or relative to `root`. `classes` defaults to the lines of a `classes.txt` next to the file
    `source`, in the folder `source` or in the root, or else to the format's default. With `outside_root`, a list may
    have videos outside of the root.
    Raises `DataError` if the annotations cannot be read, or are not valid.
    """
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
        path = error.filename or source
        raise DataError(f"{path}: cannot be read: {error.strerror}; correct the path or its permissions") from None
    for name in videos.classes:
        if re.search(r"[\r\n\ud800-\udfff]", name):
            raise DataError(f"{root}: class {name!r}: a class name must be one line of UTF-8; rename it")
    return videos


def listed_classes(root: str, source: str) -> list[str] | None:
    """The lines of the `classes.txt` of `source`; None if there is no such file."""
    file = classes_file(root, source)
    return None if file is None else [text for _, text in numbered_lines(file)]


def open_splits(data: Data) -> dict[str, Videos]:
    """Read the usable videos of a recipe, `train` and `val`, with the same classes."""
    train = open_videos(data.format, data.root, data.train, None, data.outside_root)
    if len(train.classes) != data.classes:
        raise DataError(
            f"{data.root}: the training videos have {len(train.classes)} classes, data.classes says {data.classes}; "
            + "; ".join(train.remarks or (f"set data.classes={len(train.classes)}, or correct {data.train}",))
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
    """The videos of each split that `data.checked` says can be used; all videos if it is not set."""
    if data.checked is None:
        return [*splits]
    checked = Checked(data.checked)
    return [checked.usable(videos) for videos in splits]


def count_training_videos(recipe: Recipe, expected: bool = True) -> int:
    """The number of usable training videos, or else, if `expected`, `data.videos`. Raises `DataError` without both."""
    data = recipe.data
    try:
        videos = open_videos(data.format, data.root, data.train, None, data.outside_root)
    except DataError as error:
        if not expected:
            raise
        if data.videos is None:
            raise DataError(f"{error}; give --videos to plan without the data") from None
        note(f"{error}; planning with data.videos={data.videos}")
        return data.videos
    (videos,) = usable(data, videos)
    if videos.left_out:
        note(f"training videos: {videos.left_out_words}, as {data.checked} says")
    return len(videos)
