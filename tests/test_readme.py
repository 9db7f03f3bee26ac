"""The README: short, with Python that runs as it stands; tests/test_docs.py follows its links and commands."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

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


def test_a_published_package_has_absolute_links_and_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hatchling")
    hook = runpy.run_path(str(ROOT / "hatch_build.py"))["CustomMetadataHook"](str(ROOT), {})
    plain: dict[str, Any] = {}
    monkeypatch.delenv("DOCS_REPOSITORY", raising=False)
    hook.update(plain)
    assert plain == {"readme": {"content-type": "text/markdown", "text": README}}
    monkeypatch.setenv("DOCS_REPOSITORY", "https://example.org/isotune/")
    published: dict[str, Any] = {}
    hook.update(published)
    links = re.findall(r"(?:\]\(|src=\"|srcset=\")([^)\"\s]+)", published["readme"]["text"])
    own = [link.removeprefix("https://example.org/isotune/") for link in links if "example.org" in link]
    assert len(own) > 15
    assert all(link.startswith("https://") for link in links)
    assert all((ROOT / link.partition("/HEAD/")[2].partition("#")[0]).exists() for link in own)
    assert {link.partition("/")[0] for link in own if link.endswith(".svg")} == {"raw"}
    assert published["urls"]["Repository"] == "https://example.org/isotune"
    assert "Documentation" not in published["urls"]
