"""Adding members to PEFT's enumeration `PeftType`, which `register_peft_method` requires and nothing public allows."""

from __future__ import annotations

import enum
from typing import TypeVar

Member = TypeVar("Member", bound=enum.Enum)


def add_member(enumeration: type[Member], name: str) -> Member:
    """Add a member whose value is its own name to an enumeration of strings; an existing member is returned as it is.

    Every Python from 3.10 to 3.14 keeps three tables on the class: `_member_map_` for E[name], `_member_names_` for
    iteration, and `_value2member_map_` for E(name), thus for unpickling and copying. E.NAME is an ordinary attribute.

    Raises:
        TypeError: the members of `enumeration` are not strings.
        ValueError: `name` is not an upper-case identifier, or is an attribute of the class but not a member.
        RuntimeError: this version of Python does not find the new member by name, value or attribute.

    >>> class Colour(str, enum.Enum):
    ...     RED = "RED"
    >>> add_member(Colour, "GREEN")
    <Colour.GREEN: 'GREEN'>
    >>> list(Colour) == ["RED", "GREEN"] and Colour("GREEN") is Colour["GREEN"] is Colour.GREEN
    True
    """
    if name in enumeration.__members__:
        return enumeration[name]
    if not issubclass(enumeration, str):
        raise TypeError(f"{enumeration.__name__} is not an enumeration of strings; derive it from str and enum.Enum.")
    if not (name.isidentifier() and name.isupper()) or hasattr(enumeration, name):
        raise ValueError(
            f"{name!r} cannot be a member of {enumeration.__name__}; give an unused upper-case identifier."
        )
    member = str.__new__(enumeration, name)
    member._name_, member._value_ = name, name
    setattr(enumeration, name, member)  # first: an attribute that is a member already cannot be set
    enumeration._member_map_[name] = member
    enumeration._value2member_map_[name] = member
    enumeration._member_names_.append(name)
    if not (enumeration[name] is enumeration(name) is getattr(enumeration, name) is list(enumeration)[-1] is member):
        raise RuntimeError(f"This version of Python does not accept {name} as a member of {enumeration.__name__}.")
    return member
