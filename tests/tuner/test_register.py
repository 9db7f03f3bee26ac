"""What PEFT knows of isotune's methods once isotune is imported, and the versions that isotune runs on."""

from __future__ import annotations

import copy
import pickle
import warnings

import peft
import pytest
import torch
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from helpers import Stack, layers_of
from isotune import PsoftConfig
from isotune.errors import IsotuneWarning, UnsupportedVersionError
from isotune.tuner.model import IsotuneModel
from isotune.tuner.register import check_versions, register


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


def test_methods_of_peft_stay_as_they_are() -> None:
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.PSOFT] is peft.PsoftConfig
    assert peft.PsoftConfig is not PsoftConfig
    model = peft.get_peft_model(Stack(), peft.LoraConfig(target_modules=["second"]))
    assert "lora_A" in " ".join(model.state_dict())
    assert layers_of(model) == []


@pytest.mark.parametrize(("library", "version"), [("torch", "2.5.1"), ("peft", "0.21.1"), ("peft", "0.9")])
def test_old_versions_are_refused(library: str, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr({"torch": torch, "peft": peft}[library], "__version__", version)
    with pytest.raises(UnsupportedVersionError, match=rf"{library} .* or later, and {version} is installed"):
        check_versions()
    assert issubclass(UnsupportedVersionError, ImportError)
    assert issubclass(UnsupportedVersionError, ValueError)


@pytest.mark.parametrize("version", ["0.22.0", "0.22.1.dev0", "1.0"])
def test_untested_versions_give_one_warning(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft, "__version__", version)
    with pytest.warns(IsotuneWarning, match="tested with peft below") as given:
        check_versions()
    assert len(given) == 1


def test_present_versions_are_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_versions()
