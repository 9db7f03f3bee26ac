"""isotune inside other trainers: one file per tool, imported by that tool and by nothing in isotune."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from isotune.methods import METHODS
from isotune.methods.checks import require, require_choice
from isotune.methods.config import IsotuneConfig


def config_from(options: Mapping[str, Any]) -> IsotuneConfig:
    """Make the configuration that a trainer's own file describes by `method` and the options of that method.

    Args:
        options: "method", the name of a method or preset ("coft", "psoft_so"), and any fields of its configuration.

    Raises:
        ValueError: there is no such method or option, or its value is not allowed; the message says what is.

    Examples:
        >>> config_from({"method": "psoft", "r": 8, "target_modules": "all-linear"}).r
        8
    """
    presets = {name: (base, fixed) for base, cls in METHODS.items() for name, (_, fixed) in cls.presets.items()}
    named = dict(options)
    method = named.pop("method", None)
    require_choice("method", method, [*METHODS, *presets])
    base, fixed = presets.get(method, (method, {}))
    allowed = sorted({field.name for field in fields(METHODS[base]) if field.init} - set(fixed))
    for name in named:
        require_choice(f"the option of {method}", name, allowed)
    return METHODS[base](**named, **fixed)


def require_unset(given: Mapping[str, Any], where: str) -> None:
    """Refuse a trainer's own LoRA settings, which isotune would not read.

    Args:
        given: the settings that are set, by name.
        where: end of the message, which says where to set such options instead.

    Raises:
        ValueError: a setting is set; names the first.
    """
    for name, value in given.items():
        require(False, name, value, f"it is a setting of another method, which isotune does not read; {where}")
