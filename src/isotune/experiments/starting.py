"""A recipe to start from for data of one's own, each key below a comment that says what it is for."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from isotune.experiments.recipe import Recipe, RecipeError, meant, validate
from isotune.experiments.registry import entries, entry
from isotune.methods import METHODS

METHOD = "psoft"
_SMALL_PARTS = {"batch_size": 16, "gradient_accumulation": 8, "eval_batch_size": 4, "max_length": 1024}
_TEXT = ("train.batch_size", "train.max_length")
_LANGUAGE = tuple(f"train.{key}" for key in _SMALL_PARTS)
_CHAT = _SMALL_PARTS | {"lr": 5e-4}


@dataclass(frozen=True)
class Kind:
    """What a recipe for one kind of data has beside what all have.

    Args:
        task: the recipe's.
        file: a name for the data where none is given.
        learnt: what is learnt, for the comment on the task.
        form: what the data look like.
        columns: those that the task reads.
        model: a usual one.
        keys: those of its own, in order.
        train: settings that are not the default. With a learning rate of the published kind among them, the method has
            its published form; otherwise generators are scaled, whose usual rate fits every size.
    """

    task: str
    file: str
    learnt: str
    form: str
    columns: tuple[str, ...]
    model: str
    keys: tuple[str, ...]
    train: Mapping[str, Any] = field(default_factory=dict)


_CHAT_MODEL = "Qwen/Qwen3-0.6B"
KINDS = {
    "chat": Kind(
        "chat",
        "chat.jsonl",
        "what the assistant says in conversations",
        'One conversation a line: {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", …}]}.',
        ("messages",),
        _CHAT_MODEL,
        ("dtype", *_LANGUAGE),
        _CHAT,
    ),
    "completion": Kind(
        "completion",
        "completions.jsonl",
        "the completion of each prompt",
        'One object a line: {"prompt": "…", "completion": "…"}, both texts, or both lists of messages.',
        ("prompt", "completion"),
        _CHAT_MODEL,
        ("dtype", *_LANGUAGE),
        _CHAT,
    ),
    "preference": Kind(
        "preference",
        "preferences.jsonl",
        "which of two answers is preferred (DPO)",
        'One object a line: {"prompt": "…", "chosen": "…", "rejected": "…"}, all texts, or all lists of messages.',
        ("chosen", "rejected"),
        _CHAT_MODEL,
        ("dtype", *_LANGUAGE, "preference.beta"),
        _CHAT | {"lr": 1e-4},
    ),
    "classification": Kind(
        "text-classification",
        "texts.csv",
        "the class of a text",
        "A .csv or .tsv file with a header, or .jsonl with one object a line.",
        ("text", "label"),
        "microsoft/deberta-v3-base",
        ("data.text", "data.label", "train.lr_head", *_TEXT),
        {"lr_head": 1e-3},
    ),
    "images": Kind(
        "image-classification",
        "images",
        "the class of an image",
        "A folder with one folder of images for each class, or with folders train and test of that kind.",
        ("image", "label"),
        "google/vit-base-patch16-224-in21k",
        ("train.lr_head", "train.batch_size"),
        {"lr_head": 1e-3},
    ),
}
"""By what `isotune init --for` calls them."""

_FIRST = ("description", "task", "model")
_SOURCES = ("data.files.train", "data.files.validation", "data.files.test")
_SCHEDULE = ("train.lr", "train.epochs", "train.seed")
_LAST = ("metric", "check_saved", "output")

ABOUT = {
    "description": "What this is, for people.",
    "model": "A folder, a name on the Hugging Face Hub, or package:NAME of an installed package.",
    "dtype": "Of the frozen weights; bfloat16 halves their memory. The adapter is float32.",
    "data": "Files are looked for from where the command is run.",
    "data.files": "Each a name or a list of names.",
    "data.files.validation": "Chooses the checkpoint and the learning rate. null: a tenth of the training examples, "
    "unless a test file is given.",
    "data.files.test": "What is reported is measured on it. null: a tenth of the training examples.",
    "data.text": "The column that holds the text; two, as [question, answer], make pairs.",
    "data.rename": "A column of the file, and the name that the task knows it by.",
    "data.label": "The column that holds the class; the classes are those that occur.",
    "method.name": f"Of isotune or of PEFT: {', '.join(entries())}.",
    "train.lr": "Of several, as [4e-4, 8e-4], the one that validates best is reported.",
    "train.epochs": "How often each training example is seen.",
    "train.seed": "Another seed gives another order of the examples.",
    "train.lr_head": "The learning rate of the new classifier; null: that of the adapter.",
    "train.batch_size": "Examples of one step.",
    "train.gradient_accumulation": "In how many parts a step's examples are computed: more parts need less memory.",
    "train.eval_batch_size": "Examples of one part where nothing is trained.",
    "train.max_length": "Tokens of an example; longer ones are cut.",
    "preference.beta": "How strongly DPO holds the model to what it was before.",
    "metric": "What is reported.",
    "check_saved": "Whether the saved adapter is loaded in a new process, merged, and measured again.",
    "output": "The folder of the results. The same command goes on where it was stopped.",
}
"""What each key is for; what differs from kind to kind and from method to method is in `starting`."""


def known_kind(kind: str) -> Kind:
    """One of KINDS by name; raises RecipeError where there is none."""
    if kind not in KINDS:
        raise RecipeError(f"--for {kind} is not one of {', '.join(KINDS)}" + meant(kind, KINDS))
    return KINDS[kind]


def starting(
    kind: str = "chat",
    model: str | None = None,
    data: str | None = None,
    name: str = "my-recipe",
    renamed: Mapping[str, str] | None = None,
) -> str:
    """A recipe as YAML, which runs as it stands where its data are.

    Args:
        kind: one of KINDS.
        model: in place of the usual one.
        data: the file or folder of the training examples; None where they are still to be put there.
        name: of the folder in `runs` for the results.
        renamed: columns of the data -> what the task knows them by, where that differs.

    Raises:
        RecipeError: there is no such kind.
    """
    known, method = known_kind(kind), entry(METHOD)
    columns: dict[str, Any] = {}
    for old, new in (renamed or {}).items():
        if f"data.{new}" in known.keys:
            columns[new] = old
        else:
            columns.setdefault("rename", {})[old] = new
    size = method.size_option
    assert size is not None
    options = {size: getattr(METHODS[METHOD](), size)}
    if "lr" not in known.train:
        options["scaled_generator"] = True
    raw = {
        "description": f"{method.title} on data of my own: {known.learnt}.",
        "task": known.task,
        "model": model or known.model,
        "data": {"files": {"train": data or known.file}, **columns},
        "method": {"name": METHOD, **options},
        "train": {"lr": method.rate_with(options), **known.train},
        "check_saved": True,
        "output": f"runs/{name}",
    }
    recipe = validate(raw, f"the recipe for {kind}")
    about = {
        **ABOUT,
        "task": f"What is learnt: {known.learnt}.",
        "data.files.train": known.form if data else f"Put your data there, or give their name here. {known.form}",
        f"method.{size}": "The size of the adapter: more trains more parameters.",
        "method.scaled_generator": "true: one learning rate for all sizes. PSOFT, OFT and BOFT have it.",
        "train.lr": f"The adapter's learning rate to begin with. {ABOUT['train.lr']}",
    }
    own = {part: [key for key in known.keys if key.startswith(part)] for part in ("data.", "train.", "preference.")}
    alone = [key for key in known.keys if "." not in key]
    renaming = ["data.rename"] if "rename" in columns else []
    keys = [
        *_FIRST,
        *alone,
        *_SOURCES,
        *own["data."],
        *renaming,
        "method.name",
        *(f"method.{option}" for option in options),
    ]
    keys += [*_SCHEDULE, *own["train."], *own["preference."], *_LAST]
    return "\n".join(_lines(recipe, keys, about)) + "\n"


def _lines(recipe: Recipe, keys: list[str], about: Mapping[str, str]) -> list[str]:
    values = recipe.model_dump(mode="json")
    lines: list[str] = []
    opened: list[str] = []
    for key in keys:
        *sections, last = key.split(".")
        value: Any = values
        for depth, section in enumerate(sections):
            value = value[section]
            if opened[depth : depth + 1] != [section]:
                opened = [*sections[:depth], section]
                lines += _comment(about.get(".".join(opened)), depth)
                lines.append(f"{'  ' * depth}{section}:")
        opened = sections
        value = value[last]
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        lines += _comment(about[key], len(sections))
        shown = yaml.safe_dump({last: value}, allow_unicode=True, width=10_000, default_flow_style=False)
        lines.append(textwrap.indent(shown.rstrip("\n"), "  " * len(sections)))
    return lines


def _comment(text: str | None, depth: int) -> list[str]:
    start = "  " * depth + "# "
    return textwrap.wrap(text, 100, initial_indent=start, subsequent_indent=start) if text else []
