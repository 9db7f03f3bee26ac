"""Rows of local files, of the Hub or of the standard library, as they are read."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from isotune.experiments.sections import FileData, HubData, HubTable
from isotune.experiments.text import first_line, from_json
from isotune.versions import install

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".txt")
_SPLITS = {"train": ("train",), "validation": ("validation", "val", "valid", "dev"), "test": ("test",)}
"""What the folders of the splits are called in a folder of images."""


class DataError(ValueError):
    """The data of a recipe cannot be used; the message says where and what to change."""


@dataclass(frozen=True)
class Row:
    """One row as it was read: its columns, where it stands, and which of several test sets it belongs to."""

    values: dict[str, Any]
    where: str
    set: str | None = None


@dataclass(frozen=True)
class StoredImage:
    """An image in a table of the library datasets, which is decoded when it is read."""

    table: Any
    place: int
    column: str

    def read(self) -> Any:
        """The image; raises OSError where it cannot be decoded."""
        return self.table[self.place][self.column]


def commas_meant(columns: Iterable[Any]) -> str:
    """What to say beside the names of columns where another separator makes one column of all."""
    names = [str(name) for name in columns]
    return " (a .csv file is separated by commas)" if len(names) == 1 and ";" in names[0] else ""


def builtin_rows(name: str) -> dict[str, list[Row]]:
    """The splits of a task that is made from the standard library's docstrings, or of images that a package carries."""
    from isotune.experiments import builtin_images, stdlib_docstrings, stdlib_word_order

    if name in builtin_images.SOURCES:
        try:
            images = builtin_images.build(name)
        except ValueError as error:
            raise DataError(str(error)) from error
        return {
            split: [Row({"image": image, "label": label}, where) for where, image, label in rows]
            for split, rows in images.items()
        }
    splits = stdlib_word_order.build() if name == "stdlib-word-order" else stdlib_docstrings.build()[0]
    return {
        split: [Row({"text": text, "label": label}, f"{split} text {i}") for i, (text, label) in enumerate(rows, 1)]
        for split, rows in splits.items()
    }


def hub_rows(hub: HubData) -> dict[str, list[Row]]:
    """The splits of a data set on the Hub."""
    table = hub.model_dump(include={"name", "config", "revision", "files"})
    splits = {"train": hub.train, "validation": hub.validation, "test": hub.test}
    rows = {split: _hub_table(HubTable(**table, split=name)) for split, name in splits.items() if name is not None}
    for name, other in hub.tests.items():
        rows.setdefault("test", []).extend(replace(row, set=name) for row in _hub_table(other))
    return rows


def _hub_table(table: HubTable) -> list[Row]:
    try:
        from datasets import Image, load_dataset
    except ImportError as error:
        raise DataError(f"data from the Hub need the package datasets: {install('language')}") from error
    try:
        files = {"data_files": table.files} if table.files else {}
        found = load_dataset(table.name, table.config, split=table.split, revision=table.revision, **files)
    except Exception as error:  # the library raises a dozen kinds, most of them about the network
        raise DataError(
            f"cannot load split {table.split!r} of {table.name} {table.config or ''} from the Hub "
            f"({first_line(error)}); to use local files instead, give data.path and data.files"
        ) from error
    kinds = getattr(found, "features", None) or {}
    images = [column for column, kind in kinds.items() if isinstance(kind, Image)]
    rows = found.remove_columns(images) if images else found
    where = " ".join(part for part in (table.name, table.config, table.files, table.split) if part)
    return [
        Row({**row, **{column: StoredImage(found, i, column) for column in images}}, f"{where}, row {i + 1}")
        for i, row in enumerate(rows)
    ]


def file_rows(files: FileData, folder: Path) -> dict[str, list[Row]]:
    """The splits of local files in a folder."""
    files = _with_splits(files, folder)

    def rows(names: Sequence[str], name: str | None = None) -> list[Row]:
        found = []
        for file in names:
            table = [replace(row, set=name) for row in _table(folder / file, files.columns)]
            if not table:
                raise DataError(f"{folder / file} is empty: it has no row to train on or to judge by")
            found += table
        return found

    found = {"train": rows(files.train)}
    if files.validation is not None:
        found["validation"] = rows(files.validation)
    if isinstance(files.test, dict):
        sets = {name: rows(names, name) for name, names in files.test.items()}
        found["test"] = list(chain(*sets.values()))
    elif files.test is not None:
        found["test"] = rows(files.test)
    return found


def _with_splits(files: FileData, folder: Path) -> FileData:
    """Where the training set is one folder of the splits' folders: these, where the recipe names no others."""
    whole = folder / files.train[0]
    inside = {entry.name for entry in _visible(whole)} if len(files.train) == 1 and whole.is_dir() else set()
    if "train" not in inside or not inside <= {name for names in _SPLITS.values() for name in names}:
        return files
    found = {
        split: [str(Path(files.train[0]) / name)]
        for split, names in _SPLITS.items()
        for name in names
        if name in inside
    }
    given = {split: value for split in ("validation", "test") if (value := getattr(files, split)) is not None}
    return files.model_copy(update={**found, **given})


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _class_rows(folder: Path) -> Iterator[Row]:
    """Images by class: every file in a folder is one of the class that the folder is called after."""
    classes = _visible(folder)
    for name in classes:
        if not name.is_dir():
            raise DataError(f"{name} lies beside the folders of the classes; a folder of images has only such folders")
        images = _visible(name)
        if not images:
            raise DataError(f"the folder {name} of a class has no image")
        for image in images:
            yield Row({"image": str(image), "label": name.name}, str(image))


def _table(path: Path, columns: list[str] | None) -> Iterator[Row]:
    if path.is_dir():
        yield from _class_rows(path)
        return
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: the kind of file is known by its name, which must end in {', '.join(SUFFIXES)}")
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
    for number, line in enumerate(_lines(text), 1):
        if line.strip():
            image, separator, label = line.strip().rpartition(" ")
            if not separator:
                raise DataError(f"{path}, line {number}: expected the path of an image, a space and its label")
            yield Row({"image": str(path.parent / image), "label": label}, f"{path}, line {number}")


def _json_rows(path: Path, text: str) -> Iterator[Row]:
    if path.suffix == ".jsonl":
        lines = [(f"{path}, line {number}", line) for number, line in enumerate(_lines(text), 1) if line.strip()]
        parsed = [(where, _parsed(line, where)) for where, line in lines]
    else:
        table = _parsed(text, str(path))
        if not isinstance(table, list):
            raise DataError(f"{path}: a .json file must hold a list of objects; one object a line is .jsonl")
        parsed = [(f"{path}, entry {number}", row) for number, row in enumerate(table, 1)]
    escaped = "\\u" in text  # where a file of whole characters can hold half of one
    for where, row in parsed:
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected an object with named fields, not {type(row).__name__}")
        if escaped:
            _check_characters(row, where)
        yield Row(row, where)


def _check_characters(row: Any, where: str) -> None:
    """Raise DataError where a text holds half a character, which no tokenizer takes and no file."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {error.object[error.start]!a} is half a character, as a text cut in the middle of an emoji "
            "has; cut it before that, or take it out"
        ) from error


def _lines(text: str) -> list[str]:
    """The lines of a file; `splitlines` would also break at characters such as U+2028, which texts may hold."""
    return text.split("\n")


def _parsed(text: str, where: str) -> Any:
    try:
        return from_json(text)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, " if "\n" in text else ""
        raise DataError(f"{where}: not valid JSON: {error.msg} at {at}character {error.colno}") from error
    except ValueError as error:
        raise DataError(f"{where}: not valid JSON: {error}") from error


@dataclass(frozen=True)
class _Record:
    """The cells of a row of a table, and the lines that it stands on, counted from 1."""

    cells: list[str]
    first: int
    last: int


def _separated_rows(path: Path, text: str, columns: list[str] | None) -> Iterator[Row]:
    # In tab-separated corpora a quotation mark is text; in csv it quotes.
    reader = (
        csv.reader(_lines(text), delimiter="\t", quoting=csv.QUOTE_NONE)
        if path.suffix == ".tsv"
        else csv.reader(io.StringIO(text), strict=True)
    )
    found: list[_Record] = []
    limit = csv.field_size_limit(max(len(text), csv.field_size_limit()))
    try:
        for record in _records(path, reader):
            if columns is None:
                columns = record.cells
                for name in columns:
                    if name and columns.count(name) > 1:
                        raise DataError(
                            f"{path}: the column {name!r} is there twice; rename one of the two, or remove it"
                        )
                continue
            if len(record.cells) != len(columns):
                raise DataError(
                    f"{path}, line {record.first}: {len(record.cells)} columns where {len(columns)} are expected "
                    f"({', '.join(columns)})"
                )
            found.append(record)
    finally:
        csv.field_size_limit(limit)
    _check_rows_within(path, text, found)
    for record in found:
        yield Row(dict(zip(columns or (), record.cells, strict=True)), f"{path}, line {record.first}")


def _records(path: Path, reader: Any) -> Iterator[_Record]:
    """What a reader of the module csv finds, without empty lines.

    Raises:
        DataError: a field begins with a quotation mark that is not closed where a field ends.
    """
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{path}, line {first}: the row that begins here cannot be read ({error} in line {reader.line_num}). "
                'A field that begins with a quotation mark ends with one, and those within it are doubled: "a 5"" '
                'screen". Double a mark that is text and put the whole field in quotation marks; nothing, not even '
                "a blank, may stand between the closing mark and the comma"
            ) from error
        if cells:
            yield _Record(cells, first, reader.line_num)


def _check_rows_within(path: Path, text: str, found: Sequence[_Record]) -> None:
    """Raise DataError where a field in quotation marks holds other rows.

    A mark that begins one row's field and another that ends a later row's are a pair to any reader of CSV, and all
    between them is one text. Such a text is known by its lines, each of which is a row by itself, with a value in some
    column, such as a label, that rows on one line have there too.
    """
    several = [record for record in found if record.last > record.first]
    known = [set(column) - {""} for column in zip(*(r.cells for r in found if r.last == r.first), strict=True)]
    lines = _lines(text) if several else []
    for record in several:
        alone = [line.split(",") for line in lines[record.first - 1 : record.last]]
        if any(len(cells) != len(known) for cells in alone):
            continue
        if any(values.issuperset(column) for values, column in zip(known, zip(*alone, strict=True), strict=True)):
            raise DataError(
                f"{path}, line {record.first}: the quotation marks of the field that begins here close in line "
                f"{record.last}, and each line up to there looks like a row of its own. Where the marks are text, "
                'double them and put the whole field in quotation marks: "a 5"" screen"; a text that does hold these '
                "lines can be given in a .jsonl file"
            )
