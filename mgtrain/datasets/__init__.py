"""The videos of a data set, read from the formats in use. A new format is one function and one line in `DATASETS`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path

from mgtrain.datasets.charades import read_charades
from mgtrain.datasets.checked import Checked
from mgtrain.datasets.folder import read_folder
from mgtrain.datasets.kinetics import read_kinetics
from mgtrain.datasets.listfile import read_list
from mgtrain.datasets.something_something import read_something_something
from mgtrain.datasets.videos import Videos, read_lines
from mgtrain.errors import DataError
from mgtrain.recipe import Data

DATASETS: dict[str, Callable[[str, str, Sequence[str] | None], Videos]] = {
    "list": read_list,
    "kinetics": read_kinetics,
    "folder": read_folder,
    "something_something": read_something_something,
    "charades": read_charades,
}


def open_videos(format: str, root: str, source: str, classes: Sequence[str] | None = None) -> Videos:
    """The videos of one split: `source` (a file or a folder, relative to `root` or absolute) in one of `DATASETS`.

    Without `classes` they are the lines of a `classes.txt` beside `source` or in the root if there is one, and
    otherwise what the format says.
    """
    if format not in DATASETS:
        near = difflib.get_close_matches(format, DATASETS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(map(repr, DATASETS))}"
        raise DataError(f"no data set format {format!r}; {hint}")
    beside = (folder / "classes.txt" for folder in (Path(root, source).parent, Path(root)))
    names = next((file for file in beside if file.is_file()), None)
    if classes is None and names is not None:
        classes = [line.strip() for line in read_lines(names) if line.strip()]
    repeated = sorted({name for name in classes or () if list(classes or ()).count(name) > 1})
    if repeated:
        raise DataError(f"class {repeated[0]!r} is there twice; name every class of {root} once")
    return DATASETS[format](root, source, classes)


def open_splits(data: Data) -> dict[str, Videos]:
    """The videos of a recipe, `train` and `val`, with the same classes in both; without those that `data.checked` says
    cannot be used."""
    train = open_videos(data.format, data.root, data.train)
    if len(train.classes) != data.classes:
        raise DataError(
            f"{data.root}: the training videos have {len(train.classes)} classes, data.classes says {data.classes}; "
            f"set data.classes={len(train.classes)}, or correct {data.train}"
        )
    val = open_videos(data.format, data.root, data.val, train.classes)
    return dict(zip(("train", "val"), usable(data, train, val), strict=True))


def usable(data: Data, *splits: Videos) -> list[Videos]:
    """Of each split the videos that can be used, as far as `data.checked` knows better than that all can."""
    if data.checked is None:
        return [*splits]
    checked = Checked(data.checked)
    return [checked.usable(videos) for videos in splits]
