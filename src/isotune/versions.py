"""The versions of other libraries that isotune runs on, asked before any of them is imported."""

from __future__ import annotations

import re
import warnings
from importlib.metadata import PackageNotFoundError, version

from isotune.errors import IsotuneWarning, UnsupportedVersionError

MINIMUM_VERSIONS = {"torch": "2.6", "peft": "0.18", "transformers": "5.6"}
"""The lowest that isotune runs on; pyproject.toml says the same."""
UNTESTED_VERSIONS = {"peft": "0.22"}
"""From where on nobody has run the tests; pyproject.toml allows them."""


def check_versions() -> None:
    """Refuse libraries that are too old for isotune, and say so once for those that are newer than what was tested.

    Raises:
        UnsupportedVersionError: a version below the minimum; it is both a ValueError and an ImportError.
    """
    for name, minimum in MINIMUM_VERSIONS.items():
        try:
            found: str | None = version(name)
        except PackageNotFoundError:  # copied in without a package; importing it says if it is missing
            continue
        if found is None:  # what an interrupted uninstall leaves has no version
            continue
        if _numbers(found) < _numbers(minimum):
            raise UnsupportedVersionError(
                f"isotune needs {name} {minimum} or later, and {found} is installed: "
                f"pip install -U '{name}>={minimum}'."
            )
        limit = UNTESTED_VERSIONS.get(name)
        if limit is not None and _numbers(found) >= _numbers(limit):
            warnings.warn(
                f"isotune was tested with {name} below {limit}, and {found} is installed; if something fails, "
                f"pip install '{name}<{limit}'.",
                IsotuneWarning,
                stacklevel=2,
            )


def _numbers(found: str) -> tuple[int, ...]:
    """The release of a version, (0, 22, 1) of 0.22.1.dev0; what comes before and after a release counts as it."""
    release = re.match(r"(?:\d+!)?([\d.]*\d)", found)
    return tuple(map(int, release[1].split("."))) if release else ()
