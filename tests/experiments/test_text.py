"""Text from outside: deep, damaged, or written for another program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import isotune_cli as cli
from comparisons import METHODS, write_comparison
from isotune.experiments.data import load
from isotune.experiments.files import read_json
from isotune.experiments.loading import load as load_recipe
from isotune.experiments.methods import checked
from isotune.experiments.recipe import RecipeError
from isotune.experiments.sections import Data
from isotune.experiments.tables import DataError
from isotune.experiments.text import DEEPEST, YamlError, from_json, from_yaml, printable, shown
from isotune.experiments.train import train

DEEP = "[" * 20_000 + "]" * 20_000
ESCAPES = "\x1b[2J\x1b]0;title\x07\r\u202e\u2028\x85\ud800"


@pytest.mark.parametrize("depth", [DEEPEST + 1, 300, 20_000])
@pytest.mark.parametrize("brackets", ["[]", "{}"])
def test_what_is_nested_too_deep_is_an_error_of_one_line(depth: int, brackets: str) -> None:
    one = "[" if brackets == "[]" else '{"a": '
    text = one * depth + "1" + brackets[1] * depth
    for parse in (from_json, from_yaml):
        with pytest.raises(ValueError, match=f"nested more than {DEEPEST} deep") as caught:
            parse(text)
        assert "\n" not in str(caught.value)


def test_what_is_as_deep_as_allowed_is_read_and_a_structure_in_itself_is_not() -> None:
    text = "[" * DEEPEST + "]" * DEEPEST
    assert from_json(text) == from_yaml(text)
    with pytest.raises(YamlError, match="nested more than"):
        from_yaml("&a [*a]")
    # Each list holds the one before nine times: small as it stands, and 9 ** 40 lists long when it is walked.
    laughs = "\n".join(["a0: &a0 [1]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40))])
    assert len(shown(from_yaml(laughs)["a39"])) <= 200


@pytest.mark.parametrize(
    "text", ["when: 2020-13-45", "!!int ''", "!!bool perhaps", "!!timestamp x", "9" * 5000, "a: 1\na: 2"]
)
def test_what_yaml_itself_cannot_convert_is_an_error_of_yaml(text: str) -> None:
    with pytest.raises(YamlError):
        from_yaml(text)


def test_mappings_are_merged_in_yaml() -> None:
    text = "a: &a {x: 1, y: 1}\nb: &b {<<: *a, y: 2}\nc: {<<: [*b, {z: 3, x: 9}], z: 4}"
    assert from_yaml(text) == {"a": {"x": 1, "y": 1}, "b": {"x": 1, "y": 2}, "c": {"x": 1, "y": 2, "z": 4}}
    assert from_yaml("a: &a {<<: *a, x: 1}") == {"a": {"x": 1}}
    for twice, key in (
        ("{<<: {x: 1}, <<: {y: 1}}", "<<"),
        ("{<<: {x: 1, x: 2}}", "x"),
        ("{<<: {x: 1}, y: 1, y: 2}", "y"),
    ):
        with pytest.raises(YamlError, match=f"the key '{key}' is given twice"):
            from_yaml(twice)
    with pytest.raises(YamlError, match="expected a mapping or list of mappings for merging"):
        from_yaml("<<: 5")
    # Each merges the one before nine times: 9 ** 40 entries, if one stayed for each time that it is merged.
    laughs = "\n".join(
        ["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 40))]
    )
    assert from_yaml(laughs)["a39"] == {"x": 1}


def test_digits_of_base_60_are_text() -> None:
    assert from_yaml("[1:10, -12:30:00, 1:10.5, 10, 0x1F, -1.5, 1.0e+3]") == [
        *("1:10", "-12:30:00", "1:10.5"),
        *(10, 31, -1.5, 1000.0),
    ]
    with pytest.raises(RecipeError, match=r"method\.r: should be a valid integer.*'1:10'"):
        checked(load_recipe("demo", ["method.r=1:10"]).method)


@pytest.mark.slow
def test_deep_files_are_one_line_that_names_the_file(tmp_path: Path, tiny: dict[str, Any]) -> None:
    path = tmp_path / "x.json"
    path.write_text(DEEP)
    with pytest.raises(ValueError, match=r"cannot read .*x\.json: .*nested"):
        read_json(path)
    recipe = tmp_path / "x.yaml"
    for text in ("model: " + DEEP, "".join(" " * i + "a:\n" for i in range(2000))):
        recipe.write_text(text)
        with pytest.raises(RecipeError, match=r"x\.yaml: not valid YAML: .*nested"):
            load_recipe(str(recipe))
    with pytest.raises(RecipeError, match=r"train\.lr: the value .* is not valid YAML: .*nested"):
        load_recipe("demo", [f"train.lr={DEEP}"])
    for name in ("x.jsonl", "x.json"):
        (tmp_path / name).write_text(f'{{"text": "a", "label": {DEEP}}}' if name == "x.jsonl" else DEEP)
        with pytest.raises(DataError, match=rf"{name}.*not valid JSON: .*nested"):
            load(Data.model_validate({"files": {"train": str(tmp_path / name), "test": str(tmp_path / name)}}))
    folder = Path(tiny["output"])
    folder.mkdir()
    (folder / "experiment.json").write_text(DEEP)
    recipe.write_text(json.dumps(tiny))
    with pytest.raises(ValueError, match=r"experiment\.json: .*nested"):
        train(load_recipe(str(recipe)))


def test_printable_text_is_one_line_that_means_nothing_to_a_terminal() -> None:
    assert printable("PSOFT r=46, α and β: 3 µs ≈ …") == "PSOFT r=46, α and β: 3 µs ≈ …"
    found = printable(f"a{ESCAPES}b")
    assert found.isprintable()
    assert found.startswith("a\\x1b[2J")
    found.encode()
    assert printable("a\nb\tc", keep="\n\t") == "a\nb\tc"


def test_names_from_files_reach_no_terminal_as_they_are(tmp_path: Path) -> None:
    folder = write_comparison(
        tmp_path / "a", recipe=f"x{ESCAPES}", methods={label: METHODS[label] for label in ("psoft:r=46", "head")}
    )
    for path in [folder / "comparison.json", *(folder / "runs").rglob("*.json")]:
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "model": ESCAPES, "command": ESCAPES, "failed": ESCAPES}))
    for form in ("md", "csv", "latex"):
        done = CliRunner().invoke(cli.app, ["report", str(folder), "--format", form])
        assert done.exit_code == 0, done.output
        assert all(line.isprintable() for line in done.stdout.split("\n"))
    recipe = tmp_path / "x.yaml"
    recipe.write_text(json.dumps({"model": "m", "data": {}, ESCAPES.replace("\ud800", ""): 1}))
    done = CliRunner().invoke(cli.app, ["train", str(recipe)])
    assert done.exit_code == 2
    assert all(line.isprintable() for line in done.stderr.split("\n"))
