"""Importing adapters of PEFT's own PSOFT, OFT, BOFT and HRA as isotune's, the same function as PEFT computes."""

from __future__ import annotations

import contextlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.psoft.layer import Linear as PeftPsoftLinear
from torch import Tensor, nn

from isotune.algebra.cayley import bound_generator
from isotune.algebra.skew import skew_from_vector, vector_from_skew
from isotune.errors import AdapterFileError
from isotune.files.adapter import (
    ADAPTER,
    CONFIG_FILE,
    WEIGHTS_FILE,
    adapted_layers,
    by_module,
    named_base,
    new_directory,
    rank_pattern,
    read_config,
    read_tensors,
)
from isotune.hosts import widen
from isotune.methods import BOFTConfig, HRAConfig, OFTConfig, PsoftConfig
from isotune.methods.config import RotationConfig
from isotune.subspace.pinning import candidate_rank, pin, recover
from isotune.subspace.solvers import principal_subspace
from isotune.tuner.layer import Layer

_EXACT = 1e-5
"""Relative difference of an update up to which an imported layer counts as the same function."""
_RECOVERABLE = 1e-3
"""How far a basis found again from its pin may be (root mean square over rows) for the pin to be kept."""


def import_peft(directory: str | os.PathLike[str], base_model: nn.Module) -> PeftModel:
    """Turn an adapter of PEFT's own PSOFT, OFT, BOFT or HRA into isotune's, the same function as PEFT computes here.

    PEFT's PSOFT file holds no basis: it computes the singular vectors anew wherever it is loaded, so what the file
    means depends on the machine. Import it where it gives the results that you want to keep; what is saved afterwards
    means the same everywhere. PEFT's own layer computes the vectors here. The other methods' files mean the same on
    every machine, except that PEFT itself can load a butterfly of several factors only with its CUDA extension.

    What has no counterpart is converted exactly, and a larger file is the price:

    - PSOFT: a Neumann series of 1 or 2 terms becomes a free matrix (psoft_orth=False); an unconverged
      psoft_svd="lowrank" one of up to twice the rank; and a basis that is not the principal subspace is stored whole
      (basis="embedded"). psoft_alpha cancels in PEFT and becomes None.
    - BOFT: where PEFT found no CUDA extension, its file has one factor, whatever its configuration says.
    - HRA: an odd number of reflections gets one more with a direction of zeros, which is the identity and stays it.

    What does nothing in PEFT (OFT's module_dropout) is left out. COFT's bound is kept unless blocks are shared on
    layers of different widths, whose bounds differ in isotune.

    Args:
        directory: the adapter's folder; only safetensors are read.
        base_model: the plain base model; as with get_peft_model, it is adapted in place.

    Returns:
        The adapted model, trainable; save_pretrained writes an adapter of type ISOTUNE_PSOFT, ISOTUNE_OFT, ….

    Raises:
        AdapterFileError: the folder is damaged or of another method, does not fit the base, adapts other layers than
            nn.Linear, or computes what no adapter of isotune does.

    Source: peft/tuners/{psoft,oft,boft,hra}/layer.py of PEFT 0.21.2. PSOFT's R acts as x Rᵀ, and the exact Cayley
    transform of OFT and BOFT is (I − Q)(I + Q)⁻¹, so these generators have the opposite sign; OFT's Neumann series has
    isotune's sign. A series with k ≥ 3 terms is isotune's with max(k − 2, 2).
    """
    folder = Path(directory)
    kind = read_config(folder).get("peft_type")
    if kind not in _METHODS:
        raise AdapterFileError(
            f"{folder} holds an adapter of type {kind!r}; only {', '.join(_METHODS)} of PEFT are imported."
        )
    method = _METHODS[kind]
    with _refused(str(folder / CONFIG_FILE)):
        theirs = method.config.from_pretrained(str(folder))
    layers, extras = by_module(read_tensors(folder), method.tensors)
    if not layers:
        raise AdapterFileError(f"{folder / WEIGHTS_FILE} holds no adapted layer; save the adapter again.")
    model = method.build(_Source(folder, theirs, layers, base_model))
    if extras:
        done: Any = set_peft_model_state_dict(model, {**get_peft_model_state_dict(model), **extras})
        if done.unexpected_keys:
            raise AdapterFileError(
                f"{folder / WEIGHTS_FILE} holds {done.unexpected_keys[0]!r}, for which this base model has no place. "
                "Load the base with the class that the adapter was trained on."
            )
    model.peft_config[ADAPTER].base_model_name_or_path = theirs.base_model_name_or_path
    return model


def convert_peft(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base: str | None = None,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Import an adapter folder of PEFT's own PSOFT, OFT, BOFT or HRA and write it as isotune's.

    Args:
        directory: the adapter's folder.
        out: the folder to write; it appears only when it is complete.
        base: the base model's name as in `resolve_base`; by default what the adapter's config names.
        trust_remote_code: run code that the base model's repository carries.

    Raises:
        ValueError: `out` is not empty, or the base cannot be loaded.
        AdapterFileError: as `import_peft`.
    """
    with new_directory(out) as folder:
        raw = read_config(directory)
        model = import_peft(directory, named_base(directory, base, trust_remote_code=trust_remote_code))
        model.peft_config[ADAPTER].base_model_name_or_path = raw.get("base_model_name_or_path") or base
        model.save_pretrained(str(folder))


@dataclass(frozen=True)
class _Source:
    """What PEFT's folder holds, and the plain base model that it belongs to."""

    folder: Path
    config: Any
    layers: dict[str, dict[str, Tensor]]
    """Module name -> its tensors, named as in PEFT's layer."""
    base: nn.Module

    def weight(self, name: str) -> Tensor:
        """W of an adapted module, which must be an nn.Linear."""
        try:
            module = self.base.get_submodule(name)
        except AttributeError:
            module = None
        if isinstance(module, nn.Linear):
            return module.weight.detach()
        found = f"{type(module).__module__}.{type(module).__name__}"
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)):
            raise AdapterFileError(
                f"{self.folder}: the adapter is on {name!r}, a {found}, and only adapters on nn.Linear are imported: "
                "on other layers PEFT computes other functions than isotune, such as a rotation of each of a "
                "convolution's overlapping patches. Train it anew with isotune's own method."
            )
        raise AdapterFileError(
            f"{self.folder}: the adapter is on an nn.Linear {name!r}, and this base model has "
            f"{'no such module' if module is None else f'a {found}'}. Give the plain base model that it was trained "
            "on, loaded with the same class."
        )

    def tensor(self, name: str, key: str, dimensions: int) -> Tensor:
        """A tensor of an adapted nn.Linear, float32 at least."""
        self.weight(name)
        tensor = self.layers[name].get(key)
        if tensor is None or tensor.ndim != dimensions:
            found = "none" if tensor is None else f"one of shape {tuple(tensor.shape)}"
            raise AdapterFileError(
                f"{self.folder / WEIGHTS_FILE} should hold a tensor {key!r} of {dimensions} dimensions for {name!r}, "
                f"and holds {found}; save the adapter again."
            )
        return widen(tensor)

    def fill(self, model: PeftModel, parameters: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Layer]:
        """Put the parameters, by module and name, into the operators of the model, and return its layers."""
        adapted = dict(adapted_layers(model, ADAPTER))
        if adapted.keys() != parameters.keys():
            odd = min(adapted.keys() ^ parameters.keys())
            raise AdapterFileError(
                f"{self.folder}: {CONFIG_FILE} and {WEIGHTS_FILE} disagree on {odd!r} being adapted."
            )
        for name, layer in adapted.items():
            for key, parameter in layer.adapter(ADAPTER).named_parameters():
                value = parameters[name][key]
                if value.shape != parameter.shape:
                    raise AdapterFileError(
                        f"{self.folder}: size mismatch for {name!r}: by {CONFIG_FILE} and the base model its {key} has "
                        f"shape {tuple(parameter.shape)}, by {WEIGHTS_FILE} {tuple(value.shape)}. Check that the files "
                        "belong together, and give the base model that the adapter was trained on."
                    )
                with torch.no_grad():
                    parameter.copy_(value)
        return adapted

    def rotation(self, config: RotationConfig, parameters: Mapping[str, Mapping[str, Tensor]]) -> PeftModel:
        """The base with a rotation of isotune's that has these parameters."""
        with _refused(str(self.folder)):
            model = get_peft_model(self.base, config)
        self.fill(model, parameters)
        return model


@contextlib.contextmanager
def _refused(what: str) -> Iterator[None]:
    """Say which file it is about when PEFT or a configuration refuses something."""
    try:
        yield
    except AdapterFileError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        raise AdapterFileError(f"{what}: {str(error).splitlines()[-1].strip()}") from error


def _shared_fields(theirs: Any) -> dict[str, Any]:
    """The fields that every method has, from PEFT's configuration."""
    names = ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "task_type",
             "auto_mapping", "revision")  # fmt: skip
    bias = getattr(theirs, "bias", "none")
    return {
        **{name: getattr(theirs, name) for name in names},
        "layers_pattern": theirs.layers_pattern or None,
        "bias": "isotune_only" if bias.endswith("_only") else bias,
    }


def _series_terms(terms: int) -> int:
    """Isotune's k for PEFT's series of `terms` ≥ 3 terms: its 3 and 4 are the same polynomial."""
    return max(terms - 2, 2)


# -- OFT --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _import_oft(source: _Source) -> PeftModel:
    theirs = source.config
    terms = int(theirs.num_cayley_neumann_terms)
    if theirs.use_cayley_neumann and terms == 2:
        raise AdapterFileError(
            f"{source.folder}: with num_cayley_neumann_terms=2 PEFT computes I + 2Q, which is neither a rotation nor a "
            "series of isotune's. Series of 3 terms or more and the exact transform can be imported."
        )
    series = theirs.use_cayley_neumann and terms > 2
    with _refused(str(source.folder / CONFIG_FILE)):
        config = OFTConfig(
            r=theirs.r,
            oft_block_size=theirs.oft_block_size,
            adjust="nearest",  # as PEFT does
            block_share=theirs.block_share,
            use_cayley_neumann=series,
            num_cayley_neumann_terms=_series_terms(terms) if series else 5,
            **_shared_fields(theirs),
        )
        if theirs.coft:
            config = replace(config, coft=True, eps=theirs.eps)
    parameters, ratios = {}, set()
    for name in source.layers:
        generator = source.tensor(name, "oft_R.weight", 2)
        width = source.weight(name).shape[1]
        with _refused(f"{source.folder}: {name!r}"):
            size = config.block_size_for(name, width)
            # Isotune divides COFT's bound among all blocks, PEFT among those that have a generator of their own.
            ratio = width // size if theirs.block_share else 1
            if theirs.coft:
                bound = theirs.eps * math.sqrt(ratio * size / width)
                generator = vector_from_skew(bound_generator(skew_from_vector(generator, size), bound))
        ratios.add(ratio)
        if not series:
            # A series of one term is I in PEFT, whatever the generator.
            generator = torch.zeros_like(generator) if theirs.use_cayley_neumann else -generator
        parameters[name] = {"generator": generator}
    if theirs.coft:
        same = len(ratios) == 1
        config = replace(config, coft=same, eps=theirs.eps * math.sqrt(ratios.pop()) if same else OFTConfig.eps)
    return source.rotation(config, parameters)


# -- BOFT -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _import_boft(source: _Source) -> PeftModel:
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
    with _refused(str(source.folder / CONFIG_FILE)):
        config = BOFTConfig(
            boft_block_size=theirs.boft_block_size,
            boft_block_num=theirs.boft_block_num,
            boft_n_butterfly_factor=count,
            boft_dropout=theirs.boft_dropout,
            **_shared_fields(theirs),
        )
    parameters = {}
    for name, own in stages.items():
        width = source.weight(name).shape[1]
        with _refused(f"{source.folder}: {name!r}"):
            size = config.block_size_for(name, width)
            if own.shape[1:] != (width // size, size, size):
                raise ValueError(
                    f"size mismatch for boft_R: by {CONFIG_FILE} and the base model it has shape "
                    f"{(count, width // size, size, size)}, by {WEIGHTS_FILE} {tuple(own.shape)}."
                )
            generator = -vector_from_skew((own - own.mT) / 2)
        parameters[name] = {"generator": generator, "output_gain": source.tensor(name, "boft_s", 2).squeeze(1)}
    return source.rotation(config, parameters)


# -- HRA --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _import_hra(source: _Source) -> PeftModel:
    theirs = source.config
    odd = theirs.r % 2 == 1 and not theirs.apply_GS
    with _refused(str(source.folder / CONFIG_FILE)):
        config = HRAConfig(
            r=theirs.r + odd,
            apply_GS=theirs.apply_GS,
            init_weights=not theirs.apply_GS,
            **_shared_fields(theirs),
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
    return found if defect <= _EXACT * len(found) ** 0.5 else found * math.nan


# -- PSOFT ------------------------------------------------------------------------------------------------------------


@dataclass
class _Subspace:
    """One layer of a PEFT adapter, ΔW = writer (M − I)ᵀ reader, and what of isotune's own layer gives the same."""

    reader: Tensor
    """A, (r, in): its rows are orthogonal."""
    writer: Tensor
    """psoft_alpha / r · B, (out, r)."""
    difference: Tensor
    """M − I, (r, r), float64; in PEFT's terms Rᵀ − I with both vectors."""
    parameters: dict[str, Tensor]
    """Of isotune's operator."""

    def basis(self) -> Tensor:
        """V, (r, in): A without the singular values of a symmetric split."""
        return nn.functional.normalize(self.reader, dim=1)

    def defect(self, matrix: Tensor, *, symmetric: bool) -> float:
        """Relative difference between this update and the one isotune's form makes with the same basis and M."""
        projection = matrix.float() @ self.basis().float().T
        values = torch.linalg.vector_norm(projection, dim=0).sqrt() if symmetric else projection.new_ones(1)
        ours = (projection / values.clamp_min(torch.finfo(values.dtype).tiny)).double() @ self.difference.T * values
        theirs = self.writer.double() @ self.difference.T * torch.linalg.vector_norm(self.reader, dim=1)
        norm = float(theirs.norm())
        return float((ours - theirs).norm()) / norm if norm > 0 else 0.0

    def as_free_matrix(self) -> _Subspace:
        """M itself as the trained matrix, whatever it was made of."""
        return replace(self, parameters={"generator": self.difference})

    def on_principal_form(self, matrix: Tensor) -> _Subspace:
        """The same update by a free matrix on orthonormal directions V with W Vᵀ as its writer.

        PEFT's "lowrank" stops before it has converged, and then its B is not W Aᵀ. But B lies in the column space of W,
        so B = W Xᵀ, and with V an orthonormal basis of the rows of A and X together, A = C V and X = D V,
        ΔW = W Vᵀ (Dᵀ (M − I)ᵀ C) V. V has up to 2 r rows, and r where W Aᵀ is B after all.
        """
        values = torch.linalg.vector_norm(self.reader, dim=1).double()
        same = _Subspace(
            self.basis(), self.writer * values.to(self.writer), self.difference * values[:, None] / values, {}
        )
        if same.defect(matrix, symmetric=False) <= _EXACT:
            return same.as_free_matrix()
        wide = matrix.double()
        source = torch.linalg.lstsq(wide.cpu(), self.writer.double().cpu(), driver="gelsd").solution.T.to(wide)
        both = torch.cat([nn.functional.normalize(source, dim=1), self.basis().double()])
        _, spread, right = torch.linalg.svd(both, full_matrices=False)
        basis = right[spread > 1e-9 * spread[0]]
        mixed = (source @ basis.T).T @ self.difference.T @ (self.reader.double() @ basis.T)
        return _Subspace(basis, wide @ basis.T, mixed.T.contiguous(), {}).as_free_matrix()


def _import_psoft(source: _Source) -> PeftModel:
    theirs = source.config
    theirs.fan_in_fan_out = False  # as PEFT sets it: its PSOFT takes nn.Linear only
    weights = {name: source.weight(name) for name in source.layers}
    with torch.no_grad():
        layers = {
            name: _compute_as_peft(theirs, source.base.get_submodule(name), state, f"{source.folder}: {name!r}")
            for name, state in source.layers.items()
        }
        config = _translate_psoft(theirs)
        if not config.psoft_orth and theirs.psoft_orth:
            layers = {name: layer.as_free_matrix() for name, layer in layers.items()}
        symmetric = config.ab_svd_init == "pissa_init"
        if any(layer.defect(weights[name], symmetric=symmetric) > _EXACT for name, layer in layers.items()):
            layers = {name: layer.on_principal_form(weights[name]) for name, layer in layers.items()}
            config = _with_free_matrices(config, {name: len(layer.reader) for name, layer in layers.items()})
    model = get_peft_model(source.base, replace(config))
    if config.basis == "pinned" and not all(
        _is_recoverable(m, layers[n]) for n, m in adapted_layers(model, ADAPTER) if n in layers
    ):
        config.basis = "embedded"
        model = get_peft_model(model.unload(), replace(config))
    for name, layer in source.fill(model, {name: layer.parameters for name, layer in layers.items()}).items():
        (form,), basis = layer.bases(ADAPTER), layers[name].basis()
        form.record(basis if form.embedded else pin(basis, seed=config.basis_seed))
        # It need not be the principal one, so no other adapter may take it for that.
        layer.put_on_basis(ADAPTER, [basis], principal=False)
    return model


def _compute_as_peft(config: peft.PsoftConfig, module: nn.Module, state: dict[str, Tensor], what: str) -> _Subspace:
    """PEFT's own layer on this weight, with its own singular vectors, and the trained tensors in it."""
    try:
        layer = PeftPsoftLinear(module, ADAPTER, config)
        trained: Any = layer.psoft_R[ADAPTER].float()
        trained.load_state_dict({name.removeprefix("psoft_R."): tensor for name, tensor in state.items()})
    except (RuntimeError, TypeError, ValueError) as error:
        detail = str(error).splitlines()[-1].strip()
        raise AdapterFileError(f"{what}: PEFT's layer cannot be made of this file and base: {detail}") from error
    reader, writer = layer._psoft_A_cache[ADAPTER], layer._psoft_B_cache[ADAPTER] * layer.scaling[ADAPTER]
    if not bool(reader.any(dim=1).all()):
        raise AdapterFileError(f"{what}: the weight's rank is below r, so ab_svd_init='pissa_init' leaves no basis.")
    matrix = trained.double().get_matrix().T
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    parameters = {"generator": -trained.weight if config.psoft_orth else trained.weight.T - eye}
    if config.psoft_mag_a:
        parameters["input_scale"] = trained.vector_a
    if config.psoft_mag_b:
        parameters["output_scale"] = trained.vector_b
    return _Subspace(reader, writer, matrix - eye, parameters)


def _translate_psoft(theirs: peft.PsoftConfig) -> PsoftConfig:
    neumann = theirs.psoft_orth and theirs.use_cayley_neumann
    terms = int(theirs.num_cayley_neumann_terms)
    # I and I + 2Q are no product (I + Q)(I + … + Qᵏ).
    free = neumann and terms < 3
    series = neumann and not free
    return PsoftConfig(
        r=theirs.r,
        psoft_dropout=theirs.psoft_dropout,
        ab_svd_init=theirs.ab_svd_init,
        psoft_orth=theirs.psoft_orth and not free,
        psoft_mag_a=theirs.psoft_mag_a and not free,
        psoft_mag_b=theirs.psoft_mag_b and not free,
        use_cayley_neumann=series,
        num_cayley_neumann_terms=_series_terms(terms) if series else 5,
        cayley_neumann_eps=theirs.cayley_neumann_eps if series else None,
        **_shared_fields(theirs),
    )


def _with_free_matrices(config: PsoftConfig, ranks: Mapping[str, int]) -> PsoftConfig:
    default = Counter(ranks.values()).most_common(1)[0][0]
    return replace(
        config,
        r=default,
        rank_pattern=rank_pattern(ranks, default),
        ab_svd_init="psoft_init",
        basis="embedded",
        psoft_orth=False,
        psoft_mag_a=False,
        psoft_mag_b=False,
        use_cayley_neumann=False,
        cayley_neumann_eps=None,
    )


def _is_recoverable(layer: Layer, imported: _Subspace) -> bool:
    """Whether the pin of this basis would lead back to it, which needs it to be principal."""
    basis = imported.basis()
    count = candidate_rank(len(basis), layer.in_features, layer.out_features)
    candidates = principal_subspace(layer.unmerged_matrix(), count).basis
    found, _ = recover(pin(basis), candidates.to(basis))
    return bool((found - basis).norm() <= _RECOVERABLE * len(basis) ** 0.5)


@dataclass(frozen=True)
class _Method:
    """How the adapters of one PEFT type are read."""

    config: type[Any]
    tensors: tuple[str, ...]
    """What follows the names of adapted modules in the file."""
    build: Callable[[_Source], PeftModel]


_METHODS = {
    "PSOFT": _Method(peft.PsoftConfig, ("psoft_R",), _import_psoft),
    "OFT": _Method(peft.OFTConfig, ("oft_R", "oft_embedding_R"), _import_oft),
    "BOFT": _Method(peft.BOFTConfig, ("boft_R", "boft_s"), _import_boft),
    "HRA": _Method(peft.HRAConfig, ("hra_u",), _import_hra),
}
