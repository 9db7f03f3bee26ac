"""Adapter folders: reading one without a model, placing its layers on a base, and importing PEFT's own PSOFT."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.psoft.layer import Linear as PeftPsoftLinear
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from isotune.base_model import load_base
from isotune.config import IsotuneConfig
from isotune.errors import AdapterFileError
from isotune.layer import AdapterGroup, Linear
from isotune.methods import METHODS, PsoftConfig
from isotune.operators import Operator
from isotune.pinning import candidate_rank, pin, recover
from isotune.subspace import principal_subspace

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."
"""What PEFT puts before every name of the base model."""

_ADAPTER = "default"
_EXACT = 1e-5
"""Relative difference of an update up to which an imported layer counts as the same function."""
_RECOVERABLE = 1e-3
"""How far a basis found again from its pin may be (root mean square over rows) for the pin to be kept."""


@dataclass(frozen=True)
class AdapterFile:
    """What an isotune adapter folder holds, without its base model."""

    directory: Path
    config: IsotuneConfig
    layers: dict[str, dict[str, Tensor]]
    """Module name -> its tensors, named as in the layer: "isotune_operator.generator", "isotune_form.pin", …"""
    extras: dict[str, Tensor]
    """All other tensors by their name in the file: saved modules, trained biases, embeddings."""

    def operator(self, module: str) -> Operator:
        """The trained operator of a module.

        Raises:
            AdapterFileError: the tensors do not fit the config.
        """
        operator = self.config.build_operator(self.config.rank_of(module))
        self._load(operator, module, "isotune_operator.")
        return operator

    def _load(self, target: nn.Module, module: str, prefix: str) -> None:
        tensors = self.layers[module]
        state = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        try:
            target.load_state_dict(state)
        except RuntimeError as error:
            detail = str(error).splitlines()[-1].strip()
            raise AdapterFileError(
                f"{self.directory}: the tensors of {module!r} are not what {CONFIG_FILE} says ({detail}). "
                "Check that the two files belong together, or save the adapter again."
            ) from error

    def place(self, base: nn.Module) -> dict[str, Linear]:
        """Build the adapted layers on the weights of a base model, which itself stays as it is.

        Args:
            base: a plain model. Where its modules are the adapter's but for what precedes their names (an encoder
                alone, for an adapter trained on it with a head), they are found all the same.

        Returns:
            Module name in the file -> layer, whose adapter is called "default".

        Raises:
            AdapterFileError: a module is not there, or the tensors do not fit it.
            BaseMismatchError: this is another base than the one trained on.
        """
        modules = dict(base.named_modules())
        layers: dict[str, Linear] = {}
        for name in self.layers:
            layer = Linear(modules[self._find(name, modules)], name)
            layer.update_layer(_ADAPTER, self.config)
            self._load(layer.operator(_ADAPTER), name, "isotune_operator.")
            self._load(layer.raw_form(_ADAPTER), name, "isotune_form.")
            layers[name] = layer
        AdapterGroup(_ADAPTER, list(layers.values())).place()
        return layers

    def _find(self, name: str, modules: Mapping[str, nn.Module]) -> str:
        parts = name.split(".")
        for drop in range(len(parts)):
            tail = ".".join(parts[drop:])
            found = [tail] if tail in modules else [other for other in modules if other.endswith("." + tail)]
            if len(found) == 1:
                return found[0]
            if found:
                break
        raise AdapterFileError(
            f"{self.directory}: the adapter is on a module {name!r}, which this base model does not have. Give the "
            "base model that it was trained on."
        )


def describe(directory: str | os.PathLike[str]) -> AdapterFile:
    """Read an isotune adapter folder without its base model.

    Args:
        directory: with adapter_config.json and adapter_model.safetensors.

    Raises:
        AdapterFileError: no such folder, a file missing or damaged, weights in a pickle, or another method's adapter.
    """
    folder = Path(directory)
    raw = read_config(folder)
    kinds = {f"ISOTUNE_{name.upper()}": config for name, config in METHODS.items()}
    kind = raw.get("peft_type")
    if kind not in kinds:
        hint = " `isotune import` converts it." if kind == "PSOFT" else ""
        raise AdapterFileError(
            f"{folder} holds an adapter of type {kind!r}; isotune's own are {', '.join(kinds)}.{hint}"
        )
    try:
        config = kinds[kind].from_pretrained(str(folder))
    except TypeError as error:
        raise AdapterFileError(f"{folder / CONFIG_FILE} is not a configuration of {kind}: {error}") from error
    layers, extras = _by_module(_read_tensors(folder), ("isotune_operator", "isotune_form"))
    if not layers:
        raise AdapterFileError(f"{folder / WEIGHTS_FILE} holds no adapted layer; save the adapter again.")
    return AdapterFile(folder, config, layers, extras)


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of an adapter folder's adapter_config.json, whatever the method.

    Raises:
        AdapterFileError: no such folder, or no such file, or not JSON.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise AdapterFileError(f"{folder} is not a folder; give the one that save_pretrained wrote.")
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise AdapterFileError(f"{folder} has no {CONFIG_FILE}, so it is not an adapter that save_pretrained wrote.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterFileError(f"{path} is damaged: {error}. Copy or save the adapter again.") from error
    if not isinstance(content, dict):
        raise AdapterFileError(f"{path} is damaged: it holds no object. Copy or save the adapter again.")
    return content


@contextlib.contextmanager
def new_directory(out: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write into that becomes `out` when the block ends well, and vanishes otherwise.

    Raises:
        ValueError: `out` exists and is not an empty folder.
    """
    target = Path(out)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} exists already; choose another place, or remove it first.")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    partial.mkdir()
    try:
        yield partial
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        if (folder / "adapter_model.bin").exists():
            raise AdapterFileError(
                f"{folder} holds its weights as adapter_model.bin, a pickle, which isotune never opens. If you trust "
                "it, convert it with PEFT: PeftModel.from_pretrained(base, folder).save_pretrained(new_folder)."
            )
        raise AdapterFileError(f"{folder} has no {WEIGHTS_FILE}; copy or save the adapter again.")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{path} is damaged: {error}. Copy or save the adapter again.") from error
    return tensors


def _by_module(
    tensors: Mapping[str, Tensor], groups: tuple[str, ...]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Split a file into the tensors of its adapted layers, by module, and the rest."""
    layers: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        parts = name.removeprefix(KEY_PREFIX).split(".")
        at = next((i for i, part in enumerate(parts) if part in groups), None)
        if at is None:
            rest[name] = tensor
        else:
            layers.setdefault(".".join(parts[:at]), {})[".".join(parts[at:])] = tensor
    return layers, rest


# -- PEFT's own PSOFT -------------------------------------------------------------------------------------------------


@dataclass
class _Imported:
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

    def as_free_matrix(self) -> _Imported:
        """M itself as the trained matrix, whatever it was made of."""
        return replace(self, parameters={"generator": self.difference})

    def on_principal_form(self, matrix: Tensor) -> _Imported:
        """The same update by a free matrix on orthonormal directions V with W Vᵀ as its writer.

        PEFT's "lowrank" stops before it has converged, and then its B is not W Aᵀ. But B lies in the column space of W,
        so B = W Xᵀ, and with V an orthonormal basis of the rows of A and X together, A = C V and X = D V,
        ΔW = W Vᵀ (Dᵀ (M − I)ᵀ C) V. V has up to 2 r rows, and r where W Aᵀ is B after all.
        """
        values = torch.linalg.vector_norm(self.reader, dim=1).double()
        same = _Imported(
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
        return _Imported(basis, wide @ basis.T, mixed.T.contiguous(), {}).as_free_matrix()


def import_peft_psoft(directory: str | os.PathLike[str], base_model: nn.Module) -> PeftModel:
    """Turn an adapter of PEFT's own PSOFT into isotune's, the same function as PEFT computes on this machine.

    PEFT's file holds no basis: it computes the singular vectors anew wherever it is loaded, so what the file means
    depends on the machine. Import it where it gives the results that you want to keep; what is saved afterwards means
    the same everywhere. PEFT's own layer computes the vectors here. psoft_alpha cancels in PEFT and becomes None.

    What has no counterpart is converted exactly, and a larger file is the price: a Neumann series of 1 or 2 terms
    becomes a free matrix (psoft_orth=False); an unconverged psoft_svd="lowrank" one of up to twice the rank; and a
    basis that is not the principal subspace is stored whole (basis="embedded").

    Args:
        directory: the adapter's folder; only safetensors are read.
        base_model: the plain base model; as with get_peft_model, it is adapted in place.

    Returns:
        The adapted model, trainable; save_pretrained writes an ISOTUNE_PSOFT adapter.

    Raises:
        AdapterFileError: the folder is damaged or not PEFT's PSOFT, or does not fit the base.

    Source: peft/tuners/psoft/layer.py of PEFT 0.21.2. Its R acts as x Rᵀ, so its generator has the opposite sign; its
    series with k ≥ 3 terms is isotune's with max(k − 2, 2).
    """
    folder = Path(directory)
    raw = read_config(folder)
    if raw.get("peft_type") != "PSOFT":
        raise AdapterFileError(f"{folder} holds an adapter of type {raw.get('peft_type')!r}; only PSOFT is imported.")
    theirs = peft.PsoftConfig.from_pretrained(str(folder))
    theirs.fan_in_fan_out = False  # as PEFT sets it: its PSOFT takes nn.Linear only
    tensors, extras = _by_module(_read_tensors(folder), ("psoft_R",))
    if not tensors:
        raise AdapterFileError(f"{folder / WEIGHTS_FILE} holds no adapted layer; save the adapter again.")
    weights = {name: _plain_weight(base_model, name, folder) for name in tensors}
    with torch.no_grad():
        layers = {
            name: _compute_as_peft(theirs, base_model.get_submodule(name), state, f"{folder}: {name!r}")
            for name, state in tensors.items()
        }
        config = _translate(theirs)
        if not config.psoft_orth and theirs.psoft_orth:
            layers = {name: layer.as_free_matrix() for name, layer in layers.items()}
        symmetric = config.ab_svd_init == "pissa_init"
        if any(layer.defect(weights[name], symmetric=symmetric) > _EXACT for name, layer in layers.items()):
            layers = {name: layer.on_principal_form(weights[name]) for name, layer in layers.items()}
            config = _with_free_matrices(config, {name: len(layer.reader) for name, layer in layers.items()})
    model = get_peft_model(base_model, replace(config))
    if config.basis == "pinned" and not all(_is_recoverable(m, layers[n]) for n, m in _adapted(model) if n in layers):
        config.basis = "embedded"
        model = get_peft_model(model.unload(), replace(config))
    adapted = dict(_adapted(model))
    if adapted.keys() != layers.keys():
        odd = min(adapted.keys() ^ layers.keys())
        raise AdapterFileError(f"{folder}: {CONFIG_FILE} and {WEIGHTS_FILE} disagree on {odd!r} being adapted.")
    with torch.no_grad():
        for name, layer in adapted.items():
            for key, parameter in layer.operator(_ADAPTER).named_parameters():
                parameter.copy_(layers[name].parameters[key])
            form = layer.raw_form(_ADAPTER)
            form.adopt_foreign(layers[name].basis(), layer.unmerged_matrix(), 1.0, config.basis_seed)
    if extras:
        done: Any = set_peft_model_state_dict(model, {**get_peft_model_state_dict(model), **extras})
        if done.unexpected_keys:
            raise AdapterFileError(
                f"{folder / WEIGHTS_FILE} holds {done.unexpected_keys[0]!r}, for which this base model has no place. "
                "Load the base with the class that the adapter was trained on."
            )
    model.peft_config[_ADAPTER].base_model_name_or_path = theirs.base_model_name_or_path
    return model


def _plain_weight(base_model: nn.Module, name: str, folder: Path) -> Tensor:
    try:
        module = base_model.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        found = "has no such module" if module is None else f"has a {type(module).__module__}.{type(module).__name__}"
        raise AdapterFileError(
            f"{folder}: the adapter is on an nn.Linear {name!r}, and this base model {found}. Give the plain base "
            "model that it was trained on, loaded with the same class."
        )
    return module.weight.detach()


def _compute_as_peft(config: peft.PsoftConfig, module: nn.Module, state: dict[str, Tensor], what: str) -> _Imported:
    """PEFT's own layer on this weight, with its own singular vectors, and the trained tensors in it."""
    try:
        layer = PeftPsoftLinear(module, _ADAPTER, config)
        trained: Any = layer.psoft_R[_ADAPTER].float()
        trained.load_state_dict({name.removeprefix("psoft_R."): tensor for name, tensor in state.items()})
    except (RuntimeError, TypeError, ValueError) as error:
        detail = str(error).splitlines()[-1].strip()
        raise AdapterFileError(f"{what}: PEFT's layer cannot be made of this file and base: {detail}") from error
    reader, writer = layer._psoft_A_cache[_ADAPTER], layer._psoft_B_cache[_ADAPTER] * layer.scaling[_ADAPTER]
    if not bool(reader.any(dim=1).all()):
        raise AdapterFileError(f"{what}: the weight's rank is below r, so ab_svd_init='pissa_init' leaves no basis.")
    matrix = trained.double().get_matrix().T
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    parameters = {"generator": -trained.weight if config.psoft_orth else trained.weight.T - eye}
    if config.psoft_mag_a:
        parameters["input_scale"] = trained.vector_a
    if config.psoft_mag_b:
        parameters["output_scale"] = trained.vector_b
    return _Imported(reader, writer, matrix - eye, parameters)


def _translate(theirs: peft.PsoftConfig) -> PsoftConfig:
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
        num_cayley_neumann_terms=max(terms - 2, 2) if series else 5,
        cayley_neumann_eps=theirs.cayley_neumann_eps if series else None,
        target_modules=theirs.target_modules,
        exclude_modules=theirs.exclude_modules,
        modules_to_save=theirs.modules_to_save,
        layers_to_transform=theirs.layers_to_transform,
        layers_pattern=theirs.layers_pattern or None,
        task_type=theirs.task_type,
        auto_mapping=theirs.auto_mapping,
        revision=theirs.revision,
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


def _adapted(model: nn.Module) -> list[tuple[str, Linear]]:
    return [(n.removeprefix(KEY_PREFIX), m) for n, m in model.named_modules() if isinstance(m, Linear)]


def _is_recoverable(layer: Linear, imported: _Imported) -> bool:
    """Whether the pin of this basis would lead back to it, which needs it to be principal."""
    basis, candidates = imported.basis(), layer.raw_form(_ADAPTER).candidates
    if candidates is None:  # a weight that another layer has too
        count = candidate_rank(len(basis), layer.in_features, layer.out_features)
        candidates = principal_subspace(layer.unmerged_matrix(), count).basis
    found, _ = recover(pin(basis), candidates.to(basis))
    return bool((found - basis).norm() <= _RECOVERABLE * len(basis) ** 0.5)


def convert_peft_psoft(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base: str | None = None,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Import an adapter folder of PEFT's own PSOFT and write it as isotune's.

    Args:
        directory: the adapter's folder.
        out: the folder to write; it appears only when it is complete.
        base: the base model's name as in `isotune.base_model.resolve_base`; by default what the adapter's config names.
        trust_remote_code: run code that the base model's repository carries.

    Raises:
        ValueError: `out` is not empty, or the base cannot be loaded.
        AdapterFileError: as `import_peft_psoft`.
    """
    with new_directory(out) as folder:
        raw = read_config(directory)
        model = import_peft_psoft(directory, named_base(directory, base, trust_remote_code=trust_remote_code))
        model.peft_config[_ADAPTER].base_model_name_or_path = raw.get("base_model_name_or_path") or base
        model.save_pretrained(str(folder))


def named_base(
    directory: str | os.PathLike[str], base: nn.Module | str | None = None, *, trust_remote_code: bool = False
) -> nn.Module:
    """The base model of an adapter folder: `base` itself, or loaded by that name or the one in the adapter's config.

    Raises:
        ValueError: neither names one, or it cannot be loaded.
    """
    if isinstance(base, nn.Module):
        return base
    raw = read_config(directory)
    name = base or raw.get("base_model_name_or_path")
    if not name:
        raise ValueError(
            f"{directory} does not name its base model; give it: base=... in Python, --base on the command line."
        )
    return load_base(str(name), raw, trust_remote_code=trust_remote_code)


def rank_pattern(ranks: Mapping[str, int], default: int) -> dict[str, int]:
    """The pattern for those modules whose rank is not the default; anchored, as one name may end in another."""
    return {"^" + name.replace(".", r"\."): rank for name, rank in ranks.items() if rank != default}
