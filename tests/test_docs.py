"""The documentation is true: its links, commands, YAML, tables and the messages that it explains."""

from __future__ import annotations

import ast
import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

import isotune_cli
from helpers import tiny_llama
from isotune.experiments import compare
from isotune.experiments.files import packaged_object
from isotune.experiments.loading import load, packaged
from pages import PAGES, ROOT, anchors, blocks, commands, text_of

WRITTEN = {page: [*commands(page)] for page in PAGES}
OWN = ("my.yaml", "mine.yaml", "my-recipe.yaml", "recipe.yaml")
"""Recipes that a page lets its reader write, here the demo's."""


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", text_of(page)) + re.findall(r'(?:src|srcset)="([^"]+)"', text_of(page))
    for link in (link for link in links if "://" not in link):
        path, _, place = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        name = target.resolve().relative_to(ROOT).as_posix()
        assert target.exists(), link
        if place and target.suffix == ".md":
            assert place in anchors(name), link


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(f"docs/{page}" for page in listed) == [page for page in PAGES if page != "README.md"]


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the recipes that pages let their reader write."""
    monkeypatch.chdir(tmp_path)
    for name in OWN:
        Path(name).write_text(yaml.safe_dump(packaged()["demo"]))
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if WRITTEN[page]])
def test_commands_are_those_of_the_command_line(page: str, recipes: Path) -> None:
    group = typer.main.get_command(isotune_cli.app)
    for words in WRITTEN[page]:
        if words[0].startswith("--"):
            assert group.make_context("isotune", words, resilient_parsing=True)
            continue
        given = group.commands[words[0]].make_context(words[0], list(words[1:])).params  # type: ignore[attr-defined]
        if words[0] in ("train", "compare"):
            recipe = load(given["recipe"], given["overrides"] or ())
            for method in compare.split_methods(",".join(given.get("methods") or ())):
                assert compare.parse(method, recipe, compare.Options())


def test_plans_are_made(recipes: Path) -> None:
    config = packaged_object("architectures.json")["meta-llama/Llama-3.2-3B"]["config"] | {"num_hidden_layers": 1}
    for name in ("meta-llama/Llama-3.2-3B", "my-model"):
        Path(name).mkdir(parents=True)
        (Path(name) / "config.json").write_text(json.dumps(config))
    for words in WRITTEN["docs/guides/memory.md"]:
        done = CliRunner().invoke(isotune_cli.app, words)
        assert done.exit_code == 0, done.output


def test_yaml_is_read_by_whom_it_is_for(recipes: Path) -> None:
    found = [(page, yaml.safe_load(block.text)) for page in PAGES for block in blocks(page, "yaml")]
    assert found
    for page, content in found:
        if "distributed_type" in content:
            assert accelerates(content)
        elif "plugins" in content:  # axolotl's, whose examples tests/integrations check with its own classes
            (example,) = [yaml.safe_load(path.read_text()) for path in ROOT.glob("examples/axolotl/psoft.yml")]
            assert {key: example[key] for key in content if key != "isotune"} == {
                key: content[key] for key in content if key != "isotune"
            }
        else:
            Path("page.yaml").write_text(yaml.safe_dump(content))
            assert load("page.yaml"), page


def accelerates(content: dict[str, Any]) -> Any:
    """A configuration as `accelerate launch` reads it."""
    from accelerate.commands.config.config_args import ClusterConfig

    Path("accelerate.yaml").write_text(yaml.safe_dump(content))
    return ClusterConfig.from_yaml_file("accelerate.yaml")


@pytest.mark.slow
def test_the_tables_of_methods_are_the_library_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs_tools")
    import sizes

    page = text_of("docs/choose.md")
    assert sizes.beginnings() in page
    head, rule, row = sizes.sizes(("MiniLM",), (16,)).splitlines()
    assert f"{head}\n{rule}" in page
    assert row in page


def test_the_published_ranks_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs_tools")
    import ranks

    assert ranks.row(ranks.SETTINGS[0]) in text_of("docs/guides/ranks.md")
    assert ranks.compared() in text_of("docs/evidence/results.md")
    assert ranks.language() in text_of("docs/evidence/results.md")


def test_the_pictures_of_methods_are_those_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs_tools")
    turns = pytest.importorskip("turns")
    ours = {title: turns.multiplied(config) for title, (_, config) in turns.METHODS.items()}
    for title, (matrix, principal) in ours.items():
        assert principal == title.startswith(("PSOFT", "LoRA-XS"))
        assert not principal or (matrix[8:, 8:].diagonal() == 1).all()
    blocks_of_8 = ours["OFT, b = 8"][0].clone()
    for start in range(0, 32, 8):
        blocks_of_8[start : start + 8, start : start + 8] = 0
    assert not blocks_of_8.any()


@functools.cache
def said() -> list[str]:
    """Every text in the library, with … for what it fills in."""
    texts = []
    for path in [*(ROOT / "src").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                texts.append("".join(p.value if isinstance(p, ast.Constant) else "…" for p in node.values))  # type: ignore[misc]
    return texts


@pytest.mark.slow
def test_messages_are_those_of_the_library() -> None:
    table = text_of("docs/guides/troubleshooting.md").split("## What messages mean")[1]
    messages = re.findall(r"^\| `([^`]+)`(?! \((?:PEFT.s|transformers.)\))", table, re.MULTILINE)
    assert len(messages) > 15
    for message in messages:
        pattern = re.compile(".*".join(re.escape(part.strip()) for part in message.split("…")), re.DOTALL)
        assert any(pattern.search(text) for text in said()), message


@pytest.mark.slow
def test_exports_and_pictures_are_written(recipes: Path) -> None:
    from transformers import AutoModelForCausalLM

    from isotune import OFTConfig, PsoftConfig, get_peft_model

    tiny_llama().save_pretrained("base")
    for name, config in {
        "opt": PsoftConfig(r=8, target_modules=["q_proj"]),
        "oft": OFTConfig(oft_block_size=8, target_modules=["q_proj"]),
        "demo/psoft/adapter": PsoftConfig(r=8, target_modules=["q_proj"]),
    }.items():
        base = AutoModelForCausalLM.from_pretrained("base")
        get_peft_model(base, config).save_pretrained(f"runs/{name}")
    for page in ("docs/guides/export.md", "docs/guides/inspect.md"):
        for words in WRITTEN[page]:
            done = CliRunner().invoke(isotune_cli.app, words)
            assert done.exit_code == 0, (words, done.output)
