"""Adapters stored by every version of the file format load and compute what they computed when they were written.

A folder tests/data/adapter-vN-* is what `save_pretrained` of that version wrote on the base below; expected.safetensors
beside it holds the output and the change of each weight. Neither is ever written again.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from isotune.methods.config import FORMAT_VERSION
from isotune.tuner.layer import Linear

DATA = Path(__file__).parents[1] / "data"
VERSIONS = sorted(DATA.glob("adapter-v*"))


class Base(nn.Module):
    """Two layers whose weights come from numpy's frozen stream, so that the base needs no file."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 12, bias=False)
        stream = np.random.RandomState(7)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.from_numpy(stream.standard_normal(tuple(parameter.shape))))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.tanh(self.up(x)))
        return y


def inputs() -> Tensor:
    return torch.from_numpy(np.random.RandomState(8).standard_normal((5, 12))).float()


def computed(model: nn.Module) -> dict[str, Tensor]:
    """What expected.safetensors holds."""
    with torch.no_grad():
        found = {"output": model(inputs())}
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            found[name.rpartition(".")[2]] = module.get_delta_weight("default").contiguous()
    return found


def test_every_version_has_a_stored_file() -> None:
    assert [int(folder.name.removeprefix("adapter-v").split("-")[0]) for folder in VERSIONS][-1] == FORMAT_VERSION
    assert {"adapter-v1-pinned", "adapter-v1-embedded"} <= {folder.name for folder in VERSIONS}


@pytest.mark.filterwarnings("ignore:truncate_base has changed:isotune.errors.IsotuneWarning")
@pytest.mark.parametrize("folder", VERSIONS, ids=lambda folder: folder.name)
def test_a_stored_adapter_means_what_it_meant(folder: Path) -> None:
    found = computed(PeftModel.from_pretrained(Base(), str(folder)).eval())
    expected = load_file(folder / "expected.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (found[name] - tensor).norm() / tensor.norm()
        assert error < 1e-3, (name, float(error))
