"""Data: every format, the checks before training, and halves that are fixed and share nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from isotune.experiments.data import DataError, Example, halves, load, texts_of
from isotune.experiments.recipe import Data


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


def test_json_pairs_and_integer_labels_in_numeric_order(folder: Path) -> None:
    rows = [{"p": "a", "q": "b", "y": number} for number in (10, 2, 1)]
    (folder / "train.json").write_text(json.dumps(rows))
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows[:1])) + "\n\n")
    examples = load(recipe(folder, files={"train": "train.json", "test": "test.jsonl"}, text=["p", "q"], label="y"))
    assert examples.labels == ["1", "2", "10"]
    assert examples.test == [Example("a", "b", 2)]


@pytest.mark.parametrize(
    ("name", "text", "changes", "said"),
    [
        ("train.csv", None, {}, "there is no data file .*train.csv"),
        ("train.csv", "text,label\n", {}, "the train split is empty"),
        ("train.csv", "", {}, "the train split is empty"),
        ("test.csv", "text,label\n", {}, "the test split is empty"),
        (
            "train.csv",
            "words,label\na,x\n",
            {},
            "train.csv, line 2: there is no column 'text'; there are words, label",
        ),
        ("train.csv", "text,label\na\n", {}, "train.csv, line 2: 1 columns where 2 are expected"),
        ("train.csv", "text,label\n,x\nb,y\n", {}, "train.csv, line 2: the column 'text' holds ''"),
        ("train.csv", "text,label\na,x\nb,x\n", {}, "at least two different labels, found x"),
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
            "train.jsonl, line 2: not valid JSON",
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


def test_nothing_to_report_on_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="nothing to report on"):
        load(recipe(folder, files={"test": None, "validation": "test.csv"}))
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
    import datasets

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("offline\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        DataError, match=r"cannot load split 'train' of x/y .*\(offline\); to use local files"
    ) as caught:
        load(Data.model_validate({"hub": {"name": "x/y"}}))
    assert "\n" not in str(caught.value)


def test_hub_rows_are_read_by_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    tables = {
        "train": [{"text": "a", "label": 0}, {"text": "b", "label": 1}],
        "dev": [{"text": "c", "label": 1}],
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split, revision: tables[split])
    examples = load(Data.model_validate({"hub": {"name": "x/y", "test": "dev"}}))
    assert examples.test == [Example("c", None, 1)]
    assert examples.labels == ["0", "1"]
