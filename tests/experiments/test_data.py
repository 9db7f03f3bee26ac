"""Data: every format, the checks before training, and halves that are fixed and share nothing."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from isotune.experiments.data import Example, halves, load, texts_of
from isotune.experiments.sections import Data, HubData
from isotune.experiments.tables import DataError, file_rows, hub_rows


def recipe(folder: Path, **changes: Any) -> Data:
    files = {"train": "train.csv", "test": "test.csv", **changes.pop("files", {})}
    return Data.model_validate({"path": str(folder), "files": files, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.csv").write_text('text,label\n"a, ""quoted"" one",x\nb,y\n')
    (tmp_path / "test.csv").write_text("text,label\nc,y\n")
    return tmp_path


def test_csv_reads_quotes_and_sorts_labels(folder: Path) -> None:
    examples = load(recipe(folder))
    assert examples.labels == ["x", "y"]
    assert examples.train == [Example('a, "quoted" one', None, 0), Example("b", None, 1)]
    assert examples.test == [Example("c", None, 1)]


def test_tsv_without_a_header_keeps_quotation_marks(folder: Path) -> None:
    (folder / "train.tsv").write_text('gj04\t1\t\tHe said "no\ngj04\t0\t*\tNo.\n')
    examples = load(
        recipe(
            folder,
            files={
                "train": "train.tsv",
                "test": ["train.tsv", "train.tsv"],
                "columns": ["s", "label", "star", "t"],
            },
            text="t",
        )
    )
    assert [e.text for e in examples.train] == ['He said "no', "No."]
    assert [e.label for e in examples.test] == [1, 0, 1, 0]


def test_only_line_feeds_end_a_row(folder: Path) -> None:
    """Marks such as U+2028, at which str.splitlines breaks, are text: JSON needs no escape for them."""
    texts = [f"one{mark}two" for mark in "\u2028\u2029\x85\x0b\x0c"]
    rows = [{"text": text, "label": "xy"[i % 2]} for i, text in enumerate(texts)]
    table = "".join(f"{row['text']}\t{row['label']}\n" for row in rows)
    files = {
        "rows.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
        "rows.csv": "text,label\n" + table.replace("\t", ","),
        "rows.tsv": "text\tlabel\n" + table,
    }
    for name, written in files.items():
        (folder / name).write_text(written, "utf-8")
        assert [e.text for e in load(recipe(folder, files={"train": name, "test": name})).train] == texts


def test_json_pairs_and_integer_labels_in_numeric_order(folder: Path) -> None:
    rows = [{"p": "a", "q": "b", "y": number} for number in (10, 2, 1)]
    (folder / "train.json").write_text(json.dumps(rows))
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows[:1])) + "\n\n")
    examples = load(recipe(folder, files={"train": "train.json", "test": "test.jsonl"}, text=["p", "q"], label="y"))
    assert examples.labels == ["1", "2", "10"]
    assert examples.test == [Example("a", "b", 2)]


@pytest.mark.parametrize("name", ["train.csv", "train.tsv", "train.jsonl"])
def test_only_line_breaks_end_a_line(folder: Path, name: str) -> None:
    """Texts from the Web hold U+2028 and U+0085, which `str.splitlines` takes for the end of a line."""
    texts = ["one\u2028line", "one\x85line", "one\x0cline"]
    if name.endswith("l"):
        written = "\n".join(json.dumps({"text": text, "label": "x"}, ensure_ascii=False) for text in texts)
    else:
        between = "," if name == "train.csv" else "\t"
        written = "\n".join(between.join(row) for row in [("text", "label"), *((text, "x") for text in texts)])
    (folder / name).write_bytes(written.encode())
    examples = load(recipe(folder, files={"train": name, "test": name}, labels=["x", "y"]))
    assert [example.text for example in examples.train] == texts


@pytest.mark.parametrize("name", ["train.csv", "train.tsv"])
def test_a_text_may_be_as_long_as_a_book(folder: Path, name: str) -> None:
    between, long, limit = "," if name == "train.csv" else "\t", "a" * 200_000, csv.field_size_limit()
    (folder / name).write_text("\n".join(between.join(row) for row in [("text", "label"), (long, "x"), ("b", "y")]))
    examples = load(recipe(folder, files={"train": name, "test": name}))
    assert [example.text for example in examples.train] == [long, "b"]
    assert csv.field_size_limit() == limit


QUOTED = [
    ('he said "x" twice,x\n6\'2"",y', ['he said "x" twice', '6\'2""'], [2, 3]),  # a mark within a field is text
    ('"""5"" wide",x\n"a ""b""",y', ['"5" wide', 'a "b"'], [2, 3]),
    ('"one, two\nthree ""four""\n",x\n\nb,y', ['one, two\nthree "four"\n', "b"], [2, 6]),
    ('"Dear all, hello\nbye, y",x\nb,y\nc,x', ["Dear all, hello\nbye, y", "b", "c"], [2, 4, 5]),
    ('"a, b",x\n"c",y', ["a, b", "c"], [2, 3]),
]


@pytest.mark.parametrize(("rows", "texts", "lines"), QUOTED)
def test_quotation_marks_of_csv(folder: Path, rows: str, texts: list[str], lines: list[int]) -> None:
    (folder / "train.csv").write_text("text,label\n" + rows)
    assert [example.text for example in load(recipe(folder)).train] == texts
    found = file_rows(recipe(folder).files, folder)["train"]
    assert [row.where.rpartition(" ")[2] for row in found] == list(map(str, lines))


STRAY = [
    ("text,label", 'a,x\n"unclosed,y\nb,x\nc,y', 3, "unexpected end of data in line 5"),
    ("label,text", 'x,a\ny,"unclosed\nx,b\ny,c\n', 3, "unexpected end of data in line 5"),
    ("text,label", 'a,x\n\n"5 inch,y\nb,x\nhe said "so",y\nc,x', 4, "in line 6"),
    ("text,label", 'a,x\n"5 inch,y\n"b, c",x', 3, "in line 4"),
    ("text,label", '"so" he said,x\nb,y', 2, "in line 2"),
    # To the module csv the marks of these are pairs.
    ("text,label", 'a,x\nb,y\n"5 inch,y\nc,x\nof 12",x\nd,y', 4, "close in line 6"),
    ("label,text", 'x,a\ny,b\ny,"5 inch\nx,of 12"\ny,d', 4, "close in line 5"),
    ("id,label,text", '1,x,a\n2,y,b\n3,y,"5 inch\n4,x,c\n5,x,of 12"\n6,y,d', 4, "close in line 6"),
]


@pytest.mark.parametrize(("head", "rows", "line", "said"), STRAY)
def test_a_stray_quotation_mark_swallows_no_rows(folder: Path, head: str, rows: str, line: int, said: str) -> None:
    (folder / "train.csv").write_text(f"{head}\n{rows}")
    with pytest.raises(DataError, match=f"train.csv, line {line}: .*{said}.*whole field in quotation marks") as caught:
        load(recipe(folder))
    assert "\n" not in str(caught.value)


def test_a_label_is_one_whether_it_is_written_as_a_float_or_not(folder: Path) -> None:
    written = ["0", "1.0", "1", "0.0", "-0.0", "1e0", '"1"', "true", "0.5", "1e300"]
    lines = [f'{{"text": "t{i}", "label": {label}}}' for i, label in enumerate(written)]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    files = {"train": "rows.jsonl", "test": "rows.jsonl"}
    examples = load(recipe(folder, files=files))
    assert examples.labels == ["0", "1", str(int(1e300)), "0.5"]
    assert [example.label for example in examples.test] == [0, 1, 1, 0, 0, 1, 1, 1, 3, 2]
    numbers = load(recipe(folder, files=files), regression=True).test
    assert [example.label for example in numbers] == [0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.5, 1e300]


@pytest.mark.parametrize(
    ("name", "text", "changes", "said"),
    [
        ("train.csv", None, {}, "there is no data file .*train.csv"),
        ("train.csv", "text,label\n", {}, "train.csv is empty"),
        ("train.csv", "", {}, "train.csv is empty"),
        ("test.csv", "text,label\n", {}, "test.csv is empty"),
        (
            "train.csv",
            "words,label\na,x\n",
            {},
            r"there are words, label\. Name one of them by data\.text, or .*data\.rename=\{NAME: text\}",
        ),
        (
            "train.csv",
            "text,kind\na,x\n",
            {},
            "no column 'label'; there are text, kind. Name one of them by data.label",
        ),
        ("train.csv", "text,label,label\na,x,y\n", {}, "train.csv: the column 'label' is there twice; rename one"),
        (
            "train.jsonl",
            '{"text": "a", "label": "x", "text": "b"}',
            {"files": {"train": "train.jsonl"}},
            "train.jsonl, line 1: not valid JSON: the key 'text' is given twice",
        ),
        (
            "train.jsonl",
            '{"text": "\\u00e9\\ud83d\\ude00", "label": "x"}\n{"text": "cut \\ud83d", "label": "y"}',
            {"files": {"train": "train.jsonl"}},
            r"train.jsonl, line 2: '\\ud83d' is half a character",
        ),
        (
            "train.csv",
            "text,label\n" + "a,x\na,y\n" * 10,
            {"files": {"test": None}},
            "20 training examples, with 1 different among them, are too few to make a validation and a test set",
        ),
        ("train.csv", "text,label\na\n", {}, "train.csv, line 2: 1 columns where 2 are expected"),
        ("train.csv", "text,label\n,x\nb,y\n", {}, "train.csv, line 2: the column 'text' holds ''"),
        ("train.csv", "text,label\na,x\nb,x\n", {}, "at least two different labels, found x"),
        ("train.csv", "text,label\na,x\nb,x \n", {}, "the labels 'x' and 'x ' differ in blanks alone"),
        ("test.csv", "text,label\na,z\n", {}, r"test.csv, line 2: the label 'z' is none of .*\(x, y\)"),
        (
            "train.csv",
            "text,label\na,2\n",
            {"labels": [0, 1]},
            r"line 2: the label '2' is none of .*\(0, 1\)",
        ),
        ("train.csv", b"text,label\ncaf\xe9,x\n", {}, "cannot read the data file"),
        ("train.doc", "a", {"files": {"train": "train.doc"}}, "must end in .csv, .tsv, .json, .jsonl, .txt"),
        ("train.txt", "images/a.png\n", {"files": {"train": "train.txt"}}, "train.txt, line 1: expected the path"),
        (
            "train.jsonl",
            '{"a": 1}\nnot',
            {"files": {"train": "train.jsonl"}},
            "train.jsonl, line 2: not valid JSON: Expecting value at character 1$",
        ),
        ("train.jsonl", "[1]", {"files": {"train": "train.jsonl"}}, "expected an object .*, not list"),
        ("train.json", '{"a": 1}', {"files": {"train": "train.json"}}, "must hold a list of objects"),
        (
            "train.jsonl",
            '{"text": [1], "label": 1}',
            {"files": {"train": "train.jsonl"}, "labels": [0, 1]},
            r"holds \[1\]",
        ),
    ],
)
def test_bad_data_are_one_line(folder: Path, name: str, text: Any, changes: dict[str, Any], said: str) -> None:
    if text is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=said) as caught:
        load(recipe(folder, **changes))
    assert "\n" not in str(caught.value)


def test_a_test_set_is_made_where_there_is_none(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "isotune")
    rows = [(f"t{n // 2}", "xyz"[0 if n < 80 else 1 if n < 98 else 2]) for n in range(100)]
    (folder / "train.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    own = recipe(folder, files={"test": None})
    examples = load(own)
    assert "of 100 training examples are held out: 10 for the validation set and 10 for the test set" in caplog.text
    texts = [{e.text for e in split} for split in (examples.train, examples.validation, examples.test)]
    assert sum(map(len, texts)) == 50  # equal texts stay together
    assert [len(split) for split in (examples.train, examples.validation, examples.test)] == [80, 10, 10]
    for split in (examples.validation, examples.test):
        assert Counter(e.label for e in split) == {0: 8, 1: 2}
    assert {e.label for e in examples.train} == {0, 1, 2}  # the only text of a class is trained on
    assert load(own) == examples
    assert load(recipe(folder, files={"test": None}, split_seed=1)) != examples
    fewer = load(recipe(folder, files={"test": None}, hold_out=4))
    assert (len(fewer.validation), len(fewer.test)) == (4, 4)
    alone = load(recipe(folder, files={"test": None, "validation": "test.csv"}))
    assert (len(alone.train), len(alone.validation), len(alone.test)) == (90, 1, 10)


def test_too_few_to_hold_out_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="2 training examples are too few to make a validation and a test"):
        load(recipe(folder, files={"test": None}))
    with pytest.raises(DataError, match="it needs a validation set and no test set"):
        load(recipe(folder, split_validation_half=True))


def test_halves_are_fixed_disjoint_and_complete() -> None:
    examples = [Example(f"text {number // 2}", None, number % 2) for number in range(60)]
    first, second = halves(examples, 0, texts_of)
    assert sorted(e.text for e in first + second) == sorted(e.text for e in examples)
    assert not {e.text for e in first} & {e.text for e in second}
    assert abs(len(first) - len(second)) <= 2
    # Written down, as a split that changes from release to release makes results incomparable.
    assert [e.text for e in first[::2]][:5] == ["text 3", "text 18", "text 5", "text 7", "text 29"]
    assert halves(examples, 0, texts_of) == (first, second)
    assert halves(examples, 1, texts_of) != (first, second)


def test_split_validation_half_reports_on_the_other_half(folder: Path) -> None:
    rows = "".join(f"t{number},{'xy'[number % 2]}\n" for number in range(9))
    (folder / "dev.csv").write_text("text,label\n" + rows)
    examples = load(recipe(folder, files={"test": None, "validation": "dev.csv"}, split_validation_half=True))
    assert (len(examples.validation), len(examples.test)) == (5, 4)


def test_fingerprint_tells_data_apart(folder: Path) -> None:
    before = load(recipe(folder)).fingerprint()
    assert load(recipe(folder)).fingerprint() == before
    (folder / "test.csv").write_text("text,label\nd,y\n")
    assert load(recipe(folder)).fingerprint() != before


def test_an_unreachable_hub_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("offline\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        DataError, match=r"cannot load split 'train' of x/y .*\(offline\); to use local files"
    ) as caught:
        load(Data.model_validate({"hub": {"name": "x/y"}}))
    assert "\n" not in str(caught.value)


def test_rows_of_two_tables_of_one_name_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are known by where they stand."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, data_files, **more: [{"text": data_files, "label": 0}])
    other = {"name": "imagefolder", "files": "b/**", "split": "train"}
    hub = {"name": "imagefolder", "files": "a/**", "tests": {"b": other}}
    rows = hub_rows(HubData.model_validate(hub))
    assert [row.values["text"] for split in ("train", "test") for row in rows[split]] == ["a/**", "b/**"]
    assert rows["train"][0].where != rows["test"][0].where


def test_hub_rows_are_read_by_split(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    tables = {
        "train": [{"text": "a", "label": 0}, {"text": "b", "label": 1}],
        "dev": [{"text": "c", "label": 1}],
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split, revision: tables[split])
    examples = load(Data.model_validate({"hub": {"name": "x/y", "test": "dev"}}))
    assert examples.test == [Example("c", None, 1)]
    assert examples.labels == ["0", "1"]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("5.5", r"dev\.csv, line 2: the column 'label' holds '5\.5', which is not a number from 0 to 5"),
        ("-1", "not a number from 0 to 5"),
        ("nan", "not a number from 0 to 5"),
        ("much", "not a number from 0 to 5"),
    ],
)
def test_a_number_outside_the_range_is_one_line(folder: Path, value: str, said: str) -> None:
    (folder / "dev.csv").write_text(f"text,label\na,{value}\n")
    (folder / "train.csv").write_text("text,label\na,2.5\nb,0\n")
    data = recipe(folder, files={"test": "dev.csv"}, range=[0, 5])
    with pytest.raises(DataError, match=said):
        load(data, regression=True)
    (folder / "dev.csv").write_text("text,label\na,5\n")
    assert [e.label for e in load(data, regression=True).train] == [2.5, 0.0]


def test_files_may_call_columns_and_labels_differently(folder: Path) -> None:
    (folder / "train.csv").write_text("said,judged\na,no\nb,yes\n")
    (folder / "test.csv").write_text("said,judged\nc,yes\n")
    own = {"text": "said", "label": "judged", "labels": ["yes", "no"]}
    examples = load(recipe(folder, files=own, labels=[0, 1]))
    assert [e.label for e in examples.train + examples.test] == [1, 0, 0]
    renamed = load(recipe(folder, rename={"said": "text", "judged": "label"}))
    assert [e.text for e in renamed.train] == ["a", "b"]


def test_a_part_is_held_out_and_test_sets_are_shortened(folder: Path) -> None:
    (folder / "train.csv").write_text("text,label\n" + "".join(f"t{n},{'xy'[n % 2]}\n" for n in range(20)))
    whole = load(recipe(folder))
    examples = load(recipe(folder, hold_out=5, max_train=8))
    assert (len(examples.train), len(examples.validation)) == (8, 5)
    assert not {e.text for e in examples.train} & {e.text for e in examples.validation}
    assert {e.text for e in examples.train + examples.validation} < {e.text for e in whole.train}
    assert load(recipe(folder, hold_out=5, max_train=8)) == examples
    assert len(load(recipe(folder, files={"test": "train.csv"}, max_test=7)).test) == 7
    with pytest.raises(DataError, match=r"data\.hold_out=20 leaves nothing of 20 training examples"):
        load(recipe(folder, hold_out=20))
    with pytest.raises(DataError, match="there is one already"):
        load(recipe(folder, hold_out=2, files={"validation": "test.csv"}))
