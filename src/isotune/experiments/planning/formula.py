"""What is known by formula: what isotune's layers hold and keep, and what the paper says is kept for backward."""

from __future__ import annotations

import math
import re
from typing import Any

from torch import Tensor, nn

from isotune.adapter.shared import SharedAdapter
from isotune.adapter.update import PlacedUpdate
from isotune.experiments import methods, paper, registry
from isotune.experiments.planning.setting import Setting
from isotune.hosts import ExpertsHost
from isotune.tuner.layer import Layer

_TERM = re.compile(r"(\d+)([bsharm]+)(\^2)?(\*log2\(h\))?")


def paper_activations(setting: Setting, base: nn.Module, tokens: int) -> float | None:
    """Bytes kept by all layers for so many tokens by the formula of the paper's Table 9, which is for float32.

    None where the paper has no formula for the method or the model is no plain transformer.
    """
    config: Any = base.config
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads")
    plain = all(hasattr(config, name) for name in names) and not getattr(config, "is_encoder_decoder", False)
    formula = _formula(setting.method)
    if formula is None or not plain:
        return None
    layers, width, heads = (int(getattr(config, name)) for name in names)
    rank = setting.options.get("r")
    if rank is None and not registry.is_plain(setting.method):
        rank = getattr(methods.adapter_config(setting.method), "r", None)
    sizes = {
        "b": setting.batch,
        "s": tokens // setting.batch,
        "h": width,
        "a": heads,
        "r": rank or 0,
        "m": setting.options.get("boft_n_butterfly_factor", 1),
    }
    total = 0.0
    for term in formula.split(" + "):
        found = _TERM.fullmatch(term)
        assert found, term
        product = float(found[1]) * math.prod(sizes[letter] for letter in found[2])
        total += product * (sizes["s"] if found[3] else 1) * (math.log2(width) if found[4] else 1)
    scale = next(base.parameters()).element_size() / 4
    return float(layers * total * scale)


def _formula(method: str) -> str | None:
    """The formula of a method, or of that of which it is a special case; None where Table 9 has neither."""
    known = paper.results()["activation_memory_per_layer_bytes_fp32"]
    entry = registry.entry(method)
    names = ("FFT",) if method == "full" else (entry.title, registry.entry(entry.base or "").title)
    return next((str(known[name]) for name in names if name in known), None)


def factor_bytes(model: nn.Module) -> int:
    """Down, up and pin of every subspace, and random matrices; tensors that adapters share count once."""
    tensors = {id(b): b for layer in _layers(model) for form in layer.isotune_form.values() for b in form.buffers()}
    placements = (module.placement for module in model.modules() if isinstance(module, PlacedUpdate))
    factors = {id(t): t for placement in placements if placement is not None for t in placement.factors}
    random: dict[Any, Tensor] = {}
    for module in model.modules():
        random |= module.in_use() if isinstance(module, SharedAdapter) else {}
    return sum(t.nbytes for t in {**tensors, **factors, **random}.values())


def _layers(model: nn.Module) -> list[Layer]:
    return [module for module in model.modules() if isinstance(module, Layer)]


def adapter_activations(model: nn.Module, tokens: int) -> int:
    """Bytes that isotune's adapters keep for backward beyond the frozen model, by formula.

    tokens × r for an update of a subspace, in the dtype of the base; at most tokens × in for a rotation of all inputs,
    which layers that read the same input share, and for an update with trained factors tokens × r besides, as for LoRA;
    tokens × out for a rotation of all outputs, and as much for its gain. The operators themselves come on top, whatever
    the tokens, and so does what convolutions and embeddings fold. Experts
    keep a folded copy of their parameter.
    """
    total = 0
    for layer in _layers(model):
        if layer.host.folds:
            total += layer.host.weight.nbytes if isinstance(layer.host, ExpertsHost) else 0
            continue
        for adapter in map(layer.adapter, layer.configs):
            total += tokens * adapter.kept(layer.in_features) * layer.host.weight.element_size()
    return total
