"""Versions of the libraries that isotune depends on, checked before any of them is imported."""

from __future__ import annotations

import json
import warnings
from importlib.metadata import PackageNotFoundError, distribution, version

from packaging.version import InvalidVersion, Version

from isotune.errors import IsotuneWarning, UnsupportedVersionError

MINIMUM_VERSIONS = {"torch": "2.6", "peft": "0.18", "transformers": "5.6"}
"""Lowest supported version of each library; must agree with pyproject.toml."""
UNTESTED_VERSIONS = {"peft": "0.22"}
"""First version of each library that the tests have not been run with; pyproject.toml allows it."""


def check_versions() -> None:
    """Refuse libraries that are too old for isotune, and warn about those newer than any it was tested with.

    Raises:
        UnsupportedVersionError: a version is below the minimum; this is both a ValueError and an ImportError.
    """
    for name, minimum in MINIMUM_VERSIONS.items():
        try:
            found = Version(version(name))
        except (PackageNotFoundError, TypeError, InvalidVersion):
            # On the path without metadata, or with metadata that have no version, as an interrupted uninstall leaves
            # them. If it is not there at all, importing it will fail clearly.
            continue
        if found.release < Version(minimum).release:
            raise UnsupportedVersionError(
                f"isotune needs {name} {minimum} or later, and {found} is installed: "
                f"pip install -U '{name}>={minimum}'."
            )
        limit = UNTESTED_VERSIONS.get(name)
        if limit is not None and found.release >= Version(limit).release:
            warnings.warn(
                f"isotune was tested with {name} below {limit}, and {found} is installed. If something fails, run "
                f"pip install '{name}<{limit}'.",
                IsotuneWarning,
                stacklevel=2,
            )


def install(extra: str) -> str:
    """The command that installs one of isotune's extras, from where isotune itself was installed."""
    try:
        source = json.loads(distribution("isotune").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:  # the sources are run without an installation
        source = {"dir_info": {}}
    if "dir_info" in source:
        return f"pip install '.[{extra}]' in your clone of isotune"
    return f"pip install 'isotune[{extra}]'"
