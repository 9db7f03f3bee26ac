"""An option of the wrong type is one ValueError that names it, by Python and from adapter_config.json."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import pytest
from peft import TaskType

from helpers import QUICK
from isotune.errors import AdapterFileError
from isotune.methods import METHODS
from isotune.methods.checks import check_types, require_choice, shown

SAMPLES: dict[str, Any] = {
    "null": None,
    "bool": True,
    "int": 4,
    "half": 0.5,
    "float": 4.5,
    "nan": math.nan,
    "huge": 10**400,
    "str": "x",
    "number in a string": "8",
    "strings": ["q_proj"],
    "ints": [1],
    "null in a list": [None],
    "lists": [["q_proj"]],
    "empty list": [],
    "str to int": {"q_proj": 2},
    "str to float": {"q_proj": 0.5},
    "str to str": {"q_proj": "2"},
    "str to bool": {"q_proj": True},
    "str to null": {"q_proj": None},
    "empty dict": {},
}
INTEGERS, NUMBERS = {"int", "huge"}, {"int", "half", "float", "nan"}
STRINGS = {"str", "number in a string"}
ALLOWED: dict[str, set[str]] = {
    "bool": {"bool"},
    "int": INTEGERS,
    "int | None": {*INTEGERS, "null"},
    "int | str | None": {*INTEGERS, *STRINGS, "null"},
    "int | Literal['auto']": INTEGERS,
    "float": NUMBERS,
    "float | None": {*NUMBERS, "null"},
    "list[str] | None": {"strings", "empty list", "null"},
    "list[str] | str | None": {"strings", "empty list", "null", *STRINGS},
    "list[int] | int | None": {"ints", "empty list", "null", *INTEGERS},
    "dict[str, int]": {"str to int", "empty dict"},
    "dict[str, float]": {"str to int", "str to float", "empty dict"},
    "Optional[str]": {"null", *STRINGS},
    "Optional[Union[str, PeftType]]": {"null", *STRINGS},
    "Optional[Union[str, TaskType]]": {"null", *STRINGS},
    "Optional[dict]": {"null", *(name for name in SAMPLES if name.startswith("str to")), "empty dict"},
}
"""Annotation -> samples of that type, which are taken or refused for another reason; a Literal takes none of them."""


def options_of(method: str) -> dict[str, str]:
    """Name of an option -> its annotation."""
    types = {option.name: option.type for option in fields(METHODS[method])}
    return {
        name: kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind)) for name, kind in types.items()
    }


@pytest.mark.parametrize("method", METHODS)
def test_every_annotation_is_known(method: str) -> None:
    assert not {kind for kind in options_of(method).values() if kind not in ALLOWED and "Literal" not in kind}


@pytest.mark.filterwarnings("ignore::isotune.errors.IsotuneWarning")
@pytest.mark.parametrize("method", METHODS)
def test_an_option_of_the_wrong_type(method: str) -> None:
    for option, kind in options_of(method).items():
        for sample in SAMPLES.keys() - ALLOWED.get(kind, set()):
            with pytest.raises(ValueError, match="format" if option == "isotune_format" else option) as refused:
                METHODS[method](**{option: SAMPLES[sample]})
            assert len(str(refused.value)) < 600
        for sample in ALLOWED.get(kind, set()):
            with contextlib.suppress(ValueError):  # its range, or what it needs besides
                METHODS[method](**{option: SAMPLES[sample]})


@pytest.mark.filterwarnings("ignore::isotune.errors.IsotuneWarning")
@pytest.mark.parametrize("method", METHODS)
def test_an_option_of_the_wrong_type_in_the_file(method: str, tmp_path: Path) -> None:
    METHODS[method](**({"r": 4} if method == "cersa" else {})).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    stored = json.loads(file.read_text())
    common = options_of("psoft").items() if method != "psoft" else ()
    for option, kind in options_of(method).items():
        if option in ("peft_type", "isotune_format"):  # what PEFT itself reads, and what has a message of its own
            continue
        samples = sorted(SAMPLES.keys() - ALLOWED.get(kind, set()))
        for sample in samples[:1] if QUICK or (option, kind) in common else samples:  # all once for what all have
            if option not in stored:  # never stored, or only where it is not the default, but a file may hold it
                assert option in (*METHODS[method].runtime_fields, *METHODS[method].format_since)
            file.write_text(json.dumps({**stored, option: SAMPLES[sample]}))
            with pytest.raises(AdapterFileError) as refused:
                METHODS[method].from_pretrained(str(tmp_path))
            assert str(refused.value).startswith(f"{file}: {option}=")


@pytest.mark.parametrize("content", ["[" * 100_000 + "]" * 100_000, '{"r": ' * 50_000, "[1]", "nonsense", "", '"x"'])
def test_a_file_that_is_no_configuration(content: str, tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_text(content)
    with pytest.raises(AdapterFileError) as refused:
        METHODS["psoft"].from_pretrained(str(tmp_path))
    assert str(file) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_a_caller_gives_is_not_laid_to_the_file(tmp_path: Path) -> None:
    METHODS["psoft"]().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^on_base_mismatch='ignore' is not one of 'error', 'warn'"):
        METHODS["psoft"].from_pretrained(str(tmp_path), on_base_mismatch="ignore")


@pytest.mark.parametrize("modules", [["q"], ("q",), {"q"}, frozenset(["q"]), "q", "all-linear", None])
def test_what_peft_and_transformers_pass_is_taken(modules: Any) -> None:
    config = METHODS["psoft"](target_modules=modules, task_type=TaskType.CAUSAL_LM, layers_to_transform=None)
    assert config.task_type == "CAUSAL_LM"
    assert METHODS["oft"](target_modules=["q"], layers_to_transform=range(2)).layers_to_transform == range(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"basis_seed": -1}, "basis_seed=-1 .* from 0 to 4294967295"),
        ({"basis_seed": 2**32}, "basis_seed"),
        ({"rank_pattern": {"(q": 2}}, r"rank_pattern has the key '\(q'"),
        ({"alpha_pattern": {"*": 2.0}}, "alpha_pattern"),
        ({"task_type": "CAUSAL"}, "task_type='CAUSAL' .* Did you mean 'CAUSAL_LM'"),
        ({"target_modules": ["q", 3]}, "target_modules=.* a list of strings or a string or None"),
    ],
)
def test_messages(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        METHODS["psoft"](**options)


@dataclass
class Example:
    """One option of each kind."""

    flag: bool = True
    count: int = 1
    share: float = 0.5
    choice: Literal["a", "b"] = "a"
    names: list[str] | None = None
    table: dict[str, int] = field(default_factory=dict)


def test_the_mechanism_by_itself() -> None:
    check_types(Example())
    check_types(Example(share=1, names=["x"], table={"x": 1}))
    for wrong, allowed in (
        ({"flag": 1}, "True or False"),
        ({"count": True}, "an integer"),
        ({"share": "0.5"}, "a number"),
        ({"choice": "c"}, "'a', 'b'"),
        ({"names": "x"}, "a list of strings or None"),
        ({"table": {1: 1}}, "a dictionary from strings to integers"),
    ):
        with pytest.raises(ValueError, match=allowed) as refused:
            check_types(Example(**wrong))  # type: ignore[arg-type]
        assert str(refused.value).startswith(next(iter(wrong)))


def test_large_and_deep_values_are_shown_short() -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    for value in (10**400, "x" * 10_000, nested):
        assert len(shown(value)) <= 121
    with pytest.raises(ValueError, match="'a', 'b'"):
        require_choice("letter", ["a"], ("a", "b"))
