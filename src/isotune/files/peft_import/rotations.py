"""Importing PEFT's own OFT (including COFT), BOFT, HRA and RoAd as isotune's rotations that compute the same."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor

from isotune.algebra.cayley import bound_entries
from isotune.algebra.factors import apply_chain, transpose_chain
from isotune.algebra.skew import vector_from_skew
from isotune.errors import AdapterFileError
from isotune.files.adapter import ADAPTER, CONFIG_FILE, WEIGHTS_FILE, refused
from isotune.files.peft_import.source import EXACT, Source, series_fields
from isotune.hosts import widen
from isotune.methods import BOFTConfig, HRAConfig, OFTConfig, RoadConfig
from isotune.methods.road import RoadOperator
from isotune.tuner.state import adapted_layers


@torch.no_grad()
def import_oft(source: Source) -> PeftModel:
    """Put isotune's OFT on the base."""
    theirs = source.config
    terms = int(theirs.num_cayley_neumann_terms)
    if theirs.use_cayley_neumann and terms == 2:
        raise AdapterFileError(
            f"{source.folder}: with num_cayley_neumann_terms=2 PEFT computes I + 2Q, which is neither a rotation nor "
            "one of isotune's series. Series of 3 or more terms and the exact transform can be imported."
        )
    series = series_fields(terms) if theirs.use_cayley_neumann and terms > 2 else {}
    names = ("r", "oft_block_size", "block_share", *(("coft", "eps") if theirs.coft else ()))
    config = source.configured(OFTConfig, *names, adjust="nearest", **series)  # PEFT takes the nearest block size
    parameters, ratios = {}, set()
    for name in source.layers:
        generator = source.tensor(name, "oft_R.weight", 2)
        width = source.weight(name).shape[1]
        with refused(f"{source.folder}: {name!r}: "):
            size = config.block_size_for(name, width)
            # isotune divides COFT's bound among all blocks, PEFT among those with a generator of their own.
            ratio = width // size if theirs.block_share else 1
            if theirs.coft:
                bound = theirs.eps * math.sqrt(ratio * size / width)
                generator = bound_entries(generator, bound)
        ratios.add(ratio)
        if not series:
            # In PEFT, a series of one term is I, whatever the generator.
            generator = torch.zeros_like(generator) if theirs.use_cayley_neumann else -generator
        parameters[name] = {"generator": generator}
    if theirs.coft:
        same = len(ratios) == 1
        config = replace(config, coft=same, eps=theirs.eps * math.sqrt(ratios.pop()) if same else OFTConfig.eps)
    return source.adapted(config, parameters)


@torch.no_grad()
def import_boft(source: Source) -> PeftModel:
    """Put isotune's BOFT on the base."""
    stages = {name: source.tensor(name, "boft_R", 4) for name in source.layers}
    # m comes from the file: without its CUDA extension PEFT uses one factor, whatever the configuration says.
    count = len(next(iter(stages.values())))
    names = ("boft_block_size", "boft_block_num", "boft_dropout")
    config = source.configured(BOFTConfig, *names, boft_n_butterfly_factor=count)
    parameters = {}
    for name, own in stages.items():
        width = source.weight(name).shape[1]
        with refused(f"{source.folder}: {name!r}: "):
            size = config.block_size_for(name, width)
            shape = (count, width // size, size, size)
            if own.shape != shape:
                raise ValueError(
                    f"size mismatch for boft_R: according to {CONFIG_FILE} and the base model it has shape {shape}, in "
                    f"{WEIGHTS_FILE} {tuple(own.shape)}."
                )
        generator = -vector_from_skew((own - own.mT) / 2)
        parameters[name] = {"generator": generator, "output_gain": source.tensor(name, "boft_s", 2).squeeze(1)}
    return source.adapted(config, parameters)


@torch.no_grad()
def import_hra(source: Source) -> PeftModel:
    """Put isotune's HRA on the base."""
    theirs = source.config
    odd = theirs.r % 2 == 1 and not theirs.apply_GS
    config = source.configured(HRAConfig, "apply_GS", r=theirs.r + odd, init_weights=not theirs.apply_GS)
    parameters = {}
    for name in source.layers:
        vectors = source.tensor(name, "hra_u", 2).T
        if theirs.apply_GS:
            vectors = _gram_schmidt(vectors)
        norms = vectors.norm(dim=1)
        if not bool((norms > 0).all() and norms.isfinite().all()):
            raise AdapterFileError(
                f"{source.folder}: {name!r} has a direction that PEFT cannot normalise (zero, not finite, or with "
                "apply_GS a combination of the others), so PEFT computes NaN or rounding noise. Train it again."
            )
        if odd:
            vectors = torch.cat([vectors, vectors.new_zeros(1, vectors.shape[1])])
        parameters[name] = {"vectors": vectors}
    return source.adapted(config, parameters)


@torch.no_grad()
def import_road(source: Source) -> PeftModel:
    """Put isotune's RoAd on the base, whose adapted layers' biases become those that PEFT rotates."""
    parameters, biased = {}, False
    for name in source.layers:
        angles, scales = (source.tensor(name, key, 1) for key in ("road_theta", "road_alpha"))
        parameters[name] = {"angles": angles, "scales": scales}
        biased = biased or source.base.get_submodule(name).bias is not None
    config = source.configured(RoadConfig, "variant", "group_size", bias="isotune_only" if biased else "none")
    model = source.adapted(config, parameters)
    if biased and not any(key.endswith(".bias") for key in get_peft_model_state_dict(model)):
        raise AdapterFileError(
            f"{source.folder}: PEFT's RoAd turns the biases too, which isotune keeps as trained biases, but the "
            "installed PEFT does not save these: pip install -U peft."
        )
    for _, layer in adapted_layers(model, ADAPTER):
        bias, operator = layer.host.module.bias, layer.adapter(ADAPTER)
        if bias is not None:
            assert isinstance(bias, Tensor)
            assert isinstance(operator, RoadOperator)
            # M b as a row: PEFT computes M (W x + b), isotune M W x with a bias of its own.
            chain, tensors = transpose_chain(operator.chain, operator.chain_tensors(widen(bias).dtype))
            bias.copy_(apply_chain(widen(bias), chain, tensors))
    return model


def _gram_schmidt(vectors: Tensor) -> Tensor:
    """The rows orthonormalised as PEFT does it, or NaN if its result is not orthonormal."""
    units: list[Tensor] = []
    for vector in vectors:
        for unit in units:
            vector = vector - (unit @ vector) * unit
        units.append(vector / vector.norm())
    found = torch.stack(units)
    defect = (found @ found.T - torch.eye(len(found), dtype=found.dtype, device=found.device)).norm()
    # isotune's own process keeps the span of orthonormal rows, and I − 2 U Uᵀ depends on nothing else.
    return found if defect <= EXACT * len(found) ** 0.5 else found * math.nan
