"""Text from outside: parsed without overflowing the stack, and shown without commanding a terminal."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Sequence
from typing import Any

import yaml

DEEPEST = 100
"""How deep lists and mappings may lie in each other: far more than any file here has, far less than Python's stack."""
_TOO_DEEP = f"lists and mappings are nested more than {DEEPEST} deep"

_BRIEF = reprlib.Repr()
_BRIEF.maxstring, _BRIEF.maxother, _BRIEF.maxlong, _BRIEF.maxlevel = 120, 120, 40, 3


class YamlError(ValueError):
    """A text is not valid YAML; `line` is where, counted from 1, or None where the parser does not say."""

    def __init__(self, problem: str, line: int | None = None) -> None:
        super().__init__(problem)
        self.line = line


def printable(text: str, keep: str = "") -> str:
    """The text with every character that is not printable written as its escape, such as `\\x1b`.

    Line breaks, terminal escape sequences, marks that change the direction of writing and lone surrogates are not
    printable, so that the result is one line which means nothing to a terminal and can be encoded. Characters in `keep`
    stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def clean(value: Any) -> Any:
    """JSON with every text and key in it made `printable`."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, list):
        return [clean(one) for one in value]
    if isinstance(value, dict):
        return {printable(str(key)): clean(one) for key, one in value.items()}
    return value


def shown(value: Any) -> str:
    """A value in an error message: its `repr`, cut short where it is long or deep."""
    found = _BRIEF.repr(value)
    return found if len(found) <= 200 else f"{found[:199]}…"


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    said = str(error).strip()
    return said.splitlines()[0].strip() if said else type(error).__name__


def aligned(lines: Sequence[Sequence[str]], sides: str) -> list[str]:
    """Lines of cells as columns of text, each to the left or right side: "<" or ">" a column."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(f"{c:{s}{w}}" for c, s, w in zip(line, sides, widths, strict=True)) for line in lines]


def from_json(text: str) -> Any:
    """Parse JSON, no object with a key twice; raises a ValueError with the reason, also if deeper than DEEPEST."""
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    _check_depth(value)
    return value


def from_yaml(text: str) -> Any:
    """Parse YAML, no mapping with a key twice; raises YamlError, also where it is nested deeper than DEEPEST.

    The key `<<` merges mappings into another. What YAML 1.1 takes for a number of base 60, such as 1:10, is text.
    """
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise YamlError(str(getattr(error, "problem", None) or error), mark.line + 1 if mark else None) from error
    except RecursionError as error:
        raise YamlError(_TOO_DEEP) from error
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        # A scalar that PyYAML's own constructor cannot convert, such as the date 2020-13-45 or an empty `!!int`.
        raise YamlError(f"a value that cannot be read ({error})") from error
    try:
        _check_depth(value)
    except ValueError as error:
        raise YamlError(str(error)) from error
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, of whose equal keys `json` would keep the last and say nothing."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return found


def _check_depth(value: Any) -> None:
    """Raise ValueError where lists and mappings lie in each other more than DEEPEST deep, or in themselves."""
    seen: dict[int, int] = {}
    waiting = [(value, 1)]
    while waiting:
        node, depth = waiting.pop()
        if not isinstance(node, (dict, list)) or seen.get(id(node), 0) >= depth:
            continue
        if depth > DEEPEST:
            raise ValueError(_TOO_DEEP)
        seen[id(node)] = depth
        waiting += [(one, depth + 1) for one in (node.values() if isinstance(node, dict) else node)]


_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys and says nothing; in a recipe that hides a mistake."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Put what is merged into a mapping before its own keys, which must differ and override it."""
        keys = ["<<" if key.tag == _MERGE else self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key!r} is given twice", problem_mark=node.start_mark
                )
        super().flatten_mapping(node)
        if "<<" in keys:
            # Left in, what is overridden would be found twice when this is merged into others, and grow with each.
            last = {self.construct_object(key, deep=True): (key, value) for key, value in node.value}
            node.value = list(last.values())

    def construct_number(self, node: yaml.ScalarNode) -> Any:
        """A number, or text where YAML 1.1 sees digits of base 60, which no one means."""
        if ":" in node.value:
            return node.value
        whole = node.tag == "tag:yaml.org,2002:int"
        return self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)
