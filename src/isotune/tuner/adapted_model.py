"""All isotune layers of one model: the only place where evaluations are shared and subspaces placed."""

from __future__ import annotations

import itertools
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from isotune.adapter.evaluation import Call, SharedEvaluation, is_recorded, share_evaluations
from isotune.adapter.operator import Adapter, Stored
from isotune.adapter.placement import Mark
from isotune.errors import BaseMismatchError
from isotune.internals.ddp import ignore_buffers
from isotune.internals.offloading import is_managed
from isotune.internals.torch_state import backward_pass, is_symbolic, remove_hooks
from isotune.parallel.sharding import gather_with, is_partitioned, is_sharded, is_wrapped_by_fsdp
from isotune.tuner.experts_layer import ExpertsLayer
from isotune.tuner.flags import Flags
from isotune.tuner.layer import Layer
from isotune.tuner.moved import update_config
from isotune.tuner.placing import forget_untrained, is_read_anew, keeps_its_basis, place_adapter
from isotune.tuner.rounding import warn_of_rounded

_KEY = "_isotune"


class AdaptedModel:
    """All isotune layers of one model: evaluates their operators once per forward pass and places their subspaces.

    It is attached to every module that contains all adapted layers, with hooks before and after the module's forward. A
    copy starts empty and finds the layers of the copied model itself.
    """

    def __init__(self) -> None:
        self.model: nn.Module | None = None
        self.layers: list[Layer] = []
        self.refreshed: list[Layer] = []
        """The layers with an adapter whose `refresh` does anything."""
        self.evaluations: list[SharedEvaluation] = []
        self.built = False
        self.warned = False
        """Whether the warning about parameters in too coarse a dtype has been given."""
        self.has_exchanged = False
        """Whether a base layer was exchanged, where nothing was trained, since all were asked for gradients."""
        self.flags = Flags()
        self.surroundings: list[nn.Module] = []
        """The modules on which accelerate or diffusers would put a hook that moves the layers' weights."""
        self.homes: list[tuple[nn.Module, str, nn.Module]] = []
        """Parent, attribute name and layer; a tuner that wraps the layer later replaces it in its parent."""
        self.others: list[BaseTunerLayer] = []
        """Layers of other tuners in the model."""
        self._running = _Running()

    def __reduce__(self) -> tuple[type[AdaptedModel], tuple[()]]:
        return AdaptedModel, ()

    @classmethod
    def of(cls, model: nn.Module) -> AdaptedModel | None:
        """The object attached to a model, or None."""
        found: AdaptedModel | None = model.__dict__.get(_KEY)
        return found

    @classmethod
    def ready(cls, model: nn.Module) -> AdaptedModel | None:
        """The object attached to a model, which knows its layers also where a copy, or a change, has made it forget."""
        own = cls.of(model)
        if own is not None and not own.built:
            own.build(own.model or model)
        return own

    @classmethod
    def attach(cls, model: nn.Module) -> AdaptedModel:
        """Find the layers of a model and hook the forward passes of every module that contains them all."""
        own = cls.of(model) or cls()
        own.build(model)
        layers = set(own.layers)
        for module in (model, *own.surroundings):
            if isinstance(module, Layer) or not layers.issubset(module.modules()):
                continue
            if _KEY not in module.__dict__:
                module.register_forward_pre_hook(_begin)
                module.register_forward_hook(_end, always_call=True)
            module.__dict__[_KEY] = own
        remove_hooks(model, _after_load)
        model.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]
        # Also the names of what is None until a subspace moves: DDP reads the names once, when it is made.
        holders = [(name, m) for name, m in model.named_modules() if isinstance(m, Stored)]
        ignore_buffers(model, [f"{name}.{key}" for name, holder in holders for key in holder.held()])
        return own

    @staticmethod
    def detach(model: nn.Module) -> None:
        """Undo `attach`, leaving nothing of isotune on the model."""
        ignore_buffers(model, [])
        for module in model.modules():
            if module.__dict__.pop(_KEY, None) is not None:
                remove_hooks(module, _begin, _end, _after_load)

    def build(self, model: nn.Module) -> None:
        """Find the layers, and group alike operators of each adapter for shared evaluation."""
        self.model = model
        self.layers = [module for module in model.modules() if isinstance(module, Layer)]
        for layer in self.layers:
            layer.owner = self
        kinds = [{type(layer.adapter(name)).refresh for name in layer.isotune_operator} for layer in self.layers]
        self.refreshed = [layer for layer, own in zip(self.layers, kinds, strict=True) if own - {Adapter.refresh}]
        self.evaluations = []
        for name in dict.fromkeys(name for layer in self.layers for name in layer.isotune_operator):
            # The parameters of experts already hold many operators, of which only some are evaluated at a time.
            plain = [layer for layer in self.layers if not isinstance(layer, ExpertsLayer)]
            adapters = [layer.adapter(name) for layer in plain if name in layer.isotune_operator]
            for shared in share_evaluations(adapters):
                self.evaluations.append(shared)
                for slot, member in enumerate(shared.members):
                    assert isinstance(member, Adapter)
                    member.shared, member.slot = shared, slot
        self.surroundings = [m for m in model.modules() if any(isinstance(inner, Layer) for inner in m.modules())]
        self.surroundings += [m for layer in self.layers for m in layer.isotune_operator.values()]
        self._find_others(model)
        self.built = True

    def _find_others(self, model: nn.Module) -> None:
        holds = ((module, name, child) for module in model.modules() for name, child in module.named_children())
        self.homes = [home for home in holds if isinstance(home[2], Layer)]
        self.others = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and not isinstance(m, Layer)]

    def layers_with(self, adapter_name: str) -> list[Layer]:
        """The layers that have an adapter."""
        return [layer for layer in self.layers if adapter_name in layer.isotune_operator]

    def forget(self) -> None:
        """Have the layers found again before the next forward pass."""
        self.evaluations, self.surroundings, self.homes, self.others = [], [], [], []
        self.built = False

    def tuners_around(self, layer: nn.Module) -> list[BaseTunerLayer]:
        """Layers of other tuners that contain this layer."""
        found = [one for one in self._other_tuners() if isinstance(one, nn.Module)]
        return [one for one in found if any(inner is layer for inner in one.modules())]

    def _other_tuners(self) -> list[BaseTunerLayer]:
        if self.model is not None and any(getattr(home, name, None) is not own for home, name, own in self.homes):
            self._find_others(self.model)
        return self.others

    # -- a forward pass ------------------------------------------------------------------------------------------

    def begin(self, module: nn.Module) -> None:
        """Begin a forward pass of a module that contains all layers."""
        if not is_recorded():
            if not self.built:
                self.build(self.model or module)
            if self._running.call is None or self._running.call is not self._running.looked:
                self._look()
                self._running.looked = self._running.call
            self._running.passing = True
        elif any(shared.is_given() for shared in self.evaluations):
            return  # in compiled code, only the adapters that were given their tensors take part
        for shared in self.evaluations:
            shared.begin(self._running.call)

    def see(self, layer: Layer) -> None:
        """Check a layer that is called outside of any checked pass, by `place`.

        Raises:
            BaseMismatchError, ValueError: as in `place`.
        """
        if not self._running.passing and backward_pass() is None:
            self.place([layer])

    def _look(self) -> None:
        """Check before a pass where weights and parameters are; once per call of `generate`."""
        # Code that loads without load_state_dict (as transformers' own loader does), replaces the base's weights, or
        # adapts a model before its weights exist leaves no earlier moment for finding the subspaces.
        apart = self.place()
        trains = torch.is_grad_enabled() and self.model is not None and self.model.training
        if self.has_exchanged and trains:
            for layer in self.layers:
                layer.refuse_to_train(layer.host)
            self.has_exchanged = False
        partitioned = [is_partitioned(shared.members[0].parameters_read()[0]) for shared in self.evaluations]
        for shared, is_zero3 in zip(self.evaluations, partitioned, strict=True):
            shared.apart = apart or is_zero3
        if any(partitioned):
            self._gather_with_layers()
        elif trains and not (self.warned or apart):
            several = [m for one in self.layers if isinstance(one, ExpertsLayer) for m in one.isotune_operator.values()]
            # One trainable adapter of each kind: this runs in every pass, and a frozen one would reveal nothing.
            trained = (filter(_is_trained, shared.members) for shared in self.evaluations)
            self.warned = warn_of_rounded([*(one for own in trained for one in itertools.islice(own, 1)), *several])

    def end(self) -> None:
        """End a forward pass, whether it returned or raised."""
        self._running.passing = False
        for shared in self.evaluations:
            shared.end()

    @contextmanager
    def calling(self) -> Iterator[None]:
        """A call of PeftModel's forward or generate, or a similar loop, during which parameters do not change."""
        running, outermost = self._running, self._running.call is None
        call = running.call = running.call or Call()
        try:
            yield
        finally:
            self.end()  # torch runs no hooks after a forward that Ctrl-C interrupts
            if outermost:
                running.call = None
                call.end()

    def _gather_with_layers(self) -> None:
        """Have ZeRO-3 gather, with each layer, the bias that the layer itself reads from the module inside it."""
        for layer in self.layers:
            bias = layer.get_base_layer()._parameters.get("bias")
            gather_with(layer, [*layer.isotune_operator.parameters(), *([] if bias is None else [bias])])

    # -- placing ---------------------------------------------------------------------------------------------------

    def place(self, layers: Sequence[Layer] | None = None) -> bool:
        """Place every adapter that is not placed yet, or whose stored basis or base weight has changed since.

        Args:
            layers: of the model; None for all.

        Returns:
            Whether other libraries move the model's weights in and out.

        Raises:
            BaseMismatchError: as in `place_adapter`.
            ValueError: another tuner has merged an adapter into a weight, which would change what ours does.
        """
        layers = self.layers if layers is None else layers
        self._refuse_others_merged(layers)
        stale = {name: None for layer in layers for name in layer.isotune_form if not self._is_placed(layer, name)}
        for name in stale:
            place_adapter(name, layers)
        moved = self._is_moved_by_others()
        if not moved:  # or the buffers may have any contents
            for layer in self.refreshed if layers is self.layers else layers:
                layer.refresh()
        return moved

    def place_after_load(self) -> None:
        """Place adapters that were just loaded, and remove one that does not fit this base.

        Raises:
            BaseMismatchError: as in `place_adapter`; the adapter is then gone and the base as it was.
        """
        configs: dict[str, Any] = getattr(self.model, "peft_config", {})
        for name in dict.fromkeys(name for layer in self.layers for name in layer.isotune_form):
            update_config(configs, self.layers, name)
            try:
                if not all(self._is_placed(layer, name) for layer in self.layers if name in layer.isotune_form):
                    place_adapter(name, self.layers)
            except BaseMismatchError:
                if self.model is not None:
                    remove_adapter(self.model, name)
                raise

    def _is_placed(self, layer: Layer, adapter_name: str) -> bool:
        """Whether an adapter has a valid placement; an invalid one is dropped."""
        adapter, weight = layer.subspace(adapter_name), layer.base_weight
        placement = adapter.placement
        empty = is_symbolic(weight)
        # What is kept elsewhere is brought where it is needed, so a placement need not be symbolic with it.
        values_come = not empty or is_managed(layer.host.module)
        if placement is None or is_symbolic(placement.down) == values_come:
            return False
        if empty:
            return True
        stored = layer.stored_of(adapter_name)
        as_many = len(stored) == len(placement.pins)  # fewer or more once it has moved
        pins_hold = as_many and all(map(Mark.is_of, placement.pins, stored))
        # A buffer that diffusers has offloaded to disk has arbitrary contents until its module is called.
        kept_elsewhere = not pins_hold and any(map(is_managed, layer.modules()))
        if not (pins_hold or kept_elsewhere or (as_many and all(map(_equal, stored, placement.stored)))):
            adapter.placement = None
            return False
        seen = isinstance(weight, nn.Parameter) and not is_sharded(weight)
        weight_holds = placement.weight.is_of(weight) if seen else not is_read_anew(layer)
        # The update belongs to the base's own weight, which is still kept while another tuner is merged into it.
        weight_holds = weight_holds or any(other.merged for other in layer.other_tuners())
        if not weight_holds and not self._is_moved_by_others() and not keeps_its_basis(layer, adapter_name):
            forget_untrained(layer, adapter_name)
            adapter.placement = None
            return False
        if not (pins_hold and weight_holds):
            assert adapter.placement is not None
            pins = tuple(Mark.of(buffer, sampled=False) for buffer in stored)
            mark = Mark.of(weight) if seen else placement.weight
            adapter.placement = replace(adapter.placement, pins=pins, weight=mark)
        return True

    def _refuse_others_merged(self, layers: Iterable[Layer]) -> None:
        """Refuse to run an adapter on a weight into which a tuner around it has merged an update."""
        if not any(other.merged for other in self._other_tuners()):
            return
        for layer in layers:
            names = layer.active_here()
            others = self.tuners_around(layer) if names else []
            if layer.host.folds and not all(layer.adapter(name).additive for name in names):
                others += layer.tuners_inside()  # a rotation folded into the weight rotates only the base's part of it
            merged = [type(other).__name__ for other in others if other.merged]
            if merged:
                raise ValueError(
                    f"Another tuner's adapter ({', '.join(merged)}) is merged into the weight of {layer.key!r}, so "
                    f"{names[0]!r} would not act on it as it does unmerged. Unmerge the other adapter, or disable "
                    "this one."
                )

    def _is_moved_by_others(self) -> bool:
        """Whether FSDP, accelerate or diffusers moves the weights in and out, which makes their marks meaningless."""
        model = self.model
        hosts = (layer.host.module for layer in self.layers)
        around = itertools.chain(self.surroundings, hosts)
        return model is not None and (is_wrapped_by_fsdp(model) or any(map(is_managed, around)))


class _Running(threading.local):
    """The call of PeftModel's forward or generate that is running in this thread."""

    call: Call | None = None
    looked: Call | None = None
    passing = False


def _equal(buffer: Tensor, known: Tensor) -> bool:
    return torch.equal(buffer.to(known), known)


def _is_trained(adapter: Any) -> bool:
    return any(parameter.requires_grad for parameter in adapter.parameters_read())


def _begin(module: nn.Module, args: Any) -> None:
    module.__dict__[_KEY].begin(module)


def _end(module: nn.Module, args: Any, output: Any) -> None:
    module.__dict__[_KEY].end()


def _after_load(model: nn.Module, incompatible_keys: Any) -> None:
    """After any load_state_dict: place the loaded adapters on this base model, and refuse one that does not fit."""
    own = AdaptedModel.ready(model)
    if own is not None:
        own.place_after_load()


def stand_ins(model: nn.Module) -> Iterator[tuple[nn.Module, str, Layer | ModulesToSaveWrapper, nn.Module]]:
    """Owner, name there, module and the base's own, of all adapted and saved modules; inner ones of nested first."""
    # Layers on several parameters of one module of experts are nested.
    for path, module in reversed(list(model.named_modules())):
        if isinstance(module, Layer | ModulesToSaveWrapper):
            owner, _, name = path.rpartition(".")
            original = module.base_layer if isinstance(module, Layer) else module.original_module
            yield model.get_submodule(owner), name, module, original


def remove_adapter(model: nn.Module, adapter_name: str) -> None:
    """Remove a refused adapter from the model it was injected into; with the last adapter, all of isotune goes."""
    for owner, name, module, original in stand_ins(model):
        known = module.configs if isinstance(module, Layer) else module.modules_to_save
        if adapter_name not in known:
            continue
        if len(known) == 1:
            setattr(owner, name, original)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT says which adapter is active now
            if isinstance(module, Layer):
                module.delete_adapter(adapter_name)
            else:
                module.delete_adapter(adapter_name, None)
    configs = getattr(model, "peft_config", {})
    configs.pop(adapter_name, None)
    own = AdaptedModel.of(model)
    if any(isinstance(module, Layer) for module in model.modules()):
        if own is not None:
            own.forget()
        return
    if own is not None:
        own.flags.restore()
        own.detach(model)
    if not configs and hasattr(model, "peft_config"):
        del model.peft_config
        if getattr(model, "_hf_peft_config_loaded", False):
            model._hf_peft_config_loaded = False  # type: ignore[assignment]
