"""`isotune rank`, and sizes as an option of recipes: the same choice as the library's, and clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import isotune_cli as cli
from chats import chat_tokenizer, conversations, preferences, words
from helpers import tiny_bert, tiny_llama
from isotune import PsoftConfig, choose_ranks
from isotune.experiments import methods
from isotune.experiments.files import read_json
from isotune.experiments.loading import load
from isotune.experiments.preview import preview
from isotune.experiments.recipe import Method, RecipeError
from isotune.experiments.train import plan, train

runner = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    tiny_llama().save_pretrained(path / "llama")
    tiny_bert().save_pretrained(path / "bert")
    for name in ("llama", "bert"):
        chat_tokenizer().save_pretrained(path / name)
    rows = [f"{words(i)},{'ab'[i % 2]}" for i in range(24)]
    (path / "texts.csv").write_text("\n".join(["text,label", *rows]))
    conversations(12).to_json(path / "chats.jsonl")
    preferences(12).to_json(path / "pairs.jsonl")
    return path


def called(*arguments: Any) -> dict[str, Any]:
    done = runner.invoke(cli.app, ["rank", *map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_table_is_the_librarys_choice(folder: Path) -> None:
    found = called(folder / "llama", "--budget", "2k", "--target", "q_proj,v_proj")
    config = PsoftConfig(target_modules=["q_proj", "v_proj"], rank_budget=2000)
    expected = choose_ranks(tiny_llama(), config)
    assert found["options"] == expected.options
    assert found["parameters"] == expected.parameters <= 2000
    assert [layer["size"] for layer in found["layers"]] == [layer.size for layer in expected.layers]
    done = runner.invoke(cli.app, ["rank", str(folder / "llama"), "--budget", "2k", "--target", "q_proj,v_proj"])
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[3:7]] == [layer.module for layer in expected.layers]
    assert lines[8].startswith("4 layers, mean energy")
    assert lines[8].endswith(f"{expected.parameters:,}")
    hint, _, rest = lines[-1].removeprefix("in a recipe: ").partition("; ")
    assert rest == "--json prints these sizes as options"
    assert set(hint.split()) == {
        "method.name=psoft",
        "method.r=auto",
        "method.rank_budget=2k",
        "method.target_modules=[q_proj,v_proj]",
    }


@pytest.mark.parametrize("file", ["texts.csv", "chats.jsonl", "pairs.jsonl"])
@pytest.mark.parametrize("method", ["psoft", "oft"])
@pytest.mark.slow
def test_activations_are_those_on_a_file(folder: Path, file: str, method: str) -> None:
    arguments = (folder / "llama", "--budget", "3k", "--target", "q_proj,o_proj", "--method", method)
    measured = called(*arguments, "--data", folder / file)
    assert measured["parameters"] <= 3000
    energies = [[layer["energy"] for layer in one["layers"]] for one in (measured, called(*arguments))]
    assert energies[0] != pytest.approx(energies[1], rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "hra"], "hra has no sizes by layer; --method may be psoft"),
        (["--method", "psfot"], "Did you mean 'psoft'?"),
        (["--method", "oft"], "block sizes of OFT are chosen for a number of parameters: give --budget"),
        (["--budget", "1k", "--energy", "0.5"], "give --budget or --energy, and not both"),
        (["--budget", "9"], "too small"),
        (["--budget", "many"], "such as 80000, 80k or 1.2M"),
        (["--energy", "2"], "it must be in (0, 1]"),
        (["r=8"], "isotune rank chooses r itself; leave it out"),
        (["--data", "nothing.csv"], "there is no data file nothing.csv"),
        (["--data", "TEXTS", "--text", "body"], "there is no column 'body'; name one of text, label by --text"),
        (["--data", "TEXTS", "--values"], "give one of them"),
    ],
)
def test_refusals(folder: Path, arguments: list[str], said: str) -> None:
    given = [str(folder / "texts.csv") if one == "TEXTS" else one for one in arguments]
    done = runner.invoke(cli.app, ["rank", str(folder / "llama"), *given])
    assert (done.exit_code, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("measure", ["squares", "activations"])
def test_a_recipe_trains_with_chosen_ranks(folder: Path, tmp_path: Path, measure: str) -> None:
    (tmp_path / "recipe.yaml").write_text(
        f"""
model: {folder / "bert"}
data: {{files: {{train: {folder / "texts.csv"}, validation: {folder / "texts.csv"}, test: {folder / "texts.csv"}}}}}
method: {{name: psoft, r: auto, rank_budget: 2k, rank_measure: {measure}}}
train: {{epochs: 1, batch_size: 8, max_length: 32}}
output: {tmp_path / "run"}
"""
    )
    recipe = load(str(tmp_path / "recipe.yaml"))
    shown = preview(plan(recipe))["methods"][0]["trainable_parameters"]
    train(recipe)
    (file,) = tmp_path.glob("run/*/adapter/adapter_config.json")
    stored = json.loads(file.read_text())
    assert isinstance(stored["r"], int)
    assert stored["rank_pattern"]
    assert not {*methods.SIZE_CHOICES} & stored.keys()
    record = read_json(file.parents[1] / "run.json")
    assert 1000 < record["adapter_parameters"] <= 2000
    assert record["trainable_parameters"] == shown


def test_a_recipe_refuses_what_the_configuration_refuses() -> None:
    for options, said in (
        ({"name": "psoft", "r": 46, "rank_budget": "80k"}, 'set r="auto"'),
        ({"name": "hra", "rank_budget": "80k"}, "whose size by layer nothing can choose"),
        ({"name": "hra", "r": "auto"}, "method.r"),
        ({"name": "lora", "rank_budget": "80k"}, "unknown key 'method.rank_budget'"),
    ):
        with pytest.raises(RecipeError, match=said):
            methods.checked(Method.model_validate(options))
    methods.checked(Method(name="lora_xs", r="auto"))


def test_chosen_sizes_are_those_that_an_adapter_would_choose(folder: Path) -> None:
    model = tiny_bert()
    asked = Method(name="psoft", rank_budget=2000)
    sized = methods.with_sizes(asked, model, ["classifier"], "SEQ_CLS", list)
    adapted = methods.attach(asked, tiny_bert(), ["classifier"], "SEQ_CLS")
    config = adapted.peft_config["default"]
    assert sized.options == {"r": config.r, "rank_pattern": config.rank_pattern}
    assert methods.with_sizes(sized, model, ["classifier"], "SEQ_CLS", list) is sized
