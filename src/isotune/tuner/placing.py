"""Finding the principal subspaces of all layers of an adapter together: solved, pinned, or recovered from a file."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from isotune.adapter.operator import is_symbolic
from isotune.adapter.subspace import SubspaceUpdate
from isotune.errors import BaseMismatchError, IsotuneWarning
from isotune.methods.config import SubspaceConfig
from isotune.parallel.processes import is_sharded, one_for_all, sample_of, several
from isotune.subspace.cache import SubspaceCache
from isotune.subspace.pinning import CANDIDATE_TOLERANCE, MAX_RESIDUAL, candidate_rank, recover
from isotune.subspace.solvers import SubspaceRequest, principal_subspaces

if TYPE_CHECKING:
    from isotune.tuner.layer import Layer


class AdapterGroup:
    """One adapter on all its layers: what is found for them together, once.

    Args:
        adapter_name: the adapter.
        layers: the layers of the model; those without the adapter, or whose form needs no subspace, are left out.
    """

    def __init__(self, adapter_name: str, layers: Iterable[Layer]) -> None:
        self.adapter_name = adapter_name
        self.layers: list[Layer] = [
            part for layer in layers if adapter_name in layer.isotune_operator for part in layer.parts(adapter_name)
        ]

    @torch.no_grad()
    def place(self) -> None:
        """Solve the subspaces of all layers that need it, pin them or recover them from their pins, and place them.

        Raises:
            BaseMismatchError: a pinned basis was trained on another base; names the worst layer and the residual.
            ValueError: a weight has no principal subspace (NaN, …).
        """
        pending = [layer for layer in self.layers if self._form(layer).needs_placing()]
        real = []
        for layer in pending:
            if is_symbolic(layer.host.weight):
                self._form(layer).place_symbolic(layer.host.matrix(), self._scale(layer))
            else:
                real.append(layer)
        foreign = [layer for layer in real if self._form(layer).holds_foreign_basis()]
        self._solve([layer for layer in real if layer not in foreign])
        self._recover(foreign)

    def share(self, adapter_name: str) -> None:
        """Take the bases of another adapter with the same ranks and scales on these layers, and its very tensors."""
        for layer in self.layers:
            form, other = self._form(layer), layer.form(adapter_name)
            assert isinstance(other, SubspaceUpdate)
            form.adopt_twin(other, layer.unmerged_matrix(), other.scale)
            form.solved_here = other.solved_here
            layer.note_host()

    def refresh(self) -> None:
        """Place again what a load of weights has changed: the stored bases, or the weights of the hosts."""
        for layer in self.layers:
            if layer.host_has_changed():
                untrained = layer.operator(self.adapter_name).is_untrained()
                self._form(layer).forget(stored=untrained)
        self.place()

    def _form(self, layer: Layer) -> SubspaceUpdate:
        form = layer.raw_form(self.adapter_name)
        assert isinstance(form, SubspaceUpdate)
        return form

    def _config(self, layer: Layer) -> SubspaceConfig:
        config = layer.configs[self.adapter_name]
        assert isinstance(config, SubspaceConfig)
        return config

    def _scale(self, layer: Layer) -> float:
        return self._config(layer).scale_of(layer.key)

    def _subspaces(self, layers: list[Layer]) -> list[Tensor]:
        """The leading right singular vectors of the layers' weights, (k, in) each, k ≥ r."""
        if not layers:
            return []
        if len(layers) > 1 and any(is_sharded(layer.host.weight) for layer in layers):
            # One after the other: a process that has room for a part of the model has none for all of it.
            return [subspace for layer in layers for subspace in self._subspaces([layer])]
        config = self._config(layers[0])
        requests = []
        for layer in layers:
            rank = self._form(layer).rank
            if config.basis == "pinned":
                # A few more than r: a cut between nearly equal singular values may fall differently elsewhere.
                rank = candidate_rank(rank, layer.in_features, layer.out_features)
            # A quantised weight is dequantised when its turn comes, so that not all of them live at once.
            weight = layer.unmerged_matrix if layer.host.quantised else layer.unmerged_matrix()
            requests.append(SubspaceRequest(weight, rank, f"module {layer.key!r}"))
        cache = SubspaceCache() if config.subspace_cache else None

        def solve() -> list[Tensor]:
            found = principal_subspaces(requests, solver=config.solver, tolerance=CANDIDATE_TOLERANCE, cache=cache)
            return [subspace.basis for subspace in found]

        if not several():
            return solve()
        same = [
            (layer.key, request.rank, layer.out_features, layer.in_features, sample_of(layer.host.weight))
            for layer, request in zip(layers, requests, strict=True)
        ]
        return one_for_all(f"{config.solver} {same}", solve)

    def _solve(self, layers: list[Layer]) -> None:
        fresh = []
        for layer in layers:
            twin = self._sibling(layer)
            if twin is None:
                fresh.append(layer)
            else:
                self._form(layer).adopt_twin(twin, layer.unmerged_matrix(), self._scale(layer))
        solved: dict[tuple[int, int], SubspaceUpdate] = {}
        for layer, subspace in zip(fresh, self._subspaces(fresh), strict=True):
            self._adopt(layer, subspace, layer.unmerged_matrix(), solved)
        for layer in layers:
            layer.note_host()

    def _adopt(
        self, layer: Layer, subspace: Tensor, matrix: Tensor, solved: dict[tuple[int, int], SubspaceUpdate]
    ) -> None:
        """Take a solved subspace, or all of another layer that was given it for the same weight."""
        form = self._form(layer)
        twin = solved.setdefault((id(subspace), matrix.data_ptr()), form)
        if twin is form:
            form.adopt(subspace, matrix, self._scale(layer), self._config(layer).basis_seed)
        else:
            form.adopt_twin(twin, matrix, self._scale(layer))

    def _sibling(self, layer: Layer) -> SubspaceUpdate | None:
        """Another adapter's form on the same layer whose basis and tensors can be used as they are."""
        own, config = self._form(layer), self._config(layer)
        for name, other in layer.configs.items():
            form = layer.raw_form(name)
            if (
                form is not own
                and isinstance(form, SubspaceUpdate)
                and isinstance(other, SubspaceConfig)
                and form.solved_here
                and form.settled
                and (form.rank, form.reader_power, form.embedded) == (own.rank, own.reader_power, own.embedded)
                and other.basis_seed == config.basis_seed
            ):
                return form
        return None

    def _recover(self, layers: list[Layer]) -> None:
        """Bases that came from a file: embedded ones as they are, pinned ones found again on this base."""
        pinned = [layer for layer in layers if not self._form(layer).embedded]
        missing = [layer for layer in pinned if self._form(layer).candidates is None]
        solved = dict(zip(map(id, missing), self._subspaces(missing), strict=True))
        found: list[tuple[Layer, Tensor, float]] = [
            (layer, self._form(layer).stored, 0.0) for layer in layers if self._form(layer).embedded
        ]
        for layer in pinned:
            candidates = self._form(layer).candidates
            seed = self._config(layer).basis_seed
            candidates = solved[id(layer)] if candidates is None else candidates
            found.append((layer, *recover(self._form(layer).stored, candidates, seed=seed)))
        self._refuse_other_base([(layer, residual) for layer, _, residual in found])
        for layer, basis, residual in found:
            self._form(layer).place(basis, layer.unmerged_matrix(), self._scale(layer))
            self._form(layer).residual = residual
            layer.note_host()

    def _refuse_other_base(self, residuals: list[tuple[Layer, float]]) -> None:
        above = [(layer, residual) for layer, residual in residuals if not residual <= MAX_RESIDUAL]
        if not above:
            return
        worst, residual = max(above, key=lambda pair: pair[1])
        message = (
            f"The adapter {self.adapter_name!r} was not trained on this base model: in {len(above)} of "
            f"{len(self.layers)} layers the principal subspace differs, most in {worst.key!r} with a residual of "
            f"{residual:.3f} (the same base gives below 0.001, a base rounded to bfloat16 about 0.003, at most "
            f"{MAX_RESIDUAL} is allowed). Load the adapter on the base it was trained on, quantised in the same way or "
            "not at all; or train and save it with basis='embedded', which fits any base of the same shapes; or, to "
            "load it all the same, set "
            "on_base_mismatch='warn' in PeftModel.from_pretrained or on the config."
        )
        if self._config(worst).on_base_mismatch == "warn":
            warnings.warn(message, IsotuneWarning, stacklevel=2)
        else:
            raise BaseMismatchError(message)
