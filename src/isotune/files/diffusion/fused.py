"""kohya's names on FLUX and SD3, where one original layer combines several of diffusers' layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from isotune.subspace.lowrank import Factored

_LAST = {"final_layer_linear": "proj_out", "final_layer_adaLN_modulation_1": "norm_out.linear"}
_FLUX_AROUND = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in_in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in_in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
    **_LAST,
}
_FLUX_DOUBLE = {
    "img_attn_qkv": "attn.to_q attn.to_k attn.to_v",
    "txt_attn_qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "img_attn_proj": "attn.to_out.0",
    "txt_attn_proj": "attn.to_add_out",
    "img_mlp_0": "ff.net.0.proj",
    "img_mlp_2": "ff.net.2",
    "txt_mlp_0": "ff_context.net.0.proj",
    "txt_mlp_2": "ff_context.net.2",
    "img_mod_lin": "norm1.linear",
    "txt_mod_lin": "norm1_context.linear",
}
_FLUX_SINGLE = {
    "linear1": "attn.to_q attn.to_k attn.to_v proj_mlp",
    "linear2": "proj_out",
    "modulation_lin": "norm.linear",
}
_SD3_AROUND = {
    "context_embedder": "context_embedder",
    "t_embedder_mlp_0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder_mlp_2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder_mlp_0": "time_text_embed.text_embedder.linear_1",
    "y_embedder_mlp_2": "time_text_embed.text_embedder.linear_2",
    **_LAST,
}
_SD3_JOINT = {
    "x_block_attn_qkv": "attn.to_q attn.to_k attn.to_v",
    "x_block_attn2_qkv": "attn2.to_q attn2.to_k attn2.to_v",
    "context_block_attn_qkv": "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
    "x_block_attn_proj": "attn.to_out.0",
    "x_block_attn2_proj": "attn2.to_out.0",
    "context_block_attn_proj": "attn.to_add_out",
    "x_block_mlp_fc1": "ff.net.0.proj",
    "x_block_mlp_fc2": "ff.net.2",
    "context_block_mlp_fc1": "ff_context.net.0.proj",
    "context_block_mlp_fc2": "ff_context.net.2",
    "x_block_adaLN_modulation_1": "norm1.linear",
    "context_block_adaLN_modulation_1": "norm1_context.linear",
}
"""Name in the original code, with underscores -> the diffusers modules whose concatenated outputs it has."""
_MODELS = {
    "FluxTransformer2DModel": (
        _FLUX_AROUND,
        (
            ("double_blocks", "transformer_blocks", _FLUX_DOUBLE),
            ("single_blocks", "single_transformer_blocks", _FLUX_SINGLE),
        ),
    ),
    "SD3Transformer2DModel": (_SD3_AROUND, (("joint_blocks", "transformer_blocks", _SD3_JOINT),)),
}
"""diffusers' class -> the tables of its layers outside of blocks, and of each kind of block by its two names."""


def original_layers(base: nn.Module) -> dict[str, tuple[str, ...]]:
    """kohya's name of each original layer of FLUX or SD3 -> the modules it combines; empty for other models.

    Source: diffusers 0.42, loaders/lora_conversion_utils.py (_convert_kohya_flux_lora_to_diffusers) and
    loaders/single_file_utils.py (convert_sd3_transformer_checkpoint_to_diffusers); kohya sd-scripts,
    networks/lora_flux.py and networks/lora_sd3.py, which put lora_unet_ before the original names.
    """
    if type(base).__name__ not in _MODELS or not type(base).__module__.startswith("diffusers."):
        return {}
    around, repeated = _MODELS[type(base).__name__]
    found: dict[str, tuple[str, ...]] = {f"lora_unet_{name}": (module,) for name, module in around.items()}
    for original, blocks, table in repeated:
        for i in range(len(base.get_submodule(blocks))):  # type: ignore[arg-type]
            for name, modules in table.items():
                parts = tuple(f"{blocks}.{i}.{module}" for module in modules.split())
                found[f"lora_unet_{original}_{i}_{name}"] = parts
    return found


def join(found: Mapping[str, Factored], base: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Join the factors of each original layer's parts, exactly, as blocks on a diagonal; their ranks add up.

    Args:
        found: module of the base -> its factors.
        base: a FLUX or SD3 transformer.

    Returns:
        kohya's name -> (up, down).
    """
    joined = {}
    for stem, parts in original_layers(base).items():
        downs = [found[part].down for part in parts if part in found]
        if downs:
            # A part without an adapter has its rows too; those of a quantised weight are packed.
            rows: dict[str, Any] = {part: base.get_submodule(part).out_features for part in parts}
            ups = [found[part].up if part in found else downs[0].new_zeros(rows[part], 0) for part in parts]
            up: Tensor = torch.block_diag(*ups)  # type: ignore[no-untyped-call]
            around = base.get_submodule(parts[0].rpartition(".")[0])
            if type(around).__name__ == "AdaLayerNormContinuous":
                up = torch.cat(up.chunk(2)[::-1])  # its rows are scales, then shifts; the original has the reverse
            joined[stem] = up, torch.cat(downs)
    return joined
