"""Registration of isotune's methods with PEFT."""

from __future__ import annotations

import warnings

import peft
import torch
from packaging.version import Version
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils import PeftType, register_peft_method

from isotune.errors import IsotuneWarning, UnsupportedVersionError
from isotune.internals.enumeration import add_member
from isotune.methods import METHODS
from isotune.tuner.model import IsotuneModel

MINIMUM_VERSIONS = {"torch": "2.6", "peft": "0.21.2"}
UNTESTED_VERSIONS = {"peft": "0.22"}


def check_versions() -> None:
    """Refuse versions of torch and PEFT that isotune does not run on, and say so once for untested ones.

    Raises:
        UnsupportedVersionError: a version below the minimum; it is both a ValueError and an ImportError.
    """
    for name, found in (("torch", torch.__version__), ("peft", peft.__version__)):
        if Version(found).release < Version(MINIMUM_VERSIONS[name]).release:
            raise UnsupportedVersionError(
                f"isotune needs {name} {MINIMUM_VERSIONS[name]} or later, and {found} is installed: "
                f"pip install -U '{name}>={MINIMUM_VERSIONS[name]}'."
            )
        limit = UNTESTED_VERSIONS.get(name)
        if limit is not None and Version(found).release >= Version(limit).release:
            warnings.warn(
                f"isotune was tested with {name} below {limit}, and {found} is installed; if something fails, "
                f"pip install '{name}<{limit}'.",
                IsotuneWarning,
                stacklevel=2,
            )


def peft_type_of(method: str) -> PeftType:
    """The PEFT type of a method, ISOTUNE_…, made on the first call.

    PEFT's own registration takes names of its enumeration only, and get_model_status() lists types through it, so the
    enumeration is given the member.
    """
    return add_member(PeftType, f"{IsotuneModel.prefix}{method}".upper())


def register() -> None:
    """Make every method known to PEFT; more calls change nothing."""
    check_versions()
    prefix = IsotuneModel.prefix
    for method, config in METHODS.items():
        kind = peft_type_of(method)
        config.method_type = kind
        if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
            register_peft_method(name=f"{prefix}{method}", config_cls=config, model_cls=IsotuneModel, prefix=prefix)
        assert PEFT_TYPE_TO_TUNER_MAPPING[kind] is IsotuneModel
        assert PEFT_TYPE_TO_PREFIX_MAPPING[kind] == prefix
