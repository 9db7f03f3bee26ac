"""Importing a single safetensors file of a rotation, recognised by its content, as isotune's adapter."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn

from isotune.algebra.skew import generator_scale, skew_order, skew_size, vector_from_skew
from isotune.errors import AdapterFileError
from isotune.files.adapter import ADAPTER, CONFIG_FILE, WEIGHTS_FILE, new_directory, only, read_config, refused
from isotune.files.base_model import load_base, pipeline_of
from isotune.files.diffusion.layer import AdaptedModule, Parameters, block_options, butterfly_options
from isotune.files.diffusion.lycoris import import_butterfly, import_diagonal
from isotune.files.diffusion.names import component_of, resolve
from isotune.files.peft_import.source import Source, series_fields
from isotune.files.tensors import load_tensors
from isotune.methods import BOFTConfig, OFTConfig
from isotune.methods.config import IsotuneConfig
from isotune.tuner.state import KEY_PREFIX, check_values

_KEYS = re.compile(r"(.+)\.(oft_R\.weight|oft_R\.scaled_oft|boft_R|boft_s|boft_P|oft_blocks|rescale|alpha)")
_TERMS = 5
"""Terms of the Neumann series as PEFT counts them: PEFT's default, and always those of kohya and OneTrainer."""


@dataclass(frozen=True)
class Stem:
    """The tensors under one layer's name in a file."""

    prefix: str
    """The prefix, which tells the component and the tool that wrote the file."""
    tensors: dict[str, Tensor]


def import_single(file: str | os.PathLike[str], base_model: nn.Module, component: str | None = None) -> PeftModel:
    """Import a single file of PEFT, kohya, LyCORIS or OneTrainer as isotune's adapter that computes the same function.

    The supported tensors are `oft_R.weight` (PEFT's OFT, kohya's networks.oft_v2, OneTrainer's OFT_2, scaled or with
    one shared block) and `boft_R` with `boft_s` (PEFT's and kohya's BOFT), which rotate inputs; and `oft_blocks`
    (LyCORIS' diag-oft and boft, and kohya's networks.oft), which rotates outputs; under the names in docs/formats.md.
    Such a file does not say how OFT's R is computed: by the Neumann series of 5 terms, PEFT's default and the only way
    of the others.

    Args:
        file: a safetensors file.
        base_model: the plain model to adapt, in place.
        component: which part of a pipeline this model is, such as "unet" or "text_encoder"; None if the file has only
            one part.

    Returns:
        The adapted model, trainable.

    Raises:
        AdapterFileError: the file is damaged, holds another method or several, or does not fit this model; the model
            is then unchanged.

    Source: peft/tuners/oft/layer.py of PEFT 0.21.2; networks/oft_v2.py, networks/boft.py and
    networks/orthogonal_common.py of kohya sd-scripts (September 2026); modules/module/oft_utils.py and LoRAModule.py
    of OneTrainer.
    """
    parts = read_single(file)
    if component is None:
        if len(parts) > 1:
            raise AdapterFileError(
                f"{file} adapts several models ({', '.join(sorted(name or 'one without a name' for name in parts))}); "
                "say which of them this base is (component=... in Python), or give the folder of the whole pipeline."
            )
        component = next(iter(parts))
    if component not in parts:
        raise AdapterFileError(f"{file} holds nothing for {component!r}; it has {', '.join(sorted(parts))}.")
    return _import_part(str(file), parts[component], base_model)


def convert_single(
    file: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base: str | None,
    *,
    trust_remote_code: bool = False,
) -> list[str]:
    """Import a single file and write it as isotune's adapter folder, or as one folder for each model of a pipeline.

    Args:
        file: as in `import_single`.
        out: a new folder; for a pipeline, with a folder inside for each component that the file adapts.
        base: the folder of a diffusers or transformers model or of a diffusers pipeline, or a model's Hub name.
        trust_remote_code: whether to run code from the base model's repository.

    Returns:
        The folders written.

    Raises:
        ValueError: `out` is not empty, or the base is not given or cannot be loaded.
        AdapterFileError: as in `import_single`.
    """
    if base is None:
        raise ValueError(f"{file} does not name its base model; give a model's or a pipeline's folder with --base.")
    parts, folders = read_single(file), pipeline_of(base)
    if folders is None:
        places: dict[str | None, tuple[str, str]] = {None: (base, "")}
    elif set(parts) <= set(folders):
        places = {name: (str(folders[name]), name) for name in parts}
    else:
        odd = ", ".join(sorted(name or "names without a component" for name in set(parts) - set(folders)))
        raise AdapterFileError(
            f"{file} holds {odd}, but the pipeline in {base} has {', '.join(sorted(folders))}. Give the folder of the "
            "model that the file adapts."
        )
    with new_directory(out) as folder:
        for component, (path, inner) in places.items():
            model = import_single(file, load_base(path, trust_remote_code=trust_remote_code), component)
            model.peft_config[ADAPTER].base_model_name_or_path = path
            model.save_pretrained(str(folder / inner))
    return [str(Path(out) / inner) for _, inner in places.values()]


def read_single(file: str | os.PathLike[str]) -> dict[str, dict[str, Stem]]:
    """Read the tensors of a single file.

    Returns:
        Component ("" if the names have no prefix) -> name of the layer without its prefix -> its tensors.

    Raises:
        AdapterFileError: the file is missing or damaged, or holds tensors of other methods.
    """
    tensors = load_tensors(file, "Only such files are read; convert a pickle (.pt, .bin, .ckpt) first.")
    parts: dict[str, dict[str, Stem]] = {}
    others = []
    for key, tensor in tensors.items():
        match = _KEYS.fullmatch(key)
        if match is None:
            others.append(key)
            continue
        component, stem = component_of(match[1])
        if match[2] == "alpha" and tensor.dtype in (torch.int32, torch.int64):
            tensor = tensor.float()
        if match[2] != "oft_R.scaled_oft":
            check_values(key, tensor, file=str(file))
        own = parts.setdefault(component, {}).setdefault(stem, Stem(match[1].removesuffix(stem), {}))
        if match[2] in own.tensors:
            raise AdapterFileError(f"{file} holds {match[2]!r} of {stem!r} twice, under two prefixes.")
        own.tensors[match[2]] = tensor
    if others or not parts:
        kinds = Counter(".".join(key.split(".")[-2 if key.endswith(".weight") else -1 :]) for key in others)
        shown = ", ".join(f"{name} ({count})" for name, count in sorted(kinds.items())) or "nothing"
        raise AdapterFileError(
            f"{file} holds {shown}, such as {min(others, default='no tensor')!r}, which is not a rotation that can be "
            "imported; oft_R.weight, boft_R with boft_s, and oft_blocks are."
        )
    return parts


def _import_part(file: str, stems: Mapping[str, Stem], base: nn.Module) -> PeftModel:
    """Put the adapter of one component on the base."""
    kinds = {stem: _kind(file, stem, own.tensors) for stem, own in stems.items()}
    if len(set(kinds.values())) > 1:
        shown = ", ".join(
            f"{kind} on {min(s for s in kinds if kinds[s] == kind)!r}" for kind in sorted(set(kinds.values()))
        )
        raise AdapterFileError(f"{file} mixes methods ({shown}), but an adapter has only one; split the file.")
    names = resolve(stems, base, file)
    layers = []
    for stem, own in stems.items():
        module = base.get_submodule(names[stem])
        convolution = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        if not (convolution or isinstance(module, nn.Linear)):
            raise AdapterFileError(
                f"{file}: {names[stem]!r} is a {type(module).__name__}; only linear layers and convolutions can be "
                "imported."
            )
        if convolution and own.prefix == KEY_PREFIX:
            raise AdapterFileError(
                f"{file}: {names[stem]!r}: PEFT rotates each of a convolution's overlapping patches, which no change "
                "of its weight can express. Train it again with isotune's own method."
            )
        layers.append(AdaptedModule(names[stem], own.prefix, module.get_parameter("weight"), own.tensors, file))
    build = _KINDS[next(iter(kinds.values()))][2]
    with torch.no_grad():
        config, parameters = build(layers)
        for layer in layers:
            if not all(torch.isfinite(own.float()).all() for own in parameters[layer.name].values()):
                raise layer.refuse("its values are beyond float32; the file is damaged, or its training diverged.")
        return Source(Path(file), None, {}, base).adapted(config, parameters)


def _oft(layers: list[AdaptedModule]) -> tuple[IsotuneConfig, Parameters]:
    """oft_R.weight, (blocks or 1, b(b − 1)/2)."""
    rows, sizes, scaled = {}, {}, {}
    for layer in layers:
        weight = layer.tensor("oft_R.weight", 2)
        size = sizes[layer.name] = skew_order(weight.shape[1])
        if skew_size(size) != weight.shape[1] or len(weight) not in (1, layer.width // size) or layer.width % size:
            raise layer.refuse(
                f"oft_R.weight has shape {tuple(weight.shape)}, which does not fit blocks of its {layer.width} inputs."
            )
        scaled[layer.name] = _is_scaled(layer)
        rows[layer.name] = layer.sign * weight
    if not all(scaled.values()):  # isotune's configuration is for all layers
        rows = {name: own * generator_scale(sizes[name]) if scaled[name] else own for name, own in rows.items()}
    shared = all(len(own) == 1 for own in rows.values()) and any(x.width > sizes[x.name] for x in layers)
    if not shared:  # expand blocks that only some layers share
        rows = {x.name: rows[x.name].expand(x.width // sizes[x.name], -1) for x in layers}
    config = OFTConfig(
        target_modules=only(rows),
        **block_options(layers, sizes, "input"),
        block_share=shared,
        scaled_generator=all(scaled.values()),
        **series_fields(_TERMS),
    )
    return config, {name: {"generator": own} for name, own in rows.items()}


def _kind(file: str, stem: str, tensors: Mapping[str, Tensor]) -> str:
    """The method that a layer's tensors belong to."""
    found = [kind for kind, (key, beside, _) in _KINDS.items() if key in tensors and tensors.keys() <= {key, *beside}]
    blocks = tensors.get("oft_blocks")
    if blocks is not None and found:
        found = {3: ["diag-oft"], 4: ["LyCORIS BOFT"]}.get(blocks.ndim, [])
    if not found:
        known = "; ".join(f"{key} with {', '.join(beside)}" for key, beside, _ in _KINDS.values())
        raise AdapterFileError(
            f"{file} holds {', '.join(sorted(tensors))} for {stem!r}, which do not make a known method: {known}."
        )
    return found[0]


def _is_scaled(layer: AdaptedModule) -> bool:
    """Whether OneTrainer divides the stored weight by 2 √(b − 1).

    Builds from before scaled OFT was merged wrote an integer instead of a Boolean, and divided by √(b(b − 1)/2).
    """
    flag = layer.tensors.get("oft_R.scaled_oft")
    if flag is None:
        return False
    if not flag.dtype.is_floating_point and flag.dtype != torch.bool:
        raise layer.refuse(
            "its flag scaled_oft is an integer, as written by OneTrainer builds from before scaled OFT was merged, "
            "which divide by another number. Save it again with a released OneTrainer."
        )
    if flag.numel() != 1:
        raise layer.refuse(f"its flag scaled_oft has {flag.numel()} values; it must have one.")
    return bool(flag)


def _boft(layers: list[AdaptedModule]) -> tuple[IsotuneConfig, Parameters]:
    """boft_R, (m, blocks, b, b), and boft_s, (out, 1) or (1, out)."""
    parameters, shapes = {}, {}
    for layer in layers:
        stages, gain = layer.tensor("boft_R", 4), layer.tensor("boft_s", 2)
        _, blocks, size, other = shapes[layer.name] = tuple(stages.shape)
        if size != other or blocks * size != layer.width or gain.numel() != layer.outputs:
            raise layer.refuse(
                f"boft_R {tuple(stages.shape)} and boft_s {tuple(gain.shape)} do not fit its weight, "
                f"{layer.outputs} × {layer.width}."
            )
        # PEFT and kohya: R = (I − S)(I + S)⁻¹, S = ½ (A − Aᵀ), the inverse of isotune's; W Rᵀ for kernels too.
        generator = -vector_from_skew((stages - stages.mT) / 2)
        parameters[layer.name] = {"generator": generator, "output_gain": gain.flatten()}
    with refused(f"{layers[0].where}: "):
        config = BOFTConfig(target_modules=only(parameters), **butterfly_options(shapes))
    return config, parameters


_KINDS: dict[str, tuple[str, tuple[str, ...], Callable[[list[AdaptedModule]], tuple[IsotuneConfig, Parameters]]]] = {
    "OFT": ("oft_R.weight", ("oft_R.scaled_oft",), _oft),
    "BOFT": ("boft_R", ("boft_s", "boft_P"), _boft),
    "diag-oft": ("oft_blocks", ("alpha", "rescale"), import_diagonal),
    "LyCORIS BOFT": ("oft_blocks", ("alpha", "rescale"), import_butterfly),
}
"""Method -> the tensor it must have, the tensors it may have, and the function that imports it."""


def with_config(file: str | os.PathLike[str]) -> Path | None:
    """The folder of a file with PEFT's configuration beside it, which says more than the tensors; otherwise None."""
    folder = Path(file).parent
    if Path(file).name != WEIGHTS_FILE or not (folder / CONFIG_FILE).is_file():
        return None
    return folder if "peft_type" in read_config(folder) else None
