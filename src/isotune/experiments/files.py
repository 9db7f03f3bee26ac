"""Writing result files so that no half of one is ever read."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from isotune.experiments.text import first_line, from_json, shown
from isotune.whole_files import written_whole

_FULL = (errno.ENOSPC, errno.EDQUOT)
# What torch says, as a RuntimeError, where its own writer fails.
_TORCH_WRITER = re.compile(r"PytorchStreamWriter|iostream|inline_container|unexpected pos")


class StorageError(ValueError):
    """Something could not be written, for want of room for instance; what was there before is still there."""


@contextlib.contextmanager
def storing(what: str) -> Iterator[None]:
    """Turn a failed write, by whichever library, into a StorageError of one line that names `what` was written.

    A lost connection to another process, which a common checkpoint needs too, is raised as it is.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (StorageError, ConnectionError):  # another process that is gone is no matter of room
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        unexplained = isinstance(error, RuntimeError)
        if unexplained and not _TORCH_WRITER.search(str(error)):
            raise
        full = getattr(error, "errno", None) in _FULL or any(f"os error {code}" in str(error) for code in _FULL)
        todo = "make room and run" if full else "when it can be written, run"
        if unexplained:
            todo = f"there may be no room left; {todo}"
        raise StorageError(
            f"cannot write {what}: {first_line(error)}; {todo} the same command again, which goes on from the last "
            "checkpoint"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON atomically: `path` holds either what it held before or all of the new text.

    Raises:
        ValueError: NaN or an infinity, which are not JSON and which a result must not contain.
        StorageError: there is no room.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with storing(str(path)):
        write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: `path` holds either what it held before or all of the new text."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


@functools.cache
def packaged_object(name: str) -> dict[str, Any]:
    """The object in a JSON file of this package."""
    found: dict[str, Any] = json.loads(resources.files("isotune.experiments").joinpath(name).read_text("utf-8"))
    return found


def read_json(path: Path) -> Any:
    """Read a JSON file; raises a ValueError that names it where it cannot be read, is no JSON or nested too deep."""
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; raises as `read_json`."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"cannot read {path}: it holds {shown(content)}, and should hold an object")
    return content
