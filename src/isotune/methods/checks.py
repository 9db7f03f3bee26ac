"""What an option of a configuration may be: its type, read off the annotations, and its range."""

from __future__ import annotations

import math
import re
import types
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from functools import cache, lru_cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from isotune.errors import IsotuneWarning

_SHOWN = 120
"""Characters of a value in a message."""
_SEED_LIMIT = 2**32
"""What numpy's frozen random stream takes as a seed lies below this."""


def check_types(config: Any) -> None:
    """Refuse the first option of a dataclass that is not of the type that its annotation says.

    An integer is a number too, where it has one as a float; True and False are neither. A set or a tuple may stand for
    a list. Nothing is converted.

    Args:
        config: a dataclass instance, annotated with bool, int, float, str, None, Literal, list, dict and unions of
            them; what is annotated otherwise is not looked at.

    Raises:
        ValueError: names the option, what was given and what is allowed.
    """
    kind: Any = type(config)
    hints = _hints(kind)
    for option in fields(config):
        value, hint = getattr(config, option.name), hints[option.name]
        if _fits(value, hint):
            continue
        if get_origin(hint) is Literal:
            require_choice(option.name, value, get_args(hint))
        raise ValueError(f"{option.name}={shown(value)} is not allowed; it must be {_described(hint)}.")


@cache
def _hints(config: Any) -> dict[str, Any]:
    return get_type_hints(config)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


_TESTS: dict[Any, Callable[[Any], bool]] = {
    bool: lambda value: isinstance(value, bool),
    int: lambda value: isinstance(value, int) and not isinstance(value, bool),
    float: _is_number,
    str: lambda value: isinstance(value, str),
    type(None): lambda value: value is None,
}
_NAMES: dict[Any, tuple[str, str]] = {
    bool: ("True or False", "truth values"),
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    str: ("a string", "strings"),
    type(None): ("None", "nothing"),
}
"""Annotation -> what one of them is called, and several."""


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if hint in _TESTS:
        return _TESTS[hint](value)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in inner)
    if origin is Literal:
        return any(value is choice or (type(value) is type(choice) and value == choice) for choice in inner)
    if hint is list or origin is list:
        several = isinstance(value, (list, tuple, set, frozenset, range))
        return several and all(_fits(item, part) for part in inner[:1] for item in value)
    if hint is dict or origin is dict:
        items = value.items() if isinstance(value, Mapping) else ()
        return isinstance(value, Mapping) and (
            not inner or all(_fits(key, inner[0]) and _fits(item, inner[1]) for key, item in items)
        )
    return isinstance(value, hint) if isinstance(hint, type) else True


def _described(hint: Any, *, several: bool = False) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if hint in _NAMES:
        return _NAMES[hint][several]
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

    Args:
        value: anything.

    Example:
        >>> shown("x" * 1000)[-3:]
        'xx…'
    """
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or a list in a list in a list …
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def require_choice(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Refuse what is not one of a few values.

    Args:
        name: of the option.
        value: what was given.
        allowed: the values.

    Raises:
        ValueError: it is none of them; the message lists them and points to the nearest.

    Example:
        >>> require_choice("psoft_svd", "fulll", ["auto", "full", "lowrank"])
        Traceback (most recent call last):
        ValueError: psoft_svd='fulll' is not one of 'auto', 'full', 'lowrank'. Did you mean 'full'?
    """
    choices = tuple(allowed)
    if value not in choices:
        near = get_close_matches(str(value), map(str, choices), n=1) if isinstance(value, str) else []
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}={shown(value)} is not one of {', '.join(map(repr, choices))}.{hint}")


def require_positive_integer(name: str, value: Any) -> None:
    """Refuse what is not an integer above zero.

    Args:
        name: of the option.
        value: what was given.

    Raises:
        ValueError: names the option and the value.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"{name}={shown(value)} is not allowed; it must be an integer of at least 1.")


def check_seed(name: str, value: int) -> None:
    """Refuse an integer that is no seed.

    Args:
        name: of the option.
        value: what was given.

    Raises:
        ValueError: it is below 0 or above 2³² − 1.
    """
    if not 0 <= value < _SEED_LIMIT:
        raise ValueError(f"{name}={shown(value)} is not allowed; it must be an integer from 0 to {_SEED_LIMIT - 1}.")


def check_alphas(name: str, alpha: float | None, pattern: Mapping[str, float]) -> None:
    """Refuse an alpha that is not a finite number above 0, or the method's own None.

    Args:
        name: of the method's own option.
        alpha: its value.
        pattern: module name or regular expression -> alpha.

    Raises:
        ValueError: names the option and both values.
    """
    if not all(a is None or 0 < a < math.inf for a in (alpha, *pattern.values())):
        raise ValueError(
            f"{name}={alpha!r} with alpha_pattern={shown(pattern)} is not allowed; each must be above 0, or {name} "
            "None for r."
        )


def check_number(name: str, value: float, below: float = math.inf) -> None:
    """Refuse a number that is negative, too large, infinite or NaN.

    Args:
        name: of the option.
        value: what was given.
        below: the first number that is too large, such as 1 for a probability.

    Raises:
        ValueError: names the option and the value.
    """
    if not 0.0 <= value < below:
        allowed = "a number of at least 0" if below == math.inf else f"in [0, {below:g})"
        raise ValueError(f"{name}={value!r} is not allowed; it must be {allowed}.")


def check_expression(name: str, value: str) -> None:
    """Refuse a string that is no regular expression.

    Args:
        name: of the option.
        value: what was given.

    Raises:
        ValueError: names the option and what is wrong with the expression.
    """
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{name}={shown(value)} is not a regular expression ({error}); give a list for plain names."
        ) from None


def check_pattern(name: str, pattern: Mapping[str, Any]) -> None:
    """Refuse a dictionary by module whose keys are no regular expressions.

    Args:
        name: of the option.
        pattern: module name or regular expression -> anything.

    Raises:
        ValueError: names the option and the key.
    """
    for key in pattern:
        try:
            re.compile(key)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(
                f"{name} has the key {shown(key)}, which is neither a module's name nor a regular expression ({error})."
            ) from None


def check_cayley_options(use_neumann: bool, terms: int, bound: float | None) -> None:
    """Refuse options of the Cayley transform that are not allowed or have no effect.

    Args:
        use_neumann: use_cayley_neumann.
        terms: num_cayley_neumann_terms.
        bound: cayley_neumann_eps.

    Raises:
        ValueError: terms below 1; a bound outside of (0, 1), or one without the series.
    """
    require_positive_integer("num_cayley_neumann_terms", terms)
    if bound is None:
        return
    if not use_neumann:
        raise ValueError(
            "cayley_neumann_eps bounds the generator of the Neumann series and has no effect with "
            "use_cayley_neumann=False; leave it None or set use_cayley_neumann=True."
        )
    if not 0.0 < bound < 1.0:
        raise ValueError(
            f"cayley_neumann_eps={bound!r} is not allowed; it must be between 0 and 1, where the series converges."
        )


def divisor_for(name: str, value: int, module: str, width: int, adjust: str = "refuse") -> int:
    """A number if it divides the inputs of a module, else the nearest divisor, the lower of two, if that is allowed.

    Args:
        name: of the option.
        value: at least 1.
        module: for the message.
        width: in_features.
        adjust: "refuse" or "nearest".

    Raises:
        ValueError: it does not divide them; the message names the nearest that do.

    Example:
        >>> divisor_for("oft_block_size", 32, "q_proj", 768)
        32
    """
    if value <= width and width % value == 0:
        return value
    divisors = [d for d in range(1, width + 1) if width % d == 0]
    nearest = min(divisors, key=lambda d: (abs(d - value), d))
    if adjust == "nearest":
        _say_once(f"{name}={value} does not divide the {width} inputs of some modules; {nearest} is used there.")
        return nearest
    around = [max((d for d in divisors if d < value), default=0), min((d for d in divisors if d > value), default=0)]
    names = " or ".join(str(d) for d in around if d)
    raise ValueError(
        f"{name}={value} does not divide the {width} inputs of {module!r}; the nearest that do are {names}. Choose one "
        "that divides the width of every adapted module, or exclude this one with exclude_modules."
    )


@lru_cache(maxsize=256)
def _say_once(message: str) -> None:
    warnings.warn(message, IsotuneWarning, stacklevel=2)
