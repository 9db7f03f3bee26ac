"""`isotune init --data`: the kind of the data and their columns, or one line that says what does not fit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from isotune.experiments.loading import load
from isotune.experiments.own_columns import OTHER_NAMES, fit
from isotune.experiments.starting import KINDS
from isotune.experiments.tables import DataError
from isotune_cli import app
from pages import text_of

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stored(row: dict[str, Any]) -> Path:
    Path("own.jsonl").write_text(json.dumps(row) + "\n")
    return Path("own.jsonl")


@pytest.mark.parametrize(
    ("row", "kind", "renamed"),
    [
        ({"messages": TURNS, "label": "x"}, "chat", {}),
        ({"conversations": TURNS}, "chat", {"conversations": "messages"}),
        ({"prompt": "a", "completion": "b"}, "completion", {}),
        ({"question": "a", "answer": "b"}, "completion", {"question": "prompt", "answer": "completion"}),
        ({"prompt": "a", "response": "b"}, "completion", {"response": "completion"}),
        ({"instruction": "a", "output": "b"}, "completion", {"instruction": "prompt", "output": "completion"}),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference", {}),
        ({"question": "a", "chosen": "b", "rejected": "c"}, "preference", {"question": "prompt"}),
        ({"chosen": "a b", "rejected": "a c"}, "preference", {}),
        ({"text": "a", "label": "x", "Class": "y"}, "classification", {}),
        ({"Sentence": "a", "label": "x"}, "classification", {"Sentence": "text"}),
    ],
)
def test_the_kind_is_found_by_the_columns(row: dict[str, Any], kind: str, renamed: dict[str, str]) -> None:
    assert fit(stored(row)) == fit(stored(row), kind) == (kind, renamed)


@pytest.mark.parametrize(
    ("row", "kind", "said"),
    [
        ({"a": "b", "c": "d"}, None, "has the columns a, c, and --for cannot be told .* messages for chat; prompt and"),
        (
            {"a": "b"},
            "completion",
            "columns a; --for completion needs prompt and completion: call them so in the file$",
        ),
        ({"text": "b", "label": "d"}, "chat", "--for chat needs messages: .*, or take --for classification$"),
        (
            {"instruction": "a", "input": "b", "output": "c"},
            "completion",
            "call them so in the file, instruction and input joined into one prompt",
        ),
        (
            {"prompt": "a", "completion": "b", "text": "c", "label": "d"},
            None,
            "fit --for completion and classification: say which",
        ),
        (
            {"messages": "hello"},
            None,
            "line 1: expected a list of messages, each with role and content, and not 'hello'",
        ),
        ({"conversations": [{"from": "human", "value": "a"}]}, None, "what is from and value here is role and content"),
        ({"a;b": "c"}, None, "separated by commas"),
        ({"image": "none.png", "label": "a"}, None, "line 1: there is no image none.png"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(row: dict[str, Any], kind: str | None, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        fit(stored(row), kind)
    assert "\n" not in str(caught.value)


def test_a_text_file_and_folders_of_texts_are_refused_with_what_to_make_of_them() -> None:
    Path("corpus.txt").write_text("once upon a time")
    for label in ("good", "bad"):
        Path("texts", label).mkdir(parents=True)
        Path("texts", label, "1.txt").write_text("a text")
        Path("photos", label).mkdir(parents=True)
        Path("photos", label, "1.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"corpus.txt: a .txt file lists images .*Give texts as .csv, .tsv, .json or"):
        fit(Path("corpus.txt"))
    for kind in (None, "images"):
        with pytest.raises(
            DataError, match=r"texts is a folder.* is no image; .*a \.csv with the columns text and label"
        ):
            fit(Path("texts"), kind)
    with pytest.raises(DataError, match=r"--for classification needs a file: a \.csv with the columns text and label"):
        fit(Path("texts"), "classification")
    assert fit(Path("photos")) == ("images", {})
    Path("photos", "stray.png").write_bytes(b"")
    with pytest.raises(DataError, match="lies beside the folders of the classes"):
        fit(Path("photos"))


def test_columns_are_renamed_in_the_recipe() -> None:
    Path("plain.csv").write_text("question,answer\na,b\n")
    Path("texts.csv").write_text("sentence,label\na,x\n")
    runner = CliRunner()
    done = runner.invoke(app, ["init", "--data", "plain.csv", "-o", "plain.yaml"])
    assert done.stdout == (
        "wrote plain.yaml for completion, question for prompt, answer for completion; next: isotune train plain.yaml\n"
    )
    assert load("plain.yaml").data.rename == {"question": "prompt", "answer": "completion"}
    assert runner.invoke(app, ["init", "--data", "texts.csv", "-o", "texts.yaml"]).exit_code == 0
    recipe = load("texts.yaml")
    assert (recipe.task, recipe.data.text, recipe.data.rename) == ("text-classification", ["sentence"], {})
    refused = runner.invoke(app, ["init", "--for", "chat", "--data", "texts.csv", "-o", "chat.yaml"])
    assert refused.exit_code == 2
    assert re.search("--for chat needs messages", refused.output)
    assert not Path("chat.yaml").exists()


def test_other_names_are_of_columns_that_are_read_and_on_the_page() -> None:
    assert set(OTHER_NAMES) <= {name for kind in KINDS.values() for name in kind.columns}
    page = text_of("docs/guides/own-data.md")
    for name, others in OTHER_NAMES.items():
        assert f"| {name} | {', '.join(others)} |" in page
