"""Examples from local files, the Hub or the standard library, checked before anything is trained."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from isotune.experiments import processes
from isotune.experiments.sections import Data
from isotune.experiments.tables import DataError, Row, builtin_rows, commas_meant, file_rows, hub_rows
from isotune.experiments.text import shown

T = TypeVar("T")
HELD_OUT, MOST_HELD_OUT = 0.1, 1000
"""The share of the training examples of which a test or validation set is made, and the most of them."""


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


def fingerprint(*parts: Any) -> str:
    """Sixteen hexadecimal digits that tell data apart, from anything that JSON can hold."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part).encode())
    return digest.hexdigest()[:16]


def given(row: Row, column: str, key: str = "") -> Any:
    """What stands in a column, which `key` of the recipe names, if any; raises DataError where there is none."""
    if column not in row.values:
        found = ", ".join(map(str, row.values))
        hint = commas_meant(row.values)
        todo = f"name one of them by {key}, or " if key else ""
        todo += f"take one for it by data.rename={{NAME: {column}}}"
        if row.values.get("image") == row.where:  # renaming would make texts of the paths
            todo = "a folder is read as images by class; write texts by class into a .csv with the columns text, label"
        raise DataError(
            f"{row.where}: there is no column {column!r}; there are {found}{hint}. {todo[0].upper() + todo[1:]}"
        )
    return row.values[column]


def cell(row: Row, column: str) -> str:
    """The text or whole number in a column."""
    value = given(row, column)
    if isinstance(value, bool):
        value = int(value)
    if isinstance(value, float) and math.isfinite(value):
        value = repr(value)
    if not isinstance(value, str | int) or value == "":
        raise DataError(f"{row.where}: the column {column!r} holds {shown(value)}, neither text nor a whole number")
    return str(value)


def label_in(row: Row, column: str) -> str:
    """The label in a column; 1.0 is 1, as pandas makes floats of whole numbers where one of a column is missing."""
    value = given(row, column)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return cell(row, column)


def load(data: Data, regression: bool = False, text_of: Callable[[Row, str], str] = cell) -> Examples:
    """Read, check and split the examples of a recipe, their texts by `text_of`.

    Raises:
        DataError: the data cannot be used; the message names the file, line and column.
    """
    rows, data = read(data)
    texts: dict[str, list[list[str]]] = {split: [] for split in rows}
    for split, found in rows.items():
        for row in found:
            for column, key in (*((name, "data.text") for name in data.text), (data.label, "data.label")):
                given(row, column, key)
            texts[split].append([text_of(row, column) for column in data.text])
            label_in(row, data.label)
    names = [] if regression else label_names(data, rows["train"])

    def example(row: Row, texts: list[str]) -> Example:
        label = number(row, data.label, data.range) if regression else label_of(row, data, names)
        return Example(texts[0], texts[1] if len(texts) > 1 else None, label)

    splits = {split: list(map(example, found, texts[split])) for split, found in rows.items()}
    return Examples(names, **arrange(data, splits, texts_of, (lambda example: 0) if regression else _class_of))


def _class_of(example: Example) -> Hashable:
    return example.label


def texts_of(example: Example) -> Hashable:
    """What makes two examples equal when the validation set is split in halves."""
    return example.text, example.pair


def read(data: Data) -> tuple[dict[str, list[Row]], Data]:
    """The rows of each split, none of them empty, and the section with the columns of the source that was read."""
    columns: dict[str, Any] = {}
    if data.path is None and data.builtin is not None:
        rows = builtin_rows(data.builtin)
        columns = {"text": [next(iter(rows["train"][0].values))], "label": "label"}
    elif data.path is None and data.hub is not None:
        rows = hub_rows(data.hub)
    else:
        assert data.files is not None  # held by the recipe's validator
        folder = Path(data.path or ".")
        if data.folder is not None and (folder / data.folder).is_dir():
            folder = folder / data.folder
        rows = file_rows(data.files, folder)
        own = data.files.model_dump(include={"text", "label", "labels"})
        columns = {name: value for name, value in own.items() if value}
    for split, found in rows.items():
        if not found:
            raise DataError(f"the {split} split is empty")
        for row in found:
            for old, new in data.rename.items():
                if old in row.values and new not in row.values:
                    row.values[new] = row.values.pop(old)
    return rows, data.model_copy(update=columns)


def arrange(
    data: Data,
    splits: dict[str, list[T]],
    key: Callable[[T], Hashable],
    kind: Callable[[T], Hashable] = lambda example: 0,
) -> dict[str, list[T]]:
    """Shorten, hold out and halve the splits as a recipe says, and make a test set where there is none.

    Args:
        data: the recipe's section.
        splits: the examples that were read.
        key: examples with equal keys, such as equal texts, stay together where a split is made by chance.
        kind: a test set that is made here has each kind of example in its share, and the training set all of them.

    Raises:
        DataError: there is then nothing to train or to report on.
    """
    splits = dict(splits)
    shuffle = random.Random(data.split_seed)
    if "test" not in splits and not data.split_validation_half:
        splits = _with_test_set(data, splits, key, kind)
    elif data.hold_out is not None:
        if "validation" in splits:
            raise DataError("data.hold_out makes the validation set from the training set, and there is one already")
        if data.hold_out >= len(splits["train"]):
            raise DataError(f"data.hold_out={data.hold_out} leaves nothing of {len(splits['train'])} training examples")
        shuffled = _by_numpy(data, splits["train"]) or shuffle.sample(splits["train"], len(splits["train"]))
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
        whole = splits["validation"]
        if len(whole) > 1 and (shuffled := _by_numpy(data, whole)):
            middle = len(whole) // 2
            splits["validation"], splits["test"] = shuffled[:middle], shuffled[middle:]
        else:
            splits["validation"], splits["test"] = halves(whole, data.split_seed, key)
    return splits


def _by_numpy(data: Data, examples: list[T]) -> list[T]:
    """The examples in the order in which numpy shuffles them, where the recipe says so; else none.

    The default generator's is that of `train_test_split` of the library datasets, the legacy one's `np.random.shuffle`.
    """
    if data.split_generator == "python":
        return []
    seed = data.split_seed
    generator = np.random.default_rng(seed) if data.split_generator == "numpy" else np.random.RandomState(seed)
    return [examples[place] for place in generator.permutation(len(examples))]


def _with_test_set(
    data: Data, splits: dict[str, list[T]], key: Callable[[T], Hashable], kind: Callable[[T], Hashable]
) -> dict[str, list[T]]:
    """Make the test set of training examples, and the validation set too where there is none; say so."""
    missing = [split for split in ("validation", "test") if split not in splits]
    train = splits["train"]
    count = data.hold_out or max(1, min(MOST_HELD_OUT, round(HELD_OUT * len(train))))
    found = dict(splits)
    groups = spread(train, data.split_seed, key, kind)
    alike = "" if len(groups) == len(train) else f", with {len(groups)} different among them,"
    for split in missing:
        found[split] = []
        while groups and len(found[split]) < count:
            found[split] += groups.pop(0)
    found["train"] = [example for group in groups for example in group]
    for split in (*missing, "train"):
        if not found[split]:
            raise DataError(
                f"{len(train)} training examples{alike} are too few to make a {' and a '.join(missing)} set of "
                f"{count} each of them; give more, or files of your own for these sets"
            )
    sizes = " and ".join(f"{len(found[split])} for the {split} set" for split in missing)
    processes.say(f"of {len(train)} training examples are held out: {sizes}")
    return found


def spread(
    examples: Sequence[T], seed: int, key: Callable[[T], Hashable], kind: Callable[[T], Hashable]
) -> list[list[T]]:
    """Groups of examples of equal `key`, by a shuffle with a fixed seed in which each kind is spread evenly.

    So any number of groups from the beginning has every kind in about its share. The last group of a kind stands at the
    end: what is taken from the beginning leaves one of each, unless most is taken.
    """
    groups = _grouped(examples, key)
    shuffled = random.Random(seed).sample(groups, len(groups))
    sizes = Counter(kind(group[0]) for group in shuffled)
    seen: Counter[Hashable] = Counter()
    places = []
    for group in shuffled:
        own = kind(group[0])
        seen[own] += 1
        places.append(1.0 if seen[own] == sizes[own] else (seen[own] - 0.5) / sizes[own])
    return [shuffled[i] for i in sorted(range(len(shuffled)), key=places.__getitem__)]


def halves(examples: Sequence[T], seed: int, key: Callable[[T], Hashable]) -> tuple[list[T], list[T]]:
    """Two disjoint halves by a shuffle with a fixed seed, the same on every machine.

    Examples of one key, equal texts, fall into the same half, so what is chosen on one half has not been seen in the
    other; the first half may therefore be longer by more than one.
    """
    groups = _grouped(examples, key)
    random.Random(seed).shuffle(groups)
    first: list[T] = []
    second: list[T] = []
    for group in groups:
        (first if len(first) <= len(second) else second).extend(group)
    if not second:
        raise DataError("the validation set is too small to split in halves: it has one example")
    return first, second


def _grouped(examples: Sequence[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    groups: dict[Hashable, list[T]] = {}
    for example in examples:
        groups.setdefault(key(example), []).append(example)
    return list(groups.values())


def label_names(data: Data, train: Sequence[Row]) -> list[str]:
    """The names of the classes: 0, 1, … of a given number, those given, or the training set's, numbers in order."""
    if data.classes is not None:
        return [str(index) for index in range(data.classes)]
    if data.labels is not None:
        names = [str(name) for name in data.labels]
    else:
        seen = {label_in(row, data.label) for row in train}
        names = sorted(seen, key=lambda name: (0, int(name), "") if _is_integer(name) else (1, 0, name))
    if len(names) < 2 or len(set(names)) != len(names):
        raise DataError(f"a classification needs at least two different labels, found {', '.join(names) or 'none'}")
    bare: dict[str, str] = {}
    for name in names:
        if (other := bare.setdefault(name.strip(), name)) != name:
            raise DataError(
                f"the labels {shown(other)} and {shown(name)} differ in blanks alone; write them alike in the data"
            )
    return names


def number(row: Row, column: str, allowed: tuple[float, float] | None) -> float:
    """The number in a column, within the range that is allowed."""
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


def label_of(row: Row, data: Data, names: Sequence[str]) -> int:
    """The index of a row's label."""
    name = label_in(row, data.label)
    if name not in names:
        known = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
        raise DataError(f"{row.where}: the label {shown(name)} is none of the task's labels ({known})")
    return names.index(name)


def _is_integer(name: str) -> bool:
    return name.removeprefix("-").isdecimal()
