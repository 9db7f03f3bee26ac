"""Exporting isotune's rotations as the single files of kohya's scripts, OneTrainer and LyCORIS."""

from __future__ import annotations

import os
from collections.abc import Callable
from math import isqrt
from typing import Literal

import torch
from torch import Tensor, nn

from isotune.adapter.operator import Adapter
from isotune.algebra.skew import skew_from_vector
from isotune.files.diffusion.lora import Component, new_file, opened_alone, stems_of
from isotune.files.tensors import save_tensors
from isotune.methods.boft import BOFTOperator
from isotune.methods.checks import require_choice
from isotune.methods.oft import OFTOperator
from isotune.tuner.layer import Layer
from isotune.whole_files import written_whole

Format = Literal["kohya", "onetrainer", "lycoris"]
_KOHYA_TERMS = 3
"""isotune's num_cayley_neumann_terms for the series of 5 terms of kohya's networks.oft_v2 and of OneTrainer."""


@torch.no_grad()
def export_rotation(
    model_or_dir: nn.Module | str | os.PathLike[str],
    file: str | os.PathLike[str],
    form: Format,
    adapter_name: str = "default",
    base: nn.Module | str | None = None,
    *,
    component: Component | None = None,
    trust_remote_code: bool = False,
) -> int:
    """Write an OFT or BOFT adapter as a file that computes the same function in kohya's scripts, OneTrainer or LyCORIS.

    "kohya" supports rotations of inputs: the series with num_cayley_neumann_terms=3 as networks.oft_v2
    (`oft_R.weight`), and the exact transform, which oft_v2 lacks, as networks.boft with one factor (`boft_R`,
    `boft_s`). "onetrainer" supports that series alone, as OFT_2, with `scaled_oft` if the adapter has scaled_generator.
    "lycoris" supports rotations of outputs by the exact transform: `oft_blocks` of diag-oft, which ComfyUI reads too,
    with `rescale` for BOFT of one factor, or of boft for a butterfly of all factors that its width allows.

    The bound `alpha` of oft_blocks is written larger than the rotation, so that it has no effect in any reader.

    Other arguments are as in `export_lora`.

    Args:
        file: a new .safetensors file.
        form: "kohya", "onetrainer" or "lycoris".
        component: as in `export_lora_file`.

    Returns:
        The number of layers written.

    Raises:
        ValueError: the file exists, or the format does not support this method, side or base; says what it supports.

    Source: as in `isotune.files.diffusion.single.import_single`.
    """
    require_choice("form", form, _WRITERS)
    path = new_file(file)
    own = opened_alone(model_or_dir, adapter_name, base, trust_remote_code)
    whole, layers = own.model, own.layers
    if form == "lycoris" and component is None and not type(whole).__module__.startswith("diffusers."):
        stems = {name: "lycoris_" + name.replace(".", "_") for name in layers}
    elif form == "onetrainer" and component is None:  # diffusers' names, for SDXL too
        dotted = stems_of(whole, layers, "diffusers")
        stems = {name: "lora_" + stem.replace(".", "_") for name, stem in dotted.items()}
    else:
        stems = stems_of(whole, layers, "kohya", component)
    tensors = {
        f"{stems[name]}.{key}": tensor
        for name, layer in layers.items()
        for key, tensor in _WRITERS[form](name, layer, own.adapter_name).items()
    }
    with written_whole(path) as partial:
        save_tensors(tensors, partial)
    return len(layers)


def _operator(name: str, layer: Layer, adapter_name: str, side: str, form: str) -> OFTOperator | BOFTOperator:
    """The operator of a layer, refused unless it rotates this side."""
    module = layer.get_base_layer()
    if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) or (
        side == "input" and getattr(module, "groups", 1) != 1
    ):
        raise ValueError(
            f"The adapted module {name!r} is a {type(module).__name__}, which these files cannot express; export the "
            "merged model (--to merged)."
        )
    return rotation_of(
        name, layer.adapter(adapter_name), side, f"{form} files can only hold OFT and BOFT on the {side}s"
    )


def rotation_of(name: str, adapter: Adapter, side: str, allowed: str) -> OFTOperator | BOFTOperator:
    """The adapter on a module, refused with what is allowed unless it is OFT or BOFT on this side."""
    if not isinstance(adapter, OFTOperator | BOFTOperator) or adapter.side != side:
        turned = getattr(adapter, "side", None)
        raise ValueError(
            f"The adapter on {name!r} is a {type(adapter).__name__}{f' on the {turned}s' if turned else ''}; {allowed}."
            " Export it as LoRA (--to lora) or merged (--to merged) instead."
        )
    return adapter


def generators_of(operator: OFTOperator | BOFTOperator) -> Tensor:
    """The free entries of Q at the current scale, within its bound: (blocks or 1, …), or (m, blocks, …) for BOFT."""
    return operator.cayley.generator(operator.in_part("generator", operator.generator.detach().float()))


def gain_of(operator: OFTOperator | BOFTOperator) -> Tensor | None:
    """The gain at the current scale."""
    return None if operator.gain is None else operator.in_part("output_gain", operator.gain.detach().float())


def _onetrainer(name: str, layer: Layer, adapter_name: str) -> dict[str, Tensor]:
    operator = _operator(name, layer, adapter_name, "input", "OneTrainer")
    terms = operator.cayley.neumann_terms
    if not isinstance(operator, OFTOperator) or terms != _KOHYA_TERMS:
        how = "the exact transform" if terms is None else f"a series with num_cayley_neumann_terms={terms}"
        raise ValueError(
            f"The adapter on {name!r} is a {type(operator).__name__} by {how}; OneTrainer's files can only hold OFT "
            f"with use_cayley_neumann=True and num_cayley_neumann_terms={_KOHYA_TERMS}. Export the merged model (--to "
            "merged)."
        )
    flag = {"oft_R.scaled_oft": torch.tensor(True)} if operator.cayley.scaled else {}
    return {"oft_R.weight": _by_kernel(layer, generators_of(operator) / operator.cayley.scale), **flag}


def _by_kernel(layer: Layer, own: Tensor) -> Tensor:
    """The generator of R; kohya and OneTrainer rotate a convolution's kernels by R, but a linear layer's rows by Rᵀ."""
    return -own if layer.host.weight.ndim > 2 else own


def _kohya(name: str, layer: Layer, adapter_name: str) -> dict[str, Tensor]:
    operator = _operator(name, layer, adapter_name, "input", "kohya")
    own = generators_of(operator)
    terms = operator.cayley.neumann_terms
    if isinstance(operator, OFTOperator) and terms == _KOHYA_TERMS:
        return {"oft_R.weight": _by_kernel(layer, own)}
    if isinstance(operator, OFTOperator):
        if terms is not None:
            raise ValueError(
                f"The adapter on {name!r} is OFT by a series with num_cayley_neumann_terms={terms}; "
                f"kohya supports only {_KOHYA_TERMS}, or the exact transform. Export the merged model (--to merged)."
            )
        own = own.expand(operator.blocks, -1)[None]
    gain = gain_of(operator)
    scale = torch.ones(layer.out_features) if gain is None else gain
    return {"boft_R": -skew_from_vector(own, operator.block_size), "boft_s": scale[:, None]}


def _lycoris(name: str, layer: Layer, adapter_name: str) -> dict[str, Tensor]:
    operator = _operator(name, layer, adapter_name, "output", "LyCORIS")
    own, size, gain = generators_of(operator), operator.block_size, gain_of(operator)
    if isinstance(operator, OFTOperator):
        if operator.cayley.neumann_terms is not None:
            raise ValueError(
                f"The adapter on {name!r} is OFT by a Neumann series, but LyCORIS supports only the exact transform. "
                "Train with use_cayley_neumann=False, or export the merged model (--to merged)."
            )
        own = own.expand(operator.blocks, -1)
    elif len(own) == 1:
        own = own[0]
    elif own.shape[1] != 2 ** (len(own) - 1):
        raise ValueError(
            f"The adapter on {name!r} is a butterfly of {len(own)} factors with {own.shape[1]} blocks; m factors of "
            "LyCORIS' boft have 2^(m − 1) blocks. Export the merged model (--to merged)."
        )
    skew = skew_from_vector(own, size)
    if skew.ndim == 3 and size > len(skew):
        raise ValueError(
            f"The adapter on {name!r} has {len(skew)} blocks of {size}; LyCORIS can only load diag-oft with at least "
            f"as many blocks as a block has rows. Train with blocks of at most {isqrt(len(skew) * size)}, or export "
            "the merged model (--to merged)."
        )
    if skew.ndim == 4:  # LyCORIS' order of a block's coordinates
        order = torch.arange(size).view(2, size // 2).T.flatten()
        skew = skew[..., order, :][..., order]
    else:  # in LyCORIS, W' = Rᵀ W
        skew = -skew
    alpha = torch.tensor(max(1.0, 2 * float(skew.norm())))
    tensors = {"oft_blocks": skew.triu(), "alpha": alpha}
    if gain is not None:
        tensors["rescale"] = gain.reshape(-1, *[1] * (layer.host.weight.ndim - 1))
    return tensors


_WRITERS: dict[str, Callable[[str, Layer, str], dict[str, Tensor]]] = {
    "kohya": _kohya,
    "onetrainer": _onetrainer,
    "lycoris": _lycoris,
}
"""Format -> the function that gives the tensors of one layer."""
