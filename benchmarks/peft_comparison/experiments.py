"""Write isotune's methods as experiments of PEFT's own benchmark, method_comparison in the repository huggingface/peft.

    python benchmarks/peft_comparison/experiments.py peft/method_comparison/MetaMathQA

An experiment is `experiments/isotune-METHOD/NAME/` with an adapter_config.json and, where its rate is not PEFT's own of
1e-4, a training_params.json. `run.py` in this folder runs one. Existing files of the same experiments are replaced.

Left out are ROSA, PESO and UORA, which need calls during training that PEFT's loop does not make, and CERSA and SVFit,
of which no rate is public.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FLUX = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("linear_in", "linear_out", "to_qkv_mlp_proj"),
)
"""The layers of FLUX.2-klein that PEFT's experiments adapt."""


@dataclass(frozen=True)
class Experiment:
    """One of a benchmark's experiments.

    Args:
        method: its name in a recipe.
        name: the end of its folder's name, after the model's.
        lr: the learning rate, or USUAL or PEFT.
        options: of the method's configuration.
        source: whose rate it is, where it is neither.
    """

    method: str
    name: str
    lr: float | str
    options: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""


USUAL = "isotune's usual rate"
PEFT = "PEFT's own training settings"
_PSOFT = "the PSOFT paper, 4e-4 at r = 168 and 2e-4 at r = 352"
_GOFT = "the GOFT paper, on Llama 2"
_FAST = {"r": 256, "use_cayley_neumann": True, "psoft_svd": "lowrank"}
_BUTTERFLY = {"boft_block_size": 8, "boft_n_butterfly_factor": 2}

METAMATH = (
    Experiment("psoft", "rank46", USUAL, {"r": 46}),
    Experiment("psoft", "rank256", 3e-4, {"r": 256}, f"between the rates of {_PSOFT}"),
    Experiment("psoft", "rank256-lr1e-4", PEFT, {"r": 256}),
    Experiment("psoft", "rank256-fast-lr1e-4", PEFT, _FAST),
    Experiment("psoft", "rank352", 2e-4, {"r": 352}, f"{_PSOFT}; q and v as in the authors' script"),
    Experiment("psoft", "rank352-all-linear", 2e-4, {"r": 352, "target_modules": "all-linear"}, _PSOFT),
    Experiment("psoft_so", "rank256", 3e-4, {"r": 256}, "as PSOFT"),
    Experiment("oft", "block32", 8e-4, {"oft_block_size": 32}, "the authors of OFTv2"),
    Experiment("oft", "block32-lr1e-4", PEFT, {"oft_block_size": 32}),
    Experiment("oft", "rank32-lr1e-4", PEFT, {"r": 32, "use_cayley_neumann": True}),
    Experiment("boft", "block8-m2", 3e-4, _BUTTERFLY, "the BOFT paper, 1e-4 to 8e-4 on Llama 2"),
    Experiment("boft", "block4-lr1e-4", PEFT, {"boft_block_size": 4}),
    Experiment("hra", "rank32", 1e-5, {"r": 32}, "the HRA paper, on Llama 2 without its regularisation"),
    Experiment("hra", "rank32-lr1e-4", PEFT, {"r": 32}),
    Experiment("goft", "default", 1e-4, {}, _GOFT),
    Experiment("qgoft", "default", 1e-4, {}, _GOFT),
    Experiment("road", "default", USUAL),  # which is PEFT's for its own RoAd
    Experiment("lora_xs", "rank64", 4e-3, {"r": 64}, "the authors' code, on MetaMathQA"),
    Experiment("lora_xs", "rank248", USUAL, {"r": 248}),
    Experiment("oplora", "rank32-lr1e-4", PEFT, {"r": 32}),  # its LoRA's
)
IMAGES = (
    Experiment("psoft", "rank32", USUAL, {"r": 32}),
    Experiment("psoft", "rank32-lr1e-4", PEFT, {"r": 32}),
    Experiment("psoft", "rank256", USUAL, {"r": 256}),
    Experiment("oft", "block32", USUAL, {"oft_block_size": 32}),
    Experiment("oft", "block32-lr1e-4", PEFT, {"oft_block_size": 32, "use_cayley_neumann": True}),
    Experiment("boft", "block4-m2-lr1e-4", PEFT, {"boft_block_size": 4, "boft_n_butterfly_factor": 2}),
    Experiment("hra", "rank32-lr1e-4", PEFT, {"r": 32}),
    Experiment("goft", "default", USUAL),
    Experiment("road", "default", USUAL),
    Experiment("lora_xs", "rank64", USUAL, {"r": 64}),
)
BENCHMARKS = {
    "MetaMathQA": ("llama-3.2-3B", ("q_proj", "v_proj"), METAMATH),
    "image-gen": ("flux2-klein", FLUX, IMAGES),
}
"""PEFT's folder -> the model as its experiments name it, the layers that they adapt, and ours."""


def write(folder: Path, benchmark: str) -> list[str]:
    """Write the experiments of one of PEFT's benchmarks below `folder`.

    Args:
        folder: of the benchmark in a checkout of PEFT, or any other.
        benchmark: a key of BENCHMARKS.

    Returns:
        A line for each: its path in `folder`, its rate, and whose that is.
    """
    from isotune.experiments.methods import adapter_config
    from isotune.experiments.registry import entry

    model, layers, found = BENCHMARKS[benchmark]
    lines = []
    for one in found:
        path = folder / "experiments" / f"isotune-{one.method}" / f"{model}-{one.name}"
        adapter_config(one.method, **{"target_modules": list(layers), **one.options}).save_pretrained(path)
        params = path / "training_params.json"
        rate = entry(one.method).rate_with(one.options) if one.lr == USUAL else one.lr
        if rate == PEFT:
            params.unlink(missing_ok=True)
        else:
            # No weight decay: PEFT's of 0.1 would pull vectors that start at 1 towards 0, at these rates by a lot.
            settings = {"optimizer_kwargs": {"lr": rate, "weight_decay": 0.0}}
            params.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        told = PEFT if rate == PEFT else f"lr {rate:g}, {one.source or USUAL}"
        lines.append(f"{path.relative_to(folder)}: {told}")
    return lines


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the benchmark in a checkout of PEFT")
    parser.add_argument("--benchmark", choices=sorted(BENCHMARKS), help="by default the folder's name")
    given = parser.parse_args()
    benchmark = given.benchmark or given.folder.resolve().name
    if benchmark not in BENCHMARKS:
        parser.error(f"{given.folder} is none of PEFT's benchmarks {', '.join(BENCHMARKS)}; say which by --benchmark")
    print("\n".join(write(given.folder, benchmark)))


if __name__ == "__main__":
    main()
