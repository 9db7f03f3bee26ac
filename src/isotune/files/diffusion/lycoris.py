"""Importing LyCORIS' diag-oft and boft, which rotate the outputs of a layer: W' = M W in isotune."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from isotune.algebra.skew import vector_from_skew
from isotune.errors import IsotuneWarning
from isotune.files.adapter import only, refused
from isotune.files.diffusion.layer import AdaptedModule, Parameters, block_options, butterfly_options
from isotune.methods import BOFTConfig, OFTConfig
from isotune.methods.config import IsotuneConfig


def import_diagonal(layers: list[AdaptedModule]) -> tuple[IsotuneConfig, Parameters]:
    """Import diag-oft: oft_blocks (blocks, b, b), alpha, which bounds the rotation, and rescale, a factor per output.

    W'_k = rescale_k R_kᵀ W_k with R = (I + Q)(I − Q)⁻¹ and Q = B − Bᵀ, so the generator has the opposite sign. With
    rescale it is a BOFT of one factor, which has a gain.

    Source: LyCORIS 4.1.3, lycoris/functional/diag_oft.py; kohya sd-scripts, networks/oft.py.
    """
    generators = {x.name: -vector_from_skew(q) for x, q in zip(layers, _bounded(layers, 3), strict=True)}
    if any("rescale" in layer.tensors for layer in layers):
        return _butterfly(layers, {name: own[None] for name, own in generators.items()})
    sizes = {layer.name: layer.tensors["oft_blocks"].shape[-1] for layer in layers}
    config = OFTConfig(target_modules=only(generators), **block_options(layers, sizes, "output"), side="output")
    return config, {name: {"generator": own} for name, own in generators.items()}


def import_butterfly(layers: list[AdaptedModule]) -> tuple[IsotuneConfig, Parameters]:
    """Import boft: oft_blocks (m, blocks, b, b), a butterfly W' = rescale R_m ⋯ R_1 W, the first of least stride.

    A block interleaves its two chunks of b / 2 coordinates, which isotune concatenates.

    Source: LyCORIS 4.1.3, lycoris/functional/boft.py.
    """
    generators = {}
    for layer, skew in zip(layers, _bounded(layers, 4), strict=True):
        size = skew.shape[-1]
        order = torch.arange(size).view(size // 2, 2).T.flatten() if size % 2 == 0 else torch.arange(size)
        generators[layer.name] = vector_from_skew(skew[..., order, :][..., order])
    return _butterfly(layers, generators)


def _butterfly(layers: list[AdaptedModule], generators: dict[str, Tensor]) -> tuple[IsotuneConfig, Parameters]:
    """BOFT with these generators, each (m, blocks, b(b − 1)/2)."""
    shapes = {x.name: (*generators[x.name].shape[:2], x.tensors["oft_blocks"].shape[-1]) for x in layers}
    parameters: Parameters = {}
    for layer in layers:
        gain = layer.tensors.get("rescale", torch.ones(layer.outputs)).float().flatten()
        if len(gain) != layer.outputs:
            raise layer.refuse(f"rescale has {len(gain)} values for {layer.outputs} outputs.")
        parameters[layer.name] = {"generator": generators[layer.name], "output_gain": gain}
    with refused(f"{layers[0].where}: "):
        return BOFTConfig(target_modules=only(generators), **butterfly_options(shapes), side="output"), parameters


def _bounded(layers: list[AdaptedModule], dimensions: int) -> list[Tensor]:
    """Q = B − Bᵀ of each layer; if alpha is above 0, scaled down to ‖Q‖_F ≤ alpha · out over all its blocks."""
    found, bounded = [], []
    for layer in layers:
        blocks = layer.tensor("oft_blocks", dimensions)
        count, size, other = blocks.shape[-3:]
        if size != other or count * size != layer.outputs:
            raise layer.refuse(f"oft_blocks {tuple(blocks.shape)} do not fit blocks of its {layer.outputs} outputs.")
        alpha = layer.tensors.get("alpha", torch.zeros(()))
        if alpha.numel() != 1 or float(alpha) < 0:
            raise layer.refuse(
                f"alpha, which bounds the rotation, is {alpha.tolist()}; it must be one number of at least 0."
            )
        bound = float(alpha) * layer.outputs
        if bound == 0 and layer.prefix == "oft_unet_":
            raise layer.refuse(
                "alpha is 0: kohya's own module then does not rotate at all, while others rotate without a bound."
            )
        skew = blocks - blocks.mT
        norm = float(skew.norm()) + 1e-8
        if 0 < bound < norm:
            skew = skew * (bound / norm)
            bounded.append(layer.name)
        found.append(skew)
    if bounded:
        warnings.warn(
            f"{layers[0].where}: {len(bounded)} of {len(layers)} layers, such as {bounded[0]!r}, are bounded by their "
            "alpha. The bound is taken as in LyCORIS and kohya, alpha · out, and applied for good; ComfyUI bounds by "
            "alpha alone and so computes another function.",
            IsotuneWarning,
            stacklevel=2,
        )
    return found
