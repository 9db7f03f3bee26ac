"""Exporting an adapter as an ordinary LoRA folder, which needs no isotune."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from isotune.files.adapter import (
    ADAPTER,
    CONFIG_FILE,
    WEIGHTS_FILE,
    by_module,
    config_of,
    describe,
    named_base,
    new_directory,
    read_config,
)
from isotune.files.base_model import copy_tokenizer
from isotune.files.pooled import ENCODER, HEAD, MeanPooled, save_sentence_transformer
from isotune.files.tensors import save_tensors
from isotune.methods.config import IsotuneConfig
from isotune.progress import bar
from isotune.subspace.lowrank import Factored, check_truncation, pad_rank, truncate, truncate_product
from isotune.tuner.layer import Layer
from isotune.tuner.state import KEY_PREFIX, adapted_layers

LORA_REPORT = "isotune_export.json"
"""The file in a LoRA folder that records each layer's rank and error."""


@dataclass(frozen=True)
class ExportedLayer:
    """One exported layer of a LoRA folder."""

    name: str
    rank: int
    """Rows of A, not counting zero padding."""
    missing: float
    """‖ΔW − B A‖_F; 0 if the factors are exact."""
    norm: float
    """‖ΔW‖_F."""

    @property
    def error(self) -> float:
        """‖ΔW − B A‖_F / ‖ΔW‖_F, from 0 to 1."""
        return self.missing / self.norm if self.norm else 0.0


@dataclass(frozen=True)
class LoraExport:
    """The result of `export_lora`."""

    layers: tuple[ExportedLayer, ...]

    @classmethod
    def of(cls, found: Mapping[str, Factored]) -> LoraExport:
        """The result for the factors of each layer."""
        return cls(tuple(ExportedLayer(name, len(one.down), one.missing, one.norm) for name, one in found.items()))

    @property
    def rank(self) -> int:
        """The largest rank, which a server must support."""
        return max(layer.rank for layer in self.layers)

    @property
    def error(self) -> float:
        """The error of all layers together, ‖ΔW − B A‖_F / ‖ΔW‖_F."""
        whole = math.hypot(*(layer.norm for layer in self.layers))
        return math.hypot(*(layer.missing for layer in self.layers)) / whole if whole else 0.0

    @property
    def worst(self) -> ExportedLayer:
        """The layer with the largest error."""
        return max(self.layers, key=lambda layer: layer.error)

    def __str__(self) -> str:
        exact = "exact" if not self.error else f"relative error of the update {self.error:.2e}"
        worst = f", worst {self.worst.error:.2e} in {self.worst.name}" if self.error and len(self.layers) > 1 else ""
        lowest = min(layer.rank for layer in self.layers)
        ranks = f"rank {self.rank}" if lowest == self.rank else f"ranks {lowest} to {self.rank}"
        return f"{len(self.layers)} layers, {ranks}, {exact}{worst}"

    def to_dict(self) -> dict[str, Any]:
        """The ranks, errors and norms for JSON."""
        layers = {x.name: {"rank": x.rank, "error": x.error, "update_norm": x.norm} for x in self.layers}
        return {"rank": self.rank, "error": self.error, "layers": layers}


def export_lora(
    model_or_dir: nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str],
    adapter_name: str = "default",
    base: nn.Module | str | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    uniform_rank: bool = False,
    trust_remote_code: bool = False,
) -> LoraExport:
    """Write an adapter as an ordinary PEFT LoRA folder, which plain PEFT loads without isotune.

    An update of low rank (PSOFT, LoRA-XS, SVFit, CERSA, OPLoRA, ROSA, PESO, UORA, HRA) is written exactly, at its own
    rank, unless `rank` or `energy` asks for less. A rotation of all inputs or outputs (OFT, BOFT, GOFT, qGOFT, RoAd)
    changes W by a matrix of full rank; `rank` or `energy` then sets how good the best approximation is to be.

    B is (out, r) and A is (r, in) with lora_alpha = r, so the scaling is 1 in every layer. Saved modules, trained
    biases and embeddings are written as they are. The file LORA_REPORT in the folder records each layer's error.

    A classifier on the mean of an encoder's hidden states, as isotune's recipes train it on a sentence-transformers
    model, is written as the factors of its encoder, in a sentence-transformers folder that holds the head.

    Args:
        model_or_dir: a model with isotune adapters, merged or not, or the folder of a saved adapter.
        out: the folder to write; it appears only when it is complete.
        adapter_name: the adapter of a model to export.
        base: for a folder, the base model or its name; by default the one that the adapter's configuration names.
        rank: the largest rank; a layer whose smaller side is below it has that side as its rank.
        energy: choose each layer's rank so that B A has at least this share of ‖ΔW‖²_F, such as 0.999.
        uniform_rank: pad all layers to one rank with zeros, for servers that support only one rank and one alpha.
        trust_remote_code: whether to run code from the base model's repository.

    Raises:
        ValueError: `out` is not empty, there is no such adapter or base, the adapter does not fit the base, or its
            update has full rank and neither rank nor energy is given.

    Examples:
        >>> import tempfile
        >>> from isotune import PsoftConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 6)), PsoftConfig(r=2, target_modules=["0"]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print(export_lora(model, os.path.join(folder, "lora")))
        1 layers, rank 2, exact
    """
    check_truncation(rank, energy)
    origin = None
    if not isinstance(model_or_dir, nn.Module):
        origin = origin_of(model_or_dir, {"rank": rank, "energy": energy, "uniform_rank": uniform_rank})
    own = opened(model_or_dir, adapter_name, base, trust_remote_code=trust_remote_code)
    model, config, layers, extras, adapter_name = own.model, own.config, own.layers, own.extras, own.adapter_name
    head: dict[str, Tensor] = {}
    if isinstance(model, MeanPooled):  # other libraries load the encoder, with the head beside it
        head = {f"linear.{k.rpartition('.')[2]}": extras.pop(k) for k in list(extras) if k.startswith(f"{HEAD}.")}
        extras = {k.removeprefix(ENCODER): tensor for k, tensor in extras.items()}
        layers = {k.removeprefix(ENCODER): layer for k, layer in layers.items()}
        config = copy.copy(config)
        config.task_type, config.modules_to_save = "FEATURE_EXTRACTION", None
    shown = bar(layers.items(), desc="factors", unit="layer", leave=False)
    found = {module: _factored(module, layer, adapter_name, rank, energy) for module, layer in shown}
    report = LoraExport.of(found)
    factors = {name: (one.up, one.down) for name, one in found.items()}
    if uniform_rank:
        factors = {name: pad_rank(*pair, report.rank) for name, pair in factors.items()}
    with new_directory(out) as folder:
        write_lora(folder, config, layers, factors, extras)
        if head:
            source = str(getattr(model.encoder, "name_or_path", ""))
            save_sentence_transformer(folder, head, source)
            copy_tokenizer([source], folder)
        content = {**report.to_dict(), "origin": origin}
        (folder / LORA_REPORT).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return report


@dataclass(frozen=True)
class Opened:
    """An adapter whose layers are placed on the base model's weights."""

    model: Any
    """The base model; a live adapter is still in it."""
    config: IsotuneConfig
    layers: dict[str, Layer]
    extras: dict[str, Tensor]
    """Saved modules, trained biases and embeddings, by name in the base model."""
    adapter_name: str
    """The adapter's name in the layers."""


def opened(
    model_or_dir: nn.Module | str | os.PathLike[str],
    adapter_name: str,
    base: nn.Module | str | None,
    *,
    trust_remote_code: bool = False,
) -> Opened:
    """Open an adapter of a live model, or of a folder on its base model; arguments as in `export_lora`."""
    if isinstance(model_or_dir, nn.Module):
        config, layers = config_of(model_or_dir, adapter_name), dict(adapted_layers(model_or_dir, adapter_name))
        model: Any = model_or_dir
        model = model.get_base_model() if isinstance(model, PeftModel) else model
        state = get_peft_model_state_dict(model_or_dir, adapter_name=adapter_name)
        extras = {k: tensor for k, tensor in state.items() if ".isotune_" not in k}
    else:
        file = describe(model_or_dir)
        config, extras, adapter_name = file.config, file.extras, ADAPTER
        model = named_base(model_or_dir, base, trust_remote_code=trust_remote_code)
        layers = file.place(model)
    extras = {k.removeprefix(KEY_PREFIX): tensor for k, tensor in extras.items()}
    return Opened(model, config, layers, extras, adapter_name)


def origin_of(directory: str | os.PathLike[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """Hashes and options that tell whether exporting a folder again would give the same LoRA folder, for JSON.

    Raises:
        AdapterFileError: the folder holds no adapter.
    """
    read_config(directory)
    files = [Path(directory) / name for name in (CONFIG_FILE, WEIGHTS_FILE)]
    hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()}
    return {"sha256": hashes, "options": options}


def _factored(module: str, layer: Layer, adapter_name: str, rank: int | None, energy: float | None) -> Factored:
    """The update of a linear layer's W as two factors, exact if the requested rank allows it."""
    if layer.host.folds:
        kind = type(layer.get_base_layer()).__name__
        raise ValueError(
            f"The adapted module {module!r} is a {kind}, and only linear layers can be exported as LoRA; export the "
            "merged model instead (--to merged)."
        )
    return factors_of(module, layer, adapter_name, rank, energy)


def factors_of(module: str, layer: Layer, adapter_name: str, rank: int | None, energy: float | None) -> Factored:
    """The update of any layer's W, (out, in), as two factors, exact if the requested rank allows it.

    Raises:
        ValueError: the adapter is a rotation, whose update has full rank, and neither rank nor energy is given.
    """
    if layer.host.stands_in:
        raise ValueError(
            f"The adapter truncates the weight of {module!r} (truncate_base), "
            "which no LoRA on the base model does; export the merged model instead (--to merged)."
        )
    if layer.supports_lora_conversion(adapter_name):
        return truncate_product(*layer.low_rank(adapter_name), rank=rank, energy=energy)
    if rank is None and energy is None:
        raise ValueError(
            f"The adapter rotates all {layer.adapter(adapter_name).side}s of {module!r}, so its update has full rank. "
            "Give a rank (--rank 64) or the share of the update to keep (--energy 0.99) for the best LoRA adapter, "
            "whose error is reported; or export the merged model, which is exact (--to merged)."
        )
    return truncate(layer.host.seen(layer.get_delta_weight(adapter_name)), rank=rank, energy=energy)


def write_lora(
    folder: Path,
    config: IsotuneConfig,
    layers: Mapping[str, Layer],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    extras: Mapping[str, Tensor],
) -> None:
    """Write a LoRA adapter of PEFT whose scaling is 1.

    Args:
        folder: the folder.
        config: says all but the ranks.
        layers: the adapted layers, by name in the base model.
        factors: up and down of each layer.
        extras: further tensors of the file, by name in the base model.
    """
    tensors = {f"{KEY_PREFIX}{name}": tensor for name, tensor in extras.items()}
    for name, (up, down) in factors.items():
        tensors[f"{KEY_PREFIX}{name}.lora_A.weight"] = down
        tensors[f"{KEY_PREFIX}{name}.lora_B.weight"] = up
    save_tensors(tensors, folder / WEIGHTS_FILE)
    ranks = {name: len(down) for name, (_, down) in factors.items()}
    largest = max(ranks.values())  # servers compare r with the largest rank they support, and some ignore patterns
    LoraConfig(
        **peft_options(config, layers, "lora"),
        **by_module("r", "rank_pattern", ranks, largest),
        **by_module("lora_alpha", "alpha_pattern", ranks, largest),
        fan_in_fan_out=any(getattr(layer.host, "transposed", False) for layer in layers.values()),
    ).save_pretrained(str(folder))


def peft_options(config: IsotuneConfig, layers: Mapping[str, Layer], method: str) -> dict[str, Any]:
    """The options of an adapter of PEFT's own, "lora", "oft" or "boft", that mean the same in every method."""
    return {
        "target_modules": sorted(layers),
        "bias": config.bias.replace("isotune", method),
        "modules_to_save": config.modules_to_save and list(dict.fromkeys(config.modules_to_save)),
        "task_type": config.task_type,
        "base_model_name_or_path": config.base_model_name_or_path,
        "revision": config.revision,
        "auto_mapping": config.auto_mapping,
        "inference_mode": True,
    }
