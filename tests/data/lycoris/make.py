"""Writes the files beside it, with lycoris-lora 4.1.3: what it saves of each algorithm, and the weights it merges.

Run with a Python that has lycoris-lora, torch and safetensors: python tests/data/lycoris/make.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lycoris import LycorisNetwork, create_lycoris
from safetensors.torch import save_file
from torch import nn

CASES: dict[str, dict[str, Any]] = {
    "diag-oft": {"algo": "diag-oft"},
    "diag-oft-bounded": {"algo": "diag-oft", "constraint": 0.02},
    "diag-oft-rescaled": {"algo": "diag-oft", "rescaled": True},
    "boft": {"algo": "boft"},
    "boft-bounded-rescaled": {"algo": "boft", "constraint": 0.05, "rescaled": True},
}


def main() -> None:
    folder = Path(__file__).parent
    torch.manual_seed(0)
    base = nn.ModuleDict({"linear": nn.Linear(6, 16), "conv": nn.Conv2d(2, 16, 3), "point": nn.Conv2d(6, 16, 1)})
    save_file(base.state_dict(), folder / "base.safetensors")
    for name, options in CASES.items():
        LycorisNetwork.apply_preset({"target_module": ["Linear", "Conv2d"]})
        network = create_lycoris(base, 1.0, linear_dim=4, linear_alpha=1, **options)
        network.apply_to()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        merged = {}
        for lora in network.loras:
            weight, _ = lora.get_merged_weight(multiplier=1)
            merged[lora.lora_name.removeprefix("lycoris_")] = weight.detach().contiguous()
        state = {key: tensor.detach().clone().contiguous() for key, tensor in network.state_dict().items()}
        save_file(state, folder / f"{name}.safetensors")
        save_file(merged, folder / f"{name}-merged.safetensors")
        network.restore()


if __name__ == "__main__":
    main()
