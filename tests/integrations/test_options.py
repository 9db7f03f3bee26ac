"""What a trainer's own file says becomes a configuration, or is refused by isotune's own error."""

from __future__ import annotations

import pytest

from isotune.integrations import config_from, require_unset
from isotune.methods import METHODS


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_reached(method: str) -> None:
    config = config_from({"method": method, "target_modules": ["q_proj"]})
    assert type(config) is METHODS[method]
    assert config.target_modules == {"q_proj"}


def test_presets_fix_their_options() -> None:
    assert config_from({"method": "coft"}).coft is True
    with pytest.raises(ValueError, match="option of coft='coft' is not one of"):
        config_from({"method": "coft", "coft": False})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "method=None is not one of"),
        ({"method": "psfot"}, "Did you mean 'psoft'"),
        ({"method": "oft", "oft_blok_size": 8}, "Did you mean 'oft_block_size'"),
        ({"method": "psoft", "r": 0}, "r=0 is not allowed"),
    ],
)
def test_refusals(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config_from(options)


def test_settings_of_another_method_are_refused() -> None:
    require_unset({}, "")
    with pytest.raises(ValueError, match=r"lora_r=8 is not allowed; .*which isotune does not read; put it there"):
        require_unset({"lora_r": 8}, "put it there")
