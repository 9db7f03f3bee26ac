"""`isotune recipes --keys`: every key of a recipe, with its usual value."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from isotune.experiments.recipe import Recipe, RecipeError, keys_of
from isotune.experiments.reference import reference, to_text
from isotune_cli import app


def test_every_key_is_there_with_its_usual_value() -> None:
    found = reference()
    sections = {key.rpartition(".")[0] for key in keys_of(Recipe)}
    assert set(found) == {
        key for key in keys_of(Recipe) if key not in sections - {"baselines"} and "baselines." not in key
    }
    assert (found["train.weight_decay"], found["model"], found["train.moving.every"]) == (0.0, "needed", 1)
    lines = to_text().splitlines()
    assert [line.split()[0] for line in lines if line and line[0] != "#"] == list(found)
    assert max(map(len, lines)) <= 110


def test_those_of_a_section() -> None:
    done = CliRunner().invoke(app, ["recipes", "train", "--keys", "--json"])
    found = json.loads(done.stdout)
    assert found == reference("train")
    assert {key.partition(".")[0] for key in found} == {"train"}
    assert re.match(r"# How to train: AdamW", to_text("train"))
    assert list(reference("train.lr")) == ["train.lr"]
    with pytest.raises(RecipeError, match=r"no key 'trian'; did you mean 'train'"):
        reference("trian")
