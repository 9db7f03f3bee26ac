"""The layer on the experts of a mixture: each expert has its own operator and its own subspace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from isotune.adapter.operator import Adapter
from isotune.hosts import ExpertsHost
from isotune.methods.config import IsotuneConfig
from isotune.tuner.layer import Layer
from isotune.tuner.mixed_batch import BASE, MixedBatch


class ExpertsLayer(Layer):
    """Adapters on one parameter of a module of experts; layers on several of its parameters are nested.

    Args:
        base_layer: the module of experts, or the layer on another of its parameters.
        key: the parameter's name in the model.

    Raises:
        ValueError: the parameter cannot be a host.
    """

    host: ExpertsHost

    def __init__(self, base_layer: nn.Module, key: str) -> None:
        super().__init__(base_layer, key, parameter=key.rpartition(".")[2])

    def _new_adapter(self, config: IsotuneConfig) -> Adapter:
        """Make an adapter whose parameters have a leading dimension of experts, each initialised on its own.

        Raises:
            ValueError: the configuration does not fit, or uses an option that experts do not support.
        """
        adapters = [super(ExpertsLayer, self)._new_adapter(config) for _ in range(self.host.experts)]
        first = adapters[0]
        if first.beside:
            raise ValueError(f"This method's gains cannot be trained on experts, such as {self.key!r}; use OFT.")
        if first.dropout and not first.additive:
            raise ValueError(f"Dropout of blocks is not supported on experts, such as {self.key!r}; set it to 0.")
        for name in first.names_read():
            stacked = torch.stack([adapter.get_parameter(name).detach() for adapter in adapters])
            setattr(first, name, nn.Parameter(stacked))
        return first

    def _new_form(self, config: IsotuneConfig, device: torch.device) -> nn.Module | None:
        found = [config.build_basis(self.key, self.in_features, device) for _ in range(self.host.experts)]
        forms = [form for form in found if form is not None]
        return nn.ModuleDict({"forms": nn.ModuleList(forms)}) if forms else None

    def _set_scales(self, scales: Mapping[str, float]) -> None:
        for name, scale in scales.items():
            if scale != 1.0:
                raise ValueError(
                    f"The adapter {name!r} on the experts {self.key!r} cannot be scaled by {scale}; use a scale of 1."
                )

    def low_rank(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Refuse by a ValueError: exporting experts to LoRA is not supported."""
        raise ValueError(
            "An adapter on experts cannot be exported to LoRA; export the merged model instead (--to merged)."
        )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: exporting experts to LoRA is not supported."""
        return adapter_name not in self.isotune_operator

    def _mixed(self, x: Tensor, batch: MixedBatch, *args: Any, **kwargs: Any) -> Tensor:
        """Run a batch that uses one adapter; several are refused, since the router mixes tokens of all samples."""
        names = {name if name in self.isotune_operator else BASE for name in batch.names}
        if len(names) > 1:
            raise ValueError(
                f"adapter_names cannot mix {', '.join(sorted(names))} in one batch, as {self.key!r} adapts experts; "
                "call the model once for each adapter."
            )
        return self._adapted(x, [name for name in names if name != BASE], *args, **kwargs)

    @property
    def weight(self) -> Tensor:
        """Refuse by an AttributeError: experts have several parameters, none of which is called weight."""
        raise AttributeError(f"The experts {self.key!r} have no single weight; read the parameters of the base layer.")

    def extra_repr(self) -> str:
        """The adapters, each with its method and size."""
        return ", ".join(f"{name}={self.adapter(name).describe()}, each expert" for name in self.configs)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Remove all layers on the parameters of the module of experts, and return it to PEFT."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        inner = self.base_layer
        if isinstance(inner, ExpertsLayer):
            return inner.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        return inner


def layers_on(module: nn.Module) -> dict[str, ExpertsLayer]:
    """Parameter name -> layer, for the layers nested around a module of experts."""
    found: dict[str, ExpertsLayer] = {}
    while isinstance(module, ExpertsLayer):
        found[module.host.parameter] = module
        module = module.base_layer
    return found


def inject(model: nn.Module, config: IsotuneConfig, adapter_name: str) -> list[str]:
    """Put an adapter on the parameters that `target_parameters` names, matched as in PEFT, and return their names.

    Raises:
        ValueError: a parameter cannot be a host, its module is already adapted as a layer, or another adapter is on
            other parameters of the module.
    """
    targets, done = config.target_parameters or [], list[str]()
    for name, module in list(model.named_modules()):
        if name and "base_layer" not in name.split("."):
            plain = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            done += _inject_into(model, name, plain, targets, config, adapter_name)
    return done


def _packed(module: nn.Module) -> dict[str, type]:
    """Name -> the type with which a library has replaced a parameter: a parametrisation or an object of its own."""
    computed = getattr(module, "parametrizations", {})
    return {
        **{own: type(value) for own, value in vars(module).items() if value is not None},
        **{own: type(next(iter(steps))) for own, steps in computed.items()},
    }


def _inject_into(
    model: nn.Module, name: str, module: nn.Module, targets: Sequence[str], config: IsotuneConfig, adapter_name: str
) -> list[str]:
    def is_target(own: str) -> bool:
        return any(f"{name}.{own}" == t or f"{name}.{own}".endswith(f".{t}") for t in targets)

    for own, packer in _packed(module).items():
        if is_target(own):
            raise ValueError(
                f"target_parameters name {name}.{own}, which is no longer a parameter: a {packer.__module__}."
                f"{packer.__qualname__} has replaced it. Packed experts cannot be adapted: load them unquantised, as "
                "bitsandbytes leaves fused experts when transformers loads the model, or take them out of "
                "target_parameters."
            )
    chosen = [own for own, _ in module.named_parameters(recurse=False) if is_target(own)]
    if not chosen:
        return []
    top = model.get_submodule(name)
    if isinstance(top, BaseTunerLayer) and not isinstance(top, ExpertsLayer):
        raise ValueError(
            f"target_parameters name {', '.join(chosen)} of {name!r}, which is already adapted as a layer; take it out "
            "of target_modules or out of target_parameters."
        )
    present = layers_on(top)
    if present and set(present) != set(chosen):
        raise ValueError(
            f"target_parameters name {', '.join(chosen)} of {name!r}, where another adapter is on "
            f"{', '.join(sorted(present))}; name the same parameters of a module in all adapters of a model."
        )
    for own in chosen:
        layer = present.get(own)
        if layer is None:
            top = layer = ExpertsLayer(top, f"{name}.{own}")
        layer.update_layer(adapter_name, config)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, top)
    return [f"{name}.{own}" for own in chosen]
