"""Importing PEFT's own PSOFT, OFT, BOFT, HRA and RoAd adapters as isotune's, computing the same function as PEFT."""

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
from isotune.files.peft_import.rotations import import_boft, import_hra, import_oft, import_road
from isotune.files.peft_import.source import Source

__all__ = ["convert_peft", "import_peft"]

_METHODS = {
    "PSOFT": (("psoft_R",), import_psoft),
    "OFT": (("oft_R", "oft_embedding_R"), import_oft),
    "BOFT": (("boft_R", "boft_s"), import_boft),
    "HRA": (("hra_u",), import_hra),
    "ROAD": (("road_theta", "road_alpha"), import_road),
}
"""PEFT's type -> the name parts that follow adapted modules in its files, and the function that imports it."""


def import_peft(directory: str | os.PathLike[str], base_model: nn.Module) -> PeftModel:
    """Import an adapter of PEFT's own PSOFT, OFT, BOFT, HRA or RoAd as isotune's, computing what PEFT computes here.

    PEFT's PSOFT file holds no basis: PEFT recomputes the singular vectors wherever it loads the file, so its meaning
    depends on the machine. Import it where it gives the results that you want to keep, since PEFT's own layer computes
    the vectors here; the adapter saved afterwards means the same everywhere. The other methods' files mean the same on
    every machine, except that PEFT itself can load a butterfly of several factors only with its CUDA extension.

    Options without a counterpart are converted exactly, at the price of a larger file; docs/guides/from-peft.md lists
    them.

    Args:
        directory: the adapter's folder; only safetensors files are read.
        base_model: the plain base model, adapted in place as by get_peft_model.

    Returns:
        The adapted model, trainable; save_pretrained writes an adapter of type ISOTUNE_PSOFT, ISOTUNE_OFT, ….

    Raises:
        AdapterFileError: the folder is damaged or holds another method, does not fit the base, adapts layers other
            than nn.Linear, or computes something that no adapter of isotune can.

    Source: peft/tuners/{psoft,oft,boft,hra,road}/layer.py of PEFT 0.21.2. PSOFT's R acts as x Rᵀ, and the exact Cayley
    transform of OFT and BOFT is (I − Q)(I + Q)⁻¹, so these generators have the opposite sign; OFT's Neumann series has
    isotune's sign. A series with k ≥ 3 terms is isotune's with max(k − 2, 2).
    """
    folder = Path(directory)
    kind = read_config(folder).get("peft_type")
    if kind not in list(_METHODS):  # of a dictionary no list could be asked, which a damaged file may hold
        raise AdapterFileError(
            f"{folder} holds an adapter of type {kind!r}; only PEFT's {', '.join(_METHODS)} can be imported."
        )
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise AdapterFileError(
            f"{folder} holds an adapter of type {kind!r}, which the installed PEFT {peft.__version__} lacks, but "
            "importing needs PEFT's own layers: pip install -U peft."
        )
    groups, build = _METHODS[kind]
    with refused(f"{folder / CONFIG_FILE}: "):
        theirs = PEFT_TYPE_TO_CONFIG_MAPPING[kind].from_pretrained(str(folder))
    layers, extras = read_layers(folder, groups)
    model = build(Source(folder, theirs, layers, base_model))
    if hasattr(theirs, "bias"):  # RoAd rotates the biases themselves
        _warn_of_lost_biases(folder, model, extras)
    if extras:
        done: Any = set_peft_model_state_dict(model, {**get_peft_model_state_dict(model), **extras})
        if done.unexpected_keys:
            raise AdapterFileError(
                f"{folder / WEIGHTS_FILE} holds {done.unexpected_keys[0]!r}, for which this base model has no place. "
                "Load the base with the class the adapter was trained on."
            )
    model.peft_config[ADAPTER].base_model_name_or_path = theirs.base_model_name_or_path
    return model


def _warn_of_lost_biases(folder: Path, model: nn.Module, stored: Iterable[str]) -> None:
    """Warn if the configuration says that biases were trained but the file holds none."""
    trained = [name for name, p in model.named_parameters() if p.requires_grad and name.endswith(".bias")]
    if trained and not any(name.endswith(".bias") for name in stored):
        warnings.warn(
            f"{folder / CONFIG_FILE} says that biases were trained, but {WEIGHTS_FILE} holds none: PEFT below 0.21 "
            f"does not save them. {len(trained)} biases keep the base model's values, as when PEFT loads this folder. "
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
    """Import an adapter folder of PEFT's own PSOFT, OFT, BOFT, HRA or RoAd and write it as isotune's.

    `out`, `base` and `trust_remote_code` are as in `export_lora`.

    Args:
        directory: as in `import_peft`.

    Raises:
        ValueError: `out` is not empty, or the base cannot be loaded.
        AdapterFileError: as in `import_peft`.
    """
    with new_directory(out) as folder:
        model = import_peft(directory, named_base(directory, base, trust_remote_code=trust_remote_code))
        config = model.peft_config[ADAPTER]
        config.base_model_name_or_path = config.base_model_name_or_path or base
        model.save_pretrained(str(folder))
