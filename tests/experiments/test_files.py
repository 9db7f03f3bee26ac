"""Result files are all or nothing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from isotune.experiments.files import StorageError, read_json, storing, write_json


@pytest.mark.parametrize(
    ("reason", "todo"),
    [
        ((errno.ENOSPC, "No space left on device"), "make room and run the same command again"),
        ((errno.EDQUOT, "Disk quota exceeded"), "make room and run the same command again"),
        ((errno.EACCES, "Permission denied"), "when it can be written, run the same command again"),
    ],
)
def test_a_failed_write_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: tuple[int, str], todo: str
) -> None:
    path = tmp_path / "new" / "result.json"
    write_json(path, {"old": 1})
    written: list[str] = []

    def fail(source: str, target: Path) -> None:
        written.append(Path(source).read_text())
        raise OSError(*reason)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(StorageError, match=rf"cannot write .*result\.json: .*{reason[1]}; {todo}"):
        write_json(path, {"new": 2})
    assert written == ['{\n  "new": 2\n}\n']  # the whole text was there before the old file was touched
    assert read_json(path) == {"old": 1}
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]


def test_what_json_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "result.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_reading_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot read .*x\.json"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(28, "No space left on device"), StorageError),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), StorageError),
        (ConnectionResetError("Connection reset by peer"), ConnectionResetError),
        (RuntimeError("Connection closed by peer [127.0.0.1]:4711"), RuntimeError),
    ],
)
def test_what_is_no_matter_of_room_passes_as_it_is(error: Exception, expected: type[Exception]) -> None:
    with pytest.raises(expected) as found, storing("the checkpoint"):
        raise error
    assert (found.value is error) == (expected is type(error))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "; make room and run the same"),
        (OSError(30, "Read-only file system"), "; when it can be written, run the same"),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "; make room and run the same",
        ),
        (RuntimeError("basic_ios::clear: iostream error"), "; there may be no room left; when it can be written, run"),
    ],
)
def test_where_the_disk_is_full_it_is_said(error: Exception, said: str) -> None:
    with pytest.raises(StorageError) as found, storing("the checkpoint"):
        raise error
    assert said in str(found.value)
