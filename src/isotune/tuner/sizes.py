"""Sizes of an adapter's layers that follow from the model: ranks or block sizes, by energy or for a budget."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isotune.internals.torch_state import is_symbolic
from isotune.methods.config import IsotuneConfig, by_pattern, exactly
from isotune.methods.rotation import RotationConfig
from isotune.methods.subspace import SubspaceConfig
from isotune.parallel.processes import one_for_all, sample_of
from isotune.progress import bar
from isotune.subspace.cache import SubspaceCache
from isotune.subspace.energy import Sizes, block_shares, kept_shares, least_size, output_energies, spectrum, spend
from isotune.tuner.layer import Layer


@dataclass(frozen=True)
class LayerSize:
    """The size that was chosen for one layer."""

    module: str
    """The layer's name in the model."""
    shape: tuple[int, int]
    """(out, in) of its weight."""
    size: int
    """The rank, or the block size."""
    energy: float
    """The share of the layer's energy that a subspace of this rank holds, or the share of rotations within blocks."""
    parameters: int


@dataclass(frozen=True)
class ChosenSizes:
    """The sizes chosen for all layers, as a table and as options of the method's configuration."""

    layers: tuple[LayerSize, ...]
    size_option: str
    """The option for the size of most layers, such as "r"."""
    pattern_option: str
    """The option for the sizes of the others, such as "rank_pattern"."""
    uniform: LayerSize | None
    """The largest one size for all layers within the budget, or within these parameters if there is none, with the mean
    of the layers' energies; None if no one size fits."""

    @property
    def parameters(self) -> int:
        """The trainable parameters of all layers together."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def energy(self) -> float:
        """The mean of the layers' energies."""
        return sum(layer.energy for layer in self.layers) / len(self.layers)

    @property
    def options(self) -> dict[str, Any]:
        """The options that give every layer its size, such as {"r": 8, "rank_pattern": {…}}."""
        counted = Counter(layer.size for layer in self.layers)
        usual = min(counted, key=lambda size: (-counted[size], size))
        others = {layer.module: layer.size for layer in self.layers if layer.size != usual}
        if not self._is_given_by(others, usual):  # one name ends with another
            others = {exactly(name): size for name, size in others.items()}
        return {self.size_option: usual, self.pattern_option: others}

    def _is_given_by(self, pattern: Mapping[str, int], usual: int) -> bool:
        # The file sorts the keys, and the first that fits decides.
        ordered = dict(sorted(pattern.items()))
        return all(by_pattern(ordered, layer.module, usual) == layer.size for layer in self.layers)


def size_layers(model: nn.Module, adapter_name: str, config: IsotuneConfig) -> None:
    """Replace what a configuration asks for by what its layers' weights give, and give the layers their adapters.

    Args:
        model: the model with the layers, which have no adapter of this name yet.
        adapter_name: the adapter's name.
        config: its configuration, which no other model has.
    """
    layers = [m for m in model.modules() if isinstance(m, Layer) and m.configs.get(adapter_name) is config]
    if config.chooses_sizes:
        for option, value in choose_sizes(layers, config).options.items():
            setattr(config, option, value)
    if config.fits:
        cache = SubspaceCache() if getattr(config, "subspace_cache", False) else None
        for layer in bar(layers, desc="singular values", unit="weight"):
            values = torch.empty(0) if config.fits_by_shape else _singular_values(layer, cache)
            config.fit(layer.key, _shape(layer), values)
    for name in config.asking:
        if hasattr(config, name):
            setattr(config, name, None)
    config.sized = True
    for layer in layers:
        layer.update_layer(adapter_name, config)


def choose_sizes(
    layers: Sequence[Layer], config: IsotuneConfig, moments: Mapping[str, Tensor] | None = None
) -> ChosenSizes:
    """Choose the sizes of layers as a configuration asks for, one weight in memory at a time.

    Args:
        layers: the layers, without the adapter yet.
        config: asks by `rank_budget`, or by `rank_energy` and `rank_measure`.
        moments: E x xᵀ of each layer's inputs, (in, in), by the layer's name; makes the energy that of the outputs.

    Raises:
        ValueError: the weights have no values, a weight is not finite, the budget is too small for these layers, or the
            energy is that of activations and there are no moments.
    """
    if moments is None and config.by_activations:
        raise ValueError(
            'rank_measure="activations" needs data, which get_peft_model is not given: take the options that '
            "isotune.choose_ranks(model, config, data=batches) finds, or train by a recipe."
        )
    if isinstance(config, SubspaceConfig) and config.selection != "top":
        raise ValueError("Ranks are chosen for the strongest directions of a weight; give r with another selection.")
    own = config if isinstance(config, SubspaceConfig) else None
    cache = SubspaceCache() if own is not None and own.subspace_cache else None
    budget = config.rank_budget if isinstance(config.rank_budget, int) else None
    share = None if own is None else own.rank_energy
    price = _Prices(config, budget)
    found = []
    for layer in bar(layers, desc="sizes of layers", unit="weight"):
        given = None if moments is None else moments[layer.key]
        if own is not None:
            kept = kept_shares(_energies(layer, own, given, cache))
            found.append(price.of_ranks(layer, kept))
        else:
            found.append(price.of_blocks(layer, given))
    if budget is not None:
        chosen = spend(found, budget, logarithm=own is None)
    else:
        chosen = [least_size(sizes.kept, 1.0 if share is None else share) for sizes in found]
    rows = tuple(
        LayerSize(layer.key, _shape(layer), sizes.sizes[index], sizes.kept[index], price.of(layer, sizes.sizes[index]))
        for layer, sizes, index in zip(layers, found, chosen, strict=True)
    )
    uniform = price.uniform(layers, found, budget or sum(row.parameters for row in rows))
    return ChosenSizes(rows, price.option, config.size_pattern, uniform)


def _shape(layer: Layer) -> tuple[int, int]:
    return layer.out_features, layer.in_features


def _weights(layer: Layer) -> tuple[Tensor, ...]:
    """The base's W, or that of each expert."""
    if is_symbolic(layer.base_weight):
        raise ValueError(
            f"The weight of {layer.key!r} has no values yet (it is on the meta device), and ranks are chosen by them. "
            "Load the model first, or give numbers: r and rank_pattern, as `isotune rank --json` prints them, or "
            "preserved_rank."
        )
    matrix = layer.unmerged_matrix()
    return matrix.unbind() if matrix.ndim == 3 else (matrix,)


@torch.no_grad()
def _singular_values(layer: Layer, cache: SubspaceCache | None) -> Tensor:
    """All singular values of W, or of each expert, (1 or experts, n), descending: equal in all processes."""
    weights, sample = _weights(layer), sample_of(layer.base_weight)

    def solve() -> list[Tensor]:
        return [spectrum(weight, cache=cache, name=f"module {layer.key!r}") for weight in weights]

    return torch.stack(one_for_all(f"spectra {layer.key} {_shape(layer)} {sample}", solve))


@torch.no_grad()
def _energies(layer: Layer, config: SubspaceConfig, moments: Tensor | None, cache: SubspaceCache | None) -> Tensor:
    """The energy of each principal direction, in their order, (min(out, in),); of experts, the mean of their shares."""
    if moments is None:
        energies = _singular_values(layer, cache).square()
    else:
        (weight,), own, sample = _weights(layer), moments, sample_of(layer.base_weight)

        def solve() -> list[Tensor]:
            return [output_energies(weight, own.to(weight.device), name=f"module {layer.key!r}")]

        energies = torch.stack(one_for_all(f"outputs {layer.key} {_shape(layer)} {sample}", solve))
    energies = energies.sqrt() if config.rank_measure == "values" else energies
    return (energies / energies.sum(1, keepdim=True).clamp_min(torch.finfo(energies.dtype).tiny)).mean(0)


class _Prices:
    """What sizes cost on a layer, counted on adapters that are built on the meta device.

    Args:
        config: the method and its other options.
        budget: prices above it are of no interest; None for all.
    """

    def __init__(self, config: IsotuneConfig, budget: int | None) -> None:
        self.config, self.budget = copy.copy(config), budget
        self.option = next(iter(config.size_names))
        setattr(self.config, config.size_pattern, {})
        # Another pattern, such as butterfly_factor_pattern, gives layers of one shape different prices.
        self._by_name = any(isinstance(value, dict) and value for value in vars(self.config).values())
        self._known: dict[tuple[Any, ...], int] = {}

    def of(self, layer: Layer, size: int) -> int:
        """The parameters of an adapter of this size; raises ValueError if it does not fit the layer."""
        key = (layer.key if self._by_name else "", *_shape(layer), getattr(layer.host, "experts", 1), size)
        if key not in self._known:
            setattr(self.config, self.option, size)
            self._known[key] = layer.count_parameters(self.config)
        return self._known[key]

    def of_ranks(self, layer: Layer, kept: Sequence[float]) -> Sizes:
        """All ranks of a layer, with a budget only those that it could pay for."""
        prices: list[int] = []
        for rank in range(1, len(kept) + 1):
            if self.budget is None:
                prices.append(rank)  # ranks are then chosen by their energies alone
                continue
            prices.append(self.of(layer, rank))
            if prices[-1] > self.budget:
                break
        return Sizes(range(1, len(prices) + 1), prices, kept[: len(prices)])

    def of_blocks(self, layer: Layer, moments: Tensor | None) -> Sizes:
        """All block sizes above 1 that fit a layer; the smallest fitting one if no other does."""
        config = self.config
        assert isinstance(config, RotationConfig)
        width = layer.in_features if config.side == "input" else layer.out_features
        prices: dict[int, int] = {}
        for size in (size for size in range(1, width + 1) if width % size == 0):
            try:
                prices[size] = self.of(layer, size)
            except ValueError:
                continue
        if not prices:
            self.of(layer, width)  # raises, and says what does not fit
        sizes = [size for size in prices if size > 1] or list(prices)
        weight = layer.unmerged_matrix() if moments is not None else None
        shares = block_shares(width, sizes, weight, moments)
        return Sizes(sizes, [prices[size] for size in sizes], shares)

    def uniform(self, layers: Sequence[Layer], found: Sequence[Sizes], most: int) -> LayerSize | None:
        """The largest one size that fits all layers and has at most so many parameters."""
        best = None
        for size in sorted(set.intersection(*(set(sizes.sizes) for sizes in found))):
            total = sum(self.of(layer, size) for layer in layers)
            if total > most:
                break
            kept = [sizes.kept[sizes.sizes.index(size)] for sizes in found]
            best = LayerSize("", (0, 0), size, sum(kept) / len(kept), total)
        return best
