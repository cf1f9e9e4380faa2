"""Something-Something V2: JSON lists of videos, and a JSON file that numbers the classes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mgtrain.data.formats.locate import Row, locate
from mgtrain.data.formats.reading import read_file
from mgtrain.data.videos import Videos
from mgtrain.errors import DataError

LABELS = ("something-something-v2-labels.json", "labels.json")  # next to the list of videos
FOLDERS = ("20bn-something-something-v2", "videos", "frames", "rawframes", "")  # to search, relative to the root


def read_something_something(root: str, source: str, classes: Sequence[str] | None) -> Videos:
    """The videos `<id>` of `something-something-v2-train.json` (or `-validation`), a JSON list.

    A video's class is its template without brackets, such as "Putting something on something". `classes` defaults to
    those that the file of labels next to `source` numbers.
    """
    listing = Path(root, source)
    entries = _load(listing)
    if not isinstance(entries, list):
        raise DataError(f'{listing}: not a list of videos; it must be [{{"id": ..., "template": ...}}, ...]')
    names = classes or _classes(listing)
    rows = []
    for place, entry in enumerate(entries, start=1):
        try:
            template = str(entry["template"]).replace("[", "").replace("]", "")
            rows.append(Row(f"{listing}: entry {place}", str(entry["id"]), template, FOLDERS))
        except (TypeError, KeyError):
            raise DataError(
                f"{listing}: entry {place} has no id or no template; use the list of training or validation videos "
                "(that of test videos has no labels)"
            ) from None
    return locate(root, listing, rows, names)


def _classes(listing: Path) -> list[str]:
    """The classes in the order of their numbers."""
    file = next((path for path in map(listing.with_name, LABELS) if path.exists()), None)
    if file is None:
        files = " or ".join(LABELS)
        raise DataError(f"{listing.parent}: no {files}; put the file of labels next to {listing.name}")
    numbers = _load(file)
    try:
        names = sorted(numbers, key=lambda name: int(numbers[name]))
        complete = [int(numbers[name]) for name in names] == list(range(len(names)))
    except (AttributeError, TypeError, ValueError, OverflowError):
        complete = False
    if not complete:
        raise DataError(f'{file}: the classes are not numbered 0, 1, ...; it must be {{"Approaching something": "0"}}')
    return names


def _load(path: Path) -> Any:
    try:
        return json.loads(read_file(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {error}; get the file again") from None
