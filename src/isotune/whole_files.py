"""Writing a file so that no half of it is ever read."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A new file to write into, which takes the place of `path` when the block succeeds and is deleted when it fails.

    Its name ends like that of `path`, since some writers go by that. The folders of `path` are created.

    Args:
        path: path of the file; what it held is kept until all of the new content is on the disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # It lies beside the target, as os.replace is atomic only within one file system, and has a name of its own and not
    # one by mkstemp, whose files no one else may read.
    partial = path.with_name(f".{secrets.token_hex(6)}.{path.name}")
    try:
        yield partial
        with partial.open("rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def is_left_of(path: Path, target: Path) -> bool:
    """Whether a file is what a process left that was killed while it wrote `target`."""
    return path.name.startswith(".") and path.name.endswith(f".{target.name}")
