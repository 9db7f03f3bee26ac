"""One process at a time writes to an experiment's folder, and none is kept out by one that is gone."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from isotune.experiments import claim as claiming
from isotune.experiments.claim import LOCK, alone, claim
from isotune.experiments.recipe import RecipeError, validate

HOLD = (
    "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); sys.stdin.read()"
)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claiming, "_PATIENCE", 0.05)


@pytest.fixture
def own(tiny: dict[str, Any]) -> dict[str, Any]:
    return claiming.identity(validate(tiny), "0123")


def test_a_folder_is_one_commands_at_a_time(tmp_path: Path, own: dict[str, Any]) -> None:
    folder = tmp_path / "new" / "folder"
    with alone(folder, "-o FOLDER"):
        claim(folder, own, "-o FOLDER")
        with pytest.raises(RecipeError, match=r"another process is writing to .*folder; .*with -o FOLDER$"):
            alone(folder, "-o FOLDER").__enter__()
        with alone(tmp_path / "other", ""):
            pass
    assert [path.name for path in folder.iterdir()] == ["experiment.json"]
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), alone(folder, ""):
            raise error
    with alone(folder, ""):
        pass


def test_a_process_that_was_killed_keeps_nobody_out(tmp_path: Path, own: dict[str, Any]) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / LOCK)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    try:
        with pytest.raises(RecipeError, match="another process"):
            alone(tmp_path, "").__enter__()
    finally:
        holder.kill()
        holder.communicate()
    assert (tmp_path / LOCK).exists()
    with alone(tmp_path, ""):
        claim(tmp_path, own, "")  # what is left is nothing else that the folder holds
    assert [path.name for path in tmp_path.iterdir()] == ["experiment.json"]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_written_to(tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def missing(*_: object) -> None:
        raise OSError(code, "no locks here")

    monkeypatch.setattr(fcntl, "flock", missing)
    for _ in range(2):
        with alone(tmp_path / "new", ""):
            (tmp_path / "new" / "file").touch()


def test_what_is_no_folder_of_an_experiment_stays_as_it_is(tmp_path: Path, own: dict[str, Any]) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(RecipeError, match="holds something else"), alone(file, ""):
        claim(file, own, "")
    with pytest.raises(RecipeError, match="holds something else"), alone(tmp_path, ""):
        claim(tmp_path, own, "")
    assert list(tmp_path.iterdir()) == [file]
