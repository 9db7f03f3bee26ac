"""What PEFT knows of isotune's methods once isotune is imported."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from helpers import Stack, layers_of
from isotune import PsoftConfig
from isotune.tuner.model import IsotuneModel
from isotune.tuner.register import register


def test_registering_again_changes_nothing() -> None:
    before = list(PeftType.__members__), dict(PEFT_TYPE_TO_CONFIG_MAPPING), dict(PEFT_TYPE_TO_TUNER_MAPPING)
    register()
    register()
    assert (list(PeftType.__members__), PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING) == before
    assert list(PeftType.__members__).count("ISOTUNE_PSOFT") == 1
    assert PEFT_TYPE_TO_TUNER_MAPPING["ISOTUNE_PSOFT"] is IsotuneModel


def test_the_type_behaves_like_a_member() -> None:
    kind = PeftType("ISOTUNE_PSOFT")
    assert kind == "ISOTUNE_PSOFT"
    assert kind.value == kind.name == "ISOTUNE_PSOFT"
    assert kind in list(PeftType)
    assert isinstance(kind, PeftType)
    assert PeftType["ISOTUNE_PSOFT"] is kind
    assert PeftType.ISOTUNE_PSOFT is kind
    assert copy.deepcopy(kind) is pickle.loads(pickle.dumps(kind)) is kind
    assert {kind: 1}["ISOTUNE_PSOFT"] == 1


@pytest.mark.skipif("PSOFT" not in PEFT_TYPE_TO_CONFIG_MAPPING, reason="PEFT has its own PSOFT from 0.19 on")
def test_methods_of_peft_stay_as_they_are() -> None:
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.PSOFT] is peft.PsoftConfig
    assert peft.PsoftConfig is not PsoftConfig
    model = peft.get_peft_model(Stack(), peft.LoraConfig(target_modules=["second"]))
    assert "lora_A" in " ".join(model.state_dict())
    assert layers_of(model) == []
