"""The tuner model, which puts isotune's layers into a model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from isotune.adapter.evaluation import is_recorded
from isotune.errors import AdapterFileError
from isotune.internals.peft_hooks import HAS_HOOKS, Tuner
from isotune.internals.peft_quantisation import get_quantization_kwargs
from isotune.internals.quantised_state import keep_readable
from isotune.internals.transformers_state import scales_by_tie
from isotune.methods.basis import BasisConfig
from isotune.methods.config import IsotuneConfig
from isotune.parallel.sharding import is_sharded
from isotune.parallel.tensor_parallel import make_equal, mesh_of
from isotune.tuner.adapted_model import AdaptedModel, remove_adapter
from isotune.tuner.backends import adapt
from isotune.tuner.experts_layer import inject as inject_experts
from isotune.tuner.flags import Flags
from isotune.tuner.layer import Layer
from isotune.tuner.mean import check_request, combine, parts_of
from isotune.tuner.merging import warn_of_requantising
from isotune.tuner.mixed_batch import batch_of, check_names, measured, saved_modules_routed
from isotune.tuner.moved import make_room
from isotune.tuner.placing import place_adapter, share_basis
from isotune.tuner.quantisation import refuse_without_gradient
from isotune.tuner.refusals import (
    refuse_divided,
    refuse_loading_by_one,
    refuse_loading_onto_disk,
    refuse_names_of_saved,
    refuse_several_places,
    warn_of_lists,
    warn_of_missing,
    warn_of_tied,
)
from isotune.tuner.sizes import size_layers
from isotune.tuner.state import check_file, current_key, keys_in_model
from isotune.tuner.truncating import refuse_other_truncation, refuse_untruncatable
from isotune.tuner.tying import base_layers_in_place, kept_tied

_PREFIX = "isotune_"


class IsotuneModel(Tuner):
    """The tuner model of every isotune method.

    Args:
        model: the model to adapt.
        config: one configuration, or a dictionary of them by adapter name.
        adapter_name: the adapter to inject now.

    Raises:
        ValueError: a layer cannot be adapted, a rank does not fit or no module matches; the model is left as it was.
    """

    prefix = _PREFIX
    tuner_layer_cls = Layer
    # LoRA's default targets in known architectures, the attention projections, are a good default here too.
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, basis_of: str | None = None, **kwargs: Any
    ) -> None:
        """Put the adapter into the model and find the subspaces of all its layers, or change nothing.

        With `basis_of`, the adapter shares the subspaces and frozen tensors of another one.
        """
        refuse_divided(model)
        config = self.peft_config[adapter_name]
        if isinstance(config, BasisConfig):
            refuse_loading_by_one(model)
        # The sizes of a file, and of a mean of adapters, are there already.
        chooses = config.chooses and config.origin is None and basis_of is None
        if chooses:  # on a copy, so that the given configuration makes its own choice for every model
            config = self.peft_config[adapter_name] = copy.deepcopy(config)
            config.sized = False
        flags = Flags.of(model)
        first = not any(isinstance(module, Layer) for module in model.modules())
        for module in model.modules():
            keep_readable(module)  # without an adapter too: the gradients of earlier layers pass through it
        try:
            refuse_names_of_saved(model, self.peft_config)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            refuse_several_places(model)
            refuse_loading_onto_disk(model, adapter_name, config)
            warn_of_lists(model, adapter_name)
            if config.origin is None and "target_modules" in config.given:  # else the names are PEFT's, of its tables
                warn_of_missing(model, config)
                warn_of_tied(model)
            refuse_untruncatable(model, adapter_name, config)
            if chooses:
                size_layers(model, adapter_name, config)
            refuse_other_truncation(model, adapter_name, config)
            own = AdaptedModel.attach(model)
            if first:
                own.flags = flags
            if basis_of is not None:
                share_basis(adapter_name, basis_of, own.layers)
            elif config.origin is None:  # otherwise the file's tensors come next and are placed then
                place_adapter(adapter_name, own.layers)
            _make_replicas(model, own.layers, adapter_name)  # some start where they are placed
        except BaseException:
            remove_adapter(model, adapter_name)
            getattr(self, "peft_config", {}).pop(adapter_name, None)  # gone with the model's last adapter
            flags.restore()
            raise

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: Literal["rotation", "orthomerge"] = "rotation",
    ) -> None:
        """Add the weighted mean of adapters of one method, rank and basis as a new adapter of that method.

        Rotations are averaged on the rotation group, scales and gains geometrically, free matrices and angles linearly.
        Of HRA's mean the nearest product of as many reflections is taken, with a warning that says how near it is.
        Weight 1 for one adapter and 0 for all others gives that adapter; weights that sum to less than one leave the
        rest to the base model. The new adapter is inactive until it is set, and is saved like any other.

        Args:
            adapters: names of the adapters, each once.
            weights: one finite weight per adapter, of any sum and sign.
            adapter_name: name of the new adapter.
            combination_type: "rotation" averages logarithms, so that a plane that all turn is turned by the mean angle;
                "orthomerge" averages the Cayley generators of each layer and scales their mean to the mean of their
                norms, so that adapters which turn different planes do not weaken each other. Its weights must not be
                below 0.

        Raises:
            ValueError: the adapters differ in method, modules, sizes, options or basis; the method has no mean (qGOFT,
                HRA's strict form, a free matrix with scales); or names and weights do not fit. The model is left as it
                was.

        Source: for "orthomerge" Yang, Shi and Liu, Orthogonal Model Merging (arXiv 2602.05943); see `linear_mean`.
        """
        configs: dict[str, IsotuneConfig] = self.peft_config
        check_request(adapters, weights, adapter_name, configs, combination_type)
        layers = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, Layer) and any(adapter in module.isotune_operator for adapter in adapters)
        }
        found = combine(parts_of(layers, adapters), weights, combination_type)
        found.warn()
        configs[adapter_name] = copy.deepcopy(configs[adapters[0]])
        self.inject_adapter(self.model, adapter_name, basis_of=adapters[0])
        with torch.no_grad():
            for name, values in found.values.items():
                for parameter, value in values.items():
                    layers[name].adapter(adapter_name).get_parameter(parameter).copy_(value)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base; all layers are checked before the first is changed."""
        layers = self._check_merge(safe_merge, adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)
        warn_of_requantising(layers)

    def unmerge_adapter(self) -> None:
        """Restore the weights of the base; what was tied to a merged one meanwhile is tied to the base's again."""
        with kept_tied(self.model):
            super().unmerge_adapter()  # type: ignore[no-untyped-call]

    def disable_adapter_layers(self) -> None:
        """Run without adapters, merged ones too."""
        with kept_tied(self.model):
            super().disable_adapter_layers()

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Tie the weights of the base model, whatever adapters are on them, by its own method of this name."""
        tie = getattr(self.model, "tie_weights", None)
        if tie is None:
            return
        with base_layers_in_place(self.model):
            tie(*args, **kwargs)

    def _check_merge(self, safe_merge: bool, adapter_names: list[str] | None) -> list[Layer]:
        AdaptedModel.ready(self.model)  # or a copy that has not been called yet would not see other tuners
        layers = self._layers()
        for layer in layers:
            layer.check_merge(adapter_names, safe_merge)
        return layers

    def _layers(self) -> list[Layer]:
        return [module for module in self.model.modules() if isinstance(module, Layer)]

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        layers = self._check_merge(safe_merge, adapter_names) if merge else []
        if not merge:
            self._refuse_to_unload_within_others()
        tied = scales_by_tie(self.model) and self.model.config.tie_word_embeddings
        with nullcontext() if merge else kept_tied(self.model):
            model: Any = super()._unload_and_optionally_merge(
                merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
            )
        if tied:  # the merged head differs from the embedding, and is to be used as before
            model.config.tie_word_embeddings = True
        AdaptedModel.detach(model)
        warn_of_requantising(layers)
        return model

    def _refuse_to_unload_within_others(self) -> None:
        own = AdaptedModel.ready(self.model)
        for layer in self._layers():
            if own is not None and (others := own.tuners_around(layer)):
                names = ", ".join(type(other).__name__ for other in others)
                raise ValueError(
                    f"Another tuner's adapter is around {layer.key!r} ({names}), and unloading this one would remove "
                    "it too, so nothing was unloaded. Unload the other adapter first."
                )

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None and peft_config.target_parameters:
            return peft_config  # only the parameters that were asked for, no default layers
        return super()._prepare_adapter_config(peft_config, model_config)

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        names = inject_experts(model, peft_config, adapter_name)
        if not HAS_HOOKS:
            self.targeted_parameter_names += names
        return names

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        while isinstance(child, Layer):
            # The module below isotune's layers, not the innermost one, so that another tuner's adapter stays.
            new_module = child = child.base_layer
        setattr(parent, child_name, new_module)

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
        kwargs = get_quantization_kwargs(self.model)
        layer = target if isinstance(target, Layer) else adapt(target, current_key, **kwargs)
        if not peft_config.inference_mode:
            refuse_without_gradient(layer.host, layer.key)
        layer.update_layer(adapter_name, peft_config)
        if layer is target:
            return
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        # PEFT's _replace_module would move the layer to its host's device, where it is already.
        setattr(parent, target_name, layer)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast the parameters as PEFT would: to float32 if the base is in half precision, or to the base's dtype."""
        if autocast_adapter_dtype:
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
            return
        for layer in self._layers():
            dtype = layer.host.weight.dtype
            if adapter_name in layer.isotune_operator and dtype.is_floating_point:
                layer.adapter(adapter_name).to(dtype)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Wrap each forward and generate of a PeftModel: share one evaluation and apply `adapter_names`."""
        own, names = AdaptedModel.of(self.model), kwargs.get("adapter_names")
        mixed = nullcontext() if names is None else self._mixed(names, kwargs)
        with nullcontext() if own is None or is_recorded() else own.calling(), mixed:
            yield

    @contextmanager
    def _mixed(self, names: Sequence[str], kwargs: dict[str, Any]) -> Iterator[None]:
        """Pass the `adapter_names` of a mixed batch to the layers for the duration of one call."""
        check_names(names, self.peft_config)
        if self.training:
            raise ValueError("adapter_names is for inference; call model.eval() first, or train one adapter at a time.")
        layers = self._layers()
        if any(layer.merged for layer in layers):
            raise ValueError("adapter_names needs every adapter unmerged; call unmerge_adapter() first.")
        batch = batch_of(self.model, names, kwargs)
        for layer in layers:
            layer.mixed_batch = batch
        try:
            with measured(self.model, batch), saved_modules_routed(self.model, batch):
                yield
        finally:
            for layer in layers:
                layer.mixed_batch = None

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: IsotuneConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """The tensors of one adapter, whatever the adapters are called.

        PEFT leaves out of `state_dict` every tensor whose name contains another adapter's name anywhere, such as in a
        layer's number or a block's name.

        Raises:
            ValueError: the omitted tensors are sharded over processes, so they cannot be read here.
        """
        selected: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        own = {f"{name}.{key}" for name, key in keys_in_model(model, adapter_name)}
        others = {f"{name}.{key}" for other in unwanted_adapter_names for name, key in keys_in_model(model, other)}
        selected = {key: tensor for key, tensor in selected.items() if key not in others}
        left_out = {
            key for key in own - selected.keys() if any(f".{name}." in f"{key}." for name in unwanted_adapter_names)
        }
        if state_dict and left_out:  # under FSDP, only the first process has anything to save
            whole = model.state_dict()
            if any(is_sharded(whole[key]) for key in left_out):
                raise ValueError(
                    f"An adapter has the name of a part of the model ({', '.join(unwanted_adapter_names)}), so PEFT "
                    f"leaves tensors of {adapter_name!r} out of the file. Save the model in one process, or give that "
                    "adapter another name."
                )
            selected.update((key, whole[key]) for key in left_out)
        return selected

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """The file's key for a key of the model: the adapter's name is removed in its own place only."""
        for group in ("isotune_operator", "isotune_form", "modules_to_save"):
            head, found, rest = key.rpartition(f".{group}.{adapter_name}.")
            if found:
                return f"{head}.{group}.{rest}"
        return key

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: IsotuneConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        state_dict = {current_key(name): tensor for name, tensor in state_dict.items()}
        make_room(model, adapter_name, state_dict)
        try:
            check_file(model, config, adapter_name, state_dict)
        except AdapterFileError:
            remove_adapter(model.get_base_model() if isinstance(model, PeftModel) else model, adapter_name)
            raise
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        return remapped


def _make_replicas(model: nn.Module, layers: Sequence[Layer], adapter_name: str) -> None:
    """Under tensor parallelism, give all processes equal parameters, and refuse options that would let them diverge."""
    mesh = next((found for module in model.modules() if (found := mesh_of(module)) is not None), None)
    if mesh is None:
        return
    own = [layer for layer in layers if adapter_name in layer.isotune_operator]
    if any(layer.adapter(adapter_name).dropout and not layer.configs[adapter_name].inference_mode for layer in own):
        raise ValueError(
            f"The adapter {adapter_name!r} has dropout, which under tensor parallelism each process would draw on its "
            "own, so their copies of the adapter would diverge in training. Set its dropout to 0, or load the model "
            "without a tensor parallel plan and shard it with FSDP2."
        )
    make_equal((p for layer in own for p in layer.adapter(adapter_name).parameters()), mesh)
