"""`isotune init`: what it writes is valid, explained key by key, and leads from own data to a trained adapter."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from chats import conversations, preferences, words
from isotune.experiments.loading import load, packaged
from isotune.experiments.recipe import Recipe, keys_of
from isotune.experiments.starting import KINDS, METHOD, starting
from isotune.methods import METHODS
from isotune_cli import app

runner = CliRunner()


def isotune(*arguments: str) -> Any:
    done = runner.invoke(app, list(arguments))
    assert done.exit_code == 0, done.output
    return done


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        key: v for name, one in value.items() for key, v in flat(one, f"{prefix}.{name}" if prefix else name).items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_has_a_comment_and_the_value_of_the_schema(kind: str) -> None:
    text = starting(kind, data="d.jsonl")
    lines = text.splitlines()
    for before, line in zip(["", *lines], lines, strict=False):
        assert len(line) <= 110
        if not line.lstrip().startswith("#") and not line.endswith(":"):
            assert before.lstrip().startswith("# "), line
            assert len(before) - len(before.lstrip()) == len(line) - len(line.lstrip())
    written = flat(yaml.safe_load(text))
    assert {key for key in written if not key.startswith("method.")} <= set(keys_of(Recipe))
    # What docs/choose.md says: language models want less than the small models by which the usual rate was found.
    of_language = {"chat": 5e-4, "completion": 5e-4, "preference": 1e-4}
    assert written["train.lr"] == of_language.get(kind, METHODS[METHOD].scaled_learning_rate)
    assert written.get("method.scaled_generator", False) == (kind not in of_language)
    plain = Recipe.model_validate(
        {"task": KINDS[kind].task, "model": "m", "data": {"files": {"train": "d.jsonl"}}, "method": METHOD}
    )
    defaults = flat(plain.model_dump(mode="json"))
    for key in ("train.epochs", "train.seed", "metric", "data.files.test"):
        assert written[key] == defaults[key]


def test_nothing_is_overwritten_and_no_data_are_made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = isotune("init").stdout
    assert said == (
        "wrote my-recipe.yaml for chat; name your data there (data.files.train), then: isotune train my-recipe.yaml\n"
    )
    before = Path("my-recipe.yaml").read_text()
    assert "# Put your data there, or give their name here. One conversation a line" in before
    assert load("my-recipe.yaml").task == "chat"
    for arguments, said in (
        ([], "my-recipe.yaml exists and is not overwritten"),
        (["--for", "chats", "-o", "b.yaml"], "--for chats is not one of chat, completion, .*; did you mean 'chat'"),
        (["--data", "none.jsonl", "-o", "b.yaml"], "there is no none.jsonl"),
        (["--data", ".", "--for", "chat", "-o", "b.yaml"], "is a folder; --for chat needs a file: a .jsonl with the"),
        (["-o", "b.txt"], "the name of a recipe ends in .yaml"),
    ):
        done = runner.invoke(app, ["init", *arguments])
        assert done.exit_code == 2
        assert re.search(said, done.output), done.output
    assert [path.name for path in tmp_path.iterdir()] == ["my-recipe.yaml"]
    assert Path("my-recipe.yaml").read_text() == before


def test_packaged_recipes_are_json_too() -> None:
    one = json.loads(isotune("recipes", "demo", "--json").stdout)
    assert one == packaged()["demo"]
    assert json.loads(isotune("recipes", "arc/", "--json").stdout).keys() == {"arc/gemma", "arc/gemma-words"}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data of every kind, and in it the current one."""
    monkeypatch.chdir(tmp_path)
    conversations(20).to_json("chat.jsonl")
    preferences(20).to_json("preference.jsonl")
    rows = [{"prompt": words(i), "completion": f" {words(i + 20)}"} for i in range(20)]
    Path("completion.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [
        f"{'good' if i % 2 else 'bad'} {'film' if i % 3 else 'book'} {'very ' * (i % 5)},{i % 2}" for i in range(40)
    ]
    Path("classification.csv").write_text("\n".join(["text,label", *lines]))
    return tmp_path


def paint(folder: Path, count: int) -> None:
    image = pytest.importorskip("PIL.Image")
    for number in range(count):
        for name, colour in (("red", (200 + number, 9, 9)), ("blue", (9, 9, 200 + number))):
            (folder / name).mkdir(parents=True, exist_ok=True)
            image.new("RGB", (32, 32), colour).save(folder / name / f"{number}.png")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["chat", "completion", "preference"])
def test_from_own_texts_to_a_chat_and_an_export(own: Path, chat_model: Path, kind: str) -> None:
    pytest.importorskip("trl")
    isotune("init", "--for", kind, "--model", str(chat_model), "--data", f"{kind}.jsonl", "-o", "own.yaml")
    quick = ["method.r=4", "train.epochs=1", "check_saved=false"]
    found = json.loads(isotune("train", "own.yaml", *quick, "--json", "-q").stdout)
    assert found["rows"][0]["mean"] is not None
    assert [found["data"][split] for split in ("train", "validation", "test")] == [16, 2, 2]
    adapter = next(Path("runs/own").rglob("adapter_config.json")).parent
    answers = isotune("chat", str(adapter), "w3 w4", "--new-tokens", "3").stdout
    assert [line.split()[0] for line in answers.splitlines()] == ["base:", "adapter:"]
    isotune("export", str(adapter), "--to", "lora", "-o", "lora")
    assert Path("lora/adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_from_own_classes_to_an_export(own: Path, tiny_model: Path, vit: Path) -> None:
    paint(own / "images", 6)
    for kind, model, data in (("classification", tiny_model, "classification.csv"), ("images", vit, "images")):
        isotune("init", "--for", kind, "--model", str(model), "--data", data, "-o", f"{kind}.yaml")
        quick = ["method.r=4", "train.max_steps=4", "train.batch_size=4", "check_saved=false"]
        quick += ["train.max_length=16"] if kind == "classification" else []
        found = json.loads(isotune("train", f"{kind}.yaml", *quick, "--json", "-q").stdout)
        assert found["data"]["labels"] == {"classification": ["0", "1"], "images": ["blue", "red"]}[kind]
        adapter = next(Path(f"runs/{kind}").rglob("adapter_config.json")).parent
        inputs = {"classification": "tokenizer_config.json", "images": "preprocessor_config.json"}[kind]
        assert (adapter / inputs).is_file()
        isotune("export", str(adapter), "--to", "lora", "-o", f"lora-{kind}")


@pytest.mark.slow
def test_methods_are_compared_on_own_preferences(own: Path, chat_model: Path) -> None:
    pytest.importorskip("trl")
    isotune("init", "--for", "preference", "--model", str(chat_model), "--data", "preference.jsonl")
    options = ["--methods", "full", "--seeds", "1", "--lr-search", "1", "--json", "-q", "-o", "compared"]
    found = json.loads(isotune("compare", "my-recipe.yaml", "train.epochs=1", *options).stdout)
    row = found["rows"][0]
    assert (row["failed"], row["seeds"]) == (None, 1)
    assert 0 <= row["mean"] <= 1
