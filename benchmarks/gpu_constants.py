"""The constants of `isotune plan` for a GPU, from the results of benchmarks/gpu.py.

    python benchmarks/gpu_constants.py benchmarks/results/gpu/h100.json

Of every method whose eager training steps were timed: the operations of the step, counted as `isotune plan` counts
them, over its time, as a share of the speed that the vendor gives; the median over all steps of the widest shape.
Written to src/isotune/experiments/planning/measured/NAME.json, NAME as for `isotune plan --accelerator`.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

import torch  # noqa: E402
import transformers  # noqa: E402

from gpu_bench.models import SHAPES, Settings, adapted, configs, llama  # noqa: E402
from isotune.experiments.files import read_object, write_json  # noqa: E402
from isotune.experiments.planning.measured import FOLDER, Measured  # noqa: E402
from isotune.experiments.planning.setting import ACCELERATORS  # noqa: E402
from isotune.experiments.planning.trace import attention, trace  # noqa: E402
from isotune.experiments.registry import entries  # noqa: E402
from isotune.methods import METHODS  # noqa: E402

_ATTENTION = "isotune_trace"


def accelerator_of(card: str) -> str:
    """The name of an accelerator in a setting, by what the driver calls the card.

    Raises:
        ValueError: a card of which no speed is known, such as an H100 for PCIe.
    """
    words = re.split(r"[\s-]+", card.lower())
    found = [name for name in ACCELERATORS if name in words]
    slower = {"pcie", "nvl"} & set(words) and found != ["a100"]
    if len(found) != 1 or slower:
        raise ValueError(f"{card!r} is none of the accelerators that are known: {', '.join(ACCELERATORS)}")
    return found[0]


def method_of(variant: str) -> str | None:
    """The method of a variant by its name in recipes; None for the frozen model and PEFT's own forms of ours."""
    titles = {f"{'isotune' if name in METHODS else 'PEFT'} {entry.title}": name for name, entry in entries().items()}
    found = [title for title in titles if variant == title or variant.startswith(f"{title} ")]
    return titles[max(found, key=len)] if found else None


def operations_of(piece: dict[str, Any], variant: str) -> int:
    """Floating-point operations of one step of a variant, found on a model without numbers."""
    settings = replace(Settings.of_gpu(piece["layers"]), device=torch.device("meta"))
    shape = SHAPES[piece["shape"]]
    base = llama(settings, shape, piece["layers"])
    transformers.AttentionInterface.register(_ATTENTION, attention)
    base.set_attn_implementation(_ATTENTION)
    with settings.device:
        model = adapted(base, configs(settings)[variant])
    size = piece["batch"], piece["tokens"] // piece["batch"], shape.width
    embeddings = torch.empty(size, dtype=settings.dtype, device="meta", requires_grad=True)
    return trace(model, {"inputs_embeds": embeddings}).operations_with(checkpointing=piece["checkpointing"])


def constants(steps: list[dict[str, Any]], accelerator: str) -> Measured:
    """What complete pieces of steps say of an accelerator, whichever machine and sources measured each.

    Of the widest shape alone: launches limit the others, more so with few blocks, and a plan cannot know how much.
    """
    peak = ACCELERATORS[accelerator].half
    widest = max(SHAPES[piece["shape"]].width for piece in steps)
    steps = [piece for piece in steps if SHAPES[piece["shape"]].width == widest]
    shares: dict[str, list[float]] = defaultdict(list)
    known, used = configs(Settings.of_gpu(1)), set()
    for piece in steps:
        for variant, row in piece["variants"].items():
            method = method_of(variant)
            if method is not None and variant in known and row.get("ms"):
                used.add(f"{piece['shape']}, {piece['batch']} × {piece['tokens'] // piece['batch']} tokens")
                shares[method].append(operations_of(piece, variant) / (row["ms"] / 1e3) / peak)
    where = dict.fromkeys(f"{piece['environment']['card']}, torch {piece['environment']['torch']}" for piece in steps)
    about = f"{'; '.join(where)}, eager steps of Llama's shapes: {'; '.join(sorted(used))}"
    return Measured(about, "bfloat16", {name: round(statistics.median(found), 4) for name, found in shares.items()})


def main() -> None:
    """Write one file for each card of the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="what benchmarks/gpu.py wrote")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    pieces = read_object(options.results)["pieces"]
    steps: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for name, piece in pieces.items():
        if name.startswith("step/") and piece["complete"]:
            steps[accelerator_of(piece["environment"]["card"])].append(piece)
    if not steps:
        raise SystemExit(f"{options.results} has no complete steps; run benchmarks/gpu.py --only step")
    for accelerator, own in steps.items():
        found = constants(own, accelerator)
        options.folder.mkdir(parents=True, exist_ok=True)
        path = options.folder / f"{accelerator}.json"
        write_json(path, vars(found))
        print(f"{path}: {found.utilization}")


if __name__ == "__main__":
    main()
