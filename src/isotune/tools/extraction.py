"""Taking an adapter out of a fine-tuned checkpoint: the rotation nearest to it, and what the rotation leaves."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from isotune.errors import IsotuneWarning
from isotune.files.adapter import ADAPTER, new_directory
from isotune.files.base_model import load_base
from isotune.files.checkpoint import Checkpoint, open_checkpoint
from isotune.files.export_lora import write_lora
from isotune.methods import HRAConfig, OFTConfig, PsoftConfig
from isotune.methods.checks import require_positive_integer
from isotune.methods.config import IsotuneConfig
from isotune.progress import bar
from isotune.subspace.lowrank import truncate
from isotune.tools.fitting import check_fits, fit
from isotune.tuner.experts_layer import ExpertsLayer
from isotune.tuner.layer import Layer
from isotune.tuner.state import KEY_PREFIX, adapted_layers

METHODS: dict[str, type[IsotuneConfig]] = {"oft": OFTConfig, "psoft": PsoftConfig, "hra": HRAConfig}
"""The methods as which an adapter can be extracted."""
RESIDUAL = "residual"
"""Name of the folder of the LoRA within that of the adapter."""
REPORT = "isotune_extraction.json"


@dataclass(frozen=True)
class ExtractedLayer:
    """One adapted layer, with Frobenius norms."""

    name: str
    weight: float
    """‖W‖."""
    change: float
    """‖W' − W‖."""
    left: float
    """‖W' − W''‖, W'' the weight with the adapter."""
    missing: float
    """‖W' − W'' − B A‖ with the residual's LoRA; the same without one."""


@dataclass(frozen=True)
class Outside:
    """A tensor outside the adapted weights that fine-tuning has changed."""

    name: str
    size: int
    change: float | None
    """‖T' − T‖; None if only one of the models has it, or their shapes differ."""
    kept: bool
    """Whether the adapter's folder holds it."""


@dataclass(frozen=True)
class Extraction:
    """The result of `extract`."""

    method: str
    layers: tuple[ExtractedLayer, ...]
    outside: tuple[Outside, ...]

    @property
    def whole(self) -> ExtractedLayer:
        """All adapted layers together."""
        parts = ("weight", "change", "left", "missing")
        return ExtractedLayer("all", *(math.hypot(*(getattr(layer, part) for layer in self.layers)) for part in parts))

    @property
    def error(self) -> float:
        """‖W' − what the folder gives‖ / ‖W' − W‖ of all adapted layers together."""
        return self.whole.missing / self.whole.change if self.whole.change else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The norms for JSON."""

        def of(layer: ExtractedLayer) -> dict[str, float]:
            return {part: getattr(layer, part) for part in ("weight", "change", "left", "missing")}

        return {
            "method": self.method,
            "error": self.error,
            "all": of(self.whole),
            "layers": {layer.name: of(layer) for layer in self.layers},
            "outside": {x.name: {"size": x.size, "change": x.change, "kept": x.kept} for x in self.outside},
        }


@torch.no_grad()
def extract(
    base: nn.Module | str,
    tuned: nn.Module | str,
    config: IsotuneConfig,
    out: str | os.PathLike[str] | None = None,
    *,
    residual: Literal["lora", "drop"] = "drop",
    residual_rank: int = 8,
    trust_remote_code: bool = False,
) -> Extraction:
    """Find the adapter that comes nearest to what fine-tuning has made of a base model, layer by layer.

    W' of each adapted layer is compared with W'' = W Mᵀ (OFT, HRA) or W'' = W + s P (Mᵀ − I) V (PSOFT), and M is chosen
    so that ‖W' − W''‖_F is small; `isotune.tools.fitting.fit` says how, and how far that is the least there is. What is
    left can be kept as a LoRA, the best of its rank, which acts beside the adapter: W'' + B A.

    The base model is loaded as always; of the fine-tuned one a tensor at a time is read from its safetensors files, if
    their names are the base's. Otherwise, or if it is a GGUF file, it is loaded too.

    Args:
        base: the base model, which is left as it was; or its folder, Hub name or package:NAME.
        tuned: the fine-tuned model of the same architecture, given in the same ways.
        config: the configuration of the adapter, of OFT, PSOFT or HRA. With `target_modules=None` all linear layers but
            the output layer are adapted. Modules in `modules_to_save` and biases as `bias` says are copied from the
            fine-tuned model into the adapter.
        out: the folder to write, complete or not at all; None writes nothing.
        residual: "lora" writes the residual as a LoRA of PEFT into the folder `residual` in `out`; "drop" leaves it.
        residual_rank: largest rank of that LoRA.
        trust_remote_code: whether to run code from the base model's repository.

    Returns:
        What the adapter and the residual hold of each layer's change, and which tensors changed outside of them.

    Raises:
        ValueError: the models differ in shape or architecture, the configuration is of another method or has an option
            with which there is no nearest adapter, a layer cannot be compared, or `out` is not empty.

    Examples:
        >>> from isotune import OFTConfig
        >>> base, tuned = (nn.Sequential(nn.Linear(8, 8, bias=False)) for _ in range(2))
        >>> tuned[0].weight.data = base[0].weight.data.roll(2, dims=1)  # a rotation of the inputs
        >>> extract(base, tuned, OFTConfig(oft_block_size=8, target_modules=["0"])).error < 1e-3
        True

    Source: Yang, Shi and Liu, Orthogonal Model Merging (arXiv 2602.05943), for its decoupling of a fine-tuned weight
    into the nearest rotation of W and a residual; fitted here within a method's own form.
    """
    if type(config) not in METHODS.values():
        raise ValueError(f"A {type(config).__name__} cannot be extracted; {', '.join(METHODS)} can be.")
    check_fits(config)
    require_positive_integer("residual_rank", residual_rank)
    for name, given in (("base", base), ("tuned", tuned)):
        if isinstance(given, nn.Module) and any(isinstance(module, BaseTunerLayer) for module in given.modules()):
            raise ValueError(
                f"The model given as {name} has adapters; give what merge_and_unload() or unload() returns."
            )
    if base is tuned:
        raise ValueError("base and tuned are one model, so there is no change to extract; give two.")
    config = copy.deepcopy(config)
    config.target_modules = config.target_modules or "all-linear"
    model = load_base(base, trust_remote_code=trust_remote_code) if isinstance(base, str) else base
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    plain = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    names = {*plain, *dict(model.named_parameters(remove_duplicate=False))}  # tied ones by each of their names
    adapted = get_peft_model(model, config)
    try:
        layers = dict(adapted_layers(adapted, ADAPTER))
        saved = _saved(adapted, layers)
        _refuse(layers, saved, config, residual)
        if residual == "lora" and saved:
            warnings.warn(
                "The adapter will have saved modules or biases, which PEFT switches off, or cannot name, where another "
                "adapter is put around it. To use it with its residual, merge it first (merge_and_unload), and put the "
                "residual on the merged model.",
                IsotuneWarning,
                stacklevel=2,
            )
        weights = {name: f"{name}.{layer.host.parameter}" for name, layer in layers.items()}
        prefix = str(getattr(model, "base_model_prefix", ""))
        checkpoint = open_checkpoint(tuned, names, weights.values(), prefix)
        rows, factors = [], {}
        for name, layer in bar(layers.items(), desc="extracting", unit="layer", leave=False):
            target = layer.host.seen(checkpoint.tensor(weights[name], layer.host.weight)).to(layer.host.weight.device)
            row, left = _extracted(name, layer, target)
            if residual == "lora":
                factors[name] = truncate(left, rank=residual_rank)
                row = ExtractedLayer(name, row.weight, row.change, row.left, factors[name].missing)
            rows.append(row)
        outside = _outside(checkpoint, plain, set(weights.values()), saved)
        report = Extraction(type(config).title, tuple(rows), outside)
        if out is not None:
            own = adapted.peft_config[ADAPTER]
            own.base_model_name_or_path = base if isinstance(base, str) else own.base_model_name_or_path
            with new_directory(out) as folder, _tuned(saved, checkpoint):
                adapted.save_pretrained(str(folder))
                if factors:
                    (folder / RESIDUAL).mkdir()
                    alone = copy.copy(own)
                    alone.modules_to_save, alone.bias = None, "none"
                    pairs = {name: (one.up.float(), one.down.float()) for name, one in factors.items()}
                    write_lora(folder / RESIDUAL, alone, layers, pairs, {})
                text = json.dumps(report.to_dict(), indent=2) + "\n"
                (folder / REPORT).write_text(text, encoding="utf-8")
    finally:
        adapted.unload()
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
    return report


def _refuse(layers: Mapping[str, Layer], saved: Mapping[str, Tensor], config: IsotuneConfig, residual: str) -> None:
    """Refuse layers that cannot be compared, and modules to save that the base does not have."""
    for name, layer in layers.items():
        if isinstance(layer, ExpertsLayer):
            raise ValueError(f"{name!r} holds the experts of a mixture, from which nothing can be extracted yet.")
        if layer.host.quantised:
            raise ValueError(f"The base's {name!r} is quantised; give the model that it was quantised from.")
        if residual == "lora" and layer.host.folds:
            raise ValueError(
                f"{name!r} is a {type(layer.get_base_layer()).__name__}, and only a linear layer can have the residual "
                "as a LoRA; exclude the module with exclude_modules, or drop the residual."
            )
    for module in config.modules_to_save or ():
        if not any(
            f".{name}".rpartition(".")[0].endswith(f".{module}") or f".{module}." in f".{name}" for name in saved
        ):
            raise ValueError(
                f"modules_to_save names {module!r}, which the base model, loaded by its own class, does not have. In "
                "Python, load both models with the class that has it, and give the models."
            )


def _extracted(name: str, layer: Layer, target: Tensor) -> tuple[ExtractedLayer, Tensor]:
    """Set a layer's adapter to what comes nearest to W', and measure with it; also W' − W'', float64."""
    weight, adapter = layer.unmerged_matrix(), layer.adapter(ADAPTER)
    if not bool(torch.isfinite(target).all()):
        raise ValueError(f"{name!r} holds NaN or infinity in the fine-tuned model; give an earlier checkpoint of it.")
    for parameter, value in fit(adapter, weight, target).items():
        adapter.get_parameter(parameter).copy_(value)
    change = target.double() - weight.double()
    left = change - layer.host.seen(layer.get_delta_weight(ADAPTER)).double()
    norms = [float(torch.linalg.vector_norm(matrix)) for matrix in (weight.double(), change, left, left)]
    return ExtractedLayer(name, *norms), left


def _saved(model: PeftModel, layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """The tensors that the adapter's folder holds besides its own, by their names in the base model."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            own = module.modules_to_save[ADAPTER].state_dict(keep_vars=True)
            found |= {f"{name.removeprefix(KEY_PREFIX)}.{key}": tensor for key, tensor in own.items()}
    bias = model.peft_config[ADAPTER].bias
    for name, parameter in model.get_base_model().named_parameters():
        plain = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        trained = bias == "all" or (bias != "none" and plain.removesuffix(".bias") in layers)
        if trained and plain.endswith(".bias") and ".modules_to_save." not in name and plain not in found:
            found[plain] = parameter
    return found


@contextlib.contextmanager
def _tuned(saved: Mapping[str, Tensor], checkpoint: Checkpoint) -> Iterator[None]:
    """Within this block, the tensors that are saved besides the adapter have the fine-tuned model's values."""
    before = {name: tensor.detach().clone() for name, tensor in saved.items()}
    try:
        for name, tensor in saved.items():
            tensor.copy_(checkpoint.tensor(name, tensor))
        yield
    finally:
        for name, tensor in saved.items():
            tensor.copy_(before[name])


def _outside(
    checkpoint: Checkpoint, plain: Mapping[str, Tensor], weights: set[str], saved: Mapping[str, Tensor]
) -> tuple[Outside, ...]:
    """What fine-tuning has changed besides the adapted weights."""
    found = []
    for name, tensor in plain.items():
        if name in weights or not tensor.is_floating_point():
            continue
        if name not in checkpoint.keys:
            if isinstance(tensor, nn.Parameter):
                found.append(Outside(name, tensor.numel(), None, kept=False))
            continue
        other = checkpoint.read(checkpoint.keys[name]).to(tensor.device)
        if other.shape != tensor.shape:
            found.append(Outside(name, other.numel(), None, kept=False))
        elif change := float(torch.linalg.vector_norm(other.double() - tensor.double())):
            found.append(Outside(name, tensor.numel(), change, kept=name in saved))
    found += [Outside(name, checkpoint.read(name).numel(), None, kept=False) for name in checkpoint.alone]
    return tuple(found)
