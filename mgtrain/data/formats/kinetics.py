"""The official Kinetics lists: label,youtube_id,time_start,time_end,split[,is_cc]."""

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from mgtrain.data.formats.locate import Row, locate
from mgtrain.data.formats.reading import read_table
from mgtrain.data.videos import Videos
from mgtrain.errors import DataError

COLUMNS = ("label", "youtube_id", "time_start", "time_end", "split")
# Folders to search for videos, relative to the root; those of UCF101 and HMDB51 have a folder for each class.
REPLACEMENTS = os.path.join("replacement", "replacement_for_corrupted_k400")  # where the CVDF's scripts unpack them


def read_kinetics(root: str, source: str, classes: Sequence[str] | None) -> Videos:
    """The videos of an official Kinetics CSV, named `<id>_<start>_<end>` with six digits and any suffix.

    They may be among the CVDF's replacements of corrupted Kinetics-400 videos, or in `root/<split>/<label>`,
    `root/<split>`, `root/<label>` or `root`. The split is that of the row or the name of the CSV (`val.csv` finds
    `val/` although its rows say `validate`), and a folder's name may have underscores instead of a label's spaces.
    `classes` defaults to all labels of the CSV in alphabetical order, with or without a video.
    """
    listing = Path(root, source)
    rows = []
    for line, row in read_table(listing, COLUMNS, f"the first line must be {','.join(COLUMNS)}"):
        where, label, split = f"{listing}:{line}", row["label"], row["split"]
        try:
            start, end = float(row["time_start"]), float(row["time_end"])
            if not (0 <= start < 1e6 and 0 <= end < 1e6):  # six digits
                raise ValueError
        except ValueError:
            times = f"{row['time_start']!r} and {row['time_end']!r}"
            raise DataError(f"{where}: the times {times} are not numbers of seconds; fix this line") from None
        for name in (label, split):
            if os.path.isabs(name) or os.pardir in name.split(os.sep):
                raise DataError(f"{where}: {name!r} leads out of {root}; it must be a name within it")
        video = f"{row['youtube_id']}_{int(start):06d}_{int(end):06d}"
        rows.append(Row(where, video, label, _folders(label, split, listing.stem)))
    return locate(root, listing, rows, classes or sorted({str(row.label) for row in rows}))


@cache  # so that all rows of a class share a tuple
def _folders(label: str, split: str, stem: str) -> tuple[str, ...]:
    """The folders to search: the replacement first, then the most specific first."""
    labels = dict.fromkeys((label, label.replace(" ", "_")))
    splits = dict.fromkeys((split, stem))
    return (REPLACEMENTS, *(os.path.join(s, f) for s in splits for f in labels), *splits, *labels, "")
