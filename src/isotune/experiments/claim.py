"""Taking a folder for one experiment, so that the results of two are never mixed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from isotune.experiments.files import read_object, write_json
from isotune.experiments.recipe import Recipe, RecipeError
from isotune.experiments.text import shown
from isotune.whole_files import is_left_of

_FREE = ("output", "description", "group", "chart", "check_saved", "score_untrained", "measure_forgetting")
"""What may differ between two calls of one experiment without making them two experiments."""
_METHODS = ("method", "baselines")
LOCK = ".isotune.lock"
"""In an experiment's folder while a process writes to it; one that was killed leaves the file there, but not locked."""
_PATIENCE = 2.0
"""Seconds in which another process that only shows again what was finished, or has just been stopped, is gone."""


def identity(recipe: Recipe, fingerprint: str, *, methods: bool = True) -> dict[str, Any]:
    """What makes two experiments two: the recipe, but for what changes no result, and the data.

    In a comparison other `methods` do not make another experiment.
    """
    left_out: Any = {"train": {"report_to"}} | dict.fromkeys(_FREE if methods else (*_FREE, *_METHODS), True)
    return {"recipe": recipe.model_dump(mode="json", exclude=left_out), "data": fingerprint}


@contextlib.contextmanager
def alone(folder: Path, how: str) -> Iterator[None]:
    """Keep every other process from writing an experiment's results to the folder.

    The lock is the operating system's, so it ends with this process, however that ends. Where the folder cannot be
    written, or its file system has no locks, there is none.

    Args:
        how: what the error says to give for another folder.

    Raises:
        RecipeError: another process writes to it.
    """
    lock = FileLock(folder / LOCK, fallback_to_soft=False)  # which would be a file that outlives a killed process
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=_PATIENCE)
    except Timeout as error:
        raise RecipeError(
            f"another process is writing to {folder}; wait until it has ended, or give another folder with {how}"
        ) from error
    except (OSError, NotImplementedError):
        pass  # what cannot be written is said by what writes it
    try:
        yield
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):  # the folder may be gone; an open file cannot be removed on Windows
                (folder / LOCK).unlink()  # before the release, after which it may be another's
            with contextlib.suppress(OSError):
                lock.release()


def claim(folder: Path, own: dict[str, Any], how: str) -> None:
    """Take the folder for the experiment of this identity.

    Args:
        how: what the error says to give for another folder.

    Raises:
        RecipeError: it holds another experiment's results, or something else.
    """
    stored = folder / "experiment.json"
    # An attempt that ended before anything was trained, as by a misspelt model, has left no more than its claim, and a
    # process that was killed while it wrote that no more than the file under its first name, and its lock.
    taken = folder.exists() and (
        not folder.is_dir()
        or any(path not in (stored, folder / LOCK) and not is_left_of(path, stored) for path in folder.iterdir())
    )
    if stored.exists():
        other = _completed(read_object(stored), stored)
        if other == own:
            return
        if taken:
            raise RecipeError(
                f"{folder} holds the results of another experiment ({_difference(other, own)}); "
                f"give another folder with {how}, or remove it"
            )
    elif taken:
        raise RecipeError(f"{folder} exists and holds something else; give another folder with {how}")
    write_json(stored, own)


def _completed(stored: dict[str, Any], path: Path) -> dict[str, Any]:
    """What an earlier release stored, which knew fewer settings: what it did not know had the defaults of today."""
    own = stored.get("recipe")
    methods = isinstance(own, dict) and "method" in own
    try:
        recipe = Recipe.model_validate(own if methods else {**(own or {}), "method": "head", "baselines": ["head"]})
    except (TypeError, ValueError) as error:
        raise RecipeError(f"cannot read {path}: it holds no recipe that this release knows; remove it") from error
    return identity(recipe, str(stored.get("data")), methods=methods)


def _difference(old: Any, new: Any, key: str = "") -> str:
    """The first key in which two experiments differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            if old.get(name) != new.get(name):
                return _difference(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    if key == "data":
        return "the data have changed"
    return f"{key.removeprefix('recipe.')} is {_value(old)} there and {_value(new)} here"


def _value(value: Any) -> str:
    return "null" if value is None else shown(value)
