"""The one tuner layer: adapters on a frozen host, how they compose, and their merge state."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import Tensor, nn

from isotune.adapter.operator import DenseOperator, Operator, Rotation, autocasts, is_symbolic, without_autocast
from isotune.adapter.subspace import Form, SubspaceUpdate, mark
from isotune.algebra.factors import rotated_linear
from isotune.errors import IsotuneWarning
from isotune.hosts import Backend, Kept, LinearHost, QuantisedHost, functions_for, host_for, read_by_forward, widen
from isotune.methods.config import IsotuneConfig, SubspaceConfig
from isotune.parallel.processes import gathered, is_divided, is_sharded, whole
from isotune.parallel.tensor_parallel import Share, mesh_of
from isotune.tuner.placing import AdapterGroup

if TYPE_CHECKING:
    from isotune.tuner.adapted_model import Links

_M = TypeVar("_M", bound=nn.Module)


@dataclass
class MixedBatch:
    """Which adapter each sample of a batch is meant for."""

    names: tuple[str, ...]
    """One a sample; "__base__" for none."""
    copies: int = 1
    """How often generation repeats each sample, one after the other, for beams or for several answers."""
    length: int = 1
    """Positions of a sample in the forward pass that runs."""

    def of(self, x: Tensor) -> list[str]:
        """The names for the rows of an input: samples, their copies, or (rows, n) with the positions of each in turn.

        Raises:
            ValueError: it is none of these.
        """
        for copies in dict.fromkeys((1, self.copies)):
            for repeats in (copies, copies * self.length) if x.ndim == 2 else (copies,):
                if len(x) == len(self.names) * repeats:
                    return [name for name in self.names for _ in range(repeats)]
        raise ValueError(f"adapter_names has {len(self.names)} entries for a batch of {len(x)} samples.")


class Layer(nn.Module, BaseTunerLayer):
    """Adapters of any isotune methods on one frozen layer that multiplies by a matrix W.

    Several active adapters compose as if they had been merged one after the other: an update is added to what the
    adapters before it have made of W, and a rotation turns that. The update itself is always that of the base's own W.

    Args:
        base_layer: the host module, possibly already wrapped by another tuner layer.
        key: its name in the model.
        backend: of a quantised host: how its weight is read and written.
        parameter: of a module of experts: the name of the one that is adapted.

    Raises:
        ValueError: the layer cannot be a host, or the rank does not fit its weight.
    """

    adapter_layer_names = ("isotune_operator",)
    other_param_names = ("isotune_form", "isotune_dropout")

    def __init__(
        self, base_layer: nn.Module, key: str = "", backend: Backend | None = None, parameter: str | None = None
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.key = key
        self.host = host_for(self.get_base_layer(), key, backend, parameter)
        self.quantization_backend: Any = backend  # PEFT's name, by which get_layer_status() finds it
        self.in_features = self.host.in_features
        self.out_features = self.host.out_features
        self.isotune_operator = nn.ModuleDict()
        self.isotune_form = nn.ModuleDict()
        self.isotune_dropout = nn.ModuleDict()
        self.configs: dict[str, IsotuneConfig] = {}
        self.links: Links | None = None
        self.merged_adapters: list[str] = []
        self.requantised: Requantised | None = None
        self._kept: Kept | None = None
        self._batch_adapters: MixedBatch | None = None
        self._host_mark: tuple[int, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy of one layer must not bring the whole model along; the copy of a model links its layers anew.
        return {**self.__dict__, "links": None}

    def train(self, mode: bool = True) -> Layer:
        """Set the mode; a base is checked here too, since transformers' own loader ends in model.eval()."""
        if self.links is not None and not all(form.settled for _, form in self._forms()):
            self.links.settle()
        if mode:
            for _, form in self._forms():
                form.candidates = None  # a compiled forward pass, unlike another, leaves them where they are
        super().train(mode)
        return self

    # -- adapters ------------------------------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, config: IsotuneConfig) -> None:
        """Add an adapter, the identity until trained; a subspace is placed later, for all layers together.

        Raises:
            ValueError: the configuration does not fit the shape of W.
        """
        weight = self.host.weight
        if self.host.quantised and is_divided(weight):
            raise ValueError(
                f"{self.key!r} is quantised and divided by DeepSpeed ZeRO-3, so that its weight cannot be read. Use "
                "ZeRO-2, or load the base unquantised."
            )
        device = torch.device("cpu") if weight.is_meta else weight.device
        wide = torch.promote_types(weight.dtype, torch.float32)
        operator = _placed(self._new_operator(config), device, wide)
        if not config.init_weights:
            operator.randomize_parameters()
        dropout = config.update_dropout if isinstance(config, SubspaceConfig) else 0.0
        if dropout and self.host.folds:
            raise ValueError(
                f"psoft_dropout={dropout} has no meaning on {self.key!r}, a {type(self.get_base_layer()).__name__}, "
                "whose update is computed in its weight; set it to 0, or exclude the module with exclude_modules."
            )
        self.configs[adapter_name] = config
        self.isotune_operator[adapter_name] = operator
        self.isotune_form[adapter_name] = self._new_form(config, device)
        self.isotune_dropout[adapter_name] = nn.Dropout(dropout) if dropout else nn.Identity()
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _new_operator(self, config: IsotuneConfig) -> Operator:
        return config.build_operator(self.key, self.in_features, self.out_features)

    def _new_form(self, config: IsotuneConfig, device: torch.device) -> Form:
        return config.build_form(self.key, self.in_features, device)

    def parts(self, adapter_name: str) -> list[Any]:
        """What a subspace of this adapter is to be found for: the layer itself, or nothing for a rotation."""
        return [self] if isinstance(self.raw_form(adapter_name), SubspaceUpdate) else []

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from this layer and from the computations it shares."""
        super().delete_adapter(adapter_name)
        self.configs.pop(adapter_name, None)
        if self.links is not None:
            self.links.unlink()

    def without_adapters(self) -> Layer:
        """Another layer on the same host, which has no adapters and is not part of the model."""
        other = copy.copy(self)
        other._modules = dict(self._modules)
        for name in ("isotune_operator", "isotune_form", "isotune_dropout"):
            other._modules[name] = nn.ModuleDict()
        other.configs = {}
        return other

    def operator(self, adapter_name: str) -> Operator:
        """The operator of an adapter."""
        operator = self._modules["isotune_operator"]._modules[adapter_name]  # type: ignore[union-attr]
        assert isinstance(operator, Operator)
        return operator

    def raw_form(self, adapter_name: str) -> Form:
        """The form of an adapter, placed or not."""
        form = self._modules["isotune_form"]._modules[adapter_name]  # type: ignore[union-attr]
        assert isinstance(form, Form)
        return form

    def form(self, adapter_name: str) -> Form:
        """The form of an adapter, placed on the host; placing it now if something has changed."""
        form = self.raw_form(adapter_name)
        if torch.compiler.is_compiling():
            return form
        if not form.settled or (form.symbolic and not is_symbolic(self.host.weight)):
            AdapterGroup(adapter_name, [self] if self.links is None else self.links.layers).place()
        return form

    def unmerged_matrix(self) -> Tensor:
        """W (out, in) of the base, also while adapters are merged into the host."""
        if self._kept is not None:
            with self._restored(self._kept):
                return self.host.matrix()
        return self.host.matrix()

    @property
    def _base_weight(self) -> Tensor:
        """The base's own weight parameter, also while adapters are merged into the host."""
        return self.host.weight if self._kept is None else self._kept.weight

    def note_host(self) -> None:
        """Remember the weight that subspaces were placed on."""
        self._host_mark = mark(self._base_weight)

    def host_has_changed(self) -> bool:
        """Whether the host's weight was replaced or written to since subspaces were placed on it."""
        if is_sharded(self._base_weight):
            return False  # it was replaced by its own shards
        return self._host_mark is not None and self._host_mark != mark(self._base_weight)

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Multiply the configured scale of an adapter's update by `scale`, as PEFT's set_scale does.

        Raises:
            ValueError: a rotation, which has no scale but 1, or a scale of 0.
        """
        if adapter_name not in self.isotune_form:
            return
        form, config = self.form(adapter_name), self.configs[adapter_name]
        if isinstance(form, SubspaceUpdate) and isinstance(config, SubspaceConfig):
            form.rescale(config.scale_of(self.key) * scale)
        elif scale != 1.0:
            raise ValueError(
                f"The adapter {adapter_name!r} rotates the inputs of {self.key!r}, and a scaled rotation is none; the "
                f"scale can only be 1, and {scale} was given. Use disable_adapter() to do without it."
            )

    def scale_layer(self, scale: float) -> None:
        """Multiply the updates of the active adapters by `scale` until `unscale_layer`, as diffusers does for a call.

        Raises:
            ValueError: as `set_scale`.
        """
        for name in self.active_adapters:
            if name in self.isotune_form:
                self.set_scale(name, self._scale_in_use(name) * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the updates of the active adapters by `scale`, or set them back to the configured one."""
        for name in self.active_adapters:
            if name in self.isotune_form:
                self.set_scale(name, 1.0 if scale is None else self._scale_in_use(name) / scale)

    def _scale_in_use(self, adapter_name: str) -> float:
        """By what the configured scale of an adapter's update is multiplied."""
        form, config = self.form(adapter_name), self.configs[adapter_name]
        if isinstance(form, SubspaceUpdate) and isinstance(config, SubspaceConfig):
            return form.scale / config.scale_of(self.key)
        return 1.0

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT would also cast to the base's dtype, and the pin and the operator are kept in float32.
        target = device or self.host.weight.device
        if target.type == "meta":
            return
        for modules in (self.isotune_operator, self.isotune_form):
            if adapter_name in modules and not any(p.is_meta for p in modules[adapter_name].parameters()):
                _placed(modules[adapter_name], target)

    # -- forward -------------------------------------------------------------------------------------------------
    # Looking a submodule up as an attribute costs as much as launching an operation, so what every call needs is
    # taken from `_modules` and `_parameters`.

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The host's output with the active adapters' updates."""
        if self._disable_adapters:
            if self.merged:
                self.unmerge()
            return self._host_output(x, *args, **kwargs)
        if self._batch_adapters is not None:
            return self._mixed(x, self._batch_adapters, *args, **kwargs)
        if self.merged_adapters:
            return self._host_output(x, *args, **kwargs)
        operators = self._modules["isotune_operator"]._modules  # type: ignore[union-attr]
        names = self._active_adapter
        active = [name for name in ([names] if isinstance(names, str) else names) if name in operators]
        return self._adapted(x, active, *args, **kwargs)

    def _adapted(self, x: Tensor, names: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        """The host's output with these adapters in this order."""
        if self.host.folds:
            return self._folded(x, names, *args, **kwargs) if names else self._host_output(x, *args, **kwargs)
        if len(names) == 1 and not args and not kwargs:
            operator = self.operator(names[0])
            if isinstance(operator, DenseOperator):
                if self._is_plain(x) and not self._drops(names[0]):
                    return self._fused(x, names[0], operator)
            elif isinstance(operator, Rotation) and self._is_bare():
                return self._rotated(_cast_by_autocast(x), operator)
        return self._composed(x, names, *args, **kwargs)

    def _composed(self, x: Tensor, names: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        """The last adapter wraps what those before it give: the order in which merging would change W."""
        if not names:
            return self._host_output(x, *args, **kwargs)
        *before, name = names
        operator = self.operator(name)
        if not isinstance(operator, Rotation):
            return self._add_update(self._composed(x, before, *args, **kwargs), x, name)
        x = _cast_by_autocast(x)
        share = self._share(x, self.in_features)
        # A rotation mixes the inputs of all processes.
        turned = operator(x) if share is None else share.of(operator(share.joined(x)))
        result = self._composed(turned, before, *args, **kwargs)
        gain = operator.gain
        if gain is None:
            return result
        share = self._share(result, self.out_features)
        # What the gain adds, so that a gain of one changes no bit.
        less, bias = ((gain if share is None else share.of(gain)) - 1).to(result.dtype), self._bias_within(result)
        return result + (result if bias is None else result - bias.to(result.dtype)) * less

    def _share(self, tensor: Tensor, features: int) -> Share | None:
        """Which of the layer's inputs or outputs a tensor has, where tensor parallelism has divided them."""
        if tensor.shape[-1] == features:
            return None
        mesh = mesh_of(self.host.module)
        return None if mesh is None else Share(mesh, features)

    def _bias_within(self, result: Tensor) -> Tensor | None:
        """The host's bias for the outputs that `result` has."""
        bias: Tensor | None = getattr(self.get_base_layer(), "bias", None)
        if bias is None or mesh_of(self.host.module) is None:
            return bias
        own: Tensor = bias.to_local()  # type: ignore[attr-defined]
        return own if own.shape[-1] == result.shape[-1] else gathered(bias)

    def _folded(self, x: Tensor, names: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        """For a host whose input W does not multiply as it is: the host with the adapters in its weight."""

        return self.host.call_folded(self.base_layer, partial(self._fold, names), x, *args, **kwargs)

    def _fold(
        self, names: Sequence[str], matrix: Tensor, rows: Tensor | None = None, at: Tensor | None = None
    ) -> Tensor:
        """`matrix` with these adapters in this order, as `Form.fold`, whatever autocast says."""
        with without_autocast(matrix):
            for name in names:
                matrix = self.form(name).fold(matrix, self.operator(name), rows, at)
        return matrix

    def _host_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.base_layer(x, *args, **kwargs)
        return result

    def _is_plain(self, x: Tensor) -> bool:
        """Whether the host is exactly x Wᵀ + b with frozen W and b, so that it may be computed with its update."""
        return (
            type(self._modules["base_layer"]) is nn.Linear
            and self._is_bare()
            and x.dtype == self._modules["base_layer"]._parameters["weight"].dtype  # type: ignore[union-attr]
            and not autocasts(x)
        )

    def _is_bare(self) -> bool:
        """Whether nothing but the host's own forward and frozen parameters would have a part in calling it."""
        host = self._modules["base_layer"]
        if not self.host.multiplies or host is not self.host.module:
            return False
        if host._forward_hooks or host._forward_pre_hooks or host._backward_hooks or host._backward_pre_hooks:
            return False
        if "forward" in host.__dict__:  # patched, e.g. by a dispatcher
            return False
        weight, bias = host._parameters.get("weight"), host._parameters.get("bias")
        return weight is not None and not weight.requires_grad and (bias is None or not bias.requires_grad)

    def _drops(self, name: str) -> bool:
        return self.training and type(self._modules["isotune_dropout"]._modules[name]) is not nn.Identity  # type: ignore[union-attr]

    def _fused(self, x: Tensor, name: str, operator: DenseOperator) -> Tensor:
        return self._update_in_use(name).linear(x, operator.difference(x.dtype), *self._frozen())

    def _rotated(self, x: Tensor, operator: Rotation) -> Tensor:
        weight, bias = self._frozen()
        matrix = self.host.stored(weight)  # its own inverse: as it is, or transposed
        result = rotated_linear(x, operator.gain, operator.chain, operator.tensors(x.dtype), matrix, bias)
        operator.watch(result)
        return result

    def _frozen(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a bare host."""
        parameters = self._modules["base_layer"]._parameters  # type: ignore[union-attr]
        weight = parameters["weight"]
        assert weight is not None
        return weight, parameters["bias"]

    def _add_update(self, result: Tensor, x: Tensor, name: str) -> Tensor:
        operator = self.operator(name)
        assert isinstance(operator, DenseOperator)
        return self._update_in_use(name).update(
            self.isotune_dropout[name](x),
            operator.difference(result.dtype),
            result,
            self._share(x, self.in_features),
            self._share(result, self.out_features),
        )

    def draws(self, adapter_name: str) -> bool:
        """Whether an adapter drops something at random in training."""
        dropout = self.isotune_dropout[adapter_name]
        return not isinstance(dropout, nn.Identity) or self.operator(adapter_name).sample_noise(1) is not None

    def _update_in_use(self, name: str) -> SubspaceUpdate:
        form = self.form(name)
        assert isinstance(form, SubspaceUpdate)
        if not torch.compiler.is_compiling() and form.candidates is not None:
            form.candidates = None  # a file's pin would have been loaded before the first forward
        return form

    def _mixed(self, x: Tensor, batch: MixedBatch, *args: Any, **kwargs: Any) -> Tensor:
        """Each sample of the batch with the adapter named for it, "__base__" for none."""
        known = [name if name in self.isotune_operator else "__base__" for name in batch.of(x)]
        if len(set(known)) == 1:
            return self._adapted(x, [name for name in known[:1] if name != "__base__"], *args, **kwargs)
        parts: Tensor | None = None
        for name in dict.fromkeys(known):
            rows = torch.tensor([i for i, other in enumerate(known) if other == name], device=x.device)
            part = self._adapted(x[rows], () if name == "__base__" else (name,), *args, **kwargs)
            if parts is None:
                parts = part.new_zeros(len(known), *part.shape[1:])
            parts = parts.index_copy(0, rows, part)
        assert parts is not None
        return parts

    # -- merging -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The change of the host's weight by an adapter alone, in the layout of the weight and float32 at least."""
        matrix = widen(self.unmerged_matrix())
        # An update is folded into zero, which keeps its own precision.
        start = torch.zeros_like(matrix) if self.raw_form(adapter_name).additive else matrix
        with whole(self.operator(adapter_name).parameters()):
            return self.host.stored(self._fold([adapter_name], start) - start)

    @torch.no_grad()
    def low_rank(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Exact factors (out, r) and (r, in) of the change of W by an adapter alone, float32 at least.

        Raises:
            ValueError: the change has no low rank.
        """
        matrix = self.unmerged_matrix()
        with without_autocast(matrix), whole(self.operator(adapter_name).parameters()):
            return self.form(adapter_name).low_rank(matrix, self.operator(adapter_name))

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put W with the adapters in it in the place of the host's weight, computed in float32 and rounded once.

        The original parameter is kept, and `unmerge` puts it back bit for bit; modules that share it (tied
        embeddings) keep it too. On a quantised host the result is quantised as the layer was, and `requantised` says
        what that changes.

        Raises:
            ValueError: with `safe_merge`, the result would hold NaN or infinity; or the host is quantised by a library
                that cannot write back; nothing is changed.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.isotune_operator]
        if not names:
            return
        self.host.check_merge()
        merged = self._merged_matrix(names, safe_merge)
        if self._kept is None:
            self._kept = self.host.keep()
        self.host.set_matrix(merged)
        self.merged_adapters.extend(names)
        if self.host.quantised:
            self.requantised = Requantised.measure(self.unmerged_matrix(), merged, self.host.matrix())

    @torch.no_grad()
    def check_merge(self, adapter_names: list[str] | None = None, safe_merge: bool = True) -> None:
        """Raise what `merge` would raise, and change nothing."""
        names = self.active_adapters if adapter_names is None else adapter_names
        names = [n for n in names if n in self.isotune_operator and n not in self.merged_adapters]
        if names:
            self.host.check_merge()
        if names and safe_merge:
            self._merged_matrix(names, safe_merge=True)

    def _merged_matrix(self, names: list[str], safe_merge: bool) -> Tensor:
        matrix = self.unmerged_matrix()
        merged = self._fold([*self.merged_adapters, *names], widen(matrix)).to(matrix.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(
                f"Merging {', '.join(names)} into {self.key!r} gives NaN or infinite weights, so nothing was merged. "
                "The adapter is broken (a diverged training?), or its values exceed the range of "
                f"{matrix.dtype}: load a good checkpoint, or the base in float32."
            )
        return merged

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the original weight back, the same bits."""
        if not self.merged:
            warnings.warn("Nothing is merged, so there is nothing to unmerge.", IsotuneWarning, stacklevel=2)
            return
        if self._kept is not None:
            self.host.restore(self._kept)
        self._kept = self.requantised = None
        self.merged_adapters.clear()

    @contextmanager
    def _restored(self, kept: Kept) -> Iterator[None]:
        merged = self.host.keep()
        self.host.restore(kept)
        try:
            yield
        finally:
            self.host.restore(merged)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the change of W is of rank r."""
        if adapter_name not in self.isotune_form:
            return True
        return self.raw_form(adapter_name).has_low_rank(self.operator(adapter_name))

    def extra_repr(self) -> str:
        """The adapters, each with its method and size."""
        return ", ".join(f"{name}={form.describe(self.operator(name))}" for name, form in self._forms())

    def _forms(self) -> Iterator[tuple[str, Form]]:
        for name in self.configs:
            yield name, self.raw_form(name)


class Linear(Layer):
    """The layer on a linear host; the name is what PEFT recognises when it expands "all-linear"."""


@dataclass(frozen=True)
class Requantised:
    """What quantising a merged weight W' again has changed, in Frobenius norms."""

    of_weight: float
    """The change over ‖W'‖: the relative change of the output for inputs without a preferred direction."""
    of_update: float
    """The change over ‖W' − W‖, what the adapters themselves change."""

    @classmethod
    def measure(cls, before: Tensor, wanted: Tensor, found: Tensor) -> Requantised:
        """From W, W' and what W' has become."""
        before, wanted, found = widen(before), widen(wanted), widen(found)
        error = torch.linalg.vector_norm(found - wanted)
        whole, update = torch.linalg.vector_norm(wanted), torch.linalg.vector_norm(wanted - before)
        tiny = torch.finfo(whole.dtype).tiny
        return cls(float(error / whole.clamp_min(tiny)), float(error / update.clamp_min(tiny)))


def warn_of_requantising(layers: Iterable[Layer]) -> None:
    """Say once what merging into quantised layers has changed."""
    found = {layer.key: layer.requantised for layer in layers if layer.requantised is not None}
    if not found:
        return
    worst = max(found, key=lambda key: found[key].of_weight)
    mean = [sum(getattr(one, name) for one in found.values()) / len(found) for name in ("of_weight", "of_update")]
    warnings.warn(
        f"The merged weights of {len(found)} layers were quantised again, which changed them by {mean[0]:.2g} of their "
        f"norm on average (most, {found[worst].of_weight:.2g}, in {worst!r}): {mean[1]:.2g} times what the adapters "
        "change. Left unmerged, adapters on a quantised base are exact.",
        IsotuneWarning,
        stacklevel=3,
    )


def adapt(module: nn.Module, key: str = "", **quantisation: Any) -> Layer:
    """The layer around a module, without adapters yet.

    Args:
        module: the frozen layer, possibly already wrapped by another tuner layer.
        key: its name in the model.
        quantisation: what PEFT's `get_quantization_kwargs` finds on the model.

    Raises:
        ValueError: the module cannot be a host.
    """
    inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    backend = _backend_of(inner, key, **quantisation)
    return (Layer if backend is None and not LinearHost.accepts(inner) else Linear)(module, key, backend)


def _backend_of(module: nn.Module, key: str, get_apply_tensor_subclass: Any = None) -> Backend | None:
    """How the weight of a quantised module is read and written; None for a module that is not quantised."""
    own = functions_for(module, key)
    if own is not None:
        return own
    weight = module._parameters.get("weight")
    if type(weight) is nn.Parameter and weight.is_floating_point():
        return None  # PEFT would import every quantisation library that is installed
    backend = resolve_quantization_backend(
        module, get_apply_tensor_subclass=get_apply_tensor_subclass or _unknown_configuration
    )
    if isinstance(backend, ForwardOnlyQuantizationBackend):
        if backend.backend_name in ("gptq", "awq"):
            return read_by_forward(f"gptqmodel ({backend.backend_name})")
        raise ValueError(
            f"The target module {key!r} is quantised by {backend.backend_name}, whose weights cannot be dequantised, "
            f"so it cannot be adapted. Supported: {', '.join(QuantisedHost.kinds)}. Quantise the base with one of "
            "these, or exclude the module with exclude_modules."
        )
    if backend is not None and backend.backend_name == "torchao" and get_apply_tensor_subclass is None:
        backend.supports_merge = False
    return backend


def _unknown_configuration() -> None:
    """Stands where the configuration that a torchao model was quantised with is not known."""


def _cast_by_autocast(x: Tensor) -> Tensor:
    """x in the dtype that a linear layer would give it here."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if autocasts(x) else x


def _placed(module: _M, device: torch.device, dtype: torch.dtype | None = None) -> _M:
    """`module.to`, only where something differs: under FakeTensorMode even a conversion to the same would fail."""
    tensors = [*module.parameters(), *module.buffers()]
    if any(t.is_meta for t in tensors):
        return module if dtype is None else module.to(dtype=dtype)  # to be replaced by what is loaded
    if any(t.device != device or (dtype is not None and t.dtype != dtype) for t in tensors):
        module.to(device=device, dtype=dtype)
    return module
