"""Finding the principal subspaces of an adapter's layers together: solving and pinning, or recovering from a file."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from isotune.adapter.placement import Mark, Placement
from isotune.adapter.subspace import SubspaceBasis
from isotune.adapter.update import PlacedUpdate
from isotune.errors import BaseMismatchError, IsotuneWarning
from isotune.hosts.factored import ALIKE, FactoredHost
from isotune.internals.offloading import is_managed
from isotune.internals.torch_state import has_own_values, is_symbolic
from isotune.methods.basis import BasisConfig
from isotune.parallel.processes import one_for_all, sample_of, several
from isotune.parallel.sharding import is_sharded
from isotune.subspace.cache import SubspaceCache
from isotune.subspace.pinning import CANDIDATE_TOLERANCE, MAX_RESIDUAL, candidate_rank, pin, recover
from isotune.subspace.result import SubspaceRequest
from isotune.subspace.selection import chosen, generator_for
from isotune.subspace.solvers import principal_subspaces
from isotune.tuner.layer import Layer
from isotune.tuner.truncating import truncated


@dataclass(frozen=True)
class _Place:
    """Where one basis belongs: to a layer, or to one expert of a layer."""

    layer: Layer
    basis: SubspaceBasis
    expert: int | None

    def matrix(self) -> Tensor:
        """W, (out, in)."""
        found = self.layer.unmerged_matrix()
        return found if self.expert is None else found[self.expert]


@torch.no_grad()
def place_adapter(adapter_name: str, layers: Iterable[Layer]) -> None:
    """Place an adapter on all layers where it has a subspace but no placement yet: solve, or recover from a file.

    Weights that the adapter truncates are truncated first; if it cannot be placed, they are as they were.

    Args:
        adapter_name: the adapter.
        layers: the layers; those without the adapter, or where it is placed already, are left as they are.

    Raises:
        BaseMismatchError: a pinned basis was made on another base; names the worst layer and the residual. Nothing is
            placed then.
        ValueError: a weight has no principal subspace (it holds NaN, …).
    """
    layers = list(layers)
    with truncated(adapter_name, layers):
        _place(adapter_name, layers)


def _place(adapter_name: str, layers: Sequence[Layer]) -> None:
    pending = []
    for layer in layers:
        if adapter_name not in layer.isotune_form:
            continue
        adapter = layer.subspace(adapter_name)
        placement = adapter.placement
        if is_symbolic(layer.base_weight) and not is_managed(layer.host.module):
            if placement is None:
                _place_symbolically(layer, adapter_name, adapter)
        elif placement is None or is_symbolic(placement.down):
            pending.append(layer)
    if not pending:
        return
    places = {id(layer): _places(layer, adapter_name) for layer in pending}
    stored = [layer for layer in pending if not any(one.basis.is_empty() for one in places[id(layer)])]
    found = _recovered(adapter_name, [one for layer in stored for one in places[id(layer)]])
    for layer in stored:
        bases, residuals = zip(*(found.pop(0) for _ in places[id(layer)]), strict=True)
        layer.put_on_basis(adapter_name, bases, residual=max(residuals), principal=True)
    _solve(adapter_name, [layer for layer in pending if layer not in stored])


def _start(layer: Layer, adapter_name: str) -> None:
    """Give an adapter whose start follows from its placement the parameters of that start, if it has none yet."""
    adapter, config = layer.subspace(adapter_name), _config(layer, adapter_name)
    placement, parameters = adapter.placement, list(adapter.parameters())
    if not adapter.starts_by_placement or placement is None or any(p.is_meta for p in parameters):
        return  # values that are loaded later replace those on the meta device
    if any(bool(p.any()) for p in parameters):
        return  # set by whoever copies an adapter's parameters, before a pass finds that it is not placed
    for name, value in _start_of(layer, adapter_name, placement).items():
        adapter.get_parameter(name).copy_(value)
    if not config.init_weights:
        adapter.randomize_parameters()


def _start_of(layer: Layer, adapter_name: str, placement: Placement) -> dict[str, Tensor]:
    """The parameters with which an adapter starts on its first placement."""
    generator = generator_for(_config(layer, adapter_name).basis_seed, 0, layer.key)
    return layer.subspace(adapter_name).start(placement, generator)


def share_basis(adapter_name: str, other: str, layers: Iterable[Layer]) -> None:
    """Place an adapter on the basis of another one with the same ranks and options, sharing its tensors."""
    for layer in layers:
        if adapter_name in layer.isotune_form:
            _take(layer, adapter_name, other)


def is_read_anew(layer: Layer) -> bool:
    """Whether the base's weight is another tensor at each reading, of which no mark lasts.

    A parametrisation computes it so, and torch.func.functional_call puts one in its place.

    Raises:
        ValueError: a hook computes it before each call of the layer, as of prune and the former weight_norm, so that
            what it will be is not known yet.
    """
    host, weight = layer.host, layer.base_weight
    if isinstance(weight, nn.Parameter) or not has_own_values(weight):
        return False
    if host.parameter in vars(host.module):
        if host.is_computed():
            host.check()
        return False
    return host.parameter not in dict(host.module.named_buffers(recurse=False))


@torch.no_grad()
def keeps_its_basis(layer: Layer, adapter_name: str) -> bool:
    """Whether the base's weight is still the one an adapter was placed on, apart from a move, cast or rounding.

    If the weight was rounded, the factors are recomputed from it with the same basis, and parameters that are still
    where the former ones let them start, start there again.

    Raises:
        ValueError: it has another shape.
    """
    adapter, matrix = layer.subspace(adapter_name), layer.unmerged_matrix()
    now, then = tuple(matrix.shape[-2:]), (layer.out_features, layer.in_features)
    if now != then:
        raise ValueError(
            f"The weight of {layer.key!r} is {now} and not {then}, as its adapters are: it was exchanged after they "
            "were added. Exchange or resize it first, and add adapters then."
        )
    placement, accumulated = adapter.placement, layer.accumulated(adapter_name)
    assert placement is not None
    wide = torch.promote_types(matrix.dtype, torch.float32)
    basis = nn.functional.normalize(placement.down[..., : adapter.basis_rank, :].to(matrix.device, wide), dim=-1)
    now_down, now_up = adapter.factors_on(basis, matrix, accumulated)
    norm, rank = torch.linalg.vector_norm, adapter.basis_rank + placement.accumulated  # beyond it nothing acts
    change = max(
        float(norm(one.to(wide) - other.to(one.device, wide)) / norm(other.to(wide)).clamp_min(torch.finfo(wide).tiny))
        for one, other in (
            (now_down[..., :rank, :], placement.down[..., :rank, :]),
            (now_up[..., :rank], placement.up[..., :rank]),
        )
    )
    dtypes: tuple[torch.dtype, ...] = (matrix.dtype, placement.up.dtype)
    if adapter.starts_by_placement:
        dtypes = (torch.float32,)  # its parameters hold a part of the weight itself, and its factors are not rounded
    if change > max(ALIKE.get(dtype, 2e-2) for dtype in dtypes):
        if change > MAX_RESIDUAL:
            return False
        starts = adapter.starts_by_placement and adapter.is_untrained()  # on what the weight was
        placement = replace(placement, down=now_down, up=now_up)
        for name, value in _start_of(layer, adapter_name, placement).items() if starts else ():
            adapter.get_parameter(name).copy_(value)
    down, up = layer.host.shared(placement.down, placement.up, adapter.basis_rank)
    adapter.placement = replace(placement, down=down, up=up)
    return True


def forget_untrained(layer: Layer, adapter_name: str) -> None:
    """Have an adapter that has learnt nothing yet start anew on the next weight that it is placed on."""
    adapter = layer.subspace(adapter_name)
    if layer.accumulated(adapter_name) is None and adapter.is_untrained():
        for basis in layer.bases(adapter_name):
            basis.record(torch.zeros_like(basis.stored))
        for parameter in adapter.parameters() if adapter.starts_by_placement else ():
            parameter.data.zero_()


def _places(layer: Layer, adapter_name: str) -> list[_Place]:
    bases = layer.bases(adapter_name)
    experts = hasattr(layer.host, "experts")
    return [_Place(layer, basis, index if experts else None) for index, basis in enumerate(bases)]


def _place_symbolically(layer: Layer, adapter_name: str, adapter: PlacedUpdate) -> None:
    """Give an adapter a placement of the right shapes on a weight without values, to be replaced once they exist."""
    matrix, stored = layer.unmerged_matrix(), layer.stored_of(adapter_name)
    basis = matrix.new_zeros(*matrix.shape[:-2], adapter.basis_rank, matrix.shape[-1])
    wide = basis.to(torch.promote_types(matrix.dtype, torch.float32))
    adapter.placement = adapter.placed(wide, matrix, stored, layer.base_weight, layer.accumulated(adapter_name))


def _config(layer: Layer, adapter_name: str) -> BasisConfig:
    config = layer.configs[adapter_name]
    assert isinstance(config, BasisConfig)
    return config


def _take(layer: Layer, adapter_name: str, other: str) -> None:
    own, placement = layer.subspace(adapter_name), layer.subspace(other).placement
    assert placement is not None
    for mine, theirs in zip(layer.bases(adapter_name), layer.bases(other), strict=True):
        mine.hold({name: None if tensor is None else tensor.clone() for name, tensor in theirs.held().items()})
    own.placement = _on_pins_of(layer, adapter_name, placement)


def _on_pins_of(layer: Layer, adapter_name: str, placement: Placement) -> Placement:
    """A placement that shares another's tensors, for an adapter with an equal stored basis."""
    pins = tuple(Mark.of(tensor, sampled=False) for tensor in layer.stored_of(adapter_name))
    return replace(placement, pins=pins)


def _with_equal_basis(layer: Layer, adapter_name: str) -> str | None:
    """Another adapter on the same layer whose basis suits this adapter's configuration, or None."""

    own = _config(layer, adapter_name)

    def key(name: str) -> tuple[object, ...]:
        config, adapter, accumulated = _config(layer, name), layer.subspace(name), layer.accumulated(name)
        shapes = None if accumulated is None else [factor.shape for factor in accumulated]
        return config.basis, config.basis_seed, config.selection, adapter.placement_key, shapes

    # The very configuration first, as several adapters that have moved may be alike in all of this.
    for name in sorted(layer.isotune_form, key=lambda name: _config(layer, name) is not own):
        placement = layer.subspace(name).placement
        if name == adapter_name or placement is None or is_symbolic(placement.down):
            continue
        # The configuration of an adapter that has moved asks for what that one has accumulated, too.
        if key(name) == key(adapter_name) and (placement.is_principal or layer.accumulated(name) is not None):
            return name
    return None


def _solve(adapter_name: str, layers: Sequence[Layer]) -> None:
    """Place on the principal subspaces of the current weights, or on equal bases that other adapters already have."""
    fresh = []
    for layer in layers:
        other = _with_equal_basis(layer, adapter_name)
        if other is None:
            fresh.append(layer)
        else:
            _take(layer, adapter_name, other)
            _start(layer, adapter_name)
    places = [one for layer in fresh for one in _places(layer, adapter_name)]
    subspaces = _subspaces(adapter_name, places)
    taken: dict[tuple[int, int], Placement] = {}
    for layer in fresh:
        own = [(one, subspaces.pop(0)) for one in _places(layer, adapter_name)]
        config = _config(layer, adapter_name)
        bases = [_among(subspace, len(one.basis.stored), config) for one, subspace in own]
        for (one, _), basis in zip(own, bases, strict=True):
            one.basis.record(basis if one.basis.embedded else pin(basis, seed=config.basis_seed))
        adapter = layer.subspace(adapter_name)
        # Layers that share a weight were given the same subspace, and share its placement.
        key = id(own[0][1]), layer.base_weight.data_ptr()
        if len(own) == 1 and key in taken:
            adapter.placement = _on_pins_of(layer, adapter_name, taken[key])
        else:
            layer.put_on_basis(adapter_name, bases, principal=True)
            assert adapter.placement is not None
            taken[key] = adapter.placement
        _start(layer, adapter_name)


def _subspaces(adapter_name: str, places: Sequence[_Place]) -> list[Tensor]:
    """The leading right singular vectors of the weights, (k, in) each, k ≥ r."""
    if any(one.layer.host.stands_in for one in places):
        others = iter(_subspaces(adapter_name, [one for one in places if not one.layer.host.stands_in]))
        return [_leading(one, adapter_name) if one.layer.host.stands_in else next(others) for one in places]
    if not places:
        return []
    if len(places) > 1 and any(is_sharded(one.layer.base_weight) for one in places):
        # One after the other: a process with room for its shard may have none for the whole model.
        return [subspace for one in places for subspace in _subspaces(adapter_name, [one])]
    config = _config(places[0].layer, adapter_name)
    requests = []
    for one in places:
        rank, layer = _rank_to_find(one, config), one.layer
        # Quantised weights are dequantised one at a time, so that they are not all in memory at once.
        weight = one.matrix if layer.host.quantised else one.matrix()
        at = None
        if config.selection != "top":  # for which there are faster solvers
            at = tuple(config.directions(layer.key, min(layer.in_features, layer.out_features), rank).tolist())
        requests.append(SubspaceRequest(weight, rank, f"module {layer.key!r}", at))
    cache = SubspaceCache() if config.subspace_cache else None

    def solve() -> list[Tensor]:
        found = principal_subspaces(requests, solver=config.solver, tolerance=CANDIDATE_TOLERANCE, cache=cache)
        return [subspace.basis for subspace in found]

    if not several():
        return solve()
    same = [
        (one.layer.key, request.rank, one.layer.out_features, one.layer.in_features, sample_of(one.layer.base_weight))
        for one, request in zip(places, requests, strict=True)
    ]
    return one_for_all(f"{config.solver} {config.selection} {same}", solve)


def _rank_to_find(place: _Place, config: BasisConfig) -> int:
    """r; of a pinned basis a few more, as elsewhere a cut between nearly equal singular values may fall differently."""
    rank, layer = place.basis.stored.shape[0], place.layer
    return candidate_rank(rank, layer.in_features, layer.out_features) if config.basis == "pinned" else rank


def _leading(place: _Place, adapter_name: str) -> Tensor:
    """The leading right singular vectors of a weight that is held as its factors, (k, in)."""
    host = place.layer.host
    assert isinstance(host, FactoredHost)
    return host.leading(_rank_to_find(place, _config(place.layer, adapter_name)))


def _among(candidates: Tensor, rank: int, config: BasisConfig) -> Tensor:
    """The basis, (r, in), among the r or more singular vectors that were found for it; a copy."""
    if len(candidates) == rank:
        return candidates.clone()
    return candidates[chosen(len(candidates), rank, config.selection)]


def _recovered(adapter_name: str, places: Sequence[_Place]) -> list[tuple[Tensor, float]]:
    """The bases of a file and their residuals: embedded bases as stored, pinned ones found again on this base."""
    solved = _subspaces(adapter_name, [one for one in places if not one.basis.embedded])
    found: list[tuple[Tensor, float]] = []
    for one in places:
        stored, config = one.basis.stored, _config(one.layer, adapter_name)
        seed = config.basis_seed
        if one.basis.embedded:
            found.append((stored, 0.0))
            continue
        candidates = solved.pop(0)
        basis = _among(candidates, len(stored), config)
        # If solved exactly as when it was pinned, the basis is the same to the bit and needs no recovery.
        same = torch.equal(pin(basis, seed=seed).to(stored), stored)
        found.append((basis, 0.0) if same else recover(stored, candidates, seed=seed))
    _refuse_other_base(adapter_name, places, [residual for _, residual in found])
    return found


def _refuse_other_base(adapter_name: str, places: Sequence[_Place], residuals: Sequence[float]) -> None:
    above = [pair for pair in zip(places, residuals, strict=True) if not pair[1] <= MAX_RESIDUAL]
    if not above:
        return
    worst, residual = max(above, key=lambda pair: pair[1])
    # A base of another training differs in all layers.
    in_part = (
        "The other layers are the same, so these are probably new in this model, like a classifier that its checkpoint "
        "does not hold and that is made at random each time: name them in exclude_modules, and in modules_to_save to "
        "train them. "
    )
    message = (
        f"The adapter {adapter_name!r} was not trained on this base model: in {len(above)} of "
        f"{len(places)} layers the principal subspace differs, most in {worst.layer.key!r} with a residual of "
        f"{residual:.3f} (the same base gives below 0.001, a base rounded to bfloat16 about 0.003, at most "
        f"{MAX_RESIDUAL} is allowed). {in_part if len(above) < len(places) else ''}"
        "Load the adapter on the base it was trained on, quantised in the same way or not at all; or train and save it "
        "with basis='embedded', which fits any base of the same shapes; or, to load it anyway, set "
        "on_base_mismatch='warn' in PeftModel.from_pretrained or in the configuration."
    )
    if _config(worst.layer, adapter_name).on_base_mismatch == "warn":
        warnings.warn(message, IsotuneWarning, stacklevel=2)
    else:
        raise BaseMismatchError(message)
