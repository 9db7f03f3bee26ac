"""What a configuration accepts, refuses and stores."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig

from isotune import PsoftConfig
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


@pytest.mark.parametrize("name", ["rank", "psoft_alhpa", "lora_alpha", "block_size"])
def test_a_misspelt_option_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        PsoftConfig(**{name: 8})


def test_defaults_are_strict_and_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = PsoftConfig()
    assert config.r == 32
    assert config.psoft_alpha is None
    assert config.scale_of("any") == 1.0
    assert config.peft_type == "ISOTUNE_PSOFT"


def test_the_names_of_peft_are_fields() -> None:
    from peft import PsoftConfig as TheirConfig

    # The solver stops by itself at a tolerance, and is deterministic: nobody chooses iterations or a seed.
    needless = {"psoft_svd_lowrank_niter", "random_seed"}
    assert set(TheirConfig.__dataclass_fields__) - set(config_fields(PsoftConfig)) <= needless


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
    assert stored["isotune_format"] == FORMAT_VERSION
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
