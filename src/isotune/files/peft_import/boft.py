"""PEFT's own BOFT."""

from __future__ import annotations

import torch
from peft import PeftModel

from isotune.algebra.skew import vector_from_skew
from isotune.errors import AdapterFileError
from isotune.files.adapter import CONFIG_FILE, WEIGHTS_FILE
from isotune.files.peft_import.source import Source, refused, shared_fields
from isotune.methods import BOFTConfig


@torch.no_grad()
def import_boft(source: Source) -> PeftModel:
    """The base with isotune's BOFT, which computes what PEFT's BOFT does.

    Args:
        source: the folder and its base, which is adapted in place.

    Raises:
        AdapterFileError: the folder does not fit the base, or computes what no adapter of isotune does.
    """
    theirs = source.config
    # The file decides on m: without its CUDA extension PEFT has one factor whatever the configuration says.
    stages = {name: source.tensor(name, "boft_R", 4) for name in source.layers}
    numbers = {len(own) for own in stages.values()}
    if len(numbers) > 1:
        raise AdapterFileError(
            f"{source.folder}: the layers have different numbers of butterfly factors ({sorted(numbers)}), which PEFT "
            "does not write. Check that the file is whole, or save the adapter again."
        )
    count = numbers.pop()
    with refused(str(source.folder / CONFIG_FILE)):
        config = BOFTConfig(
            boft_block_size=theirs.boft_block_size,
            boft_block_num=theirs.boft_block_num,
            boft_n_butterfly_factor=count,
            boft_dropout=theirs.boft_dropout,
            **shared_fields(theirs),
        )
    parameters = {}
    for name, own in stages.items():
        width = source.weight(name).shape[1]
        with refused(f"{source.folder}: {name!r}"):
            size = config.block_size_for(name, width)
            if own.shape[1:] != (width // size, size, size):
                raise ValueError(
                    f"size mismatch for boft_R: by {CONFIG_FILE} and the base model it has shape "
                    f"{(count, width // size, size, size)}, by {WEIGHTS_FILE} {tuple(own.shape)}."
                )
            generator = -vector_from_skew((own - own.mT) / 2)
        parameters[name] = {"generator": generator, "output_gain": source.tensor(name, "boft_s", 2).squeeze(1)}
    return source.rotation(config, parameters)
