"""The addresses in a published package: absolute links in its README, and the project's URLs.

A clone does not know the address of its repository. The release workflow gives it as DOCS_REPOSITORY, and that of the
documentation as DOCS_URL, as for building the documentation; without them the README keeps its relative links.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_RELATIVE = re.compile(r"(\]\(|\bsrc=\"|\bsrcset=\")(?!https?:|#)([^)\"\s]+)")


def absolute(readme: str, repository: str) -> str:
    """The README with links to the repository's files in the place of relative ones; pictures as they are served."""

    def link(found: re.Match[str]) -> str:
        start, path = found.groups()
        return f"{start}{repository}/{'raw' if path.endswith(('.svg', '.png')) else 'blob'}/HEAD/{path}"

    return _RELATIVE.sub(link, readme)


def urls(repository: str, documentation: str | None) -> dict[str, str]:
    """[project.urls] of a package from this repository."""
    found = {
        "Repository": repository,
        "Issues": f"{repository}/issues",
        "Changelog": f"{repository}/blob/HEAD/CHANGELOG.md",
    }
    return {"Documentation": documentation, **found} if documentation else found


class CustomMetadataHook(MetadataHookInterface):
    """Gives hatchling the README and the URLs."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Put them into the metadata."""
        readme = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        repository = os.environ.get("DOCS_REPOSITORY", "").rstrip("/")
        if repository:
            readme = absolute(readme, repository)
            metadata["urls"] = urls(repository, os.environ.get("DOCS_URL") or None)
        metadata["readme"] = {"content-type": "text/markdown", "text": readme}
