"""The methods: each is one file with a configuration and an operator, and one line here."""

from isotune.config import IsotuneConfig
from isotune.methods.psoft import PsoftConfig

METHODS: dict[str, type[IsotuneConfig]] = {
    "psoft": PsoftConfig,
}
"""Name of the method -> its configuration. The PEFT type is ISOTUNE_ and the name in capitals."""

__all__ = ["METHODS", "PsoftConfig"]
