"""Ranks and block sizes for a model and data of one's own, as a table: what `isotune rank` shows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from isotune.experiments import methods, tasks
from isotune.experiments.own_columns import fitting
from isotune.experiments.recipe import Method, RecipeError, validate
from isotune.experiments.registry import entries, entry
from isotune.experiments.sections import FileData
from isotune.experiments.starting import starting
from isotune.experiments.tables import DataError, Row, file_rows
from isotune.experiments.tasks.task import MEASURED_EXAMPLES
from isotune.experiments.text import aligned, from_yaml
from isotune.files.base_model import load_base
from isotune.methods import METHODS
from isotune.methods.checks import require_choice
from isotune.tools.ranks import choose_ranks
from isotune.tuner.sizes import ChosenSizes

_TOKENS, _BATCH = 512, 8
"""The longest text that activations are measured on, and how many at a time."""
_KINDS = ("chat", "preference", "completion")
"""The kinds of files whose examples are made as they would be trained on; of others texts are read."""


@dataclass(frozen=True)
class Question:
    """What is asked of a model.

    Args:
        model: a folder, a Hub name or package:NAME.
        method, options: a method of isotune as recipes name it, and options of its configuration.
        budget: trainable parameters in all, such as "80k".
        energy: the share of each layer's energy to be held.
        data: a file of texts or conversations, or a folder of images, by whose activations energy is measured.
        text: the column of the file with the texts, where it has no conversations.
        values: whether energy is the sum of singular values and not of their squares.
        trust_remote_code: whether to run code from the model's repository.
    """

    model: str
    method: str = "psoft"
    options: Mapping[str, Any] = field(default_factory=dict)
    budget: str | None = None
    energy: float | None = None
    data: str | None = None
    text: str = "text"
    values: bool = False
    trust_remote_code: bool = False

    def asked(self) -> Method:
        """The method with options that ask for sizes.

        Raises:
            RecipeError: budget, energy and data are not given as they can be, or the method has no such option.
        """
        if self.budget is not None and self.energy is not None:
            raise RecipeError("give --budget or --energy, and not both")
        if self.values and self.data is not None:
            raise RecipeError(
                "--values is about singular values, and --data measures energy on outputs; give one of them"
            )
        sized = {name: METHODS[one.base or ""] for name, one in entries().items() if one.base in METHODS}
        sized = {name: config for name, config in sized.items() if config.size_pattern}
        if self.method in entries() and self.method not in sized:
            raise RecipeError(f"{self.method} has no sizes by layer; --method may be {', '.join(sized)}")
        require_choice("--method", self.method, sized)
        config = sized[self.method]
        if given := {*config.size_names, config.size_pattern} & self.options.keys() - {"boft_n_butterfly_factor"}:
            raise RecipeError(f"isotune rank chooses {min(given)} itself; leave it out")
        on_subspaces = config.size_pattern == "rank_pattern"
        if not on_subspaces and self.budget is None:
            raise RecipeError(
                f"block sizes of {entry(self.method).title} are chosen for a number of parameters: give --budget"
            )
        options: dict[str, Any] = {**self.options, **({"r": "auto"} if on_subspaces else {})}
        if self.budget is not None:
            options["rank_budget"] = self.budget
        if self.energy is not None:
            options["rank_energy"] = self.energy
        if self.values:
            options["rank_measure"] = "values"
        if self.data is not None and on_subspaces:
            options["rank_measure"] = "activations"
        return methods.checked(Method.model_validate({"name": self.method, **options}))


def rank(question: Question) -> tuple[str, dict[str, Any]]:
    """The table of the sizes that are chosen, as text and as JSON.

    Raises:
        ValueError: the model, the method, the data or the budget cannot be used; says why.
    """
    asked = question.asked()
    batches = None if question.data is None else list(_batches(question.model, Path(question.data), question.text))
    base = load_base(question.model, trust_remote_code=question.trust_remote_code)
    found = choose_ranks(base, methods.adapter_config(asked.name, **asked.options), data=batches)
    return _to_text(question, asked, found), _to_dict(question, asked, found)


def _batches(model: str, path: Path, text: str) -> Iterator[dict[str, Any]]:
    """Batches of a file's examples as the model takes them: of conversations and images as they would be trained on."""
    if not path.exists():
        raise DataError(f"there is no data file {path}")
    rows = [] if path.is_dir() else file_rows(FileData(train=[str(path)]), Path())["train"]
    columns = list(rows[0].values) if rows else []
    fits = {"images": dict[str, str]()} if path.is_dir() else fitting(columns)
    kind = next((kind for kind in ("images", *_KINDS) if kind in fits), None)
    if kind is not None and text not in columns:
        recipe = validate(from_yaml(starting(kind, model, str(path), renamed=fits[kind])), f"the recipe for {path}")
        yield from tasks.make(recipe).inputs()
    else:
        yield from _texts(model, rows, text)


def _texts(model: str, rows: list[Row], column: str) -> Iterator[dict[str, Any]]:
    from isotune.experiments.data import cell
    from isotune.experiments.models import tokenizer_for

    if column not in rows[0].values:
        raise DataError(
            f"{rows[0].where}: there is no column {column!r}; name one of {', '.join(rows[0].values)} by --text"
        )
    tokenizer = tokenizer_for(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    texts = [cell(row, column) for row in rows[:MEASURED_EXAMPLES]]
    for start in range(0, len(texts), _BATCH):
        yield dict(
            tokenizer(
                texts[start : start + _BATCH], truncation=True, max_length=_TOKENS, padding=True, return_tensors="pt"
            )
        )


def _measure(asked: Method, question: Question) -> str:
    if "r" not in asked.options:
        on = "" if question.data is None else f", on the inputs that {question.data} gives"
        return f"the share of the effect of all small rotations that is within blocks{on}"
    if question.data is not None:
        return f"of the outputs on {question.data} along the first r singular directions"
    return f"of the first r singular values{'' if question.values else ', squared'}"


def _shown(value: Any) -> str:
    """A value as a recipe's command line takes it, in YAML."""
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return value if isinstance(value, str) else json.dumps(value)


def _to_dict(question: Question, asked: Method, found: ChosenSizes) -> dict[str, Any]:
    uniform = found.uniform
    return {
        "model": question.model,
        "method": asked.name,
        "measure": _measure(asked, question),
        "parameters": found.parameters,
        "energy": found.energy,
        "options": found.options,
        "uniform": uniform and {key: getattr(uniform, key) for key in ("size", "energy", "parameters")},
        "layers": [asdict(layer) for layer in found.layers],
    }


def _to_text(question: Question, asked: Method, found: ChosenSizes) -> str:
    known = entry(asked.name)
    letter, title = next(iter(known.size_names.values())), known.title
    lines = [("layer", "weight", letter, "energy", "parameters")]
    for layer in found.layers:
        shape = f"{layer.shape[0]} × {layer.shape[1]}"
        lines.append((layer.module, shape, str(layer.size), f"{layer.energy:.1%}", f"{layer.parameters:,}"))
    lines.append((f"{len(found.layers)} layers, mean energy", "", "", f"{found.energy:.1%}", f"{found.parameters:,}"))
    uniform = found.uniform
    if uniform is not None:
        name = f"{letter}={uniform.size} in every layer instead"
        lines.append((name, "", str(uniform.size), f"{uniform.energy:.1%}", f"{uniform.parameters:,}"))
    given = [f"method.name={asked.name}", *(f"method.{key}={_shown(value)}" for key, value in asked.options.items())]
    table = aligned(lines, "<<>>>")
    more = 1 if uniform is None else 2
    return "\n".join(
        [
            f"{question.model}, {title}; energy: {_measure(asked, question)}",
            "",
            *table[:-more],
            "",
            *table[-more:],
            "",
            f"in a recipe: {' '.join(given)}; --json prints these sizes as options",
        ]
    )
