"""Exporting an adapter on a diffusers model as one LoRA file, with diffusers' or kohya's names."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from isotune.files.diffusion.fused import join, original_layers
from isotune.files.diffusion.names import original_names
from isotune.files.export_lora import LoraExport, Opened, factors_of, opened
from isotune.files.tensors import save_tensors
from isotune.methods.checks import require, require_choice
from isotune.subspace.lowrank import Factored, check_truncation, pad_rank
from isotune.tuner.layer import Layer
from isotune.whole_files import written_whole

Names = Literal["diffusers", "kohya"]
Component = Literal["text_encoder", "text_encoder_1", "text_encoder_2"]
_KOHYA = {"text_encoder": "lora_te_", "text_encoder_1": "lora_te1_", "text_encoder_2": "lora_te2_"}


def export_lora_file(
    model_or_dir: nn.Module | str | os.PathLike[str],
    file: str | os.PathLike[str],
    names: Names,
    adapter_name: str = "default",
    base: nn.Module | str | None = None,
    *,
    component: Component | None = None,
    rank: int | None = None,
    energy: float | None = None,
    trust_remote_code: bool = False,
) -> LoraExport:
    """Write an adapter on a part of a pipeline as a LoRA file for diffusers, ComfyUI or kohya's scripts.

    Supported parts are diffusers' UNets and transformers, and CLIP's text encoders.

    As in `export_lora`, updates of low rank are exact, and other rotations are approximated at a rank or energy. On a
    convolution the down factor has its kernel, stride and padding, and the up factor is 1 × 1. Every layer's scale is
    1: all are padded with zeros to the largest rank, which is also kohya's alpha. Where one original layer of FLUX or
    SD3 combines several of diffusers' layers (queries, keys and values), their factors become blocks on a diagonal,
    and its rank is the sum of their ranks.

    Other arguments are as in `export_lora`.

    Args:
        file: a new .safetensors file.
        names: "diffusers" for unet.MODULE.lora_A.weight (transformer.MODULE… if it is not a UNet), as
            `load_lora_weights` reads it; "kohya" for lora_unet_MODULE.lora_down.weight, with the original names on
            SDXL, FLUX and SD3, which ComfyUI and, except for SD3, diffusers read too.
        component: which text encoder of its pipeline the base is: the only one, the first or the second.

    Returns:
        Each layer's rank and error.

    Raises:
        ValueError: the file exists, the base is not such a model, the format has no name for one of its layers, the
            adapter trains more than its own tensors, or its update has full rank and neither rank nor energy is given.

    Source: diffusers 0.42, loaders/lora_conversion_utils.py and loaders/peft.py; kohya sd-scripts, networks/lora.py;
    ComfyUI, comfy/lora.py (model_lora_keys_unet).
    """
    require_choice("names", names, ["diffusers", "kohya"])
    check_truncation(rank, energy)
    path = new_file(file)
    own = opened_alone(model_or_dir, adapter_name, base, trust_remote_code)
    stems = stems_of(own.model, own.layers, names, component, joined=True)
    found = {name: _factors(name, layer, own.adapter_name, rank, energy) for name, layer in own.layers.items()}
    if names == "kohya" and original_layers(own.model):
        factors = join(found, own.model)
        kernels = dict.fromkeys(factors, torch.Size())
    else:
        factors = {stems[name]: (pair.up, pair.down) for name, pair in found.items()}
        kernels = {stems[name]: layer.host.weight.shape[2:] for name, layer in own.layers.items()}
    tensors: dict[str, Tensor] = {}
    widest = max(len(down) for _, down in factors.values())
    for stem, pair in factors.items():
        # diffusers applies one layer's rank or alpha to others, so all are padded with zeros to the same rank.
        up, down = pad_rank(*pair, widest)
        if kernel := kernels[stem]:
            down, up = down.reshape(widest, -1, *kernel), up.reshape(*up.shape, *[1] * len(kernel))
        if names == "diffusers":
            tensors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        else:
            tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
            tensors[f"{stem}.alpha"] = torch.tensor(float(widest))
    with written_whole(path) as partial:
        save_tensors(tensors, partial)
    return LoraExport.of(found)


def new_file(file: str | os.PathLike[str]) -> Path:
    """The path of a file to write; refused if it exists or does not end in .safetensors."""
    path = Path(file)
    if path.suffix != ".safetensors" or path.exists():
        raise ValueError(f"{path} must be a new file that ends in .safetensors; choose another name.")
    return path


def opened_alone(
    model_or_dir: nn.Module | str | os.PathLike[str],
    adapter_name: str,
    base: nn.Module | str | None,
    trust_remote_code: bool,
) -> Opened:
    """Open an adapter as `opened` does; refused if it trains more than its own tensors."""
    own = opened(model_or_dir, adapter_name, base, trust_remote_code=trust_remote_code)
    if own.extras or own.config.bias != "none":  # PEFT below 0.21 does not save biases
        raise ValueError(
            "The adapter trains modules or biases besides its own tensors, which such a file cannot hold; export the "
            "merged model (--to merged)."
        )
    return own


def stems_of(
    base: nn.Module, modules: Collection[str], names: Names, component: Component | None = None, *, joined: bool = False
) -> dict[str, str]:
    """Module name -> the beginning of its keys in the file.

    Args:
        base: the model.
        modules: names of the adapted modules.
        names: whose names to use.
        component: which text encoder the base is; None if it is not one.
        joined: whether several modules may share one name, that of the original layer they are parts of.

    Raises:
        ValueError: there are no such names for the base or a module, or the component does not fit the base.
    """
    is_unet = hasattr(base, "down_blocks") and hasattr(base, "mid_block")
    kind = f"{type(base).__module__}.{type(base).__qualname__}"
    is_text = type(base).__name__ in ("CLIPTextModel", "CLIPTextModelWithProjection")
    if not (is_text or kind.startswith("diffusers.")):
        raise ValueError(
            f"The base is a {kind}; files with these names can only be written for diffusers models and CLIP's text "
            "encoders. Export an ordinary LoRA folder (--to lora without --names), or the merged model."
        )
    if is_text or component is not None:
        require(
            component in _KOHYA if is_text else component is None,
            "component",
            component,
            f"the base is a {kind}; a text encoder needs one of {', '.join(_KOHYA)} (--component), other models none",
        )
    if component is not None:
        start = _KOHYA[component] if names == "kohya" else f"{component.removesuffix('_1')}."
        # transformers 5 has taken "text_model." out of the names of CLIP's text encoder; files keep it.
        full = {name: name if name.startswith("text_") else f"text_model.{name}" for name in modules}
        return {name: start + (own.replace(".", "_") if names == "kohya" else own) for name, own in full.items()}
    if names == "diffusers":
        return {name: f"{'unet' if is_unet else 'transformer'}.{name}" for name in modules}
    if not is_unet:
        known = {part: stem for stem, parts in original_layers(base).items() for part in parts} if joined else {}
        nameless = [name for name in modules if name not in known]
        if nameless:
            raise ValueError(
                f"kohya's files have no separate layer for {nameless[0]!r} of a {type(base).__qualname__}. Export it "
                "as LoRA with diffusers' names (--to lora --names diffusers), which ComfyUI reads for such models too, "
                "or export the merged model (--to merged)."
            )
        return {name: known[name] for name in modules}
    # kohya uses the original names for SDXL, and diffusers' names for SD 1 and 2.
    original = original_names(base) if getattr(base, "add_embedding", None) is not None else {}
    return {name: "lora_unet_" + original.get(name, name).replace(".", "_") for name in modules}


def _factors(name: str, layer: Layer, adapter_name: str, rank: int | None, energy: float | None) -> Factored:
    """The update of W as two factors."""
    module = layer.get_base_layer()
    if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) or getattr(module, "groups", 1) != 1:
        raise ValueError(
            f"The adapted module {name!r} is a {type(module).__name__}, which a LoRA file cannot express; it can only "
            "hold linear layers and convolutions without groups. Export the merged model instead (--to merged)."
        )
    return factors_of(name, layer, adapter_name, rank, energy)
