"""The videos of a data set, read from the formats in use. A new format is one function and one line in `DATASETS`."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from mgtrain.data.charades import read_charades
from mgtrain.data.checked import Checked
from mgtrain.data.folder import read_folder
from mgtrain.data.kinetics import read_kinetics
from mgtrain.data.listfile import read_list
from mgtrain.data.something_something import read_something_something
from mgtrain.data.ucf_hmdb import read_hmdb51, read_ucf101
from mgtrain.data.videos import Videos, read_lines
from mgtrain.errors import DataError
from mgtrain.recipe import Data

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
    otherwise what the format says. A list may name videos outside of the root if `outside_root` says so.
    """
    if format not in DATASETS:
        near = difflib.get_close_matches(format, DATASETS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(map(repr, DATASETS))}"
        raise DataError(f"no data set format {format!r}; {hint}")
    options = {"outside_root": True} if outside_root else {}
    try:
        if classes is None:
            classes = listed_classes(root, source)
        repeated = [name for name, count in Counter(classes or ()).items() if count > 1]
        if repeated:
            raise DataError(f"class {min(repeated)!r} is there twice; name every class of {root} once")
        videos = DATASETS[format](root, source, classes, **options)
    except OSError as error:
        raise DataError(
            f"{error.filename or source}: cannot be read: {error.strerror}; correct the path, or mend its permissions"
        ) from None
    for name in videos.classes:
        if re.search(r"[\r\n\ud800-\udfff]", name):
            raise DataError(f"{root}: class {name!r}: the name of a class has to be one line of UTF-8; rename it")
    return videos


def listed_classes(root: str, source: str) -> list[str] | None:
    """The lines of the `classes.txt` beside `source` or in the root; None if there is none."""
    beside = (folder / "classes.txt" for folder in (Path(root, source).parent, Path(root)))
    names = next((file for file in beside if file.is_file()), None)
    return None if names is None else [line.strip() for line in read_lines(names) if line.strip()]


def open_splits(data: Data) -> dict[str, Videos]:
    """The videos of a recipe, `train` and `val`, with the same classes in both; without those that `data.checked` says
    cannot be used."""
    train = open_videos(data.format, data.root, data.train, None, data.outside_root)
    if len(train.classes) != data.classes:
        raise DataError(
            f"{data.root}: the training videos have {len(train.classes)} classes, data.classes says {data.classes}; "
            f"set data.classes={len(train.classes)}, or correct {data.train}"
        )
    val = open_videos(data.format, data.root, data.val, train.classes, data.outside_root)
    return dict(zip(("train", "val"), usable(data, train, val), strict=True))


def check_labels(data: Data, name: str, videos: Videos) -> None:
    """Raises `DataError` where videos have several labels each and the recipe says one."""
    if videos.multi_label and not data.multi_label:
        raise DataError(
            f"{data.root}: the {name} videos have several labels each; set data.multi_label=true to train with all of "
            "them, or list one per video"
        )


def usable(data: Data, *splits: Videos) -> list[Videos]:
    """Of each split the videos that can be used, as far as `data.checked` knows better than that all can."""
    if data.checked is None:
        return [*splits]
    checked = Checked(data.checked)
    return [checked.usable(videos) for videos in splits]
