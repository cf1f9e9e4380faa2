"""UCF101 and HMDB51: lists of videos in folders of their classes."""

import re
from collections.abc import Sequence
from pathlib import Path

from mgtrain.data.formats.locate import Row, locate
from mgtrain.data.formats.reading import numbered_lines
from mgtrain.data.videos import Videos
from mgtrain.errors import DataError

UCF_CLASSES = "classInd.txt"  # next to the list: lines such as `1 ApplyEyeMakeup`
HMDB_SPLITS = "testTrainMulti_7030_splits"  # a file `<class>_test_split<1 to 3>.txt` for each class
HMDB_PARTS = {"train": "1", "test": "2"}  # marks of a video in a split's file; 0: in neither
UCF_FOLDERS = ("UCF-101", "videos", "")
HMDB_FOLDERS = ("hmdb51_org", "hmdb51", "videos", "")


def read_ucf101(root: str, source: str, classes: Sequence[str] | None) -> Videos:
    """The videos of `trainlist01.txt` or `testlist01.txt`: lines `Archery/v_Archery_g08_c01.avi 3`.

    A video's class is its folder; the number, which the lists of test videos lack, is ignored. `classes` defaults to
    `classInd.txt` next to `source`, in its order.
    """
    listing = Path(root, source)
    names = classes or _ucf_classes(listing.with_name(UCF_CLASSES))
    rows = []
    for line, text in numbered_lines(listing):
        label, _, video = re.sub(r" \d+$", "", text).rpartition("/")
        rows.append(_in_class_folder(f"{listing}:{line}", video, label or text, UCF_FOLDERS))
    return locate(root, listing, rows, names)


def _ucf_classes(file: Path) -> list[str]:
    """The classes of `classInd.txt`, in the order of their numbers."""
    rows = [line.split() for _, line in numbered_lines(file)]
    if any(len(row) != 2 or not row[0].isdecimal() for row in rows):
        raise DataError(f"{file}: must have lines such as `1 ApplyEyeMakeup`; get the file again")
    return [name for _, name in sorted((int(number), name) for number, name in rows)]


def read_hmdb51(root: str, source: str, classes: Sequence[str] | None) -> Videos:
    """The videos of one split: `source` is `train1`, `test1`, `train2` ... `test3`, or a path that ends so.

    The files `<class>_test_split1.txt` are in the path's folder or its subfolder `testTrainMulti_7030_splits`.
    """
    path = Path(root, source)
    part = re.fullmatch("(train|test)([1-3])", path.name)
    if part is None:
        raise DataError(f"{path}: HMDB51 has no split {path.name!r}; use train1 to train3 or test1 to test3")
    ending = f"_test_split{part[2]}.txt"
    folders = (path.parent / HMDB_SPLITS, path.parent)
    files = next((files for folder in folders if (files := sorted(folder.glob(f"*{ending}")))), None)
    if files is None:
        raise DataError(f"{folders[0]}: no file <class>{ending}; put the data set's splits there")
    rows = []
    for file in files:
        for line, text in numbered_lines(file):
            video, _, mark = text.rpartition(" ")
            if mark not in ("0", "1", "2"):
                raise DataError(f"{file}:{line}: {text!r} does not end in 0, 1 or 2; get the file again")
            if mark == HMDB_PARTS[part[1]]:
                label = file.name.removesuffix(ending)
                rows.append(_in_class_folder(f"{file}:{line}", video.strip(), label, HMDB_FOLDERS))
    return locate(root, path, rows, classes or [file.name.removesuffix(ending) for file in files])


def _in_class_folder(where: str, file: str, label: str, folders: Sequence[str]) -> Row:
    """A video in the folder of its class, with any suffix."""
    return Row(where, file.rpartition(".")[0] or file, label, [str(Path(folder, label)) for folder in folders])
