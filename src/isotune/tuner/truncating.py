"""Weights that an adapter truncates to their strongest directions: which can be, and the exchange of the layers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from isotune.adapter.placement import filling
from isotune.errors import IsotuneWarning
from isotune.hosts import FactoredLinear, LinearHost
from isotune.internals.offloading import is_managed
from isotune.internals.torch_state import is_bare, is_symbolic
from isotune.methods.basis import BasisConfig
from isotune.methods.config import IsotuneConfig
from isotune.parallel.processes import one_for_all, sample_of
from isotune.parallel.sharding import is_partitioned, is_sharded
from isotune.parallel.tensor_parallel import mesh_of
from isotune.progress import bar
from isotune.subspace.cache import SubspaceCache
from isotune.subspace.pinning import pin
from isotune.subspace.precision import exact_product, without_autocast
from isotune.subspace.result import SubspaceRequest
from isotune.subspace.solvers import principal_subspaces
from isotune.tuner.layer import Layer


@dataclass(frozen=True)
class TruncatedLayer:
    """What truncation has made of one adapted layer."""

    module: str
    """The layer's name in the model."""
    shape: tuple[int, int]
    """(out, in) of its weight."""
    rank: int | None
    """k; None if the layer is whole."""
    energy: float
    """Share of ‖W‖_F² that is kept; 1 if the layer is whole."""

    @property
    def before(self) -> int:
        """The numbers in the weight."""
        return self.shape[0] * self.shape[1]

    @property
    def after(self) -> int:
        """The numbers in its factors, or in the weight if it is whole."""
        return self.before if self.rank is None else self.rank * (sum(self.shape) + 1)

    @classmethod
    def of(cls, layer: Layer) -> TruncatedLayer:
        """What a layer's host is now."""
        module, shape = layer.host.module, (layer.out_features, layer.in_features)
        if isinstance(module, FactoredLinear):
            return cls(layer.key, shape, module.rank, module.energy)
        return cls(layer.key, shape, None, 1.0)


def summary(layers: Sequence[TruncatedLayer]) -> str:
    """One line about truncated layers.

    Examples:
        >>> summary([TruncatedLayer("a", (8, 8), 2, 0.9), TruncatedLayer("b", (8, 8), None, 1.0)])
        '1 of 2 layers truncated to rank 2, with 90.0 % of the energy: 98 numbers instead of 128'
    """
    done = [layer for layer in layers if layer.rank is not None]
    ranks = _span([f"{layer.rank}" for layer in sorted(done, key=lambda layer: layer.rank or 0)])
    shares = _span([f"{100 * layer.energy:.1f} %" for layer in sorted(done, key=lambda layer: layer.energy)])
    numbers = f"{sum(one.after for one in layers):,} numbers instead of {sum(one.before for one in layers):,}"
    return f"{len(done)} of {len(layers)} layers truncated to rank {ranks}, with {shares} of the energy: {numbers}"


def _span(ordered: Sequence[str]) -> str:
    """The first and the last, or the only one."""
    ends = list(dict.fromkeys([*ordered[:1], *ordered[-1:]]))
    return " to ".join(ends) or "none"


def refuse_untruncatable(model: nn.Module, adapter_name: str, config: IsotuneConfig) -> None:
    """Refuse an adapter that truncates weights of a model in which they cannot be truncated.

    Raises:
        ValueError: such a weight is not that of a plain linear layer, has no values, is shared, spread over processes
            or moved by others, or other adapters stand on it.
    """
    if not getattr(config, "truncate_base", False):
        return
    holders: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), set()).add(name)
    for layer in _own(model, adapter_name):
        if why := _why_whole(layer, len(holders.get(id(layer.base_weight), ()))):
            raise ValueError(
                f"truncate_base cannot truncate the weight of {layer.key!r}, a {type(layer.host.module).__name__}: "
                f"{why} Nothing was changed."
            )


def refuse_other_truncation(model: nn.Module, adapter_name: str, config: IsotuneConfig) -> None:
    """Refuse an adapter that was made for other weights than those to which this model's have been truncated.

    Raises:
        ValueError: the model is truncated, and not to the very ranks that the configuration says; or it is not, and has
            other adapters; or truncating it would save nothing.
    """
    own = _own(model, adapter_name)
    wanted = {layer.key: rank for layer in own if (rank := config.base_rank(layer.key)) is not None}
    there = {
        name.removesuffix(".base_layer"): module.rank
        for name, module in model.named_modules()
        if isinstance(module, FactoredLinear)
    }
    if there and wanted != there:
        name = next(name for name in (*there, *wanted) if there.get(name) != wanted.get(name))
        raise ValueError(
            f"The weights of this model are truncated (truncate_base): that of {name!r} has rank {there.get(name)}, "
            f"and this adapter is for rank {wanted.get(name)} (None: whole). On these weights an adapter needs the "
            "base_rank_pattern of the one that truncated them, in all its layers. For any other, load the original "
            "base again; or save this model without adapters, which writes plain weights, and load it as a base of its "
            "own. Nothing was changed."
        )
    if there or not config.sized or not getattr(config, "truncate_base", False):
        return
    if not wanted:
        raise ValueError(
            "truncate_base=True would save nothing: "
            + (
                "this adapter was trained on whole weights. Leave it out."
                if config.chooses
                else "in every layer the factors would need more memory than the weight does. Lower base_energy, "
                "or leave truncate_base out."
            )
            + " Nothing was changed."
        )
    tuners: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    others = [name for layer in tuners if isinstance(layer, Layer) for name in layer.configs if name != adapter_name]
    others += [f"{type(one).__module__}.{type(one).__name__}" for one in tuners if not isinstance(one, Layer)]
    if others:
        raise ValueError(
            f"truncate_base would change the weights below {others[0]!r}, an adapter that this model "
            "already has. Load the base once more for this adapter, or delete the other first. Nothing was changed."
        )


def _own(model: nn.Module, adapter_name: str) -> list[Layer]:
    return [module for module in model.modules() if isinstance(module, Layer) and adapter_name in module.configs]


def _why_whole(layer: Layer, holders: int) -> str | None:
    """Why the weight of a layer cannot be truncated; None if it can, or is."""
    host, weight = layer.host, layer.base_weight
    if host.stands_in:
        return None
    if not isinstance(host, LinearHost) or not host.multiplies:
        return "it must be an nn.Linear or Conv1D that is not quantised. Choose target_modules that are."
    if is_symbolic(weight):
        return "it has no values yet (it is on the meta device). Load the model first."
    if is_sharded(weight) or is_partitioned(weight) or mesh_of(host.module) is not None:
        return "it is spread over processes. Load the model in each process whole."
    if is_managed(host.module) or not is_bare(host.module):
        return "its module has hooks, as offloading puts them. Load the model without offloading or hooks."
    if layer.base_layer is not host.module:
        return "another tuner's adapter is on it. Merge or unload that first."
    if layer.merged:
        return "an adapter is merged into it. Unmerge it first."
    if holders != 1:
        return "another module has the same weight (tied). Exclude it with exclude_modules."
    return None


@contextmanager
def truncated(adapter_name: str, layers: Sequence[Layer]) -> Iterator[None]:
    """Truncate the weights that an adapter asks for, before the block places it; if that fails, they are whole again.

    Args:
        adapter_name: the adapter.
        layers: layers; those without the adapter, that stay whole or are truncated already, are left as they are.
    """
    own = [layer for layer in layers if adapter_name in layer.configs]
    ranks = [layer.configs[adapter_name].base_rank(layer.key) for layer in own]
    found = [(layer, k) for layer, k in zip(own, ranks, strict=True) if k is not None and not layer.host.stands_in]
    shown = bar(found, desc="truncating weights", unit="weight")
    made = [
        (layer, _factored(layer, adapter_name, rank)) for layer, rank in shown if not is_symbolic(layer.base_weight)
    ]
    before = [(layer, layer.base_layer, layer.host) for layer, _ in made]
    try:
        for layer, module in made:
            layer.stand_on(module)
        yield
        if any(layer.owner is not None for layer, _ in made):  # in the block: a filter may turn warnings into errors
            done = summary(list(map(TruncatedLayer.of, own)))
            warnings.warn(
                f"truncate_base has changed the base model: {done}. It computes something else from now on, before any "
                "training and also without the adapter (disabled, unmerged, unloaded); isotune.truncation_error "
                "measures how much.",
                IsotuneWarning,
                stacklevel=4,
            )
    except BaseException:
        for layer, original, host in before:
            layer.base_layer, layer.host = original, host
        raise


def _factored(layer: Layer, adapter_name: str, rank: int) -> FactoredLinear:
    """A layer of rank k for the one that an adapter is on, U_k Σ_k V_kᵀ, its factors in the weight's dtype."""
    config, weight, stored = layer.configs[adapter_name], layer.unmerged_matrix(), layer.bases(adapter_name)[0]
    assert isinstance(config, BasisConfig)

    def solve() -> list[Tensor]:
        cache = SubspaceCache() if config.subspace_cache else None
        request = SubspaceRequest(weight, rank, f"module {layer.key!r}")
        (found,) = principal_subspaces([request], solver="full", cache=cache, progress=False)
        return [found.basis, torch.tensor(found.energy, dtype=torch.float64)]

    basis, energy = one_for_all(f"truncated {layer.key} {rank} {tuple(weight.shape)} {sample_of(weight)}", solve)
    basis = basis.to(weight.device, copy=True)
    if not stored.is_empty():  # with the signs of the adapter's basis, so that it can share the layer's factors
        own, given = basis[: len(stored.stored)], stored.stored
        signs = ((own if stored.embedded else pin(own, seed=config.basis_seed)).to(given) * given).sum(1).sign()
        own *= torch.where(signs == 0, 1.0, signs).to(own)[:, None]
    with without_autocast(weight.device):
        product = exact_product(weight.to(basis.dtype), basis.mT)
    left, upper = torch.linalg.qr(product)
    values = upper.diagonal()
    bias = layer.host.module.bias
    assert bias is None or isinstance(bias, nn.Parameter)
    size = layer.subspace(adapter_name).basis_rank
    return FactoredLinear(
        (left * values.sign()).to(weight),
        values.abs().to(weight),
        basis.to(weight),
        bias,
        filling=max(0, size + filling(size) - rank),
        transposed=layer.host.transposed,
        energy=float(energy),
    )
