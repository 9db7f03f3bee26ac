"""The tuner layer: the adapters on a frozen layer, and how they compose."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from isotune.adapter.evaluation import is_recorded, working_dtype
from isotune.adapter.operator import Adapter, Below, FrozenLinear
from isotune.adapter.subspace import SubspaceBasis
from isotune.adapter.update import PlacedUpdate
from isotune.algebra.recording import is_plain
from isotune.hosts import Backend, host_for, widen
from isotune.internals.offloading import is_managed
from isotune.internals.torch_state import is_bare
from isotune.methods.config import IsotuneConfig
from isotune.parallel.sharding import is_partitioned
from isotune.parallel.tensor_parallel import Division, mesh_of
from isotune.tuner.adapted_weight import AdaptedWeight
from isotune.tuner.merging import MergingLayer
from isotune.tuner.mixed_batch import BASE, MixedBatch

_M = TypeVar("_M", bound=nn.Module)


class Layer(MergingLayer):
    """Adapters of any isotune methods on one frozen layer that multiplies by a matrix W.

    Several active adapters compose as if they had been merged one after the other: an update is added to what the
    adapters before it have made of W, and a rotation turns the result so far. The update itself is always computed from
    the base's own W.

    Args:
        base_layer: the host module, possibly already wrapped by another tuner layer.
        key: the host's name in the model.
        backend: for a quantised host, how its weight is read and written.
        parameter: for a module of experts, the name of the adapted parameter.

    Raises:
        ValueError: the layer cannot be a host, or the rank does not fit its weight.
    """

    adapter_layer_names = ("isotune_operator",)
    other_param_names = ("isotune_form",)

    def __init__(
        self, base_layer: nn.Module, key: str = "", backend: Backend | None = None, parameter: str | None = None
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.key = key
        self.quantization_backend: Any = backend  # PEFT's get_layer_status() reads this name
        self.parameter = parameter
        self.host = host_for(self.get_base_layer(), key, backend, parameter)
        self.in_features = self.host.in_features
        self.out_features = self.host.out_features
        self.isotune_operator = nn.ModuleDict()
        """The adapters by name. The adapter file uses the names of this attribute and the next."""
        self.isotune_form = nn.ModuleDict()
        """The stored bases of the adapters that act on a subspace."""
        self.configs: dict[str, IsotuneConfig] = {}
        self.mixed_batch: MixedBatch | None = None
        # diffusers' layerwise casting switches this attribute of PEFT's layers off; isotune never casts inputs.
        self.cast_input_dtype_enabled = True

    def __getstate__(self) -> dict[str, Any]:
        # Copying one layer must not copy the whole model; a copied model finds its layers again.
        return {**self.__dict__, "owner": None}

    def _replicate_for_data_parallel(self) -> Layer:
        """Make a replica for nn.DataParallel, whose host is the replica of this layer's host."""
        replica: Layer = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        found, run, host = weakref.ref(replica), type(self).forward, self.host

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            own = found()
            assert own is not None
            own._host = copy.copy(host)
            own._host.module = own.get_base_layer()  # torch sets it after making the replica
            return run(own, *args, **kwargs)

        replica.forward = forward  # type: ignore[method-assign]
        return replica

    # -- adapters ------------------------------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, config: IsotuneConfig) -> None:
        """Add an adapter, the identity until trained; its subspace is placed later, for all layers together.

        Raises:
            ValueError: the configuration does not fit the shape of W.
        """
        weight = self.host.weight
        if not config.sized:
            self.configs[adapter_name] = config  # called again once the sizes have been chosen
            return
        if self.host.quantised and is_partitioned(weight):
            raise ValueError(
                f"{self.key!r} is quantised and partitioned by DeepSpeed ZeRO-3, so its weight cannot be read. "
                "Use ZeRO-2, or load the base unquantised."
            )
        device = torch.device("cpu") if weight.is_meta else weight.device
        adapter = _moved(self._new_adapter(config), device, torch.promote_types(weight.dtype, torch.float32))
        if not config.init_weights and not adapter.starts_by_placement:
            adapter.randomize_parameters()
        if adapter.dropout and self.host.folds and adapter.additive:
            option = next(name for name in vars(config) if name.endswith("_dropout"))
            raise ValueError(
                f"{option}={adapter.dropout} has no meaning on {self.key!r}, a "
                f"{type(self.host.module).__name__}, whose update is added to its weight; set it to 0, or exclude "
                "the module with exclude_modules."
            )
        self._check_rows(config, adapter, moved=config.accumulated_rank(self.key) is not None)
        if adapter.side not in (None, *self.host.sides):
            raise ValueError(
                f"side={adapter.side!r} has no meaning on {self.key!r}, a {type(self.host.module).__name__}: its "
                "weight has a row for each token, and W' = M W would mix the rows of different tokens. Set "
                "side='input', which rotates the embedding vectors, or exclude the module with exclude_modules."
            )
        adapter.refresh(weight.dtype if weight.is_floating_point() else None)
        self.configs[adapter_name] = config
        self.isotune_operator[adapter_name] = adapter
        form = self._new_form(config, device)
        if form is not None:
            self.isotune_form[adapter_name] = form
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _check_rows(self, config: IsotuneConfig, adapter: Adapter, *, moved: bool) -> None:
        """Refuse an adapter whose update follows the rows of W, or has `moved`, where what is done to them is unseen.

        Raises:
            ValueError: this is such an adapter, and such a layer.
        """
        if (adapter.needs_rows or moved) and not self.host.gives_rows:
            what = type(config).__name__ + (" whose subspaces have moved" if moved else "")
            raise ValueError(
                f"{what} cannot be used on {self.key!r}, a {type(self.host.module).__name__} split by "
                "tensor parallelism: its own forward may scale the rows of W, by what cannot be seen in every process. "
                "Exclude the module with exclude_modules, or use another method on it."
            )

    def count_parameters(self, config: IsotuneConfig) -> int:
        """How many parameters an adapter of this configuration has on this layer.

        Raises:
            ValueError: the configuration does not fit the shape of W.
        """
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self._new_adapter(config).parameters())

    def _new_adapter(self, config: IsotuneConfig) -> Adapter:
        return config.build_operator(self.key, self.in_features, self.out_features)

    def _new_form(self, config: IsotuneConfig, device: torch.device) -> nn.Module | None:
        form, accumulated = config.build_basis(self.key, self.in_features, device), config.accumulated_rank(self.key)
        if form is not None and accumulated is not None:
            if accumulated > min(self.in_features, self.out_features):
                raise ValueError(
                    f"accumulated_ranks has {accumulated} for {self.key!r}, whose weight is {self.out_features} × "
                    f"{self.in_features}: no update has a higher rank than the smaller. The file is damaged, or of "
                    "another model."
                )
            form.allocate(accumulated, self.out_features)
        return form

    def adapter(self, adapter_name: str) -> Adapter:
        """The adapter of this name."""
        adapter: Adapter = self.isotune_operator[adapter_name]  # type: ignore[assignment]
        return adapter

    def refresh(self) -> None:
        """Have each adapter make what follows from its buffers, if they have changed."""
        for name in self.isotune_operator:
            self.adapter(name).refresh()

    def subspace(self, adapter_name: str) -> PlacedUpdate:
        """The adapter of this name, which must be placed by a subspace."""
        adapter = self.adapter(adapter_name)
        assert isinstance(adapter, PlacedUpdate)
        return adapter

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from this layer and from the evaluations it shares."""
        super().delete_adapter(adapter_name)
        self.configs.pop(adapter_name, None)
        if self.owner is not None:
            self.owner.forget()

    def bases(self, adapter_name: str) -> list[SubspaceBasis]:
        """The stored bases of an adapter: one on a plain layer, one per expert on experts, none for a rotation."""
        form = self.isotune_form._modules.get(adapter_name)
        if form is None or isinstance(form, SubspaceBasis):  # without going through modules, since every pass asks
            return [] if form is None else [form]
        return [module for module in form.modules() if isinstance(module, SubspaceBasis)]

    def stored_of(self, adapter_name: str) -> list[Tensor]:
        """All stored tensors on which the placement of an adapter depends."""
        return [tensor for basis in self.bases(adapter_name) for tensor in basis.tensors]

    def accumulated(self, adapter_name: str) -> tuple[Tensor, Tensor] | None:
        """U (out, k) and D (k, in) that an adapter has accumulated on earlier subspaces; None if it never moved."""
        return next((basis.accumulated for basis in self.bases(adapter_name)), None)

    @torch.no_grad()
    def put_on_basis(
        self, adapter_name: str, bases: Sequence[Tensor], *, residual: float = 0.0, principal: bool
    ) -> None:
        """Place an adapter with the bases V, (r, in) each, on the base's current weight."""
        adapter, matrix = self.subspace(adapter_name), self.unmerged_matrix()
        accumulated = self.accumulated(adapter_name)
        self._check_rows(self.configs[adapter_name], adapter, moved=accumulated is not None)
        basis = torch.stack(list(bases)) if matrix.ndim == 3 else bases[0]
        placement = adapter.placed(basis, matrix, self.stored_of(adapter_name), self.base_weight, accumulated)
        down, up = self.host.shared(placement.down, placement.up, adapter.basis_rank)
        principal = principal and accumulated is None
        adapter.placement = replace(placement, down=down, up=up, residual=residual, is_principal=principal)

    def stand_on(self, module: nn.Module) -> None:
        """Exchange the host's module for another, which then is the base's."""
        self.base_layer, self.host = module, host_for(module, self.key)

    def without_adapters(self) -> Layer:
        """Make another layer on the same host, without adapters and not part of the model."""
        other = copy.copy(self)
        other._modules = dict(self._modules)
        other.isotune_operator, other.isotune_form, other.configs = nn.ModuleDict(), nn.ModuleDict(), {}
        return other

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Scale an adapter, as PEFT's set_scale does: `scale` times an update, or that fraction of a rotation.

        Raises:
            ValueError: the scale of reflections is neither 0 nor 1.
        """
        if adapter_name in self.isotune_operator:
            self._set_scales({adapter_name: scale})

    def _set_scales(self, scales: Mapping[str, float]) -> None:
        """Set the scales of adapters, or none of them if one is refused."""
        for name, scale in scales.items():
            try:
                self.adapter(name).check_scale(scale)
            except ValueError as error:
                raise ValueError(f"{name!r} on {self.key!r}: {error}") from None
        for name, scale in scales.items():
            self.adapter(name).set_scale(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scales of the active adapters by `scale` until `unscale_layer`, as diffusers does for one call.

        Raises:
            ValueError: as in `set_scale`; then no scale has changed.
        """
        self._set_scales({name: self.adapter(name).relative_scale * scale for name in self.active_here()})

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scales of the active adapters by `scale`; None or 0 restores the configured scales."""
        now = {name: self.adapter(name).relative_scale for name in self.active_here()}
        self._set_scales({name: own / scale if scale else 1.0 for name, own in now.items()})

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT would also cast to the base's dtype, but the pin and the parameters stay in float32.
        target = device or self.host.weight.device
        if target.type == "meta":
            return
        for modules in (self.isotune_operator, self.isotune_form):
            if adapter_name in modules and not any(p.is_meta for p in modules[adapter_name].parameters()):
                _moved(modules[adapter_name], target)

    # -- forward -------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The host's output with the active adapters."""
        if self.disable_adapters and self.merged_adapters:
            self.unmerge()
        recorded = is_recorded()
        if self.owner is not None and not recorded:
            self.owner.see(self)
        if self.mixed_batch is not None and not self.disable_adapters:
            return self._mixed(x, self.mixed_batch, *args, **kwargs)
        names = self.active_here()
        lone = len(names) == 1 and not (recorded and is_plain())
        if lone and not args and not kwargs and (linear := self._bare_linear()) is not None:
            adapter = self.adapter(names[0])
            tensors = adapter.tensors(working_dtype(x))
            result = adapter.fused(x, tensors, linear)
            return adapter.output(x, tensors, Below(self.base_layer, linear[1])) if result is None else result
        return self._adapted(x, names, *args, **kwargs)

    def active_here(self) -> list[str]:
        """Names of the adapters that act now, in order."""
        if self.disable_adapters or self.merged_adapters:
            return []
        names, own = self.active_adapter, self.isotune_operator
        return [name for name in ([names] if isinstance(names, str) else names) if name in own]

    def _adapted(self, x: Tensor, names: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        """The host's output with these adapters, in this order."""

        def call(x: Tensor) -> Tensor:
            result: Tensor = self.base_layer(x, *args, **kwargs)
            return result

        if not names:
            return call(x)
        if self.host.folds:
            fold = partial(self.fold, names, drop=self.training)
            return self.host.call_folded(self.base_layer, fold, x, *args, **kwargs)
        division = Division(mesh_of(self.host.module), self.in_features, self.out_features)
        bias: Tensor | None = getattr(self.host.module, "bias", None)
        if bias is not None and is_managed(self.host.module):
            bias = call(x.new_zeros(1, x.shape[-1]))[0]  # the parameter is here only while its module runs
        below = Below(call, bias, division, self.key)
        for name in names:
            # Each adapter is applied to the output of those before it: the order in which merging would change W.
            adapter = self.adapter(name)
            applied = partial(adapter.output, tensors=adapter.tensors(working_dtype(x)), below=below)
            below = Below(applied, bias, division, self.key)
        return below.call(x)

    def _bare_linear(self) -> FrozenLinear | None:
        """W (out, in) and b of a host that only computes x Wᵀ + b with both frozen; None for any other."""
        host, module = self._host, self.base_layer  # of another module than the host's it does nothing
        if not host.multiplies or module is not host.module or not is_bare(module):
            return None
        weight: Tensor = module.weight  # type: ignore[assignment]
        bias: Tensor | None = module.bias  # type: ignore[assignment]
        trained = weight.requires_grad or (bias is not None and bias.requires_grad)
        exchanged = type(weight) is not host.weight_class and host.is_exchanged()
        return None if trained or exchanged else (host.seen(weight), bias)

    def _mixed(self, x: Tensor, batch: MixedBatch, *args: Any, **kwargs: Any) -> Tensor:
        """Run each sample of the batch with the adapter named for it; "__base__" means none."""
        known = [name if name in self.isotune_operator else BASE for name in batch.of(x)]
        if len(set(known)) == 1:
            return self._adapted(x, [name for name in known[:1] if name != BASE], *args, **kwargs)
        # Split into runs of neighbours: row indices would have to be copied to the device, which costs a wait.
        runs = [(name, len(list(same))) for name, same in itertools.groupby(known)]
        given = torch.split(x, [count for _, count in runs])
        found: dict[int, Tensor] = {}
        for name in dict.fromkeys(known):
            own = [index for index, (other, _) in enumerate(runs) if other == name]
            part = self._adapted(
                torch.cat([given[index] for index in own]), () if name == BASE else (name,), *args, **kwargs
            )
            found |= zip(own, torch.split(part, [runs[index][1] for index in own]), strict=True)
        return torch.cat([found[index] for index in range(len(runs))])

    @property
    def weight(self) -> Tensor:
        """The layer's weight with the active adapters in it, for code that reads it instead of calling the layer.

        Its shape, dtype and device cost nothing; its values are computed when they are used. That raises a ValueError
        where no weight can do what the layer does: in a batch of several adapters, and in training with dropout. A
        quantised weight is returned as it is.
        """
        base: Tensor = self.host.as_read
        if self.host.quantised or not (self.active_here() or self.mixed_batch is not None):
            return base
        return self._adapted_weight() if is_recorded() else AdaptedWeight.of(base, self._adapted_weight, self.key)

    def _adapted_weight(self) -> Tensor:
        names, base = self.active_here(), self.host.weight
        several = self.mixed_batch is not None
        if several or (self.training and any(self.adapter(name).dropout for name in names)):
            raise ValueError(
                f"The weight of {self.key!r} is used by code that does not call the layer, and "
                + ("the samples have different adapters" if several else "an adapter has dropout")
                + ", which no single weight can express. "
                + ("Call the model once for each adapter." if several else "Set its dropout to 0.")
            )
        self._see_the_base()
        matrix = self.host.seen(base) if base.requires_grad else self.host.matrix()
        return self.host.stored(self.fold(names, widen(matrix)).to(matrix.dtype))

    def extra_repr(self) -> str:
        """The adapters, each with its method and size."""
        return ", ".join(f"{name}={self.adapter(name).describe()}" for name in self.configs)


class Linear(Layer):
    """The layer on a linear host; PEFT recognises this class name when it expands "all-linear"."""


def _moved(module: _M, device: torch.device, dtype: torch.dtype | None = None) -> _M:
    """`module.to`, but only if something differs: under FakeTensorMode even a conversion without effect fails."""
    tensors = [*module.parameters(), *module.buffers()]
    if any(t.is_meta for t in tensors):
        return module if dtype is None else module.to(dtype=dtype)  # loading will replace it
    if any(t.device != device or (dtype is not None and t.dtype != dtype) for t in tensors):
        module.to(device=device, dtype=dtype)
    return module
