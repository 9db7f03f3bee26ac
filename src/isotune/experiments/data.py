"""Examples from local files, the Hub or the standard library, checked before anything is trained."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from isotune.experiments.recipe import Data, FileData, HubData, HubTable
from isotune.experiments.text import from_json, shown

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".txt")
T = TypeVar("T")


class DataError(ValueError):
    """The data of a recipe cannot be used; the message says where and what to change."""


@dataclass(frozen=True)
class Row:
    """One row as it was read: its columns, where it stands, and which of several test sets it belongs to."""

    values: dict[str, Any]
    where: str
    set: str | None = None


@dataclass(frozen=True)
class Example:
    """One text, or a pair of texts, and the index of its label; in a regression the label is the number itself."""

    text: str
    pair: str | None
    label: int | float


@dataclass(frozen=True)
class Examples:
    """The checked splits of a task; `validation` may be empty, and `labels` are in a regression."""

    labels: list[str]
    train: list[Example]
    validation: list[Example] = field(default_factory=list)
    test: list[Example] = field(default_factory=list)

    def fingerprint(self) -> str:
        """A hash of all splits and labels, which tells whether a stored result is about these data."""
        return fingerprint(
            self.labels,
            *([(e.text, e.pair, e.label) for e in split] for split in (self.train, self.validation, self.test)),
        )

    def majority(self) -> int | float:
        """The most frequent label of the training set."""
        return Counter(e.label for e in self.train).most_common(1)[0][0]


def fingerprint(*parts: Any) -> str:
    """Sixteen hexadecimal digits that tell data apart, from anything that JSON can hold."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part).encode())
    return digest.hexdigest()[:16]


def load(data: Data, regression: bool = False) -> Examples:
    """Read, check and split the texts of a recipe; raises DataError naming the file, line and column."""
    rows, columns = read(data)
    for found in rows.values():
        for row in found:
            for column in (*columns.text, columns.label):
                cell(row, column)
    names: list[str] = []
    if not regression:
        names = label_names(columns, rows["train"], data.classes)
    splits = {
        split: [
            _example(
                row,
                columns,
                number(row, columns.label, data.range) if regression else label_of(row, columns.label, names),
            )
            for row in found
        ]
        for split, found in rows.items()
    }
    return Examples(names, **arrange(data, splits, texts_of))


def texts_of(example: Example) -> Hashable:
    """What makes two examples equal when the validation set is split in halves."""
    return example.text, example.pair


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold text and label, and the labels in the order of their indices if it is given."""

    text: list[str]
    label: str
    labels: list[str | int] | None


def read(data: Data) -> tuple[dict[str, list[Row]], Columns]:
    """The rows of each split, none of them empty, and their columns; raises DataError."""
    columns = Columns(data.text, data.label, data.labels)
    if data.path is None and data.builtin is not None:
        rows, columns = _builtin_rows(), Columns(["text"], "label", data.labels)
    elif data.path is None and data.hub is not None:
        rows = _hub_rows(data.hub)
    else:
        files = data.files
        assert files is not None  # held by the recipe's validator
        folder = Path(data.path or ".")
        if data.folder is not None and (folder / data.folder).is_dir():
            folder = folder / data.folder
        rows = _file_rows(files, folder)
        columns = Columns(files.text or data.text, files.label or data.label, files.labels or data.labels)
    for split, found in rows.items():
        if not found:
            raise DataError(f"the {split} split is empty")
        for row in found:
            for old, new in data.rename.items():
                if old in row.values and new not in row.values:
                    row.values[new] = row.values.pop(old)
    return rows, columns


def arrange(data: Data, splits: dict[str, list[T]], key: Callable[[T], Hashable]) -> dict[str, list[T]]:
    """Shorten, hold out and halve the splits as a recipe says; examples of one `key` are not torn apart by halving.

    Raises DataError where there is then nothing to report on.
    """
    splits = dict(splits)
    shuffle = random.Random(data.split_seed)
    if data.hold_out is not None:
        if "validation" in splits:
            raise DataError("data.hold_out makes the validation set from the training set, and there is one already")
        if data.hold_out >= len(splits["train"]):
            raise DataError(f"data.hold_out={data.hold_out} leaves nothing of {len(splits['train'])} training examples")
        shuffled = shuffle.sample(splits["train"], len(splits["train"]))
        splits["validation"], splits["train"] = shuffled[: data.hold_out], shuffled[data.hold_out :]
    if data.max_train is not None:
        splits["train"] = shuffle.sample(splits["train"], min(data.max_train, len(splits["train"])))
    if data.max_test is not None and "test" in splits:
        splits["test"] = shuffle.sample(splits["test"], min(data.max_test, len(splits["test"])))
    if data.split_validation_half:
        if "test" in splits or "validation" not in splits:
            raise DataError(
                "data.split_validation_half makes the test set from the validation set: "
                "it needs a validation set and no test set"
            )
        splits["validation"], splits["test"] = halves(splits["validation"], data.split_seed, key)
    if "test" not in splits:
        raise DataError(
            "there is nothing to report on: give a test set, or set data.split_validation_half=true "
            "to choose on one half of the validation set and report on the other"
        )
    return splits


def halves(examples: Sequence[T], seed: int, key: Callable[[T], Hashable]) -> tuple[list[T], list[T]]:
    """Two disjoint halves by a shuffle with a fixed seed, the same on every machine.

    Examples of one key, equal texts, fall into the same half, so what is chosen on one half has not been seen in the
    other; the first half may therefore be longer by more than one.
    """
    groups: dict[Hashable, list[T]] = {}
    for example in examples:
        groups.setdefault(key(example), []).append(example)
    keys = list(groups)
    random.Random(seed).shuffle(keys)
    first: list[T] = []
    second: list[T] = []
    for name in keys:
        (first if len(first) <= len(second) else second).extend(groups[name])
    if not second:
        raise DataError("the validation set is too small to split in halves: it has one example")
    return first, second


def label_names(columns: Columns, train: Sequence[Row], classes: int | None = None) -> list[str]:
    """The names of the classes: 0, 1, … of a given number, those given, or the training set's, numbers in order."""
    if classes is not None:
        return [str(index) for index in range(classes)]
    if columns.labels is not None:
        names = [str(name) for name in columns.labels]
    else:
        seen = {cell(row, columns.label) for row in train}
        names = sorted(seen, key=lambda name: (0, int(name), "") if _is_integer(name) else (1, 0, name))
    if len(names) < 2 or len(set(names)) != len(names):
        raise DataError(f"a classification needs at least two different labels, found {', '.join(names) or 'none'}")
    return names


def cell(row: Row, column: str) -> str:
    """The text or whole number in a column; raises DataError where there is none."""
    if column not in row.values:
        raise DataError(f"{row.where}: there is no column {column!r}; there are {', '.join(map(str, row.values))}")
    value = row.values[column]
    if isinstance(value, bool):
        value = int(value)
    if isinstance(value, float) and math.isfinite(value):
        value = repr(value)
    if not isinstance(value, str | int) or value == "":
        raise DataError(f"{row.where}: the column {column!r} holds {shown(value)}, neither text nor a whole number")
    return str(value)


def number(row: Row, column: str, allowed: tuple[float, float] | None) -> float:
    """The number in a column, within the range that is allowed; raises DataError."""
    text = cell(row, column)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    low, high = allowed or (-math.inf, math.inf)
    if not (math.isfinite(value) and low <= value <= high):
        between = f" from {low:g} to {high:g}" if allowed else ""
        raise DataError(f"{row.where}: the column {column!r} holds {shown(text)}, which is not a number{between}")
    return value


def label_of(row: Row, column: str, names: Sequence[str]) -> int:
    """The index of a row's label; raises DataError where it is none of the names."""
    name = cell(row, column)
    if name not in names:
        known = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
        raise DataError(f"{row.where}: the label {shown(name)} is none of the task's labels ({known})")
    return names.index(name)


def _example(row: Row, columns: Columns, label: int | float) -> Example:
    texts = [cell(row, column) for column in columns.text]
    return Example(texts[0], texts[1] if len(texts) > 1 else None, label)


def _is_integer(name: str) -> bool:
    return name.removeprefix("-").isdecimal()


def _builtin_rows() -> dict[str, list[Row]]:
    from isotune.experiments import stdlib_docstrings

    splits, _ = stdlib_docstrings.build()
    return {
        split: [
            Row({"text": text, "label": label}, f"{split} docstring {i + 1}") for i, (text, label) in enumerate(rows)
        ]
        for split, rows in splits.items()
    }


def _hub_rows(hub: HubData) -> dict[str, list[Row]]:
    def of(name: str) -> HubTable:
        return HubTable(name=hub.name, config=hub.config, revision=hub.revision, files=hub.files, split=name)

    rows = {
        split: _hub_table(of(name))
        for split, name in {"train": hub.train, "validation": hub.validation, "test": hub.test}.items()
        if name is not None
    }
    for name, table in hub.tests.items():
        rows.setdefault("test", []).extend(replace(row, set=name) for row in _hub_table(table))
    return rows


def _hub_table(table: HubTable) -> list[Row]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError("data from the Hub need the package datasets: pip install datasets") from error
    try:
        files = {"data_files": table.files} if table.files else {}
        found = load_dataset(table.name, table.config, split=table.split, revision=table.revision, **files)
    except Exception as error:  # the library raises a dozen kinds, most of them about the network
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"cannot load split {table.split!r} of {table.name} {table.config or ''} from the Hub ({reason}); "
            "to use local files instead, give data.path and data.files"
        ) from error
    return [Row(dict(row), f"{table.name} {table.split}, row {i + 1}") for i, row in enumerate(found)]


def _file_rows(files: FileData, folder: Path) -> dict[str, list[Row]]:
    def rows(names: Sequence[str], name: str | None = None) -> list[Row]:
        return [replace(row, set=name) for file in names for row in _table(folder / file, files.columns)]

    found = {"train": rows(files.train)}
    if files.validation is not None:
        found["validation"] = rows(files.validation)
    if isinstance(files.test, dict):
        found["test"] = [row for name, names in files.test.items() for row in _some(rows(names, name), name)]
    elif files.test is not None:
        found["test"] = rows(files.test)
    return found


def _some(rows: list[Row], name: str) -> list[Row]:
    if not rows:
        raise DataError(f"the test set {name} is empty")
    return rows


def _table(path: Path, columns: list[str] | None) -> Iterator[Row]:
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: the kind of file is told by its name, which must end in {', '.join(SUFFIXES)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"there is no data file {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the data file {path}: {error}") from error
    if path.suffix == ".txt":
        yield from _listed_rows(path, text)
    else:
        yield from _json_rows(path, text) if "json" in path.suffix else _separated_rows(path, text, columns)


def _listed_rows(path: Path, text: str) -> Iterator[Row]:
    """A list of images as VTAB-1K is published: a path from the list's own folder, a space, the label."""
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            image, separator, label = line.strip().rpartition(" ")
            if not separator:
                raise DataError(f"{path}, line {number}: expected the path of an image, a space and its label")
            yield Row({"image": str(path.parent / image), "label": label}, f"{path}, line {number}")


def _json_rows(path: Path, text: str) -> Iterator[Row]:
    if path.suffix == ".jsonl":
        parsed = []
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    parsed.append((f"{path}, line {number}", from_json(line)))
                except ValueError as error:
                    raise DataError(f"{path}, line {number}: not valid JSON: {error}") from error
    else:
        try:
            table = from_json(text)
        except ValueError as error:
            raise DataError(f"{path}: not valid JSON: {error}") from error
        if not isinstance(table, list):
            raise DataError(f"{path}: a .json file must hold a list of objects; one object a line is .jsonl")
        parsed = [(f"{path}, entry {number}", row) for number, row in enumerate(table, 1)]
    for where, row in parsed:
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected an object with named fields, not {type(row).__name__}")
        yield Row(row, where)


def _separated_rows(path: Path, text: str, columns: list[str] | None) -> Iterator[Row]:
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
            yield Row(dict(zip(columns, cells, strict=True)), f"{path}, line {reader.line_num}")
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from error
