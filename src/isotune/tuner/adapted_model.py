"""What the adapted layers of one model share, and when a forward pass of it runs."""

from __future__ import annotations

import warnings
from collections.abc import MutableMapping
from itertools import takewhile
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from isotune.adapter.operator import OperatorBatch, batch_operators
from isotune.adapter.subspace import Form
from isotune.errors import BaseMismatchError
from isotune.parallel.processes import gather_with, is_divided, keep_buffers_at_home
from isotune.tuner.layer import Layer
from isotune.tuner.placing import AdapterGroup


class Links:
    """What the isotune layers of one model share: the batches of their operators, and when a forward pass runs.

    It hangs on every module that contains all adapted layers, with a hook before and after its forward; the outermost
    of them that is called is the forward pass. A copy of it is empty and finds the layers of the copied model itself.
    """

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self.batches: list[OperatorBatch] = []
        self.built = False
        self.model: nn.Module | None = None
        # Weakly: what holds a parameter would keep it whole beside the shards that take its place.
        self.trainable: MutableMapping[nn.Parameter, bool] = WeakTensorKeyDictionary()
        self._running: list[int] = []

    def __reduce__(self) -> tuple[type[Links], tuple[()]]:
        return Links, ()

    @classmethod
    def attach(cls, model: nn.Module) -> Links:
        """Link the isotune layers of a model, and watch the forward passes of it and of what holds all of them."""
        links = model.__dict__.get("_isotune_links") or cls()
        links.build(model)
        names = [name for name, module in model.named_modules() if isinstance(module, Layer)]
        paths = [name.split(".")[:-1] for name in names]
        common = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))]
        for depth in range(len(common) + 1):
            module = model.get_submodule(".".join(common[:depth]))
            if "_isotune_links" not in module.__dict__:
                module.register_forward_pre_hook(_enter)
                module.register_forward_hook(_leave, always_call=True)
            module.__dict__["_isotune_links"] = links
        keep_buffers_at_home(model, [f"{name}.{own}" for name, form in _forms(model) for own in form._buffers])
        return links

    @staticmethod
    def detach(model: nn.Module) -> None:
        """Undo `attach`."""
        keep_buffers_at_home(model, [])
        for module in model.modules():
            if module.__dict__.pop("_isotune_links", None) is not None:
                for hooks, own in ((module._forward_pre_hooks, _enter), (module._forward_hooks, _leave)):
                    for key in [key for key, hook in hooks.items() if hook is own]:
                        del hooks[key]
                        module._forward_hooks_always_called.pop(key, None)

    def build(self, model: nn.Module) -> None:
        """Find the layers, and batch their operators by adapter."""
        self.model = model
        self.layers = [module for module in model.modules() if isinstance(module, Layer)]
        for layer in self.layers:
            layer.links = self
        adapters = dict.fromkeys(name for layer in self.layers for name in layer.isotune_operator)
        self.batches = [
            batch
            for name in adapters
            for batch in batch_operators(
                layer.operator(name) for layer in self.layers if name in layer.isotune_operator
            )
        ]
        self.built = True

    def settle(self) -> None:
        """Place every adapter whose stored basis has changed, and take one out that does not fit this base.

        Raises:
            BaseMismatchError: as `AdapterGroup.place`; the adapter is gone then and the base as it was.
        """
        for name in dict.fromkeys(name for layer in self.layers for name in layer.configs):
            group = AdapterGroup(name, self.layers)
            try:
                group.refresh()
            except BaseMismatchError:
                if self.model is not None:
                    remove_adapter(self.model, name)
                raise

    def unlink(self) -> None:
        """Forget the batches; the next forward pass makes them anew."""
        self.batches.clear()
        self.built = False

    def enter(self, module: nn.Module) -> None:
        """A module that holds all layers is called."""
        if id(module) in self._running:
            self._running.clear()  # an interrupt (Ctrl-C in a notebook) left the last pass without an end
        if not self._running:
            if not torch.compiler.is_compiling():
                if not self.built:
                    self.build(module)
                if any(is_divided(batch.operators[0].parameter_tuple()[0]) for batch in self.batches):
                    self._gather_with_layers()
            for batch in self.batches:
                batch.begin()
        self._running.append(id(module))

    def _gather_with_layers(self) -> None:
        """Have ZeRO-3 gather with each layer what the layer reads itself of the modules inside it."""
        for layer in self.layers:
            bias = layer.get_base_layer()._parameters.get("bias")
            gather_with(layer, [*layer.isotune_operator.parameters(), *([] if bias is None else [bias])])

    def leave(self, module: nn.Module) -> None:
        """It has returned or raised."""
        if id(module) in self._running:
            del self._running[self._running.index(id(module)) :]
        if not self._running:
            for batch in self.batches:
                batch.end()


def _forms(model: nn.Module) -> list[tuple[str, Form]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Form)]


def _enter(module: nn.Module, args: Any) -> None:
    module.__dict__["_isotune_links"].enter(module)


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    module.__dict__["_isotune_links"].leave(module)


def remove_adapter(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter that was refused out of a model, and with the last one every trace of isotune.

    Args:
        model: the model that the adapter was injected into, not a PeftModel around it.
        adapter_name: the adapter.
    """
    for name, module in reversed(list(model.named_modules())):  # of nested layers the inner one first
        if isinstance(module, Layer) and adapter_name in module.isotune_operator:
            alone, original = len(module.isotune_operator) == 1, module.base_layer
        elif isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            alone, original = len(module.modules_to_save) == 1, module.original_module
        else:
            continue
        if alone:
            setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], original)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT tells which adapter is active now
            if isinstance(module, Layer):
                module.delete_adapter(adapter_name)
            else:
                module.delete_adapter(adapter_name, None)
    configs = getattr(model, "peft_config", {})
    configs.pop(adapter_name, None)
    links = model.__dict__.get("_isotune_links")
    if any(isinstance(module, Layer) for module in model.modules()):
        if links is not None:
            links.unlink()
        return
    if links is not None:
        for parameter, flag in links.trainable.items():
            parameter.requires_grad_(flag)
    Links.detach(model)
    if not configs and hasattr(model, "peft_config"):
        del model.peft_config
        if getattr(model, "_hf_peft_config_loaded", False):
            model._hf_peft_config_loaded = False  # type: ignore[assignment]
