"""The README: short, with links that lead somewhere and Python that runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts import run_script

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 110


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README) + re.findall(r'(?:src|srcset)="([^"]+)"', README)
    own = [link for link in links if "://" not in link]
    assert own
    for link in own:
        path, _, place = link.partition("#")
        text = (ROOT / path).read_text(encoding="utf-8")
        titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        assert not place or place in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, link


@pytest.mark.slow
def test_its_python_runs_and_prints_what_it_says(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    done = run_script("tests/pythons/readme.py", folder=tmp_path)
    assert done.stdout.splitlines()[-1] == "README.md: 2 Python examples ran"
