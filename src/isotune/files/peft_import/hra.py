"""PEFT's own HRA."""

from __future__ import annotations

import math

import torch
from peft import PeftModel
from torch import Tensor

from isotune.errors import AdapterFileError
from isotune.files.adapter import CONFIG_FILE
from isotune.files.peft_import.source import EXACT, Source, refused, shared_fields
from isotune.methods import HRAConfig


@torch.no_grad()
def import_hra(source: Source) -> PeftModel:
    """The base with isotune's HRA, which computes what PEFT's HRA does.

    Args:
        source: the folder and its base, which is adapted in place.

    Raises:
        AdapterFileError: the folder does not fit the base, or computes what no adapter of isotune does.
    """
    theirs = source.config
    odd = theirs.r % 2 == 1 and not theirs.apply_GS
    with refused(str(source.folder / CONFIG_FILE)):
        config = HRAConfig(
            r=theirs.r + odd,
            apply_GS=theirs.apply_GS,
            init_weights=not theirs.apply_GS,
            **shared_fields(theirs),
        )
    parameters = {}
    for name in source.layers:
        vectors = source.tensor(name, "hra_u", 2).T
        if theirs.apply_GS:
            vectors = _gram_schmidt(vectors)
        norms = vectors.norm(dim=1)
        if not bool((norms > 0).all() and norms.isfinite().all()):
            raise AdapterFileError(
                f"{source.folder}: {name!r} has a direction that PEFT cannot normalise (zero, not finite, or with "
                "apply_GS a combination of the others), so PEFT computes NaN or rounding noise. Train the adapter anew."
            )
        if odd:
            vectors = torch.cat([vectors, vectors.new_zeros(1, vectors.shape[1])])
        parameters[name] = {"vectors": vectors}
    return source.rotation(config, parameters)


def _gram_schmidt(vectors: Tensor) -> Tensor:
    """What PEFT makes of the rows in its own order, or NaN where that is not orthonormal."""
    units: list[Tensor] = []
    for vector in vectors:
        for unit in units:
            vector = vector - (unit @ vector) * unit
        units.append(vector / vector.norm())
    found = torch.stack(units)
    defect = (found @ found.T - torch.eye(len(found), dtype=found.dtype, device=found.device)).norm()
    # With orthonormal rows isotune's own process gives the same span, which is all that I − 2 U Uᵀ depends on.
    return found if defect <= EXACT * len(found) ** 0.5 else found * math.nan
