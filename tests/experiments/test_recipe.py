"""Recipes: loading, overrides, and one clear line for every kind of mistake."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from isotune.experiments import methods
from isotune.experiments.loading import load, packaged
from isotune.experiments.recipe import ELSEWHERE, RecipeError, keys_of, merit
from isotune.experiments.recipe import Recipe as RecipeModel
from isotune.experiments.registry import entry

MINIMAL = """
model: some/model
data: {files: {train: a.csv, test: b.csv}}
method: lora
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    (tmp_path / "mine.yaml").write_text(MINIMAL)
    return str(tmp_path / "mine.yaml")


def test_every_packaged_recipe_is_valid() -> None:
    assert {name.partition("/")[0] for name in packaged()} == {
        *("demo", "docstrings", "few-shot", "arc", "gsm8k"),
        *("glue", "vtab", "math", "commonsense"),
    }
    for name in packaged():
        recipe = load(name)
        assert recipe.output == f"runs/{name}"
        for method in recipe.methods:
            methods.checked(method)
        assert recipe.description
        for variant in packaged()[name].get("variants", {}):
            varied = load(name, [f"variant={variant}"])
            assert varied.output == f"runs/{name}-{variant}"
            for method in varied.methods:
                methods.checked(method)


def test_a_variant_lies_between_the_recipe_and_the_overrides(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(MINIMAL + "train: {lr: 1, epochs: 5}\nvariants: {slow: {train: {lr: 2, seed: 3}, metric: null}}\n")
    plain, slow = load(str(mine)), load(str(mine), ["train.seed=9", "variant=slow"])
    assert (plain.train.lr, plain.train.epochs, plain.train.seed, plain.output) == ([1], 5, 0, "runs/mine")
    assert (slow.train.lr, slow.train.epochs, slow.train.seed, slow.output) == ([2], 5, 9, "runs/mine-slow")
    assert load(str(mine), ["variant=null"]) == plain


@pytest.mark.parametrize(
    ("variants", "variant", "said"),
    [
        ("{slow: {}, fast: {}}", "slwo", "there is no variant 'slwo'; variants: slow, fast; did you mean 'slow'"),
        ("{}", "slow", "there is no variant 'slow'; it has none at all"),
        ("{slow: {}}", "[slow]", r"there is no variant \['slow'\]"),
        ("{slow: 3}", "slow", "variants should be names, each with keys of a recipe below it"),
        ("[slow]", "slow", "variants should be names"),
        ("{slow: {train: {lrr: 2}}}", "slow", "did you mean 'train.lr'"),
    ],
)
def test_a_wrong_variant_is_one_line(tmp_path: Path, variants: str, variant: str, said: str) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"{MINIMAL}variants: {variants}\n")
    with pytest.raises(RecipeError, match=said) as caught:
        load(str(mine), [f"variant={variant}"])
    assert "mine.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_cola_has_the_papers_settings() -> None:
    train = load("glue/cola").train
    assert (train.lr, train.lr_head, train.epochs, train.batch_size) == ([6e-4], 5e-4, 20, 32)
    assert (train.max_length, train.warmup_ratio, train.schedule) == (64, 0.1, "linear")


def test_overrides_reach_nested_keys_and_are_read_as_yaml(path: str) -> None:
    recipe = load(
        path,
        [
            "method.r=8",
            "train.lr=[1e-3, 2e-3]",
            "train.select_best=false",
            "data.text=[a, b]",
            "output=there",
        ],
    )
    assert recipe.method.name == "lora"
    assert recipe.method.options == {"r": 8}
    assert recipe.train.lr == [1e-3, 2e-3]
    assert recipe.train.select_best is False
    assert recipe.data.text == ["a", "b"]
    assert recipe.output == "there"


def test_a_method_may_replace_the_whole_section() -> None:
    assert load("demo", ["method=head"]).method.options == {}


def test_a_methods_own_training_settings_go_over_the_recipes(path: str) -> None:
    recipe = load(path, ["train.epochs=7", "method.train={lr: 0.5}"])
    assert recipe.training(recipe.method).lr == [0.5]
    assert recipe.training(recipe.method).epochs == 7


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.lrr=1", ["'train.lrr'", "lr_head", "did you mean 'train.lr'?"]),
        ("lr=1", ["'lr'", "did you mean 'train.lr'?"]),
        ("train.learning_rate=1e-3", ["did you mean 'train.lr'?"]),
        ("train.per_device_train_batch_size=4", ["did you mean 'train.batch_size'?"]),
        ("gradient_accumulation_steps=4", ["did you mean 'train.gradient_accumulation'?"]),
        ("train.max_seq_length=4", ["did you mean 'train.max_length'?"]),
        ("modle=x", ["'modle'", "did you mean 'model'?"]),
        ("data.files.trian=x.csv", ["'data.files.trian'", "did you mean 'data.files.train'?"]),
        ("model.size=3", ["'model.size'", "'model' has no keys below it"]),
        ("train.epochs=many", ["train.epochs", "valid number", "'many'"]),
        ("train.epochs=true", ["train.epochs: should be a number or a text, not True"]),
        ("train.seed=false", ["train.seed: should be a number or a text, not False"]),
        ("train.lr=true", ["train.lr: should be a number or a text, not True"]),
        ("train.batch_size=0", ["train.batch_size", "greater than 0", "0"]),
        ("train.batch_size=2.5", ["train.batch_size", "integer", "2.5"]),
        ("train.lr=[1e-3, fast]", ["train.lr", "valid number", "'fast'"]),
        ("train.lr=[]", ["train.lr", "at least 1"]),
        ("train.lr=.nan", ["train.lr", "finite"]),
        ("train.warmup_ratio=1.5", ["train.warmup_ratio", "less than 1"]),
        (
            "train.schedule=linaer",
            ["train.schedule", "'linear', 'cosine' or 'constant'", "did you mean 'linear'?"],
        ),
        ("method.name=psfot", ["method.name", "'psoft_so'", "did you mean 'psoft'?"]),
        ("metric=f1", ["metric", "'accuracy', 'matthews_correlation'", "'f1'"]),
        ("data.files=null", ["one of data.files, data.hub and data.builtin is needed"]),
        ("data.split_seed=some", ["data.split_seed", "integer", "'some'"]),
        ("data.split_generator=torch", ["data.split_generator", "'python', 'numpy' or 'numpy-legacy'"]),
        ("learn=text", ["learn is for the tasks multiple-choice, math, not for text-classification"]),
        ("padding.side=left", ["padding is for the tasks", "not for text-classification"]),
        ("train.start_from_head=true", ["needs 'head' among the baselines"]),
        ("method.train={lrr: 1}", ["in 'train' of method lora", "'lrr'", "did you mean 'lr'?"]),
        ("train.moving={every: 2}", ["train.moving is for ", "psoft", "and not for lora"]),
        ("method.name=uora", ["uora needs train.reinit with threshold, weight and every", "not public"]),
        ("train.reinit={threshold: 1, weight: 1, every: 2}", ["train.reinit is for uora, and not for lora"]),
        ("method.train.reinit={threshold: 0.1, every: 2}", ["the key 'reinit.weight' is missing"]),
        ("method.train.moving.select=gradient", ["select", "'top', 'bottom', 'band' or 'warm'", "'gradient'"]),
        ("model", ["an override is key=value", "'model'"]),
        ("=3", ["an override is key=value"]),
        ("train..lr=3", ["an override is key=value"]),
        ("train.lr=[1", ["train.lr", "'[1' is not valid YAML"]),
    ],
)
def test_a_wrong_override_is_one_line(path: str, override: str, said: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        load(path, [override])
    message = str(caught.value)
    assert "\n" not in message
    for part in said:
        assert part in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: [", "line"),
        ("- a\n- b", "a mapping of keys to values, not list"),
        ("", "a mapping of keys to values, not NoneType"),
        ("model: a\nmodel: b", "'model' is given twice"),
        ("model: a\nmethod: lora", "the key 'data' is missing"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=said) as caught:
        load(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_or_name_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"there is no recipe file .*absent\.yaml"):
        load(str(tmp_path / "absent.yaml"))
    (tmp_path / "chats.jsonl").write_text("{}")
    (tmp_path / "mine.yaml").write_text("")
    with pytest.raises(RecipeError, match=r"did you mean '.*mine\.yaml'\? `isotune init` writes one"):
        load(str(tmp_path / "mien.yml"))
    with pytest.raises(RecipeError, match=r"chats\.jsonl holds data and is no recipe"):
        load(str(tmp_path / "chats.jsonl"))
    with pytest.raises(RecipeError, match=r"; did you mean 'glue/cola'\? `isotune recipes` lists all"):
        load("glue/coal")
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        load(str(tmp_path))
    (tmp_path / "latin").write_bytes(b"model: caf\xe9")
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        load(str(tmp_path / "latin"))


def test_keys_are_dotted() -> None:
    assert {"model", "train.lr", "data.hub.name", "data.files.columns"} <= set(keys_of(RecipeModel))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["method.rank=8"], "unknown key 'method.rank': .*; did you mean 'method.r'"),
        (["method.lora_alhpa=8"], "did you mean 'method.lora_alpha'"),
        (["method.r=eight"], r"method.r: .*integer.*'eight'"),
        (["method.r=true"], "method.r: should be a number or a text, not True"),
        (["method={name: head, r: 3}"], "the method head has no options, given r"),
        (["method={name: psoft, r: -1}"], "method psoft: .*r=-1"),
        (["method={name: psoft_so, psoft_mag_a: true}"], "unknown key 'method.psoft_mag_a'"),
        (["method.modules_to_save=[x]"], "unknown key 'method.modules_to_save'"),
    ],
)
def test_method_options_are_checked_against_the_configuration(path: str, overrides: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        methods.checked(load(path, overrides).method)


def test_method_options_are_kept_as_the_configuration_reads_them(path: str) -> None:
    options = "r: '8', psoft_mag_a: 'false', layers_to_transform: null, use_cayley_neumann: 'yes'"
    given = [f"method={{name: psoft, {options}}}"]
    read = methods.checked(load(path, given).method)
    assert read.options == {"r": 8, "psoft_mag_a": False, "use_cayley_neumann": True}
    assert entry("psoft").title_of(read.options) == "PSOFT r=8 no α use_cayley_neumann=True"


def test_configurations_have_scale_one_on_all_linear_layers() -> None:
    lora = methods.adapter_config("lora", r=8)
    assert (lora.r, lora.lora_alpha, lora.use_dora, lora.target_modules) == (8, 8, False, "all-linear")
    assert methods.adapter_config("lora", r=8, lora_alpha=16).lora_alpha == 16
    assert methods.adapter_config("dora").use_dora is True
    so, full = methods.adapter_config("psoft_so", r=4), methods.adapter_config("psoft", r=4)
    assert (so.psoft_mag_a, so.psoft_mag_b, full.psoft_mag_a, full.psoft_mag_b) == (False, False, True, True)
    assert full.psoft_alpha in (None, 4)


def test_a_missing_metric_is_worse_than_any_score() -> None:
    assert merit("accuracy", None) == merit("accuracy", {}) == merit("loss", {"accuracy": 1.0}) == -math.inf
    assert merit("loss", {"loss": 3.0}) == -3.0 > merit("loss", {})
    assert merit("pearson", {"pearson": -1.0}) > merit("pearson", {})


@pytest.mark.parametrize(
    "key", ["train.batch_size", "train.max_steps", "train.seed", "max_new_tokens", "data.max_train"]
)
def test_integers_of_hundreds_of_digits_are_one_line(path: str, key: str) -> None:
    with pytest.raises(RecipeError, match=f"{key}: should be less than") as caught:
        load(path, [f"{key}={10**400}"])
    assert len(str(caught.value)) < 200


def test_names_elsewhere_are_of_keys_that_there_are() -> None:
    leaves = {key.rpartition(".")[2] for key in keys_of(RecipeModel)} | {"r"}
    assert set(ELSEWHERE.values()) <= leaves
    assert not set(ELSEWHERE) & leaves
