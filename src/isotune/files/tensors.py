"""Reading and writing safetensors files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from isotune.errors import AdapterFileError
from isotune.internals.safetensors_files import readable


def load_tensors(file: str | os.PathLike[str], advice: str) -> dict[str, Tensor]:
    """All tensors of a file by name.

    Args:
        file: the file.
        advice: end of the message if it cannot be read.

    Raises:
        AdapterFileError: the file is missing, damaged or of another format.
    """
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{file} cannot be read as a safetensors file ({error}). {advice}") from error
    return tensors


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors of any layout and device, with the usual mode of a new file.

    They are copied: safetensors refuses tensors that share memory, as tied embeddings do.
    """
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    save_file(copies, file, metadata={"format": "pt"})
    readable(file)
