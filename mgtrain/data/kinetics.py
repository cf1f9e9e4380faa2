"""The official Kinetics lists: label,youtube_id,time_start,time_end,split[,is_cc]."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mgtrain.data.videos import Finder, Table, Videos, check_exists
from mgtrain.errors import DataError

REPLACEMENTS = os.path.join("replacement", "replacement_for_corrupted_k400")  # as the CVDF's scripts unpack it
COLUMNS = ("label", "youtube_id", "time_start", "time_end", "split")


def read_kinetics(root: str, source: str, classes: Sequence[str] | None) -> Videos:
    """The videos of an official Kinetics CSV that are there, as `<id>_<start>_<end>` with six digits and any suffix.

    They are looked for in `root/<split>/<label>`, `root/<split>`, `root/<label>` and `root`; the split is that of the
    row or the name of the CSV (so `val.csv` finds `val/` though its rows say `validate`), and a label's spaces may be
    underscores in the name of its folder. Before all these comes the folder in which the CVDF's copy of Kinetics-400
    has replacements for broken videos. Rows without a video are left out and counted in `missing`. Without `classes`
    these are all labels of the CSV in alphabetical order, whether or not they have a video.
    """
    listing = Path(root, source)
    check_exists(Path(root), "folder of videos")
    check_exists(listing, "Kinetics CSV")
    table = Table(listing)
    absent = [column for column in COLUMNS if column not in table.columns]
    if absent:
        raise DataError(f"{listing}:1: no column {absent[0]!r}; the first line has to be {','.join(COLUMNS)}")

    clips = []  # (where, label, split, name of the file without suffix)
    for line, row in table:
        where = f"{listing}:{line}"
        try:
            times = f"{_six_digits(row['time_start'])}_{_six_digits(row['time_end'])}"
        except ValueError:
            times = f"{row['time_start']!r} and {row['time_end']!r}"
            raise DataError(f"{where}: the times {times} are no numbers of seconds; mend this line") from None
        for name in (row["label"], row["split"]):
            if os.path.isabs(name) or os.pardir in name.split(os.sep):
                raise DataError(f"{where}: {name!r} leads out of {root}; it has to be a name within it")
        clips.append((where, row["label"], row["split"], f"{row['youtube_id']}_{times}"))
    if not clips:
        raise DataError(f"{listing}: no row in it; it has to list videos, one per line")

    names = tuple(classes) if classes else tuple(sorted({label for _, label, _, _ in clips}))
    numbers = {name: number for number, name in enumerate(names)}
    finder = Finder(root)
    entries = []
    for where, label, split, name in clips:
        if label not in numbers:
            raise DataError(f"{where}: {label!r} is none of the {len(names)} classes; mend the label or the classes")
        file = finder.find(name, _folders(label, split, listing.stem))
        if file is not None:
            entries.append((file, numbers[label]))
    if not entries:
        raise finder.none_found(listing, _folders(clips[0][1], clips[0][2], listing.stem))
    return Videos.of(root, entries, names, finder.missing, finder.missing_names)


def _folders(label: str, split: str, stem: str) -> list[str]:
    """Where a video may be, relative to the root: its replacement first, then most specific first."""
    labels = dict.fromkeys((label, label.replace(" ", "_")))
    splits = dict.fromkeys((split, stem))
    return [REPLACEMENTS, *(os.path.join(s, f) for s in splits for f in labels), *splits, *labels, ""]


def _six_digits(seconds: str) -> str:
    """A time as the names of files have it; `ValueError` if it cannot be written like this."""
    if not 0 <= float(seconds) < 1e6:
        raise ValueError
    return f"{int(float(seconds)):06d}"
