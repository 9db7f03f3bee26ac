"""Where the models that packages carry lie, and their names."""

from __future__ import annotations

from pathlib import Path

KEPT = Path("~/.cache/isotune/models")
"""Holds those that had to be made of what a package carries, each in a folder called after its package."""


def package_of(path: str) -> str | None:
    """What recipes call the model in such a folder, "package:NAME"; None for any other folder."""
    folder = Path(path)
    if folder.parent == KEPT.expanduser():
        return f"package:{folder.name}"
    init = folder.parent / "__init__.py"
    return f"package:{folder.parent.name}" if folder.name == "model" and init.is_file() else None
