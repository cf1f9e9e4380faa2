"""The official Kinetics lists: label,youtube_id,time_start,time_end,split[,is_cc]."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path

from mgtrain.datasets.videos import Videos, check_exists, read_lines
from mgtrain.errors import DataError

COLUMNS = ("label", "youtube_id", "time_start", "time_end", "split")


def read_kinetics(root: str, source: str, classes: Sequence[str] | None) -> Videos:
    """The videos of an official Kinetics CSV that are there, as `<id>_<start>_<end>` with six digits and any suffix.

    They are looked for in `root/<split>/<label>`, `root/<split>`, `root/<label>` and `root`; the split is that of the
    row or the name of the CSV (so `val.csv` finds `val/` though its rows say `validate`), and a label's spaces may be
    underscores in the name of its folder. Rows without a video are left out and counted in `missing`. Without
    `classes` these are all labels of the CSV in alphabetical order, whether or not they have a video.
    """
    listing = Path(root, source)
    check_exists(Path(root), "folder of videos")
    check_exists(listing, "Kinetics CSV")
    rows = csv.DictReader(read_lines(listing))
    absent = [column for column in COLUMNS if column not in (rows.fieldnames or ())]
    if absent:
        raise DataError(f"{listing}:1: no column {absent[0]!r}; the first line has to be {','.join(COLUMNS)}")

    clips = []  # (where, label, split, name of the file without suffix)
    for row in rows:
        where = f"{listing}:{rows.line_num}"
        try:
            times = f"{int(float(row['time_start'])):06d}_{int(float(row['time_end'])):06d}"
        except (TypeError, ValueError):
            times = f"{row['time_start']!r} and {row['time_end']!r}"
            raise DataError(f"{where}: the times {times} are no numbers of seconds; mend this line") from None
        clips.append((where, row["label"], row["split"], f"{row['youtube_id']}_{times}"))
    if not clips:
        raise DataError(f"{listing}: no row in it; it has to list videos, one per line")

    names = tuple(classes) if classes else tuple(sorted({label for _, label, _, _ in clips}))
    numbers = {name: number for number, name in enumerate(names)}
    folders: dict[str, dict[str, str]] = {}  # folder -> its files by name without suffix: every folder is read once
    entries = []
    for where, label, split, name in clips:
        if label not in numbers:
            raise DataError(f"{where}: {label!r} is none of the {len(names)} classes; mend the label or the classes")
        for folder in _folders(label, split, listing.stem):
            if folder not in folders:
                folders[folder] = _files(os.path.join(root, folder))
            if name in folders[folder]:
                entries.append((os.path.join(folder, folders[folder][name]), numbers[label]))
                break
    if not entries:
        _, label, split, name = clips[0]
        places = ", ".join(str(Path(root, folder)) for folder in _folders(label, split, listing.stem))
        raise DataError(
            f"{listing}: none of its {len(clips)} videos is there; looked for {name}.* and so on in {places}"
        )
    return Videos.of(root, entries, names, missing=len(clips) - len(entries))


def _folders(label: str, split: str, stem: str) -> list[str]:
    """Where a video may be, relative to the root, most specific first."""
    labels = dict.fromkeys((label, label.replace(" ", "_")))
    splits = dict.fromkeys((split, stem))
    return [*(os.path.join(s, f) for s in splits for f in labels), *splits, *labels, ""]


def _files(folder: str) -> dict[str, str]:
    """The files of a folder by their names without suffix; none if there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return {os.path.splitext(entry.name)[0]: entry.name for entry in entries if not entry.name.startswith(".")}
    except (FileNotFoundError, NotADirectoryError):
        return {}
