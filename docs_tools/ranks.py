"""The tables of docs/guides/ranks.md and of its record: PSOFT's published ranks as budgets, and what chosen ranks gave.

    python docs_tools/ranks.py docs/guides/ranks.md docs/evidence/results.md

writes them between the comments of each page. Parameters are counted on the published configurations, on the meta
device, as `isotune compare --match-params` counts them; nothing is downloaded.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from isotune.experiments import budget, methods, tasks
from isotune.experiments.files import packaged_object, read_object
from isotune.experiments.loading import load
from isotune.experiments.recipe import Method
from isotune.tools.ranks import choose_ranks
from isotune.tuner.sizes import ChosenSizes
from sizes import written


class Setting(NamedTuple):
    """A rank that the PSOFT paper reports, and the modules that it adapts there."""

    title: str
    model: str
    rank: int
    targets: Any
    lora: int | None
    """The rank of the LoRA that the paper sets beside it; None where there is none of equal size."""


SETTINGS = [
    Setting("DeBERTaV3-base, GLUE", "microsoft/deberta-v3-base", 46, "all-linear", None),
    Setting("Llama 3.2 3B, mathematics", "meta-llama/Llama-3.2-3B", 352, "all-linear", 8),
    Setting(
        "Llama 3.1 8B, commonsense",
        "meta-llama/Llama-3.1-8B",
        424,
        ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
        8,
    ),
]
"""Wu et al., PSOFT (ICLR 2026), tables 3 to 5."""


def method(name: str, setting: Setting, **options: Any) -> Method:
    """A method on the modules of a setting."""
    return Method(name=name, target_modules=setting.targets, **options)


def row(setting: Setting) -> str:
    """One line of the table of published ranks."""
    published = packaged_object("architectures.json")[setting.model]["config"]
    config = transformers.AutoConfig.for_model(**published)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    layers = sum(isinstance(m, torch.nn.Linear) for m in model.modules())
    count = budget.counter(model, [], None)
    own = count(method("psoft", setting, r=setting.rank))
    if setting.targets != "all-linear":
        layers = len(setting.targets) * config.num_hidden_layers
    cells = [setting.title, str(layers), f"{setting.rank}", f"{own:,}"]
    if setting.lora is None:
        cells += ["", "", f"{math.sqrt(2 * own / layers):.1f}"]
    else:
        lora = count(method("lora", setting, r=setting.lora))
        found = budget.match(method("psoft", setting), lora, count)
        cells += [f"r = {setting.lora}: {lora:,}", str(found.options["r"]), f"{math.sqrt(2 * lora / layers):.1f}"]
    return "| " + " | ".join(cells) + " |"


def published() -> str:
    """The table of published ranks."""
    head = "| model and task of the paper | layers | PSOFT r | parameters | LoRA beside it | r of equal size | √(2M) |"
    return "\n".join([head, "|---|" + "---|" * 6, *map(row, SETTINGS)])


RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
MINILM = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
BUDGET = 40_572
"""The parameters of rank 46 on all linear layers of MiniLM but its pooler, which its recipes leave out."""


def chosen() -> str:
    """Ranks of MiniLM's layers for one budget, by its weights and by its activations on the docstring task."""
    task = tasks.make(load("docstrings"))
    model, _ = task.build()
    found = {}
    for measure in ("squares", "activations"):
        options = {"r": "auto", "rank_budget": BUDGET, "rank_measure": measure, "exclude_modules": ["classifier"]}
        config = methods.adapter_config("psoft", **options)
        found[measure] = choose_ranks(model, config, data=task.inputs() if config.by_activations else None)
    lines = [
        "| layers of MiniLM | r by the weights | their energy | r by activations | their energy |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {kind} | " + " | ".join(_range(one, kind) for one in found.values()) + " |" for kind in MINILM]
    for name, one in (("all, mean energy", None), ("one rank for all", "uniform")):
        cells = []
        for sizes in found.values():
            own = sizes if one is None else sizes.uniform
            assert own is not None
            cells += [f"{own.parameters:,} parameters" if one is None else f"{own.size}", f"{own.energy:.1%}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _range(found: ChosenSizes, kind: str) -> str:
    """The lowest and the highest rank and energy of one kind of layers."""
    own = [layer for layer in found.layers if layer.module.endswith(f".{kind}")]
    if kind == "output.dense":
        own = [layer for layer in own if ".attention." not in layer.module]
    sizes, energies = [layer.size for layer in own], [layer.energy for layer in own]
    return f"{min(sizes)} to {max(sizes)} | {min(energies):.0%} to {max(energies):.0%}"


def _rows(folder: str) -> list[tuple[dict[str, Any], str]]:
    """The rows of a comparison's record, each with its options of ranks."""
    rows = read_object(RESULTS / folder / "comparison.json")["rows"]
    named = ({key: value for key, value in row["method"].items() if key not in ("name", "rank_budget")} for row in rows)
    return [(row, ", ".join(f"`{k}={v}`" for k, v in own.items())) for row, own in zip(rows, named, strict=True)]


def language() -> str:
    """The losses of the same choices on a language model."""
    lines = [
        "| ranks of PSOFT on Gemma 3 270M | adapter parameters | test loss | by seed | validation loss |",
        "|---|---|---|---|---|",
    ]
    for row, name in _rows("ranks-gemma"):
        loss = f"{row['mean']:.3f} ± {row['standard_error']:.3f}"
        seeds = ", ".join(f"{score:.3f}" for score in row["scores"].values())
        lines.append(f"| {name} | {row['adapter_parameters']:,} | {loss} | {seeds} | {row['validation_score']:.3f} |")
    return "\n".join(lines)


def compared() -> str:
    """Test accuracy of one rank for all layers and of chosen ranks, as the record of the comparison says."""
    lines = ["| ranks of PSOFT on docstrings | adapter parameters | test accuracy | by seed |", "|---|---|---|---|"]
    for row, name in _rows("ranks"):
        scores = ", ".join(f"{score:.1%}" for score in row["scores"].values())
        mean = f"{row['mean']:.1%} ± {row['standard_error']:.1%}"
        lines.append(f"| {name} | {row['adapter_parameters']:,} | {mean} | {scores} |")
    return "\n".join(lines)


if __name__ == "__main__":
    tables = {"published": published(), "chosen": chosen(), "compared": compared(), "language": language()}
    for path in map(Path, sys.argv[1:]):
        page = path.read_text("utf-8")
        own = {name: table for name, table in tables.items() if f"<!-- {name}: begin -->" in page}
        path.write_text(written(page, **own), "utf-8")
