"""Versions of the libraries that isotune depends on, checked before any of them is imported."""

from __future__ import annotations

import re
import warnings
from importlib.metadata import PackageNotFoundError, version

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
            found: str | None = version(name)
        except PackageNotFoundError:  # may be on the path without metadata; if not, importing it will fail clearly
            continue
        if found is None:  # an interrupted uninstall leaves metadata without a version
            continue
        if _numbers(found) < _numbers(minimum):
            raise UnsupportedVersionError(
                f"isotune needs {name} {minimum} or later, and {found} is installed: "
                f"pip install -U '{name}>={minimum}'."
            )
        limit = UNTESTED_VERSIONS.get(name)
        if limit is not None and _numbers(found) >= _numbers(limit):
            warnings.warn(
                f"isotune was tested with {name} below {limit}, and {found} is installed. If something fails, run "
                f"pip install '{name}<{limit}'.",
                IsotuneWarning,
                stacklevel=2,
            )


def _numbers(found: str) -> tuple[int, ...]:
    """The release part of a version, (0, 22, 1) for 0.22.1.dev0; pre- and post-releases count as the release."""
    release = re.match(r"(?:\d+!)?([\d.]*\d)", found)
    return tuple(map(int, release[1].split("."))) if release else ()
