"""Where the models that packages carry lie, and their names."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

KEPT = Path("~/.cache/isotune/models")
"""Holds those that had to be made of what a package carries, each in a folder called after its package."""


def package_of(path: str) -> str | None:
    """What recipes call the model in such a folder, "package:NAME"; None for any other folder."""
    folder = Path(path)
    if folder.parent == KEPT.expanduser():
        return f"package:{folder.name}"
    name, init = folder.parent.name, folder.parent / "__init__.py"
    if folder.name != "model" or not init.is_file() or not name.isidentifier():
        return None
    spec = find_spec(name)
    return f"package:{name}" if spec is not None and spec.origin == str(init) else None
