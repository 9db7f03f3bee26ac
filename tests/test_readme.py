"""The README: short, with Python that runs as it stands; tests/test_docs.py follows its links and commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import run_script

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 110


@pytest.mark.slow
def test_its_python_runs_and_prints_what_it_says(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    done = run_script("tests/pythons/readme.py", folder=tmp_path)
    assert done.stdout.splitlines()[-1] == "README.md: 2 Python examples ran"
