"""What a configuration accepts, refuses and stores."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
from peft import PeftConfig
from torch import nn

from isotune import BOFTConfig, HRAConfig, OFTConfig, PsoftConfig, get_peft_model
from isotune.errors import AdapterFileError
from isotune.methods.config import FORMAT_VERSION, config_fields

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"r": 0}, "r=0"),
    ({"r": -3}, "r=-3"),
    ({"r": 2.5}, r"r=2\.5"),
    ({"r": True}, "r=True"),
    ({"r": "8"}, "r='8'"),
    ({"r": None}, "r=None"),
    ({"psoft_alpha": 0}, "psoft_alpha=0"),
    ({"psoft_alpha": -1.0}, "psoft_alpha"),
    ({"psoft_alpha": float("nan")}, "psoft_alpha"),
    ({"psoft_alpha": float("inf")}, "psoft_alpha"),
    ({"alpha_pattern": {"q": -1.0}}, "alpha_pattern"),
    ({"alpha_pattern": {"q": 0.0}}, "alpha_pattern"),
    ({"psoft_dropout": 1.0}, "psoft_dropout"),
    ({"psoft_dropout": -0.1}, "psoft_dropout"),
    ({"psoft_dropout": float("nan")}, "psoft_dropout"),
    ({"ab_svd_init": "psoft_inti"}, "Did you mean 'psoft_init'"),
    ({"psoft_svd": "ful"}, "Did you mean 'full'"),
    ({"psoft_svd": None}, "psoft_svd"),
    ({"basis": "pined"}, "Did you mean 'pinned'"),
    ({"bias": "lora_only"}, "bias='lora_only'"),
    ({"on_base_mismatch": "ignore"}, "on_base_mismatch"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
    ({"rank_pattern": {"q_proj": 1.5}}, "rank_pattern"),
    ({"num_cayley_neumann_terms": 0}, "num_cayley_neumann_terms"),
    ({"use_cayley_neumann": True, "cayley_neumann_eps": 1.0}, "between 0 and 1"),
    ({"use_cayley_neumann": True, "cayley_neumann_eps": 0.0}, "between 0 and 1"),
    ({"cayley_neumann_eps": 0.5}, "use_cayley_neumann"),
    ({"use_cayley_neumann": True, "psoft_orth": False}, "psoft_orth"),
    ({"layers_pattern": "layers"}, "layers_to_transform"),
    ({"target_modules": "q_proj", "layers_to_transform": [0]}, "target_modules"),
    ({"target_modules": "(q_proj"}, "regular expression"),
    ({"target_modules": ["q_proj"], "exclude_modules": "*q"}, "regular expression"),
]


@pytest.mark.filterwarnings("ignore::isotune.errors.IsotuneWarning")
@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[str(options) for options, _ in REFUSED])
def test_refused_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PsoftConfig(**options)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rank", "PsoftConfig got an unexpected keyword argument 'rank'"),
        ("psoft_alhpa", "'psoft_alhpa'. Did you mean 'psoft_alpha'"),
        ("target_module", "'target_module'. Did you mean 'target_modules'"),
        ("x", "'x'. It has .*target_modules.*psoft_alpha"),
    ],
)
def test_a_misspelt_option_is_refused(name: str, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        PsoftConfig(**{name: 8})
    assert list(inspect.signature(PsoftConfig).parameters)[-1] == "scaled_generator"  # and help() shows the options


def test_what_a_later_version_writes_into_a_file_is_left_out(tmp_path: Path) -> None:
    PsoftConfig(r=4, target_modules=["q"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "of_tomorrow": 1, "ensure_weight_tying": False}))
    with pytest.warns(UserWarning, match=r"\['ensure_weight_tying', 'of_tomorrow'\]"):
        assert PsoftConfig.from_pretrained(tmp_path).r == 4


def test_defaults_are_strict_and_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = PsoftConfig()
    assert config.r == 32
    assert config.psoft_alpha is None
    assert config.scale_of("any") == 1.0
    assert config.peft_type == "ISOTUNE_PSOFT"


OURS = {"PsoftConfig": PsoftConfig, "OFTConfig": OFTConfig, "BOFTConfig": BOFTConfig, "HRAConfig": HRAConfig}
THEIRS = [name for name in OURS if hasattr(peft, name)]
"""Those that the installed PEFT has; PSOFT came with 0.19."""


@pytest.mark.parametrize("name", THEIRS)
def test_every_option_of_peft_is_an_option(name: str) -> None:
    theirs = getattr(peft, name)
    assert set(theirs.__dataclass_fields__) <= set(config_fields(OURS[name]))


def variants(theirs: type[Any]) -> Iterator[dict[str, Any]]:
    """PEFT's defaults, and every value of its options that its documentation names, one at a time."""
    choices: dict[str, list[Any]] = {
        "target_modules": [["q_proj"], "q_proj", "all-linear"],
        "exclude_modules": [["k_proj"], "k_proj"],
        "modules_to_save": [["score"]],
        "layers_to_transform": [0, [0, 1]],
        "task_type": [peft.TaskType.CAUSAL_LM, "SEQ_CLS"],
        "bias": ["all", theirs.__name__.removesuffix("Config").lower() + "_only"],
        "fan_in_fan_out": [True],
        "init_weights": [False],
        "inference_mode": [True],
        "psoft_alpha": [16, 64],
        "psoft_dropout": [0.1],
        "ab_svd_init": ["pissa_init"],
        "psoft_svd": ["lowrank"],
        "psoft_svd_lowrank_niter": [4, 0],
        "random_seed": [7],
        "psoft_orth": [False],
        "psoft_mag_a": [False],
        "psoft_mag_b": [False],
        "use_cayley_neumann": [True, False],
        "num_cayley_neumann_terms": [3],
        "oft_block_size": [16],
        "module_dropout": [0.1],
        "coft": [True],
        "eps": [1e-4],
        "block_share": [True],
        "boft_block_size": [8],
        "boft_n_butterfly_factor": [2],
        "boft_dropout": [0.1],
        "apply_GS": [False],
        "r": [16],
    }
    base = {"target_modules": ["q_proj"]}
    yield base
    for option in theirs.__dataclass_fields__:
        for value in choices.get(option, []):
            yield {**base, option: value}
    if theirs is peft.OFTConfig:
        yield {**base, "r": 4, "oft_block_size": 0}
    if theirs is peft.BOFTConfig:
        yield {**base, "boft_block_size": 0, "boft_block_num": 4}
    yield {**base, "layers_to_transform": [1], "layers_pattern": "layers"}
    yield {**base, "layers_pattern": []}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", THEIRS)
def test_a_configuration_of_peft_is_one_of_isotune(name: str) -> None:
    theirs, known = getattr(peft, name), 0
    for options in variants(theirs):
        if name == "OFTConfig" and options.get("r") == 16:
            continue  # PEFT refuses its own default block size beside it
        whole = {key: value for key, value in theirs(**options).to_dict().items() if key != "peft_type"}
        for given in (options, whole):
            config = OURS[name](**given)
            assert config.bias in ("none", "all", "isotune_only")
            known += 1
    assert known > 20


NOT_TAKEN = [
    # What is refused of what PEFT's configurations accept, and why.
    ("HRAConfig", {"r": 7}, "odd number of reflections"),  # not the identity at the start
    ("HRAConfig", {"apply_GS": True}, "init_weights=False"),  # NaN in PEFT, from directions that are equal in pairs
    ("PsoftConfig", {"cayley_neumann_eps": 0.9}, "use_cayley_neumann"),  # no effect in PEFT either
    ("PsoftConfig", {"use_cayley_neumann": True, "psoft_orth": False}, "no effect"),  # likewise
    ("OFTConfig", {"r": 0, "oft_block_size": 32, "module_dropout": 0.1, "block_share": True}, "no effect"),
    ("PsoftConfig", {"psoft_svd_lowrank_niter": -1}, "psoft_svd_lowrank_niter=-1"),
    ("PsoftConfig", {"psoft_svd_lowrank_niter": 2.5}, "psoft_svd_lowrank_niter=2.5 .* an integer or None"),
    ("PsoftConfig", {"random_seed": -1}, "random_seed=-1"),
    ("PsoftConfig", {"bias": "psoft_only"}, "bias='psoft_only'"),  # PEFT's PSOFT has no such option
    ("OFTConfig", {"bias": "boft_only"}, "bias='boft_only'"),
]


@pytest.mark.parametrize(("name", "options", "message"), NOT_TAKEN)
def test_what_of_peft_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OURS[name](**options)


def test_options_without_a_meaning_here_are_not_stored(tmp_path: Path) -> None:
    PsoftConfig(psoft_svd="lowrank", psoft_svd_lowrank_niter=3, random_seed=5).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not {"psoft_svd_lowrank_niter", "random_seed"} & stored.keys()
    assert PsoftConfig.from_pretrained(str(tmp_path)).psoft_svd_lowrank_niter is None


@pytest.mark.parametrize("module", ["layers.1.q_proj", "q_proj"])
def test_patterns(module: str) -> None:
    config = PsoftConfig(r=8, psoft_orth=False, rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 2.0})
    assert config.rank_of(module) == 4
    assert config.scale_of(module) == 0.5
    assert config.rank_of("layers.1.k_proj") == 8
    assert config.scale_of("layers.1.k_proj") == 1.0


def test_saved_and_read_again(tmp_path: Path) -> None:
    config = PsoftConfig(
        r=6,
        target_modules=["v_proj", "q_proj"],
        exclude_modules=["b", "a"],
        rank_pattern={"q_proj": 3},
        basis="embedded",
        on_base_mismatch="warn",
        subspace_cache=False,
        use_cayley_neumann=True,
        cayley_neumann_eps=0.4,
    )
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["isotune_format"] == 1
    assert stored["target_modules"] == ["q_proj", "v_proj"]
    assert not {"on_base_mismatch", "subspace_cache"} & set(stored)
    assert json.loads(json.dumps(stored)) == stored
    for read in (PsoftConfig.from_pretrained(tmp_path), PeftConfig.from_pretrained(tmp_path)):
        assert isinstance(read, PsoftConfig)
        for name in set(stored) - {"inference_mode", "target_modules", "exclude_modules", "auto_mapping"}:
            assert getattr(read, name) == getattr(config, name), name
        assert set(read.target_modules) == {"q_proj", "v_proj"}
        assert read.on_base_mismatch == "error"
    assert PsoftConfig.from_pretrained(tmp_path, on_base_mismatch="warn").on_base_mismatch == "warn"


def test_the_same_configuration_gives_the_same_file(tmp_path: Path) -> None:
    for folder, order in (("a", ["q", "k", "v", "o"]), ("b", ["o", "v", "q", "k"])):
        PsoftConfig(target_modules=order).save_pretrained(tmp_path / folder)
    first, second = ((tmp_path / folder / "adapter_config.json").read_text() for folder in ("a", "b"))
    assert first == second


@pytest.mark.parametrize("version", [0, -1, FORMAT_VERSION + 1, "next", None])
def test_an_unknown_format_is_refused(version: Any) -> None:
    with pytest.raises(AdapterFileError, match="pip install -U isotune"):
        PsoftConfig(isotune_format=version)


def test_a_base_that_was_named_by_a_path_is_saved_with_a_card(tmp_path: Path) -> None:
    """PEFT writes such a name into the card as an object of Python's, which no reader of YAML takes."""
    base = nn.Sequential(nn.Linear(8, 8))
    base.config = {"_name_or_path": tmp_path / "base", "model_type": "own"}  # type: ignore[assignment]
    model = get_peft_model(base, PsoftConfig(r=2, target_modules=["0"]))
    model.save_pretrained(str(tmp_path / "adapter"))
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert "python/object" not in text
    assert str(tmp_path) not in text
    assert "import isotune" in text
