"""What kind of data a file or a folder of one's own holds, by its columns, and what these are called otherwise."""

from __future__ import annotations

import mimetypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from isotune.experiments.sections import FileData
from isotune.experiments.starting import KINDS, known_kind
from isotune.experiments.tables import DataError, Row, commas_meant, file_rows
from isotune.experiments.text import shown

OTHER_NAMES = {
    "messages": ("conversations", "conversation"),
    "prompt": ("question", "instruction", "query", "input"),
    "completion": ("answer", "response", "output"),
    "text": ("sentence", "review", "content"),
    "label": ("class", "category", "target"),
}
"""A column that a task reads -> what it is usually called in data that were made for something else."""
_OPTIONAL = {"preference": ("prompt",)}
_LOOKED_AT = 100
"""Rows whose columns are looked at; training checks them all."""


def fit(path: Path, kind: str | None = None) -> tuple[str, dict[str, str]]:
    """The kind of data in a file or folder, and its columns that have to be renamed.

    Args:
        path: read as training reads it.
        kind: one of KINDS, where it is known; else it is found by the columns.

    Returns:
        One of KINDS; and name in the file -> name that the task knows it by, for those that differ.

    Raises:
        DataError: the data cannot be read, or do not fit; says what they have, what is needed and what to do.
        RecipeError: there is no such kind.
    """
    if kind is not None:
        known_kind(kind)
    if path.is_dir():
        return _of_folder(path, kind)
    if path.suffix == ".txt" and kind != "images":
        raise DataError(
            f"{path}: a .txt file lists images and their classes (--for images). Give texts as .csv, .tsv, .json or "
            f".jsonl: {_needs(kind)}"
        )
    rows = file_rows(FileData(train=[str(path)]), Path())["train"][:_LOOKED_AT]
    columns = [name for name in rows[0].values if all(name in row.values for row in rows)]
    found = fitting(columns)
    if kind is None:
        exact = [one for one, renamed in found.items() if not set(renamed.values()) & set(KINDS[one].columns)]
        kinds = exact or list(found)
        if len(kinds) > 1:
            raise DataError(
                f"{path} has the columns {', '.join(columns)}, which fit --for {' and '.join(kinds)}: say which"
            )
        kind = kinds[0] if kinds else None
    if kind not in found:
        raise DataError(_refusal(path, kind, columns, found))
    _check(kind, found[kind], rows[0])
    return kind, found[kind]


def fitting(columns: Sequence[str]) -> dict[str, dict[str, str]]:
    """The kinds of data that have these columns, each with those that have to be renamed for it."""
    found = {}
    for kind, known in KINDS.items():
        named = {name: _named(name, columns) for name in (*known.columns, *_OPTIONAL.get(kind, ()))}
        if all(len(named[name]) == 1 for name in known.columns):
            found[kind] = {one[0]: name for name, one in named.items() if len(one) == 1 and one[0] != name}
    return found


def _named(name: str, columns: Sequence[str]) -> list[str]:
    """The columns that may be the one of this name: it alone where it is there."""
    names = (name, *OTHER_NAMES.get(name, ()))
    return [name] if name in columns else [one for one in columns if one.strip().lower() in names]


def _of_folder(path: Path, kind: str | None) -> tuple[str, dict[str, str]]:
    if kind not in (None, "images"):
        raise DataError(f"{path} is a folder; --for {kind} needs a file: {_needs(kind)}")
    file = next((one for one in path.rglob("*") if one.is_file() and not one.name.startswith(".")), None)
    if file is not None and (mimetypes.guess_type(file)[0] or "image/").partition("/")[0] != "image":
        raise DataError(
            f"{path} is a folder, which is read as images by class, and {file} is no image; write texts by class into "
            f"one file: {_needs('classification')}"
        )
    file_rows(FileData(train=[str(path)]), Path())
    return "images", {}


def _needs(kind: str | None) -> str:
    """The file that is needed, in words."""
    if kind is None:
        return "; ".join(f"{' and '.join(known.columns)} for {one}" for one, known in KINDS.items() if one != "images")
    suffix = ".csv" if kind == "classification" else ".jsonl"
    columns = KINDS[kind].columns
    return f"a {suffix} with the column{'s' * (len(columns) > 1)} {' and '.join(columns)}, one row an example"


def _refusal(path: Path, kind: str | None, columns: Sequence[str], found: Mapping[str, Any]) -> str:
    said = f"{path} has the columns {', '.join(columns)}{commas_meant(columns)}"
    if kind is None:
        return f"{said}, and --for cannot be told from them; call them as a task does: {_needs(None)}"
    said += f"; --for {kind} needs {' and '.join(KINDS[kind].columns)}: call them so in the file"
    for name in KINDS[kind].columns:
        if len(several := _named(name, columns)) > 1:
            said += f", {' and '.join(several)} joined into one {name}"
    return said + (f", or take --for {' or '.join(found)}" if found else "")


def _check(kind: str, renamed: Mapping[str, str], row: Row) -> None:
    """Check by the first row what a column's name does not tell."""
    of = {name: row.values[name] for name in KINDS[kind].columns if name in row.values}
    of |= {new: row.values[old] for old, new in renamed.items()}
    first = of["messages"][0] if kind == "chat" and isinstance(of["messages"], list) and of["messages"] else None
    if kind == "chat" and not (isinstance(first, Mapping) and "role" in first):
        shared = " (what is from and value here is role and content)" if isinstance(first, Mapping) else ""
        raise DataError(
            f"{row.where}: expected a list of messages, each with role and content{shared}, and not "
            f"{shown(of['messages'])}"
        )
    if kind == "images" and isinstance(of["image"], str) and not Path(of["image"]).is_file():
        raise DataError(f"{row.where}: there is no image {of['image']}")
