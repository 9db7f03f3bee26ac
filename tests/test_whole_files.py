from __future__ import annotations

import os
from pathlib import Path

import pytest

from isotune.whole_files import is_left_of, written_whole


def test_a_new_file_in_new_folders(tmp_path: Path) -> None:
    path = tmp_path / "some" / "folder" / "picture.png"
    with written_whole(path) as partial:
        partial.write_bytes(b"new")
        assert partial.suffix == ".png"
        assert is_left_of(partial, path)
        assert not is_left_of(partial, path.with_name("other.png"))
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert not is_left_of(path, path)
    assert [file.name for file in path.parent.iterdir()] == ["picture.png"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_fails_leaves_what_was_there(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("old")

    def write() -> None:
        with written_whole(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.skipif(os.name != "posix", reason="modes are those of POSIX")
def test_it_may_be_read_by_whom_any_new_file_may(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    with written_whole(tmp_path / "whole") as partial:
        partial.write_text("")
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode
