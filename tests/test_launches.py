"""How many operations an adapter adds to a training step: on a GPU each is at least one kernel that the CPU launches.

Counted on the meta device, where the library takes the path of a device that must not be waited for, on blocks with
Llama's seven projections: the difference of two depths is what adapted layers add, and what no layer adds is the part
of the batched evaluations. A factorisation counts as one here and is a few kernels. By themselves, and with the kernels
in Triton, which are started in the place of some of them and here only counted.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn

import isotune
from isotune.algebra import acceleration
from isotune.internals.operations import Operations
from isotune.tuner.adapted_model import AdaptedModel

WIDTH, INNER = 768, 1536
PROJECTIONS = {
    "q_proj": (WIDTH, WIDTH),
    "k_proj": (WIDTH, WIDTH // 2),
    "v_proj": (WIDTH, WIDTH // 2),
    "o_proj": (WIDTH, WIDTH),
    "gate_proj": (WIDTH, INNER),
    "up_proj": (WIDTH, INNER),
    "down_proj": (INNER, WIDTH),
}
DEPTHS = (2, 7)

CONFIGURATIONS: dict[str, PeftConfig] = {
    "LoRA r=16": LoraConfig(r=16),
    **{f"PSOFT r={r}": isotune.PsoftConfig(r=r) for r in (8, 46, 128)},
    **{f"LoRA-XS r={r}": isotune.LoraXsConfig(r=r) for r in (8, 46)},
    **{f"OPLoRA r={r}": isotune.OploraConfig(r=r) for r in (8, 32)},
    "ROSA r=8": isotune.RosaConfig(r=8),
    "PESO r=8": isotune.PesoConfig(r=8),
    "UORA r=64": isotune.UoraConfig(r=64),
    **{f"OFT b={b}": isotune.OFTConfig(oft_block_size=b) for b in (8, 32)},
    "COFT b=32": isotune.OFTConfig(oft_block_size=32, coft=True, eps=0.5),
    **{f"HRA r={r}": isotune.HRAConfig(r=r) for r in (2, 8)},
    "BOFT m=2 b=8": isotune.BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=2),
    "BOFT m=4 b=4": isotune.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=4),
    "GOFT": isotune.GOFTConfig(),
    "qGOFT": isotune.QGOFTConfig(),
}

LAYER = {
    "PSOFT": 8,
    "LoRA-XS": 9,
    "OPLoRA": 15,
    "ROSA": 12,
    "PESO": 8,
    "UORA": 14,
    "OFT": 5,
    "COFT": 5,
    "HRA": 7,
    "BOFT": 12,
    "GOFT": 18,
    "qGOFT": 18,
}
"""The most operations that an adapted layer adds to a step without kernels, as measured."""

WITH_KERNELS = {**LAYER, "OFT": 2, "COFT": 2, "BOFT": 6, "GOFT": 9, "qGOFT": 9}
"""The same with them."""

OF_ITS_OWN = ("OPLoRA", "ROSA", "PESO")
"""Methods whose layers are evaluated each for itself, within the operations of a layer."""

MORE_THAN_LORA = {"OPLoRA": 5, "ROSA": 2, "UORA": 4}
"""OPLoRA's projections, ROSA's differences from its start, and the vectors of UORA, which scale what passes instead of
factors kept for each layer."""

AS_LORA = ("PSOFT", "LoRA-XS", "OFT", "COFT", "HRA")
"""Methods that add no more than LoRA without kernels; with them all do."""

EVALUATION = 60
"""The most operations of one batched evaluation, forward and backward, in a step."""

MORE = {"BOFT m=4 b=4": 63}
"""What takes more without kernels, and how many."""

KERNELS = ("block_kernels", "elimination_kernels", "gain_kernels", "decoding_kernels")
NAMES = [name for name in CONFIGURATIONS if not name.startswith("LoRA r")]
PATHS = pytest.mark.parametrize(
    "kernels",
    [False, pytest.param(True, marks=pytest.mark.skipif(find_spec("triton") is None, reason="Triton is missing"))],
    ids=["plain", "kernels"],
)


class Block(nn.Module):
    """The linear layers of a block of Llama; what is between them is the same with and without adapters."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in PROJECTIONS.items():
            self.add_module(name, nn.Linear(*shape, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o_proj(self.q_proj(x) + (self.k_proj(x) * self.v_proj(x)).repeat(1, 2))
        return x + self.down_proj(self.gate_proj(x) * self.up_proj(x))


@contextlib.contextmanager
def kernels_counted(started: list[str]) -> Iterator[None]:
    """Have the kernels taken on the meta device, where their names are noted and nothing is computed."""

    def launch(kernel: Any, *_: Any, **__: Any) -> bool:
        started.append(str(kernel))
        return True

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(acceleration, "DEVICE", "meta")
        for name in KERNELS:
            patched.setattr(acceleration.load(name), "launch", launch)
        yield


@functools.cache
def operations(name: str | None, depth: int, kernels: bool) -> tuple[int, int]:
    """The operations of one step of a model with that many blocks, and its evaluations; None leaves it frozen."""
    started: list[str] = []
    with kernels_counted(started) if kernels else contextlib.nullcontext():
        return _operations(name, depth, started)


def _operations(name: str | None, depth: int, started: list[str]) -> tuple[int, int]:
    with torch.device("meta"):
        model: nn.Module = nn.Sequential(*(Block() for _ in range(depth))).requires_grad_(False)
        x = torch.randn(8, WIDTH, requires_grad=True)
    evaluations = 0
    if name is not None:
        config = CONFIGURATIONS[name]
        config.target_modules = set(PROJECTIONS)
        model = get_peft_model(model, config).to("meta").train()
        own = AdaptedModel.of(model.get_base_model())
        evaluations = 0 if own is None else len(own.evaluations)
    model(x).sum().backward()  # the subspaces are placed by the first pass
    model.zero_grad()
    x.grad = None
    started.clear()
    with Operations() as counted:
        model(x).sum().backward()
    return len(counted.names) + len(started), evaluations


def added(name: str, kernels: bool) -> tuple[float, float]:
    """The operations that one adapted layer adds to those of a frozen one, and those of one evaluation."""
    few, many = (operations(name, depth, kernels)[0] - operations(None, depth, kernels)[0] for depth in DEPTHS)
    layers = [depth * len(PROJECTIONS) for depth in DEPTHS]
    a_layer = (many - few) / (layers[1] - layers[0])
    return a_layer, (few - layers[0] * a_layer) / max(1, operations(name, DEPTHS[0], kernels)[1])


@pytest.mark.covered(kernels=(False,))
@pytest.mark.parametrize("name", NAMES)
@PATHS
@pytest.mark.slow
def test_a_layer_adds_no_more_operations_than_lora(name: str, kernels: bool) -> None:
    method = name.split()[0]
    a_layer, _ = added(name, kernels)
    assert a_layer <= (WITH_KERNELS if kernels else LAYER)[method]
    assert a_layer <= added("LoRA r=16", kernels)[0] + MORE_THAN_LORA.get(method, 0) or not (
        kernels or method in AS_LORA
    )


@pytest.mark.covered(kernels=(False,))
@pytest.mark.parametrize("name", [name for name in NAMES if name.split()[0] not in OF_ITS_OWN])
@PATHS
def test_an_evaluation_takes_few_operations_whatever_the_depth(name: str, kernels: bool) -> None:
    count = operations(name, DEPTHS[0], kernels)[1]
    assert count == operations(name, DEPTHS[1], kernels)[1]
    a_layer, an_evaluation = added(name, kernels)
    # The operations of a third depth are what the other two say: none of an evaluation's grows with the layers.
    between = operations(None, 4, kernels)[0] + 4 * len(PROJECTIONS) * a_layer + count * an_evaluation
    assert operations(name, 4, kernels)[0] == pytest.approx(between, abs=1e-6)
    assert an_evaluation <= (EVALUATION if kernels else MORE.get(name, EVALUATION))


PYTHON_CALLS = {"PSOFT": 104, "LoRA-XS": 91, "OFT": 72, "HRA": 66, "BOFT": 84, "GOFT": 101}
"""The most calls of the library's own functions in a layer's forward and backward pass, on a CPU."""


def calls(name: str, depth: int) -> int:
    """The calls of functions of isotune in one step, which the host makes while a GPU may wait for it."""
    torch.manual_seed(0)
    config = CONFIGURATIONS[name]
    config.target_modules = set(PROJECTIONS)
    model = get_peft_model(nn.Sequential(*(Block() for _ in range(depth))), config).train()
    x = torch.randn(2, WIDTH, requires_grad=True)
    model(x).sum().backward()
    source, found = str(Path(isotune.__file__).parent), 0

    def note(frame: FrameType, event: str, _: object) -> None:
        nonlocal found
        found += event == "call" and frame.f_code.co_filename.startswith(source)

    sys.setprofile(note)
    try:
        model(x).sum().backward()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.covered(name=("PSOFT r=8", "OFT b=8"))
@pytest.mark.parametrize("name", ["PSOFT r=8", "LoRA-XS r=8", "OFT b=8", "HRA r=2", "BOFT m=2 b=8", "GOFT"])
def test_a_layer_calls_few_functions(name: str) -> None:
    few, many = (calls(name, depth) for depth in (1, 2))
    assert (many - few) / len(PROJECTIONS) <= PYTHON_CALLS[name.split()[0]]
