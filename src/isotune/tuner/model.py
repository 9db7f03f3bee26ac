"""The tuner model that puts isotune's layers into a model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    ModulesToSaveWrapper,
    get_quantization_kwargs,
)
from torch import Tensor, nn

from isotune.errors import AdapterFileError
from isotune.files.adapter import KEY_PREFIX, check_tensors
from isotune.hosts import keep_readable
from isotune.methods.config import IsotuneConfig, SubspaceConfig
from isotune.parallel.processes import is_sharded, loaded_by_one
from isotune.parallel.tensor_parallel import make_equal, mesh_of
from isotune.tuner.adapted_model import Links, remove_adapter
from isotune.tuner.experts_layer import ExpertsLayer
from isotune.tuner.experts_layer import inject as inject_experts
from isotune.tuner.layer import Layer, MixedBatch, adapt, warn_of_requantising
from isotune.tuner.mean import check_request, combine
from isotune.tuner.placing import AdapterGroup

_PREFIX = "isotune_"


class IsotuneModel(BaseTuner):
    """The tuner model of every isotune method.

    Args:
        model: the model to adapt.
        config: one configuration, or a dictionary of them by adapter name.
        adapter_name: which of them to inject now.

    Raises:
        ValueError: a layer cannot be adapted, a rank does not fit, nothing matches; the model is left as it was.
    """

    prefix = _PREFIX
    tuner_layer_cls = Layer
    # What LoRA adapts by default in a known architecture is a good default here too: projections of attention.
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, basis_of: str | None = None, **kwargs: Any
    ) -> None:
        """Put the adapter into the model, then find the subspaces of all its layers; all or nothing.

        With `basis_of`, it takes those of another adapter, and its tensors.
        """
        _refuse_divided(model)
        if isinstance(self.peft_config[adapter_name], SubspaceConfig):
            _refuse_loading_by_one(model)
        trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
        first = not any(isinstance(module, Layer) for module in model.modules())
        for module in model.modules():
            keep_readable(module)  # those without an adapter too: the gradient of earlier layers passes through them
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            links = Links.attach(model)
            if first:
                links.trainable.update(trainable)
            _make_replicas(model, links.layers, adapter_name)
            group = AdapterGroup(adapter_name, links.layers)
            if basis_of is not None:
                group.share(basis_of)
            group.place()
        except BaseException:
            remove_adapter(model, adapter_name)
            self.peft_config.pop(adapter_name, None)
            for parameter, flag in trainable.items():
                parameter.requires_grad_(flag)
            raise
        if _after_load not in model._load_state_dict_post_hooks.values():
            model.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Add the weighted mean of adapters of one method, rank and basis as another adapter of that method.

        Rotations are averaged on the rotation group, magnitudes and gains geometrically, free matrices and angles
        linearly. Weight 1 for one and 0 for all others gives that one; weights that sum to less than one leave the
        rest to the base model. The mean is not active until it is set, and is saved like any other.

        Args:
            adapters: names, each once.
            weights: finite, one for each, of any sum and sign.
            adapter_name: a new name.

        Raises:
            ValueError: the adapters differ in method, modules, sizes, options or basis, the method has no mean (HRA,
                qGOFT, a free matrix with magnitudes), or names and weights do not fit; the model is left as it was.
        """
        configs: dict[str, IsotuneConfig] = self.peft_config
        check_request(adapters, weights, adapter_name, configs)
        layers = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, Layer) and any(adapter in module.isotune_operator for adapter in adapters)
        }
        for name, layer in layers.items():
            if isinstance(layer, ExpertsLayer):
                raise ValueError(f"There is no mean of adapters on experts yet, such as those of {name!r}.")
        found = combine(layers, adapters, weights)
        configs[adapter_name] = copy.deepcopy(configs[adapters[0]])
        self.inject_adapter(self.model, adapter_name, basis_of=adapters[0])
        with torch.no_grad():
            for name, values in found.items():
                for parameter, value in values.items():
                    layers[name].operator(adapter_name).get_parameter(parameter).copy_(value)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge into the base; all layers are checked before the first is changed."""
        layers = self._check_merge(safe_merge, adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        warn_of_requantising(layers)

    def _check_merge(self, safe_merge: bool, adapter_names: list[str] | None) -> list[Layer]:
        layers = [module for module in self.model.modules() if isinstance(module, Layer)]
        for layer in layers:
            layer.check_merge(adapter_names, safe_merge)
        return layers

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        layers = self._check_merge(safe_merge, adapter_names) if merge else []
        model: Any = super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )
        Links.detach(model)
        warn_of_requantising(layers)
        return model

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None and peft_config.target_parameters:
            return peft_config  # no default layers beside the parameters that were asked for
        return super()._prepare_adapter_config(peft_config, model_config)

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        return inject_experts(model, peft_config, adapter_name)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, ExpertsLayer):
            setattr(parent, child_name, new_module)  # PEFT would look for a weight of its own
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _create_and_replace(
        self,
        peft_config: IsotuneConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, Layer):
            target.update_layer(adapter_name, peft_config)
            return
        layer = adapt(target, current_key, **get_quantization_kwargs(self.model))
        layer.update_layer(adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        # PEFT's _replace_module would move the layer to its host's device, where it already is.
        setattr(parent, target_name, layer)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Let `adapter_names` of a mixed batch reach the layers for the time of one call."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        unknown = sorted(set(names) - {"__base__", *self.peft_config})
        if unknown:
            raise ValueError(
                f"adapter_names holds {', '.join(map(repr, unknown))}; this model has "
                f"{', '.join(map(repr, self.peft_config))}, and '__base__' stands for none."
            )
        if self.training:
            raise ValueError("adapter_names is for inference; call model.eval() first, or train one adapter at a time.")
        layers = [m for m in self.model.modules() if isinstance(m, Layer)]
        if any(layer.merged for layer in layers):
            raise ValueError("adapter_names needs every adapter unmerged; call unmerge_adapter() first.")
        batch = MixedBatch(tuple(names), _copies_of_a_sample(self.model, kwargs))

        def measure(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            inputs = (named.get(name) for name in ("decoder_input_ids", "input_ids", "inputs_embeds"))
            tensors = [value for value in (*given, *inputs) if isinstance(value, Tensor) and value.ndim > 1]
            batch.length = tensors[0].shape[1] if tensors else 1

        handle = self.model.register_forward_pre_hook(measure, with_kwargs=True, prepend=True)
        for layer in layers:
            layer._batch_adapters = batch
        try:
            with _saved_modules_told(self.model, batch):
                yield
        finally:
            handle.remove()
            for layer in layers:
                layer._batch_adapters = None

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: IsotuneConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        try:
            _check_file(model, adapter_name, remapped)
        except AdapterFileError:
            remove_adapter(model.get_base_model() if isinstance(model, PeftModel) else model, adapter_name)
            raise
        return remapped


def _copies_of_a_sample(model: nn.Module, kwargs: Mapping[str, Any]) -> int:
    """How often generation puts each sample into its batch, for beams or for several answers, one after the other."""
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    counts = [kwargs.get(name) or getattr(config, name, None) for name in ("num_beams", "num_return_sequences")]
    return max(count or 1 for count in counts)


@contextmanager
def _saved_modules_told(model: nn.Module, batch: MixedBatch) -> Iterator[None]:
    """Let PEFT's own wrappers of modules_to_save give each sample what its adapter has saved."""

    def tell(wrapper: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        assert isinstance(wrapper, ModulesToSaveWrapper)
        names = batch.of(given[0]) if given else batch.names
        known = [name if name in wrapper.modules_to_save else "__base__" for name in names]
        return given, {**named, "adapter_names": known}

    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    active = [wrapper._active_adapter for wrapper in wrappers]
    handles = [wrapper.register_forward_pre_hook(tell, with_kwargs=True) for wrapper in wrappers]
    for wrapper in wrappers:
        # A wrapper that has nothing saved for the active adapter would not look at the names.
        wrapper._active_adapter = list(wrapper.modules_to_save)[:1]
    try:
        yield
    finally:
        for wrapper, name in zip(wrappers, active, strict=True):
            wrapper._active_adapter = name
        for handle in handles:
            handle.remove()


def _refuse_divided(model: nn.Module) -> None:
    """Refuse a model whose weights are in parts that nothing here puts together."""
    size = getattr(model, "_tp_size", None) or 1
    if size > 1 and not any(map(is_sharded, model.parameters())):
        raise ValueError(
            f"The weights of this model are divided by rows or columns between {size} devices (tensor parallelism), "
            "and this version of transformers does not say how. Upgrade to transformers 5.17 or later, or load the "
            "model without a tensor parallel plan and spread it with FSDP2."
        )


def _refuse_loading_by_one(model: nn.Module) -> None:
    """Refuse an adapter with a basis where accelerate is going to send the other processes parameters only."""
    if not loaded_by_one() or any(type(parameter).__name__ == "Params4bit" for parameter in model.parameters()):
        return  # four-bit weights every process loads for itself
    raise ValueError(
        "fsdp_cpu_ram_efficient_loading is on: one process of a machine loads the weights, which accelerate sends to "
        "the others when it shards the model, and it cannot send the basis that this adapter keeps beside its "
        "parameters. Turn it off, by fsdp_cpu_ram_efficient_loading: false in accelerate's configuration file "
        "(accelerate launch has it on unless told otherwise); or use a method that rotates all inputs, such as OFT."
    )


def _make_replicas(model: nn.Module, layers: Sequence[Layer], adapter_name: str) -> None:
    """Under tensor parallelism, give all processes the same parameters, and refuse what would part them again."""
    mesh = next((found for module in model.modules() if (found := mesh_of(module)) is not None), None)
    if mesh is None:
        return
    own = [layer for layer in layers if adapter_name in layer.isotune_operator]
    if any(layer.draws(adapter_name) and not layer.configs[adapter_name].inference_mode for layer in own):
        raise ValueError(
            f"The adapter {adapter_name!r} is to be trained with dropout, which under tensor parallelism every process "
            "would draw for itself, so that their copies of the adapter drift apart. Set its dropout to 0, or load "
            "the model without a tensor parallel plan and spread it with FSDP2."
        )
    make_equal((p for layer in own for p in layer.operator(adapter_name).parameters()), mesh)


def _check_file(model: nn.Module, adapter_name: str, state: Mapping[str, Tensor]) -> None:
    """Refuse a file that lacks what the adapter needs or holds what cannot be."""
    own = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if f".{_PREFIX}" in name and f".{adapter_name}." in name
    }
    check_tensors(
        {name.removeprefix(KEY_PREFIX): tensor for name, tensor in own.items()},
        {name.removeprefix(KEY_PREFIX): tensor for name, tensor in state.items()},
        "on this base model by its adapter_config.json; check that both belong together",
    )


def _after_load(model: nn.Module, incompatible_keys: Any) -> None:
    """After any load_state_dict: find the loaded bases on this base model, and refuse one that does not fit."""
    links = model.__dict__.get("_isotune_links")
    if links is not None:
        if not links.built:
            links = Links.attach(model)
        links.settle()
