"""Checks of a configuration's options: their types, taken from the annotations, and their ranges."""

from __future__ import annotations

import math
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from functools import cache, lru_cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from isotune.errors import IsotuneWarning

_SHOWN = 120
"""How many characters of a value a message shows."""
_KINDS: dict[Any, tuple[tuple[type, ...], str, str]] = {
    bool: ((bool,), "True or False", "truth values"),
    int: ((int,), "an integer", "integers"),
    float: ((float, int), "a number", "numbers"),
    str: ((str,), "a string", "strings"),
    type(None): ((type(None),), "None", "nothing"),
}
"""Annotation -> the types of its values, and what messages call one of them and several."""

_hints: Callable[[Any], dict[str, Any]] = cache(get_type_hints)


def check_types(config: Any) -> None:
    """Refuse the first option of a dataclass whose value does not have its annotated type.

    An integer counts as a number if it fits a float; True and False do not. A set or a tuple may stand for a list.
    Nothing is converted.

    Args:
        config: a dataclass instance, annotated with bool, int, float, str, None, Literal, list, dict and unions of
            them; other annotations are not checked.

    Raises:
        ValueError: names the option, what was given and what is allowed.
    """
    hints = _hints(type(config))
    for option in fields(config):
        value, hint = getattr(config, option.name), hints[option.name]
        if _fits(value, hint):
            continue
        if get_origin(hint) is Literal:
            require_choice(option.name, value, get_args(hint))
        require(False, option.name, value, f"it must be {_described(hint)}")


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint) or hint, get_args(hint)
    if hint in _KINDS:
        if isinstance(value, bool) and hint is not bool:
            return False
        if hint is float and isinstance(value, int) and abs(value) > sys.float_info.max:
            return False
        return isinstance(value, _KINDS[hint][0])
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in inner)
    if origin is Literal:
        return any(value is choice or (type(value) is type(choice) and value == choice) for choice in inner)
    if origin is list:
        several = isinstance(value, (list, tuple, set, frozenset, range))
        return several and all(_fits(item, part) for part in inner for item in value)
    if origin is dict:
        return isinstance(value, Mapping) and (
            not inner or all(_fits(key, inner[0]) and _fits(item, inner[1]) for key, item in value.items())
        )
    return isinstance(value, hint) if isinstance(hint, type) else True


def _described(hint: Any, *, several: bool = False) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if hint in _KINDS:
        _, one, many = _KINDS[hint]
        return many if several else one
    if origin in (Union, types.UnionType):
        parts = [part for part in inner if not (isinstance(part, type) and issubclass(part, str) and part is not str)]
        return " or ".join(_described(part, several=several) for part in parts)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, inner))
    if origin is list:
        return f"a list of {_described(inner[0], several=True)}"
    if origin is dict:
        return f"a dictionary from {_described(inner[0], several=True)} to {_described(inner[1], several=True)}"
    return "a dictionary" if hint is dict else f"a {getattr(hint, '__name__', hint)}"


def shown(value: Any) -> str:
    """A value as a message shows it, however large it is.

    Examples:
        >>> shown("x" * 1000)[-3:]
        'xx…'
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or very deep nesting
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def require(fits: bool, name: str, value: Any, allowed: str) -> None:
    """Refuse the value of an option unless it is allowed.

    Args:
        fits: whether the value is allowed.
        name: name of the option.
        value: the value that was given.
        allowed: the end of the message, which says what is allowed.

    Raises:
        ValueError: the value is not allowed.

    Examples:
        >>> require(False, "eps", -1.0, "it must be above 0")
        Traceback (most recent call last):
        ValueError: eps=-1.0 is not allowed; it must be above 0.
    """
    if not fits:
        raise ValueError(f"{name}={shown(value)} is not allowed; {allowed}.")


def require_positive_integer(name: str, value: Any) -> None:
    """`require` an integer of at least 1."""
    fits = isinstance(value, int) and not isinstance(value, bool) and value > 0
    require(fits, name, value, "it must be an integer of at least 1")


_SEED_LIMIT = 2**32
"""Seeds of numpy's frozen random stream lie below this."""


def require_seed(name: str, value: int) -> None:
    """`require` a seed of numpy's frozen random stream."""
    require(0 <= value < _SEED_LIMIT, name, value, f"it must be an integer from 0 to {_SEED_LIMIT - 1}")


def require_number(name: str, value: float, below: float = math.inf) -> None:
    """`require` a finite number of at least 0 and below a limit, such as 1 for a probability."""
    allowed = "a number of at least 0" if below == math.inf else f"in [0, {below:g})"
    require(0.0 <= value < below, name, value, f"it must be {allowed}")


def require_choice(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Refuse a value that is not one of a few choices.

    Args:
        name: name of the option.
        value: the value that was given.
        allowed: the choices.

    Raises:
        ValueError: the value is none of them; the message lists the choices and suggests the nearest.

    Examples:
        >>> require_choice("psoft_svd", "fulll", ["auto", "full", "lowrank"])
        Traceback (most recent call last):
        ValueError: psoft_svd='fulll' is not one of 'auto', 'full', 'lowrank'. Did you mean 'full'?
    """
    choices = tuple(allowed)
    if value not in choices:
        near = get_close_matches(str(value), map(str, choices), n=1) if isinstance(value, str) else []
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}={shown(value)} is not one of {', '.join(map(repr, choices))}.{hint}")


def whole_number(name: str, value: int | str) -> int:
    """A number of parameters, as an integer or as a text such as "80k" or "1.2M".

    Raises:
        ValueError: it is no such number, or less than 1.

    Examples:
        >>> whole_number("rank_budget", "80k")
        80000
    """
    text = str(value)
    unit = {"k": 1_000, "m": 1_000_000, "g": 1_000_000_000}.get(text[-1:].lower(), 1)
    try:
        found = round(float(text[:-1] if unit > 1 else text) * unit)
    except (ValueError, OverflowError):
        found = 0
    require(found >= 1, name, value, "it must be a number of parameters, such as 80000, 80k or 1.2M")
    return found


_OF_LORA = {
    "ensure_weight_tying": "A module in modules_to_save is trained on its own, even if the base model ties it to "
    "another; to train both, name both, such as modules_to_save=['embed_tokens', 'lm_head'].",
    "trainable_token_indices": "Train the whole embedding instead, with modules_to_save=['embed_tokens'], or rotate "
    "it, with target_modules=['embed_tokens'].",
}
"""Options of PEFT's LoRA that no method here has -> what to do instead."""


def require_options(config: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse options that a configuration does not have, with a better message than Python's.

    Args:
        config: name of the configuration's class.
        given: the given options, by name.
        known: names of the options that the class has.

    Raises:
        ValueError: an option of LoRA alone is set; the message says what to do instead.
        TypeError: any other unknown option, such as a misspelt one; the message suggests the nearest. PEFT recognises
            the wording of this message, and then drops options of a file that only later versions know.

    Examples:
        >>> require_options("PsoftConfig", {"psoft_alhpa": 8}, ["r", "psoft_alpha"])
        Traceback (most recent call last):
        TypeError: PsoftConfig got an unexpected keyword argument 'psoft_alhpa'. Did you mean 'psoft_alpha'?
    """
    names = tuple(known)
    for name, value in given.items():
        if name in names:
            continue
        if value and name in _OF_LORA:
            raise ValueError(f"{name}={shown(value)} is not allowed: only LoRA has this option. {_OF_LORA[name]}")
        near = get_close_matches(name, names, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"It has {', '.join(names)}."
        raise TypeError(f"{config} got an unexpected keyword argument {name!r}. {hint}")


def require_expressions(name: str, given: str | Mapping[str, Any]) -> None:
    """Refuse an invalid regular expression, given as an option or as a key of an option by module.

    Raises:
        ValueError: names the option, the expression and what is wrong with it.
    """
    for expression in [given] if isinstance(given, str) else given:
        try:
            re.compile(expression)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(
                f"{name}={shown(expression)} is not a valid regular expression ({error}); use a list for plain names."
                if isinstance(given, str)
                else f"{name} has the key {shown(expression)}, which is neither a module name nor a valid "
                f"regular expression ({error}); correct or remove it."
            ) from None


def require_sizes(name: str, given: Mapping[str, Any]) -> None:
    """Refuse an option by module whose keys are no names or expressions, or whose values are no positive integers.

    Raises:
        ValueError: names the option, the key and what is wrong.
    """
    require_expressions(name, given)
    for key, size in given.items():
        require_positive_integer(f"{name}[{key!r}]", size)


def divisor_for(name: str, value: int, module: str, width: int, adjust: str = "refuse", *, side: str = "input") -> int:
    """Return a number that divides the width of a module, or its nearest divisor, the lower of two, if allowed.

    Args:
        name: name of the option.
        value: the number, at least 1.
        module: name of the module, for the message.
        width: the number of the module's inputs or outputs.
        adjust: "refuse" raises if the number does not divide the width; "nearest" warns and takes the nearest divisor.
        side: "input" or "output", for the message.

    Raises:
        ValueError: the number does not divide the width; the message names the nearest that do.

    Examples:
        >>> divisor_for("oft_block_size", 32, "q_proj", 768)
        32
    """
    if value <= width and width % value == 0:
        return value
    divisors = [d for d in range(1, width + 1) if width % d == 0]
    nearest = min(divisors, key=lambda d: (abs(d - value), d))
    if adjust == "nearest":
        _say_once(f"{name}={value} does not divide the {width} {side}s of some modules; {nearest} is used there.")
        return nearest
    around = [*[d for d in divisors if d < value][-1:], *[d for d in divisors if d > value][:1]]
    raise ValueError(
        f"{name}={value} does not divide the {width} {side}s of {module!r}; the nearest that do are "
        f"{' or '.join(map(str, around))}. Choose one that divides the width of every adapted module, or exclude this "
        "module with exclude_modules."
    )


@lru_cache(maxsize=256)
def _say_once(message: str) -> None:
    warnings.warn(message, IsotuneWarning, stacklevel=2)
