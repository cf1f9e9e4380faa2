"""Something-Something: a JSON of videos with their templates, a JSON that numbers the templates, `<id>.webm`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mgtrain.data.videos import Finder, Videos, check_exists, read_file
from mgtrain.errors import DataError

FOLDERS = ("20bn-something-something-v2", "videos", "")  # relative to the root
LABELS = ("something-something-v2-labels.json", "labels.json")  # beside the list of videos


def read_something_something(root: str, source: str, classes: Sequence[str] | None) -> Videos:
    """The videos of `something-something-v2-train.json` (or `-validation`) that are there, with any suffix.

    They are looked for in `root/20bn-something-something-v2`, `root/videos` and `root`. A video's class is its
    template without brackets: "Putting [something] on [something]" is "Putting something on something". Without
    `classes` the labels' file beside `source` numbers them. Entries without a video are left out and counted.
    """
    listing = Path(root, source)
    check_exists(Path(root), "folder of videos")
    check_exists(listing, "JSON of videos")
    entries = _load(listing)
    if not isinstance(entries, list) or not entries:
        raise DataError(f'{listing}: no list of videos; it has to be [{{"id": ..., "template": ...}}, ...]')
    names = tuple(classes or _read_classes(listing))
    numbers = {name: number for number, name in enumerate(names)}
    finder = Finder(root)
    found = []
    for place, entry in enumerate(entries, start=1):
        try:
            video, template = str(entry["id"]), str(entry["template"]).replace("[", "").replace("]", "")
        except (TypeError, KeyError):
            raise DataError(
                f"{listing}: entry {place} has no id or no template; use the list of training or validation videos "
                "(that of test videos has no labels)"
            ) from None
        if template not in numbers:
            raise DataError(
                f"{listing}: entry {place}: {template!r} is none of the {len(names)} classes; "
                "use the labels of the same release"
            )
        file = finder.find(video, FOLDERS)
        if file is not None:
            found.append((file, numbers[template]))
    if not found:
        raise finder.none_found(listing, FOLDERS)
    return Videos.of(root, found, names, finder.missing, finder.missing_names)


def _read_classes(listing: Path) -> list[str]:
    """The classes in the order of their numbers."""
    file = next((path for path in map(listing.with_name, LABELS) if path.exists()), None)
    if file is None:
        raise DataError(f"{listing.parent}: no {' or '.join(LABELS)}; put the labels' file beside {listing.name}")
    numbers = _load(file)
    try:
        names = sorted(numbers, key=lambda name: int(numbers[name]))
        complete = [int(numbers[name]) for name in names] == list(range(len(names)))
    except (AttributeError, TypeError, ValueError, OverflowError):
        complete = False
    if not complete:
        raise DataError(
            f'{file}: the classes are not numbered 0, 1, ...; it has to be {{"Approaching something": "0"}}'
        )
    return names


def _load(path: Path) -> Any:
    try:
        return json.loads(read_file(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {error}; get the file anew") from None
