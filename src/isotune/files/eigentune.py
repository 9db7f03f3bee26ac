"""Importing adapter folders of eigentune: factors of singular values, or a small matrix between singular vectors."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from isotune.errors import AdapterFileError, BaseMismatchError
from isotune.files.adapter import ADAPTER, WEIGHTS_FILE, new_directory, only, refused
from isotune.files.base_model import load_base
from isotune.files.peft_import.psoft import FREE_MATRIX, ImportedUpdate, adapted_on, ranks_of
from isotune.files.peft_import.source import EXACT, Source
from isotune.files.tensors import load_tensors
from isotune.json_files import json_object
from isotune.methods import PsoftConfig, SvfitConfig
from isotune.subspace.selection import chosen
from isotune.tuner.state import check_values

__all__ = ["convert_eigentune", "import_eigentune", "is_eigentune"]

_CONFIG_FILE = "eigentune_config.json"
_VERSION = 1
_CHOICES = {
    "method": ("diagonal", "spectral_core"),
    "selection": ("principal", "minor", "mixed"),
    "update": ("additive", "relative"),
    "svd_backend": ("auto", "exact", "randomized", "lowrank"),
}
_SELECTIONS = {"principal": "top", "minor": "bottom", "mixed": "mixed"}
_FINGERPRINT = 24
"""Hexadecimal digits of a base weight's hash that the file keeps."""
_PROBED = 4
"""Directions whose signature the file keeps."""
_SIGNATURE_TOLERANCE = 1e-3
_EMBED = (
    "Save it again with its bases, eigentune.save_adapter(eigentune.load_adapter(base, folder), new_folder, "
    "save_bases=True), on the machine where it works."
)


def is_eigentune(directory: str | os.PathLike[str]) -> bool:
    """Whether a folder is an adapter of eigentune."""
    return (Path(directory) / _CONFIG_FILE).is_file()


@torch.no_grad()
def import_eigentune(directory: str | os.PathLike[str], base_model: nn.Module) -> PeftModel:
    """Import an adapter folder of eigentune as isotune's that computes the same function.

    Its "diagonal" method becomes SVFit, where an additive δ is d = δ / σ; "spectral_core" becomes PSOFT with a free
    matrix. A file without bases must be imported where eigentune itself can load it, since the singular vectors are
    computed here; the adapter saved afterwards means the same everywhere.

    Args:
        directory: the adapter's folder; only JSON and safetensors are read.
        base_model: the plain base model, adapted in place as by get_peft_model.

    Returns:
        The adapted model, trainable.

    Raises:
        AdapterFileError: the folder is damaged, does not fit the base, or was solved approximately and holds no bases.
        BaseMismatchError: the weights of the base are not those the adapter was trained on.

    Source: the file format of eigentune 0.2.0, version 1 (its serialization.py and svd.py).
    """
    folder = Path(directory)
    header = _header(folder)
    layers = {name: _Layer(folder, name, own, header) for name, own in header["layers"].items()}
    tensors = _tensors(folder, layers)
    source = Source(folder, None, {name: tensors.get(name, {}) for name in layers}, base_model)
    weights = {name: source.weight(name) for name in layers}
    for name, layer in layers.items():
        layer.check_base(weights[name])
    updates = {name: layer.update(weights[name], tensors.get(name, {})) for name, layer in layers.items()}
    exact = all(layers[name].is_exact(weights[name], own) for name, own in updates.items())
    if exact and header["config"]["method"] == "diagonal":
        for own in updates.values():
            own.parameters = {"stretch": own.difference.diagonal()}
        selection: Any = _SELECTIONS[header["config"]["selection"]]
        return adapted_on(
            source, SvfitConfig(selection=selection, target_modules=only(layers), **ranks_of(updates)), updates
        )
    if not exact:
        updates = {name: layers[name].on_the_weight(weights[name], own) for name, own in updates.items()}
    basis: Any = "pinned" if exact else "embedded"
    config = PsoftConfig(basis=basis, target_modules=only(layers), **ranks_of(updates), **FREE_MATRIX)
    return adapted_on(source, config, updates)


def convert_eigentune(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    base: str | None = None,
    *,
    trust_remote_code: bool = False,
) -> None:
    """Import an adapter folder of eigentune and write it as isotune's.

    `out`, `base` and `trust_remote_code` are as in `export_lora`; the base is loaded with the class its folder names.

    Raises:
        ValueError: `out` is not empty, or the base is not named or cannot be loaded.
        AdapterFileError, BaseMismatchError: as in `import_eigentune`.
    """
    name = base or _header(Path(directory)).get("base_model")
    if not name:
        raise ValueError(f"{directory} does not name its base model; give it with --base on the command line.")
    with new_directory(out) as folder:
        model = import_eigentune(directory, load_base(str(name), trust_remote_code=trust_remote_code))
        model.peft_config[ADAPTER].base_model_name_or_path = str(name)
        model.save_pretrained(str(folder))


@dataclass(frozen=True)
class _Layer:
    """One adapted layer as the configuration file describes it."""

    folder: Path
    name: str
    own: Mapping[str, Any]
    """Its fingerprint `fp`, its signature `sig`, and with a budget of ranks its rank `r`."""
    header: Mapping[str, Any]

    @property
    def config(self) -> Mapping[str, Any]:
        return self.header["config"]  # type: ignore[no-any-return]

    def refuse(self, reason: str) -> AdapterFileError:
        return AdapterFileError(f"{self.folder}: {self.name!r}: {reason}")

    def solver(self, weight: Tensor) -> str:
        """How its singular vectors were found: "exact", "randomized" or "lowrank"."""
        if self.config["selection"] != "principal":
            return "exact"
        if self.config["svd_backend"] != "auto":
            return str(self.config["svd_backend"])
        side = min(weight.shape)
        return "randomized" if side >= 1024 and 4 * self.config["rank"] <= side else "exact"

    def check_base(self, weight: Tensor) -> None:
        """Refuse another base, by the hash of the weight and of what its bases depend on."""
        config, solver = self.config, self.solver(weight)
        settings = [config["svd_oversampling"], config["svd_niter"], config["svd_seed"]]
        settings += [config["svd_tol"]] if solver == "randomized" else []
        about = {
            "fmt": _VERSION,
            "shape": list(weight.shape),
            "dtype": str(weight.dtype),
            "rank": config["rank"],
            "selection": config["selection"],
            "backend": solver,
            "svd": None if solver == "exact" else settings,
        }
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        if digest.hexdigest()[:_FINGERPRINT] != str(self.own.get("fp"))[:_FINGERPRINT]:
            raise BaseMismatchError(
                f"{self.folder}: the weight of {self.name!r} is not the one the adapter was trained on. Give the same "
                "base model in the same dtype, not quantised."
            )

    def update(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> ImportedUpdate:
        """ΔW = (U S) (S⁻¹ C) V, C the matrix that eigentune puts between U and V."""
        left, values, right = self._bases(weight, tensors)
        core = self._core(tensors, values)
        if not bool((values > 1e-12 * values.max()).all()):
            raise self.refuse("one of its singular values is zero, and isotune scales what is there.")
        rotated, _, other = torch.linalg.svd(right, full_matrices=False)  # rounded, where the base is half precision
        return ImportedUpdate(rotated @ other, left * values, (core / values[:, None]).double().T)

    def is_exact(self, weight: Tensor, update: ImportedUpdate) -> bool:
        """Whether U S is W Vᵀ, up to what an exact decomposition in float32 rounds: ε σ₁ / σᵢ of direction i."""
        allowed = EXACT
        if self.solver(weight) == "exact":
            weakest = torch.linalg.vector_norm(update.up, dim=0).min()
            strongest = torch.linalg.matrix_norm(weight.float(), 2)
            allowed = max(allowed, 4 * torch.finfo(torch.float32).eps * float(strongest / weakest))
        return update.defect(weight, symmetric=False) <= allowed

    def on_the_weight(self, weight: Tensor, update: ImportedUpdate) -> ImportedUpdate:
        """The same update by directions V and W Vᵀ, where U S is not W Vᵀ since the solver stopped early."""
        found = update.on_principal_form(weight)
        mine, theirs = (own.up.double() @ own.difference.T @ own.down.double() for own in (found, update))
        if float((mine - theirs).norm()) > max(EXACT, torch.finfo(weight.dtype).eps) * float(theirs.norm()):
            raise self.refuse("its bases are not singular vectors of this weight.")
        return found

    def _core(self, tensors: Mapping[str, Tensor], values: Tensor) -> Tensor:
        """C, (r, r)."""
        key, rank = "delta" if self.config["method"] == "diagonal" else "core", len(values)
        trained = tensors[key].to(values)
        if trained.shape != ((rank,) if key == "delta" else (rank, rank)):
            raise self.refuse(f"{key} has shape {tuple(trained.shape)}, which does not fit a rank of {rank}.")
        band = self.config["core_bandwidth"]
        core = trained.diag() if key == "delta" else trained
        if band is not None:
            core = core.tril(band).triu(-band)
        return core * values[:, None] if self.config["update"] == "relative" else core

    def _bases(self, weight: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """U (out, r), S (r,) and V (r, in), in float32."""
        n = min(weight.shape)
        rank = self.own.get("r", min(self.config["rank"], n))
        if not isinstance(rank, int) or not 1 <= rank <= n:
            raise self.refuse(f"its rank is {rank!r}, but its weight is {' × '.join(map(str, weight.shape))}.")
        if self.header.get("bases_embedded"):
            left, values, right = (tensors[key].to(weight.device).float() for key in ("U", "S", "Vh"))
            shapes = ((weight.shape[0], rank), (rank,), (rank, weight.shape[1]))
            if (left.shape, values.shape, right.shape) != shapes:
                raise self.refuse(f"its bases have shapes {left.shape, values.shape, right.shape} instead of {shapes}.")
            return left, values, right
        if self.solver(weight) != "exact":
            raise self.refuse(f"its bases are not in the file and were found approximately. {_EMBED}")
        left, values, right = torch.linalg.svd(weight.float(), full_matrices=False)
        places = chosen(n, min(self.config["rank"], n), _SELECTIONS[self.config["selection"]])[:rank]
        left, values, right = left[:, places], values[places], right[places]
        signs = torch.sign(right.gather(1, right.abs().argmax(1, keepdim=True)))  # the largest entry is positive
        left, right = left * signs.T, right * signs
        if not self._is_signed(left.to(weight.dtype), right.to(weight.dtype)):
            raise self.refuse(f"its singular vectors come out differently on this machine. {_EMBED}")
        return left, values, right

    def _is_signed(self, left: Tensor, right: Tensor) -> bool:
        """Whether the signature of the bases is the file's: their products with fixed random vectors."""
        generator = torch.Generator().manual_seed(0)
        inputs, outputs = (torch.randn(size, generator=generator) for size in (right.shape[1], left.shape[0]))
        found = torch.cat([right[:_PROBED].cpu().float() @ inputs, left[:, :_PROBED].cpu().float().T @ outputs])
        with refused(f"{self.folder / _CONFIG_FILE}: the signature of {self.name!r}: "):
            stored = torch.tensor(self.own["sig"], dtype=torch.float32)
        if stored.shape != found.shape:
            return False
        return float((found - stored).abs().max()) <= _SIGNATURE_TOLERANCE * max(1.0, float(stored.abs().max()))


def _header(folder: Path) -> dict[str, Any]:
    """The configuration file, with eigentune's defaults for the options it lacks."""
    path = folder / _CONFIG_FILE
    if not path.is_file():
        raise AdapterFileError(f"{folder} has no {_CONFIG_FILE}, so it is not an adapter that eigentune wrote.")
    header = json_object(path, AdapterFileError)
    version, given, layers = (header.get(key) for key in ("format_version", "config", "layers"))
    if version != _VERSION:
        raise AdapterFileError(f"{path} has format version {version!r}; only version {_VERSION} can be imported.")
    if not isinstance(given, dict) or not isinstance(layers, dict) or not layers:
        raise AdapterFileError(f"{path} should hold a config and the adapted layers; save the adapter again.")
    if not all(isinstance(own, dict) for own in layers.values()):
        raise AdapterFileError(f"{path}: layers should hold an object for each layer; save the adapter again.")
    defaults = {"rank": 8, "method": "diagonal", "core_bandwidth": None, "selection": "principal", "update": "additive"}
    solving = {"svd_backend": "auto", "svd_oversampling": 32, "svd_niter": 100, "svd_tol": 1e-4, "svd_seed": 0}
    config = {**defaults, **solving, **given}
    for key, allowed in _CHOICES.items():
        if config[key] not in allowed:
            raise AdapterFileError(f"{path}: {key} is {config[key]!r}; {', '.join(allowed)} can be imported.")
    for key, least in (("rank", 1), ("core_bandwidth", 0)):
        value = config[key]
        if not ((isinstance(value, int) and value >= least) or (value is None and key == "core_bandwidth")):
            raise AdapterFileError(f"{path}: {key} is {value!r}; it must be an integer of at least {least}.")
    return {**header, "config": config}


def _tensors(folder: Path, layers: Mapping[str, _Layer]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each layer, by their names in it."""
    path = folder / WEIGHTS_FILE
    advice = "Only such files are read, and eigentune writes no others; save the adapter again with its save_adapter."
    split: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_tensors(path, advice).items():
        name, _, last = key.rpartition(".")
        check_values(key, tensor, file=str(path))
        split.setdefault(name, {})[last] = tensor
    for name, layer in layers.items():
        bases = {"U", "S", "Vh"} if layer.header.get("bases_embedded") else set()
        needed = {"delta" if layer.config["method"] == "diagonal" else "core", *bases}
        if split.get(name, {}).keys() != needed:
            raise layer.refuse(
                f"{WEIGHTS_FILE} holds {sorted(split.get(name, {}))} for it instead of {sorted(needed)}."
            )
    if odd := split.keys() - layers.keys():
        raise AdapterFileError(f"{path} holds tensors of {min(odd)!r}, which {_CONFIG_FILE} does not name.")
    return split
