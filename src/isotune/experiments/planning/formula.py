"""What the paper's formulas say is kept for backward, to stand beside what is counted."""

from __future__ import annotations

import math
import re
from typing import Any

from torch import nn

from isotune.experiments import methods, paper, registry
from isotune.experiments.planning.setting import Setting

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
