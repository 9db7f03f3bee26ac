"""Exporting a rotation of inputs as an adapter of PEFT's own OFT or BOFT, which needs no isotune."""

from __future__ import annotations

import os
from typing import Any

import torch
from peft import BOFTConfig, OFTConfig, PeftConfig
from torch import nn

from isotune.algebra.skew import skew_from_vector
from isotune.files.adapter import WEIGHTS_FILE, new_directory
from isotune.files.diffusion.rotations import gain_of, generators_of, rotation_of
from isotune.files.export_lora import opened, peft_options
from isotune.files.pooled import MeanPooled
from isotune.files.tensors import save_tensors
from isotune.methods.boft import BOFTOperator
from isotune.methods.oft import OFTOperator
from isotune.tuner.layer import Layer
from isotune.tuner.state import KEY_PREFIX

_INSTEAD = "Export it as LoRA (--to lora) or merged (--to merged) instead."


@torch.no_grad()
def export_peft(
    model_or_dir: nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str],
    adapter_name: str = "default",
    base: nn.Module | str | None = None,
    *,
    trust_remote_code: bool = False,
) -> int:
    """Write an OFT, COFT or BOFT adapter as a folder of PEFT's own OFT or BOFT that computes the same function.

    PEFT's OFT has the exact transform and the series of isotune's num_cayley_neumann_terms=2 or more; its BOFT has one
    factor unless its CUDA extension is built. COFT's bound and a scale that is set are applied to the generators for
    good. Saved modules and trained biases are written as they are.

    All arguments are as in `export_lora`.

    Returns:
        The number of layers written.

    Raises:
        ValueError: `out` is not empty, there is no such adapter or base, or PEFT does not have this rotation or
            support this layer; says what to do.

    Source: PEFT 0.21.2, tuners/oft/layer.py and tuners/boft/layer.py.
    """
    own = opened(model_or_dir, adapter_name, base, trust_remote_code=trust_remote_code)
    if isinstance(own.model, MeanPooled):
        raise ValueError(f"PEFT cannot load an adapter on isotune's mean-pooled classifier. {_INSTEAD}")
    operators: dict[str, Any] = {name: _operator(name, layer, own.adapter_name) for name, layer in own.layers.items()}
    tensors = {f"{KEY_PREFIX}{key}": tensor for key, tensor in own.extras.items()}
    for name, operator in operators.items():
        generators = generators_of(operator)
        if isinstance(operator, OFTOperator):
            # PEFT's exact transform is the inverse of the one its series approaches.
            in_series = operator.cayley.neumann_terms is not None
            tensors[f"{KEY_PREFIX}{name}.oft_R.weight"] = generators if in_series else -generators
        else:
            gain = gain_of(operator)
            assert gain is not None
            tensors[f"{KEY_PREFIX}{name}.boft_R"] = -skew_from_vector(generators, operator.block_size)
            tensors[f"{KEY_PREFIX}{name}.boft_s"] = gain[:, None]
    theirs: PeftConfig
    first = next(iter(operators.values()))
    if isinstance(first, OFTOperator):
        terms = first.cayley.neumann_terms
        series: dict[str, Any] = (
            {"use_cayley_neumann": False} if terms is None else {"num_cayley_neumann_terms": terms + 2}
        )
        # In a layer of one block, shared and separate blocks look alike.
        shared = any(len(operator.generator) < operator.blocks for operator in operators.values())
        sizes = _sizes(operators, "oft_block_size", "r")
        theirs = OFTConfig(**peft_options(own.config, own.layers, "oft"), **sizes, **series, block_share=shared)
    else:
        sizes = _sizes(operators, "boft_block_size", "boft_block_num")
        theirs = BOFTConfig(**peft_options(own.config, own.layers, "boft"), **sizes)
    with new_directory(out) as folder:
        save_tensors(tensors, folder / WEIGHTS_FILE)
        theirs.save_pretrained(str(folder))
    return len(operators)


def _operator(name: str, layer: Layer, adapter_name: str) -> OFTOperator | BOFTOperator:
    """The operator of a layer, refused unless PEFT has one that computes the same."""
    allowed = "only OFT and BOFT on inputs can be written for PEFT, whose own rotate inputs"
    operator, module = rotation_of(name, layer.adapter(adapter_name), "input", allowed), layer.get_base_layer()
    if not isinstance(module, nn.Linear):
        raise ValueError(
            f"The adapted module {name!r} is a {type(module).__name__}; PEFT's own rotations compute the same only on "
            f"linear layers. {_INSTEAD}"
        )
    if isinstance(operator, OFTOperator) and operator.cayley.neumann_terms == 1:
        raise ValueError(f"PEFT has no series with num_cayley_neumann_terms=1, as on {name!r}. {_INSTEAD}")
    if isinstance(operator, BOFTOperator) and len(operator.generator) > 1:
        raise ValueError(
            f"The adapter on {name!r} is a butterfly of {len(operator.generator)} factors; without its CUDA extension, "
            f"PEFT supports only one. {_INSTEAD}"
        )
    return operator


def _sizes(operators: dict[str, Any], by_size: str, by_count: str) -> dict[str, Any]:
    """PEFT's fields for one size of all blocks, or one number of blocks in all layers."""
    sizes = {operator.block_size for operator in operators.values()}
    counts = {operator.size // operator.block_size for operator in operators.values()}
    if len(sizes) > 1 and len(counts) > 1:
        raise ValueError(
            f"The layers have blocks of {', '.join(map(str, sorted(sizes)))}, but PEFT's configuration holds only one "
            f"size or one number of blocks. {_INSTEAD}"
        )
    return {by_size: sizes.pop(), by_count: 0} if len(sizes) == 1 else {by_size: 0, by_count: counts.pop()}
