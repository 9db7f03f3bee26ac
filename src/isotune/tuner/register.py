"""Registration of isotune's methods with PEFT."""

from __future__ import annotations

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils import PeftType, register_peft_method

from isotune.internals.enumeration import add_member
from isotune.internals.model_cards import install_cards
from isotune.internals.peft_hooks import install_hooks
from isotune.methods import METHODS
from isotune.model_card import tags_of, write_cards
from isotune.tuner.model import IsotuneModel


def register() -> None:
    """Register every method with PEFT; repeated calls change nothing."""
    install_hooks()
    install_cards(write_cards, tags_of)
    prefix = IsotuneModel.prefix
    for method, config in METHODS.items():
        # PEFT's registration accepts members of its enumeration alone, through which get_model_status() lists types.
        kind = add_member(PeftType, f"{prefix}{method}".upper())
        config.method_type = kind
        if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
            register_peft_method(name=f"{prefix}{method}", config_cls=config, model_cls=IsotuneModel, prefix=prefix)
        assert PEFT_TYPE_TO_TUNER_MAPPING[kind] is IsotuneModel
        assert PEFT_TYPE_TO_PREFIX_MAPPING[kind] == prefix
