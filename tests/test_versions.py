"""Which versions of other libraries isotune refuses, warns of and promises."""

from __future__ import annotations

import subprocess
import sys
import warnings
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from isotune import versions
from isotune.errors import IsotuneWarning, UnsupportedVersionError
from isotune.versions import MINIMUM_VERSIONS, check_versions

ROOT = Path(__file__).parents[1]


def installed(monkeypatch: pytest.MonkeyPatch, **found: str) -> None:
    real = versions.version
    monkeypatch.setattr(versions, "version", lambda name: found.get(name) or real(name))


@pytest.mark.parametrize(
    ("library", "version"),
    [("torch", "2.5.1+cpu"), ("peft", "0.17.1"), ("peft", "0.9"), ("transformers", "4.57.6")],
)
def test_old_versions_are_refused(library: str, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, **{library: version})
    with pytest.raises(UnsupportedVersionError) as refused:
        check_versions()
    minimum = MINIMUM_VERSIONS[library]
    assert f"isotune needs {library} {minimum} or later, and {version} is installed" in str(refused.value)
    assert f"pip install -U '{library}>={minimum}'" in str(refused.value)
    assert isinstance(refused.value, ImportError)
    assert isinstance(refused.value, ValueError)


def test_an_old_peft_is_refused_before_it_is_imported(tmp_path: Path) -> None:
    """One that cannot even be imported, and whose package says its version."""
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "peft-0.17.0.dist-info").mkdir()
    (tmp_path / "peft-0.17.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.17.0\n")
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(Path(versions.__file__).parents[1])!r}]; import isotune"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "UnsupportedVersionError: isotune needs peft" in done.stderr
    assert "0.17.0 is installed" in done.stderr
    assert "imported" not in done.stderr


def test_a_package_without_a_version_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an interrupted uninstall leaves one: importlib.metadata says None."""
    monkeypatch.setattr(versions, "version", lambda name: None)
    check_versions()


@pytest.mark.parametrize("version", ["0.22.0", "0.22.1.dev0", "1.0"])
def test_untested_versions_give_one_warning(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, peft=version)
    with pytest.warns(IsotuneWarning, match="tested with peft below") as given:
        check_versions()
    assert len(given) == 1


def test_present_versions_are_silent() -> None:
    for name, limit in versions.UNTESTED_VERSIONS.items():
        if Version(versions.version(name)).release >= Version(limit).release:
            pytest.skip(f"{name} is newer than what was tested")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_versions()


def test_the_package_promises_the_same_versions() -> None:
    """And sets no upper bound to PEFT, which its next minor version would break."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    promised = {one.name: one.specifier for one in map(Requirement, project["dependencies"])}
    for name, minimum in MINIMUM_VERSIONS.items():
        assert f">={minimum}" in str(promised[name]).split(","), name
    assert promised["peft"].contains("0.22.0")
    assert promised["peft"].contains("1.0")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (None, "pip install 'isotune[train]'"),
        ('{"url": "https://there/isotune.whl", "archive_info": {}}', "pip install 'isotune[train]'"),
        ('{"url": "file:///here", "dir_info": {"editable": true}}', "pip install '.[train]' in your clone of isotune"),
        (PackageNotFoundError("isotune"), "pip install '.[train]' in your clone of isotune"),
    ],
)
def test_an_extra_comes_from_where_isotune_came(source: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Installed:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            if isinstance(source, Exception):
                raise source
            return source

    monkeypatch.setattr(versions, "distribution", lambda name: Installed())
    assert versions.install("train") == said
