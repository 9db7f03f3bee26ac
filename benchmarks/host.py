"""The host's time of a training step: what a GPU waits for where launching takes longer than the kernels.

    python benchmarks/host.py

Blocks with Llama's seven projections, so small that their arithmetic is nothing beside Python and torch's dispatch.
What each adapted layer adds to a frozen one follows from two depths. Processor time of one thread, the least of many
interleaved rounds, so that other work on the machine hardly counts. On a CPU the kernels in Triton are not used;
products and copies take their place.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))
os.environ |= {"ISOTUNE_CACHE": "off", "TQDM_DISABLE": "1"}

import peft  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import isotune  # noqa: E402
from step import PROJECTIONS, REFERENCE  # noqa: E402

WIDTH, INNER, TOKENS = 64, 128, 8
DEPTHS = 8, 24
FROZEN = "frozen"


class Block(nn.Module):
    """The linear layers of a block of Llama, with little between them."""

    def __init__(self) -> None:
        super().__init__()
        half = {"k_proj", "v_proj"}
        for name in PROJECTIONS:
            narrow = WIDTH // 2 if name in half else INNER if name in ("gate_proj", "up_proj") else WIDTH
            self.add_module(name, nn.Linear(INNER if name == "down_proj" else WIDTH, narrow, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """All seven, each once."""
        x = x + self.o_proj(self.q_proj(x) + (self.k_proj(x) * self.v_proj(x)).repeat(1, 1, 2))
        return x + self.down_proj(self.gate_proj(x) * self.up_proj(x))


def configs() -> dict[str, Callable[[], Any]]:
    """What is compared."""
    targets: dict[str, Any] = {"target_modules": list(PROJECTIONS)}
    boft = {"boft_block_size": 8, "boft_n_butterfly_factor": 2, **targets}
    return {
        FROZEN: lambda: None,
        REFERENCE: lambda: peft.LoraConfig(r=8, **targets),
        "isotune PSOFT r=8": lambda: isotune.PsoftConfig(r=8, **targets),
        "isotune LoRA-XS r=8": lambda: isotune.LoraXsConfig(r=8, **targets),
        "isotune OFT b=16": lambda: isotune.OFTConfig(oft_block_size=16, **targets),
        "isotune BOFT m=2 b=8": lambda: isotune.BOFTConfig(**boft),
        "isotune GOFT": lambda: isotune.GOFTConfig(**targets),
        "isotune HRA r=8": lambda: isotune.HRAConfig(r=8, **targets),
    }


def least(depth: int, rounds: int) -> dict[str, float]:
    """Processor seconds of one step of each variant, the least of all rounds."""
    models: dict[str, nn.Module] = {}
    for name, make in configs().items():
        torch.manual_seed(0)
        model: Any = nn.Sequential(*(Block() for _ in range(depth))).requires_grad_(False)
        config = make()
        models[name] = (model if config is None else peft.get_peft_model(model, config)).train()
    x, found = torch.randn(1, TOKENS, WIDTH, requires_grad=True), dict.fromkeys(models, float("inf"))
    for _ in range(rounds):
        for name, model in models.items():
            begun = time.process_time()
            model(x).sum().backward()
            found[name] = min(found[name], time.process_time() - begun)
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    torch.set_num_threads(1)
    few, many = (least(depth, options.rounds) for depth in DEPTHS)
    layers = [depth * len(PROJECTIONS) for depth in DEPTHS]

    def added(name: str) -> float:
        """Microseconds of a layer."""
        return 1e6 * (many[name] - few[name]) / (layers[1] - layers[0])

    print(f"| | step of {DEPTHS[0]} blocks over {REFERENCE} | a layer adds, µs |\n|---|---|---|")
    for name in few:
        print(f"| {name} | {few[name] / few[REFERENCE]:.2f} | {added(name) - added(FROZEN):.0f} |")


if __name__ == "__main__":
    main()
