"""docs/guides/own-data.md: its data are read by its recipes, and its commands exist."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("trl")

from chats import chat_tokenizer
from isotune.experiments import tasks
from isotune.experiments.loading import load
from isotune_cli import app

PAGE = (Path(__file__).parents[2] / "docs" / "guides" / "own-data.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = PAGE) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("section", [s for s in re.split(r"^## ", PAGE, flags=re.MULTILINE) if "```yaml" in s])
def test_a_recipe_reads_the_data_beside_it(
    section: str, chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    [recipe] = blocks("yaml", section)
    Path("recipe.yaml").write_text(recipe)
    loaded = load("recipe.yaml")
    [file] = loaded.data.files.train if loaded.data.files else []
    for text in blocks("json", section):
        row = json.loads(text)
        Path(file).write_text("".join(json.dumps(row).replace("?", f"? {i}") + "\n" for i in range(4)))
    for text in blocks("csv", section):
        Path(file).write_text(text)
    if file == "photos":
        image = pytest.importorskip("PIL.Image")
        for name in [f"{kind}/{number}.png" for kind in "ab" for number in range(3)]:
            Path("photos", name).parent.mkdir(parents=True, exist_ok=True)
            image.new("RGB", (8, 8)).save(Path("photos", name))
    task: Any = tasks.make(loaded)
    assert min(task.sizes.values()) >= 1
    if task.peft_type == "CAUSAL_LM":
        task.tokenizer = chat_tokenizer()
        assert len(task.encoded.train) == task.sizes["train"]


def test_its_commands_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    Path("chat.jsonl").write_text(json.dumps({"messages": turns}))
    runner = CliRunner()
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(commands) >= 4
    for line in commands:
        program, command, *arguments = shlex.split(line)
        assert program == "isotune"
        done = runner.invoke(app, [command, *arguments] if command == "init" else [command, "--help"])
        assert done.exit_code == 0, done.output
        for option in (one for one in arguments if one.startswith("-")):
            assert command == "init" or option in done.output
