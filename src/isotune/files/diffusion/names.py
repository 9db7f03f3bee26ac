"""How single files name layers: prefixes of components, underscores for dots, and two layouts of a UNet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from isotune.errors import AdapterFileError

ANY = ""
"""The component of names without a prefix: whichever the base model is."""
COMPONENTS = {
    "lora_unet_": "unet",
    "oft_unet_": "unet",
    "unet.": "unet",
    "lora_transformer_": "transformer",
    "transformer.": "transformer",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "clip_l.": "text_encoder",
    "text_encoder.": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "clip_g.": "text_encoder_2",
    "text_encoder_2.": "text_encoder_2",
    "base_model.model.": ANY,
    "lycoris_": ANY,
}
"""Prefix of a name -> the component of a pipeline, as diffusers calls it.

Source: kohya sd-scripts networks/orthogonal_common.py (lora_, and OMI's unet, clip_l, clip_g) and networks/oft.py
(oft_unet); OneTrainer modules/util/convert/lora/ (OMI); LyCORIS 4.1.3 lycoris/wrapper.py (lycoris); PEFT 0.21.2.
"""
_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_AROUND = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def component_of(stem: str) -> tuple[str, str]:
    """The component that a layer's name in a file belongs to, and the name without its prefix.

    Examples:
        >>> component_of("lora_te2_text_model_encoder_layers_0_mlp_fc1")
        ('text_encoder_2', 'text_model_encoder_layers_0_mlp_fc1')
        >>> component_of("down_blocks.0.conv")
        ('', 'down_blocks.0.conv')
    """
    for prefix, component in COMPONENTS.items():
        if stem.startswith(prefix):
            return component, stem.removeprefix(prefix)
    return ANY, stem


def original_names(base: nn.Module) -> dict[str, str]:
    """The names of a diffusers UNet's layers in Stable Diffusion's original code; empty for other models.

    Returns:
        Module name -> name such as "input_blocks.4.1.transformer_blocks.0.attn1.to_q".

    Source: modules/util/convert/lora/convert_sdxl_lora.py of OneTrainer has the same table for SDXL.
    """
    if not (hasattr(base, "down_blocks") and hasattr(base, "up_blocks") and hasattr(base, "mid_block")):
        return {}
    blocks = dict(_blocks_of(base))
    found: dict[str, str] = {}
    for name, _ in base.named_modules():
        if name in _AROUND:
            found[name] = _AROUND[name]
            continue
        inner = next((block for block in blocks if name.startswith(block + ".")), None)
        if inner is None:
            continue
        rest = name.removeprefix(inner + ".")
        if "resnets" in inner:
            rest = _RESNET.get(rest, rest)
        elif "downsamplers" in inner:
            rest = {"conv": "op"}.get(rest, rest)
        found[name] = f"{blocks[inner]}.{rest}"
    return found


def _blocks_of(unet: nn.Module) -> Iterator[tuple[str, str]]:
    """The parts of a UNet and their names in the original code, which numbers resnets and samplers together."""
    count = 1
    for i, block in enumerate(unet.down_blocks):  # type: ignore[arg-type]
        for j in range(len(block.resnets)):
            yield f"down_blocks.{i}.resnets.{j}", f"input_blocks.{count}.0"
            yield f"down_blocks.{i}.attentions.{j}", f"input_blocks.{count}.1"
            count += 1
        if getattr(block, "downsamplers", None):
            yield f"down_blocks.{i}.downsamplers.0", f"input_blocks.{count}.0"
            count += 1
    for old, new in (("resnets.0", "0"), ("attentions.0", "1"), ("resnets.1", "2")):
        yield f"mid_block.{old}", f"middle_block.{new}"
    count = 0
    for i, block in enumerate(unet.up_blocks):  # type: ignore[arg-type]
        attends = bool(getattr(block, "attentions", None))
        for j in range(len(block.resnets)):
            yield f"up_blocks.{i}.resnets.{j}", f"output_blocks.{count}.0"
            yield f"up_blocks.{i}.attentions.{j}", f"output_blocks.{count}.1"
            count += 1
        yield f"up_blocks.{i}.upsamplers.0", f"output_blocks.{count - 1}.{2 if attends else 1}"


def resolve(stems: Iterable[str], base: nn.Module, where: str) -> dict[str, str]:
    """Find the module of the base model that each name in a file means.

    Args:
        stems: names without the prefix of a component, with dots or underscores.
        base: the model.
        where: the file, for messages.

    Returns:
        Name in the file -> module name.

    Raises:
        AdapterFileError: some names mean no layer, several layers, or the same layer as another; lists them all.
    """
    meant: dict[str, set[str]] = {}
    original = original_names(base)
    for name, module in base.named_modules():
        if not isinstance(getattr(module, "weight", None), nn.Parameter):
            continue
        # transformers 5 has taken "text_model." out of the names of CLIP's text encoder; files keep it.
        for known in (name, original.get(name, name), f"text_model.{name}"):
            for form in (known, known.replace(".", "_")):
                meant.setdefault(form, set()).add(name)
    stems = list(stems)
    found = {stem: meant.get(stem, set()) for stem in stems}
    unknown = sorted(stem for stem, names in found.items() if not names)
    unclear = sorted(f"{stem} ({' or '.join(sorted(names))})" for stem, names in found.items() if len(names) > 1)
    single = {stem: next(iter(names)) for stem, names in found.items() if len(names) == 1}
    twice = sorted(stem for stem, name in single.items() if list(single.values()).count(name) > 1)
    problems = (
        ("mean no layer of this base model", unknown),
        ("mean more than one layer", unclear),
        ("mean the same layer as another", twice),
    )
    said = [f"these names {what}: {', '.join(names)}" for what, names in problems if names]
    if said:
        raise AdapterFileError(
            f"{where}: {'; '.join(said)}. Give the base model that the file was trained for, or remove what belongs to "
            "another model from the file."
        )
    return single
