"""Models of Llama's shapes with random weights, and what is compared on them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

import isotune
from step import PROJECTIONS

FROZEN, REFERENCE = "frozen", "PEFT LoRA r=16"


@dataclass(frozen=True)
class Shape:
    """Widths of a Llama, and how many layers the published model has."""

    width: int
    inner: int
    heads: int
    groups: int
    layers: int


SHAPES = {
    "8b": Shape(4096, 14336, 32, 8, 32),
    "3b": Shape(3072, 8192, 24, 8, 28),
    "1b": Shape(2048, 8192, 32, 8, 16),
}
"""Llama-3.1-8B, Llama-3.2-3B and Llama-3.2-1B, by their published configurations."""


@dataclass(frozen=True)
class Settings:
    """Sizes of a run: those of a GPU, or tiny ones that try the command itself on a CPU."""

    device: torch.device
    dtype: torch.dtype
    shapes: Mapping[str, Shape]
    layers: int
    heavy_layers: int
    tokens: int
    ranks: tuple[int, int, int, int]
    rounds: int
    new_tokens: int
    dry: bool = False

    @staticmethod
    def of_gpu(layers: int) -> Settings:
        """At the published widths, in bf16, with `layers` blocks."""
        return Settings(torch.device("cuda"), torch.bfloat16, SHAPES, layers, 2, 2048, (46, 128, 256, 352), 15, 64)

    @staticmethod
    def of_dry_run() -> Settings:
        """Tiny, on the CPU."""
        shapes = {name: Shape(64, 128, 4, 2, 2) for name in SHAPES}
        sizes = {"layers": 1, "heavy_layers": 1, "tokens": 16, "ranks": (4, 6, 8, 12), "rounds": 2, "new_tokens": 4}
        return Settings(torch.device("cpu"), torch.float32, shapes, dry=True, **sizes)  # type: ignore[arg-type]

    def wait(self) -> None:
        """Until the device has done everything."""
        if not self.dry:
            torch.cuda.synchronize()

    def allocated(self) -> int:
        """Bytes on the device."""
        return 0 if self.dry else torch.cuda.memory_allocated()

    @contextmanager
    def peak(self, found: dict[str, Any], name: str) -> Iterator[None]:
        """Note the largest memory beyond what is held at the start, in GiB; None on a CPU."""
        self.wait()
        held = self.allocated()
        if not self.dry:
            torch.cuda.reset_peak_memory_stats()
        yield
        self.wait()
        found[name] = None if self.dry else round((torch.cuda.max_memory_allocated() - held) / 2**30, 4)


@torch.no_grad()
def decay(weight: Tensor) -> Tensor:
    """Fill a weight, (out, in), with random numbers whose singular values decay, in place and on its device."""
    weight.normal_(0, 0.3)
    for axis, size in enumerate(weight.shape):
        scale = torch.arange(1, size + 1, device=weight.device, dtype=torch.float32) ** -0.3
        weight.mul_(scale.to(weight.dtype).unsqueeze(1 - axis))
    return weight


def llama(settings: Settings, shape: Shape, layers: int, *, distinct: bool = False, causal: bool = False) -> nn.Module:
    """A frozen Llama made on the device, all of whose blocks have the same weights unless they are to be distinct.

    With a vocabulary of 1,024, which leaves the blocks the whole of the time.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        vocab_size=1024,
        attn_implementation="sdpa",
        use_cache=causal,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(settings.dtype)
    try:
        with settings.device:
            model: nn.Module = (LlamaForCausalLM if causal else LlamaModel)(config)
    finally:
        torch.set_default_dtype(before)
    first: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            key = name if distinct else name.rpartition(".")[2]
            if key in first:
                module.weight = nn.Parameter(first[key].detach())  # the same memory, another parameter
            else:
                first[key] = decay(module.weight)
    return model.requires_grad_(False).train(not causal)


def shared(base: nn.Module) -> nn.Module:
    """A copy of a frozen model with parameters of its own on the very memory of the base's."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in base.parameters()}
    return copy.deepcopy(base, memo)


@torch.no_grad()
def stir(model: nn.Module, std: float = 1e-3) -> nn.Module:
    """Give what is trained small random numbers: at exactly zero some kernels are faster than ever again."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * std)
    return model


Configs = Mapping[str, Callable[[], Any]]
"""Name of a variant -> what makes its configuration; None for the frozen model."""


def configs(settings: Settings) -> dict[str, Callable[[], Any]]:
    """Every variant that shares one race, those of the ranks in `settings` included."""
    small, middle, large, largest = settings.ranks
    targets: dict[str, Any] = {"target_modules": PROJECTIONS}
    found: dict[str, Callable[[], Any]] = {FROZEN: lambda: None}
    for rank in (16, 32):
        found[f"PEFT LoRA r={rank}"] = lambda r=rank: peft.LoraConfig(r=r, lora_alpha=2 * r, **targets)
    for rank in (small, large):
        for kind, neumann in (("exact", False), ("Neumann", True)):
            # How PEFT's subspace was found does not change what a step costs, so the quickest way is taken.
            quick = {"psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 1, "use_cayley_neumann": neumann}
            found[f"PEFT PSOFT r={rank} {kind}"] = lambda r=rank, q=quick: peft.PsoftConfig(
                r=r, psoft_alpha=r, **q, **targets
            )
    for kind, neumann in (("exact", False), ("Neumann", True)):
        found[f"PEFT OFT b=32 {kind}"] = lambda n=neumann: peft.OFTConfig(
            r=0, oft_block_size=32, use_cayley_neumann=n, **targets
        )
    for rank in (small, middle, large, largest):
        found[f"isotune PSOFT r={rank}"] = lambda r=rank: isotune.PsoftConfig(r=r, **targets)
    found[f"isotune LoRA-XS r={small}"] = lambda: isotune.LoraXsConfig(r=small, **targets)
    found["isotune OFT b=32"] = lambda: isotune.OFTConfig(oft_block_size=32, **targets)
    boft = {"boft_block_size": 8, "boft_n_butterfly_factor": 2, **targets}
    found["isotune BOFT m=2 b=8"] = lambda: isotune.BOFTConfig(**boft)
    found["isotune GOFT"] = lambda: isotune.GOFTConfig(**targets)
    found["isotune HRA r=8"] = lambda: isotune.HRAConfig(r=8, **targets)
    return found


def heavy(settings: Settings) -> dict[str, Callable[[], Any]]:
    """Variants so slow or large that they have a race of their own, with few layers, beside isotune's."""
    targets: dict[str, Any] = {"target_modules": PROJECTIONS}
    boft = {"boft_block_size": 8, "boft_n_butterfly_factor": 2, **targets}
    return {
        **chosen(settings, FROZEN, REFERENCE, "isotune BOFT m=2 b=8", "isotune HRA r=8"),
        # PEFT silently takes m=1 where its CUDA extension cannot be built.
        "PEFT BOFT m=2 b=8": lambda: peft.BOFTConfig(**boft),
        "PEFT HRA r=8": lambda: peft.HRAConfig(r=8, **targets),
    }


def chosen(settings: Settings, *names: str) -> dict[str, Callable[[], Any]]:
    """Some of `configs` by their names."""
    everything = configs(settings)
    return {name: everything[name] for name in names}


def usual(settings: Settings) -> dict[str, Callable[[], Any]]:
    """What captured, compiled and decoding models are measured for."""
    small, _, large, _ = settings.ranks
    return chosen(
        settings, FROZEN, REFERENCE, f"isotune PSOFT r={small}", f"isotune PSOFT r={large}", "isotune OFT b=32"
    )


def goals(settings: Settings) -> dict[str, Callable[[], Any]]:
    """What whole models are measured for: there one evaluation for all layers weighs as little as it does in use."""
    return {**usual(settings), **chosen(settings, "isotune BOFT m=2 b=8", "isotune GOFT", "isotune HRA r=8")}


def adapted(base: nn.Module, make: Callable[[], Any]) -> nn.Module:
    """A model with an adapter that is not the identity, on the memory of the base; the base's copy for None."""
    config, model = make(), shared(base)
    return model if config is None else stir(peft.get_peft_model(model, config))
