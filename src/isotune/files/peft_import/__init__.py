"""Importing adapters of PEFT's own PSOFT, OFT, BOFT and HRA as isotune's, the same function as PEFT computes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from isotune.errors import AdapterFileError
from isotune.files.adapter import (
    ADAPTER,
    CONFIG_FILE,
    WEIGHTS_FILE,
    by_module,
    named_base,
    new_directory,
    read_config,
    read_tensors,
)
from isotune.files.peft_import.boft import import_boft
from isotune.files.peft_import.hra import import_hra
from isotune.files.peft_import.oft import import_oft
from isotune.files.peft_import.psoft import import_psoft
from isotune.files.peft_import.source import Source, refused

__all__ = ["convert_peft", "import_peft"]


def import_peft(directory: str | os.PathLike[str], base_model: nn.Module) -> PeftModel:
    """Turn an adapter of PEFT's own PSOFT, OFT, BOFT or HRA into isotune's, the same function as PEFT computes here.

    PEFT's PSOFT file holds no basis: it computes the singular vectors anew wherever it is loaded, so what the file
    means depends on the machine. Import it where it gives the results that you want to keep; what is saved afterwards
    means the same everywhere. PEFT's own layer computes the vectors here. The other methods' files mean the same on
    every machine, except that PEFT itself can load a butterfly of several factors only with its CUDA extension.

    What has no counterpart is converted exactly, and a larger file is the price:

    - PSOFT: a Neumann series of 1 or 2 terms becomes a free matrix (psoft_orth=False); an unconverged
      psoft_svd="lowrank" one of up to twice the rank; and a basis that is not the principal subspace is stored whole
      (basis="embedded"). psoft_alpha cancels in PEFT and becomes None.
    - BOFT: where PEFT found no CUDA extension, its file has one factor, whatever its configuration says.
    - HRA: an odd number of reflections gets one more with a direction of zeros, which is the identity and stays it.

    What does nothing in PEFT (OFT's module_dropout) is left out. COFT's bound is kept unless blocks are shared on
    layers of different widths, whose bounds differ in isotune.

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
    method = _METHODS[kind]
    with refused(str(folder / CONFIG_FILE)):
        theirs = method.config.from_pretrained(str(folder))
    layers, extras = by_module(read_tensors(folder), method.tensors)
    if not layers:
        raise AdapterFileError(f"{folder / WEIGHTS_FILE} holds no adapted layer; save the adapter again.")
    model = method.build(Source(folder, theirs, layers, base_model))
    if extras:
        done: Any = set_peft_model_state_dict(model, {**get_peft_model_state_dict(model), **extras})
        if done.unexpected_keys:
            raise AdapterFileError(
                f"{folder / WEIGHTS_FILE} holds {done.unexpected_keys[0]!r}, for which this base model has no place. "
                "Load the base with the class that the adapter was trained on."
            )
    model.peft_config[ADAPTER].base_model_name_or_path = theirs.base_model_name_or_path
    return model


def convert_peft(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base: str | None = None,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Import an adapter folder of PEFT's own PSOFT, OFT, BOFT or HRA and write it as isotune's.

    Args:
        directory: the adapter's folder.
        out: the folder to write; it appears only when it is complete.
        base: the base model's name as in `resolve_base`; by default what the adapter's config names.
        trust_remote_code: run code that the base model's repository carries.

    Raises:
        ValueError: `out` is not empty, or the base cannot be loaded.
        AdapterFileError: as `import_peft`.
    """
    with new_directory(out) as folder:
        raw = read_config(directory)
        model = import_peft(directory, named_base(directory, base, trust_remote_code=trust_remote_code))
        model.peft_config[ADAPTER].base_model_name_or_path = raw.get("base_model_name_or_path") or base
        model.save_pretrained(str(folder))


@dataclass(frozen=True)
class _Method:
    """How the adapters of one PEFT type are read."""

    config: type[Any]
    tensors: tuple[str, ...]
    """What follows the names of adapted modules in the file."""
    build: Callable[[Source], PeftModel]


_METHODS = {
    "PSOFT": _Method(peft.PsoftConfig, ("psoft_R",), import_psoft),
    "OFT": _Method(peft.OFTConfig, ("oft_R", "oft_embedding_R"), import_oft),
    "BOFT": _Method(peft.BOFTConfig, ("boft_R", "boft_s"), import_boft),
    "HRA": _Method(peft.HRAConfig, ("hra_u",), import_hra),
}
