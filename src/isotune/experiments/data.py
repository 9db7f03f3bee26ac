"""Examples from local files, the Hub or the standard library, checked before anything is trained."""

from __future__ import annotations

import csv
import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isotune.experiments.recipe import Data, FileData, HubData

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl")


class DataError(ValueError):
    """The data of a recipe cannot be used; the message says where and what to change."""


@dataclass(frozen=True)
class Example:
    """One text, or a pair of texts, and the index of its label."""

    text: str
    pair: str | None
    label: int


@dataclass(frozen=True)
class Examples:
    """The checked splits of a task; `validation` and `test` may be empty where the recipe has none."""

    labels: list[str]
    train: list[Example]
    validation: list[Example] = field(default_factory=list)
    test: list[Example] = field(default_factory=list)

    def fingerprint(self) -> str:
        """A hash of all splits and labels, which tells whether a stored result is about these data."""
        digest = hashlib.sha256(json.dumps(self.labels).encode())
        for split in (self.train, self.validation, self.test):
            digest.update(json.dumps([(e.text, e.pair, e.label) for e in split]).encode())
        return digest.hexdigest()[:16]

    def majority(self) -> int:
        """The most frequent label of the training set."""
        return Counter(e.label for e in self.train).most_common(1)[0][0]


@dataclass(frozen=True)
class _Row:
    values: dict[str, Any]
    where: str


def load(data: Data) -> Examples:
    """Read, check and split the data of a recipe; raises DataError naming the file, line and column."""
    if data.path is None and data.builtin is not None:
        rows = _builtin_rows()
        text, label = ["text"], "label"
    elif data.path is None and data.hub is not None:
        rows, text, label = _hub_rows(data.hub), data.text, data.label
    else:
        assert data.files is not None  # held by the recipe's validator
        rows, text, label = _file_rows(data.files, Path(data.path or ".")), data.text, data.label
    for split, found in rows.items():
        if not found:
            raise DataError(f"the {split} split is empty")
        for row in found:
            for column in (*text, label):
                _cell(row, column)
    names = [str(name) for name in data.labels] if data.labels is not None else None
    if names is None:
        seen = {_cell(row, label) for row in rows["train"]}
        names = sorted(seen, key=lambda name: (0, int(name), "") if _is_integer(name) else (1, 0, name))
    if len(names) < 2 or len(set(names)) != len(names):
        raise DataError(f"a classification needs at least two different labels, found {', '.join(names) or 'none'}")
    splits = {split: [_example(row, text, label, names) for row in found] for split, found in rows.items()}
    if data.max_train is not None:
        splits["train"] = random.Random(data.split_seed).sample(
            splits["train"], min(data.max_train, len(splits["train"]))
        )
    if data.split_validation_half:
        if "test" in splits or "validation" not in splits:
            raise DataError(
                "data.split_validation_half makes the test set from the validation set: "
                "it needs a validation set and no test set"
            )
        splits["validation"], splits["test"] = halves(splits["validation"], data.split_seed)
    if "test" not in splits:
        raise DataError(
            "there is nothing to report on: give a test set, or set data.split_validation_half=true "
            "to choose on one half of the validation set and report on the other"
        )
    return Examples(names, **splits)


def halves(examples: Sequence[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """Two disjoint halves by a shuffle with a fixed seed, the same on every machine.

    Equal texts fall into the same half, so what is chosen on one half has not been seen in the other; the
    first half may therefore be longer by more than one.
    """
    groups: dict[tuple[str, str | None], list[Example]] = {}
    for example in examples:
        groups.setdefault((example.text, example.pair), []).append(example)
    keys = list(groups)
    random.Random(seed).shuffle(keys)
    first: list[Example] = []
    second: list[Example] = []
    for key in keys:
        (first if len(first) <= len(second) else second).extend(groups[key])
    if not second:
        raise DataError("the validation set is too small to split in halves: it has one example")
    return first, second


def _is_integer(name: str) -> bool:
    return name.removeprefix("-").isdecimal()


def _builtin_rows() -> dict[str, list[_Row]]:
    from isotune.experiments import stdlib_docstrings

    splits, _ = stdlib_docstrings.build()
    return {
        split: [
            _Row({"text": text, "label": label}, f"{split} docstring {i + 1}") for i, (text, label) in enumerate(rows)
        ]
        for split, rows in splits.items()
    }


def _hub_rows(hub: HubData) -> dict[str, list[_Row]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError("data from the Hub need the package datasets: pip install datasets") from error
    rows = {}
    for split, name in {"train": hub.train, "validation": hub.validation, "test": hub.test}.items():
        if name is None:
            continue
        try:
            table = load_dataset(hub.name, hub.config, split=name, revision=hub.revision)
        except Exception as error:  # the library raises a dozen kinds, most of them about the network
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise DataError(
                f"cannot load split {name!r} of {hub.name} {hub.config or ''} from the Hub ({reason}); "
                "to use local files instead, give data.path and data.files"
            ) from error
        rows[split] = [_Row(dict(row), f"{hub.name} {name}, row {i + 1}") for i, row in enumerate(table)]
    return rows


def _file_rows(files: FileData, folder: Path) -> dict[str, list[_Row]]:
    named = {"train": files.train, "validation": files.validation, "test": files.test}
    return {
        split: [row for name in names for row in _table(folder / name, files.columns)]
        for split, names in named.items()
        if names is not None
    }


def _table(path: Path, columns: list[str] | None) -> Iterator[_Row]:
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: the kind of file is told by its name, which must end in {', '.join(SUFFIXES)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"there is no data file {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the data file {path}: {error}") from error
    yield from _json_rows(path, text) if "json" in path.suffix else _separated_rows(path, text, columns)


def _json_rows(path: Path, text: str) -> Iterator[_Row]:
    if path.suffix == ".jsonl":
        parsed = []
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    parsed.append((f"{path}, line {number}", json.loads(line)))
                except ValueError as error:
                    raise DataError(f"{path}, line {number}: not valid JSON: {error}") from error
    else:
        try:
            table = json.loads(text)
        except ValueError as error:
            raise DataError(f"{path}: not valid JSON: {error}") from error
        if not isinstance(table, list):
            raise DataError(f"{path}: a .json file must hold a list of objects; one object a line is .jsonl")
        parsed = [(f"{path}, entry {number}", row) for number, row in enumerate(table, 1)]
    for where, row in parsed:
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected an object with named fields, not {type(row).__name__}")
        yield _Row(row, where)


def _separated_rows(path: Path, text: str, columns: list[str] | None) -> Iterator[_Row]:
    # In tab-separated corpora a quotation mark is text; in csv it quotes.
    reader = (
        csv.reader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
        if path.suffix == ".tsv"
        else csv.reader(text.splitlines(keepends=True))
    )
    try:
        for cells in reader:
            if not cells:
                continue
            if columns is None:
                columns = cells
                continue
            if len(cells) != len(columns):
                raise DataError(
                    f"{path}, line {reader.line_num}: {len(cells)} columns where {len(columns)} are expected "
                    f"({', '.join(columns)})"
                )
            yield _Row(dict(zip(columns, cells, strict=True)), f"{path}, line {reader.line_num}")
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from error


def _cell(row: _Row, column: str) -> str:
    if column not in row.values:
        raise DataError(f"{row.where}: there is no column {column!r}; there are {', '.join(map(str, row.values))}")
    value = row.values[column]
    if isinstance(value, bool):
        value = int(value)
    if not isinstance(value, str | int) or value == "":
        raise DataError(f"{row.where}: the column {column!r} holds {value!r}, neither text nor a whole number")
    return str(value)


def _example(row: _Row, text: Sequence[str], label: str, names: list[str]) -> Example:
    name = _cell(row, label)
    if name not in names:
        shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
        raise DataError(f"{row.where}: the label {name!r} is none of the task's labels ({shown})")
    texts = [_cell(row, column) for column in text]
    return Example(texts[0], texts[1] if len(texts) > 1 else None, names.index(name))
