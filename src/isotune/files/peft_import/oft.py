"""PEFT's own OFT and COFT."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from peft import PeftModel

from isotune.algebra.cayley import bound_entries
from isotune.errors import AdapterFileError
from isotune.files.adapter import CONFIG_FILE
from isotune.files.peft_import.source import Source, refused, series_terms, shared_fields
from isotune.methods import OFTConfig


@torch.no_grad()
def import_oft(source: Source) -> PeftModel:
    """The base with isotune's OFT, which computes what PEFT's OFT, COFT included does.

    Args:
        source: the folder and its base, which is adapted in place.

    Raises:
        AdapterFileError: the folder does not fit the base, or computes what no adapter of isotune does.
    """
    theirs = source.config
    terms = int(theirs.num_cayley_neumann_terms)
    if theirs.use_cayley_neumann and terms == 2:
        raise AdapterFileError(
            f"{source.folder}: with num_cayley_neumann_terms=2 PEFT computes I + 2Q, which is neither a rotation nor a "
            "series of isotune's. Series of 3 terms or more and the exact transform can be imported."
        )
    series = theirs.use_cayley_neumann and terms > 2
    with refused(str(source.folder / CONFIG_FILE)):
        config = OFTConfig(
            r=theirs.r,
            oft_block_size=theirs.oft_block_size,
            adjust="nearest",  # as PEFT does
            block_share=theirs.block_share,
            use_cayley_neumann=series,
            num_cayley_neumann_terms=series_terms(terms) if series else 5,
            **shared_fields(theirs),
        )
        if theirs.coft:
            config = replace(config, coft=True, eps=theirs.eps)
    parameters, ratios = {}, set()
    for name in source.layers:
        generator = source.tensor(name, "oft_R.weight", 2)
        width = source.weight(name).shape[1]
        with refused(f"{source.folder}: {name!r}"):
            size = config.block_size_for(name, width)
            # Isotune divides COFT's bound among all blocks, PEFT among those that have a generator of their own.
            ratio = width // size if theirs.block_share else 1
            if theirs.coft:
                bound = theirs.eps * math.sqrt(ratio * size / width)
                generator = bound_entries(generator, bound)
        ratios.add(ratio)
        if not series:
            # A series of one term is I in PEFT, whatever the generator.
            generator = torch.zeros_like(generator) if theirs.use_cayley_neumann else -generator
        parameters[name] = {"generator": generator}
    if theirs.coft:
        same = len(ratios) == 1
        config = replace(config, coft=same, eps=theirs.eps * math.sqrt(ratios.pop()) if same else OFTConfig.eps)
    return source.rotation(config, parameters)
