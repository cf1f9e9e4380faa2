"""A file is written whole or not at all."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mgtrain.processes.files import replacing, write_whole


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    with replacing(file) as temporary:
        temporary.write_text("whole")
        assert not file.exists()

    def interrupted() -> None:
        with replacing(file) as temporary:
            temporary.write_text("ha")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "whole")]


def test_a_file_has_the_permissions_of_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    with replacing(tmp_path / "a") as temporary:
        temporary.unlink()
        temporary.touch(0o600)  # as some libraries do
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_pipes_and_folders_are_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as thread:
        read = thread.submit((tmp_path / "pipe").read_text)
        write_whole(tmp_path / "pipe", b"whole")
        assert read.result(10) == "whole"
    assert (tmp_path / "pipe").is_fifo()
    for folder in (tmp_path, Path()):
        with pytest.raises(IsADirectoryError):
            write_whole(folder, b"whole")


def test_an_error_names_the_file_and_not_the_temporary_one(tmp_path: Path) -> None:
    (tmp_path / ".a.txt.tmp").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        write_whole(tmp_path / "a.txt", b"whole")
    assert caught.value.filename == str(tmp_path / "a.txt")
