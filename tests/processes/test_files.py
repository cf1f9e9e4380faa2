"""A file is written whole or not at all."""

from __future__ import annotations

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


def test_an_error_names_the_file_and_not_the_temporary_one(tmp_path: Path) -> None:
    (tmp_path / ".a.txt.tmp").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        write_whole(tmp_path / "a.txt", b"whole")
    assert caught.value.filename == str(tmp_path / "a.txt")
