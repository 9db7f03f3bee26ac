"""Importing adapters of PEFT's own PSOFT, OFT, BOFT and HRA as isotune's, the same function as PEFT computes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from isotune.errors import AdapterFileError, IsotuneWarning
from isotune.files.adapter import (
    ADAPTER,
    CONFIG_FILE,
    WEIGHTS_FILE,
    named_base,
    new_directory,
    read_config,
    read_layers,
    refused,
)
from isotune.files.peft_import.psoft import import_psoft
from isotune.files.peft_import.rotations import import_boft, import_hra, import_oft
from isotune.files.peft_import.source import Source

__all__ = ["convert_peft", "import_peft"]

_METHODS = {
    "PSOFT": (("psoft_R",), import_psoft),
    "OFT": (("oft_R", "oft_embedding_R"), import_oft),
    "BOFT": (("boft_R", "boft_s"), import_boft),
    "HRA": (("hra_u",), import_hra),
}
"""PEFT's type -> what follows the names of adapted modules in its files, and how it becomes isotune's."""


def import_peft(directory: str | os.PathLike[str], base_model: nn.Module) -> PeftModel:
    """Turn an adapter of PEFT's own PSOFT, OFT, BOFT or HRA into isotune's, the same function as PEFT computes here.

    PEFT's PSOFT file holds no basis: it computes the singular vectors anew wherever it is loaded, so what the file
    means depends on the machine. Import it where it gives the results that you want to keep; what is saved afterwards
    means the same everywhere. PEFT's own layer computes the vectors here. The other methods' files mean the same on
    every machine, except that PEFT itself can load a butterfly of several factors only with its CUDA extension.

    What has no counterpart is converted exactly, and a larger file is the price; docs/guides/from-peft.md lists it.

    Args:
        directory: the adapter's folder; only safetensors are read.
        base_model: the plain base model; as with get_peft_model, it is adapted in place.

    Returns:
        The adapted model, trainable; save_pretrained writes an adapter of type ISOTUNE_PSOFT, ISOTUNE_OFT, ….

    Raises:
        AdapterFileError: the folder is damaged or of another method, does not fit the base, adapts other layers than
            nn.Linear, or computes what no adapter of isotune does.

    Source: peft/tuners/{psoft,oft,boft,hra}/layer.py of PEFT 0.21.2. PSOFT's R acts as x Rᵀ, and the exact Cayley
    transform of OFT and BOFT is (I − Q)(I + Q)⁻¹, so these generators have the opposite sign; OFT's Neumann series has
    isotune's sign. A series with k ≥ 3 terms is isotune's with max(k − 2, 2).
    """
    folder = Path(directory)
    kind = read_config(folder).get("peft_type")
    if kind not in _METHODS:
        raise AdapterFileError(
            f"{folder} holds an adapter of type {kind!r}; only {', '.join(_METHODS)} of PEFT are imported."
        )
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise AdapterFileError(
            f"{folder} holds an adapter of type {kind!r}, which the installed PEFT {peft.__version__} lacks, and "
            "its own layers say what the file means: pip install -U peft."
        )
    groups, build = _METHODS[kind]
    with refused(f"{folder / CONFIG_FILE}: "):
        theirs = PEFT_TYPE_TO_CONFIG_MAPPING[kind].from_pretrained(str(folder))
    layers, extras = read_layers(folder, groups)
    model = build(Source(folder, theirs, layers, base_model))
    _warn_of_lost_biases(folder, model, extras)
    if extras:
        done: Any = set_peft_model_state_dict(model, {**get_peft_model_state_dict(model), **extras})
        if done.unexpected_keys:
            raise AdapterFileError(
                f"{folder / WEIGHTS_FILE} holds {done.unexpected_keys[0]!r}, for which this base model has no place. "
                "Load the base with the class that the adapter was trained on."
            )
    model.peft_config[ADAPTER].base_model_name_or_path = theirs.base_model_name_or_path
    return model


def _warn_of_lost_biases(folder: Path, model: nn.Module, stored: Iterable[str]) -> None:
    """Say that biases were trained, by the configuration, and are not in the file."""
    trained = [name for name, p in model.named_parameters() if p.requires_grad and name.endswith(".bias")]
    if trained and not any(name.endswith(".bias") for name in stored):
        warnings.warn(
            f"{folder / CONFIG_FILE} says that biases were trained, and {WEIGHTS_FILE} holds none: PEFT below 0.21 "
            f"does not save them. {len(trained)} biases are those of the base model, as when PEFT loads this folder. "
            "If you have the trained model, save it again with PEFT 0.21 or later.",
            IsotuneWarning,
            stacklevel=3,
        )


def convert_peft(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base: str | None = None,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Import an adapter folder of PEFT's own PSOFT, OFT, BOFT or HRA and write it as isotune's.

    `out`, `base` and `trust_remote_code` are as for `export_lora`.

    Args:
        directory: as for `import_peft`.

    Raises:
        ValueError: `out` is not empty, or the base cannot be loaded.
        AdapterFileError: as `import_peft`.
    """
    with new_directory(out) as folder:
        model = import_peft(directory, named_base(directory, base, trust_remote_code=trust_remote_code))
        config = model.peft_config[ADAPTER]
        config.base_model_name_or_path = config.base_model_name_or_path or base
        model.save_pretrained(str(folder))
