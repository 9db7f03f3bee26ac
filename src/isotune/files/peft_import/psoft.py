"""Importing PEFT's own PSOFT, whose file holds no basis: the import keeps the one that PEFT computes here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from isotune.errors import AdapterFileError
from isotune.files.adapter import ADAPTER, by_module, refused
from isotune.files.peft_import.source import EXACT, Source, series_fields
from isotune.internals.peft_state import psoft_basis
from isotune.methods import PsoftConfig
from isotune.methods.subspace import SubspaceConfig
from isotune.subspace.pinning import candidate_rank, pin, recover
from isotune.subspace.selection import singular_subspace
from isotune.subspace.solvers import principal_subspace
from isotune.tuner.layer import Layer
from isotune.tuner.state import adapted_layers

FREE_MATRIX: dict[str, Any] = {
    "psoft_orth": False,
    "psoft_mag_a": False,
    "psoft_mag_b": False,
    "use_cayley_neumann": False,
    "cayley_neumann_eps": None,
}
"""Options of a PSOFT adapter that trains M itself."""
_RECOVERABLE = 1e-3
"""Largest error of a basis recovered from its pin (root mean square over rows) with which the pin is kept."""


@dataclass
class ImportedUpdate:
    """One layer of another tool's adapter, ΔW = up (M − I)ᵀ down, and the parameters that make isotune's the same."""

    down: Tensor
    """A, (r, in), with orthogonal rows."""
    up: Tensor
    """psoft_alpha / r · B, (out, r)."""
    difference: Tensor
    """M − I, (r, r), float64; in PEFT's terms Rᵀ − I with both vectors."""
    parameters: dict[str, Tensor] | None = None
    """The parameters of isotune's operator; None for a free matrix, which is M − I itself."""

    def basis(self) -> Tensor:
        """V, (r, in): A without the singular values of a symmetric split."""
        return nn.functional.normalize(self.down, dim=1)

    def defect(self, matrix: Tensor, *, symmetric: bool) -> float:
        """Relative difference between this update and isotune's with the same basis and M."""
        projection = matrix.float() @ self.basis().float().T
        values = torch.linalg.vector_norm(projection, dim=0).sqrt() if symmetric else projection.new_ones(1)
        ours = (projection / values.clamp_min(torch.finfo(values.dtype).tiny)).double() @ self.difference.T * values
        theirs = self.up.double() @ self.difference.T * torch.linalg.vector_norm(self.down, dim=1)
        norm = float(theirs.norm())
        return float((ours - theirs).norm()) / norm if norm > 0 else 0.0

    def on_principal_form(self, matrix: Tensor) -> ImportedUpdate:
        """The same update as a free matrix on orthonormal directions V, with up = W Vᵀ.

        PEFT's "lowrank" stops before it has converged, so its B is not exactly W Aᵀ. But B lies in the column space of
        W, so B = W Xᵀ. With V an orthonormal basis of the rows of A and X together, A = C V and X = D V,
        ΔW = W Vᵀ (Dᵀ (M − I)ᵀ C) V. V has up to 2 r rows, or r if B is W Aᵀ after all.
        """
        values = torch.linalg.vector_norm(self.down, dim=1).double()
        same = ImportedUpdate(self.basis(), self.up * values.to(self.up), self.difference * values[:, None] / values)
        if same.defect(matrix, symmetric=False) <= EXACT:
            return same
        wide = matrix.double()
        source = torch.linalg.lstsq(wide.cpu(), self.up.double().cpu(), driver="gelsd").solution.T.to(wide)
        both = torch.cat([nn.functional.normalize(source, dim=1), self.basis().double()])
        _, spread, right = torch.linalg.svd(both, full_matrices=False)
        basis = right[spread > 1e-9 * spread[0]]
        mixed = (source @ basis.T).T @ self.difference.T @ (self.down.double() @ basis.T)
        return ImportedUpdate(basis, wide @ basis.T, mixed.T.contiguous())


@torch.no_grad()
def import_psoft(source: Source) -> PeftModel:
    """Put isotune's PSOFT on the base."""
    theirs = source.config
    theirs.fan_in_fan_out = False  # as PEFT sets it: its PSOFT takes nn.Linear only
    weights = {name: source.weight(name) for name in source.layers}
    layers = {name: _computed_by_peft(source, name) for name in source.layers}
    terms = int(theirs.num_cayley_neumann_terms)
    fields: dict[str, Any] = {}
    if theirs.psoft_orth and theirs.use_cayley_neumann:
        if terms > 2:
            fields = {**series_fields(terms), "cayley_neumann_eps": theirs.cayley_neumann_eps}
        else:  # I and I + 2Q are not of the form (I + Q)(I + … + Qᵏ)
            fields = FREE_MATRIX
            layers = {name: replace(layer, parameters=None) for name, layer in layers.items()}
    names = ("r", "psoft_dropout", "ab_svd_init", "psoft_orth", "psoft_mag_a", "psoft_mag_b")
    config = source.configured(PsoftConfig, *names, **fields)
    symmetric = config.ab_svd_init == "pissa_init"
    if any(layer.defect(weights[name], symmetric=symmetric) > EXACT for name, layer in layers.items()):
        layers = {name: layer.on_principal_form(weights[name]) for name, layer in layers.items()}
        config = replace(config, **ranks_of(layers), ab_svd_init="psoft_init", basis="embedded", **FREE_MATRIX)
    return adapted_on(source, config, layers)


def ranks_of(layers: Mapping[str, ImportedUpdate]) -> dict[str, Any]:
    """The options r and rank_pattern with which each layer has the rank of its update."""
    return by_module("r", "rank_pattern", {name: len(layer.down) for name, layer in layers.items()})


def adapted_on(source: Source, config: SubspaceConfig, layers: Mapping[str, ImportedUpdate]) -> PeftModel:
    """Put isotune's adapter on the base, on the bases of these updates: pinned if all can be found again."""
    parameters = {name: layer.parameters or {"generator": layer.difference} for name, layer in layers.items()}
    model = source.adapted(config, parameters)
    found = (_is_recoverable(layer, layers[name], config) for name, layer in adapted_layers(model, ADAPTER))
    if config.basis == "pinned" and not all(found):
        model = replace(source, base=model.unload()).adapted(replace(config, basis="embedded"), parameters)
    for name, layer in adapted_layers(model, ADAPTER):
        (form,), basis = layer.bases(ADAPTER), layers[name].basis()
        form.record(basis if form.embedded else pin(basis, seed=config.basis_seed))
        # This basis may not be the principal one, so other adapters must not share it as such.
        layer.put_on_basis(ADAPTER, [basis], principal=False)
    return model


def _computed_by_peft(source: Source, name: str) -> ImportedUpdate:
    """Build PEFT's own layer on this weight, with its own singular vectors and the trained tensors."""
    from peft.tuners.psoft.layer import Linear as PeftPsoftLinear  # PEFT has it from 0.19 on

    config, what = source.config, f"{source.folder}: {name!r}"
    with refused(f"{what}: PEFT's layer cannot be built from this file and base: "):
        layer = PeftPsoftLinear(source.base.get_submodule(name), ADAPTER, config)
        trained: Any = layer.psoft_R[ADAPTER].float()
        trained.load_state_dict({key.removeprefix("psoft_R."): t for key, t in source.layers[name].items()})
    down, up = psoft_basis(layer, ADAPTER)
    if not bool(down.any(dim=1).all()):
        raise AdapterFileError(f"{what}: the weight's rank is below r, so ab_svd_init='pissa_init' leaves no basis.")
    matrix = trained.double().get_matrix().T
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    parameters = {"generator": -trained.weight if config.psoft_orth else trained.weight.T - eye}
    if config.psoft_mag_a:
        parameters["input_scale"] = trained.vector_a
    if config.psoft_mag_b:
        parameters["output_scale"] = trained.vector_b
    return ImportedUpdate(down, up * layer.scaling[ADAPTER], matrix - eye, parameters)


def _is_recoverable(layer: Layer, imported: ImportedUpdate, config: SubspaceConfig) -> bool:
    """Whether this basis can be recovered from its pin, which requires it to be what the configuration selects."""
    basis, matrix = imported.basis(), layer.unmerged_matrix()
    count = candidate_rank(len(basis), layer.in_features, layer.out_features)
    if config.selection == "top":
        candidates = principal_subspace(matrix, count).basis
    else:
        candidates = singular_subspace(matrix, count, config.selection).basis
    found, _ = recover(pin(basis), candidates.to(basis))
    return bool((found - basis).norm() <= _RECOVERABLE * len(basis) ** 0.5)
