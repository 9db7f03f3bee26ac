"""What every host is: a frozen layer seen as a matrix W of shape (out, in)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from isotune.internals.torch_state import is_hooked, own_parameters
from isotune.parallel.sharding import gathered, is_partitioned, is_whole, shape_of
from isotune.parallel.tensor_parallel import mesh_of, split_like

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

Fold = Callable[..., Tensor]
"""fold(matrix, rows, at) -> matrix with the active adapters in it, in its own dtype; the others as in Form.fold."""


class Kept(NamedTuple):
    """What `Host.restore` puts back."""

    weight: Tensor
    """What `Host.weight` was."""
    module: nn.Module | None = None
    """A copy of the layer that holds what else belongs to the weight, where there is more."""


class Host(ABC):
    """A frozen layer seen as a matrix W of shape (out, in)."""

    kinds: ClassVar[tuple[str, ...]]
    quantised: ClassVar[bool] = False
    """Whether W is packed: `matrix` makes it anew at each call, and `set_matrix` rounds it."""
    multiplies = False
    """Whether the module is x Wᵀ + b by its parameters weight and bias and nothing more, so that this may be computed
    in its place."""
    folds: ClassVar[bool] = False
    """Whether adapters act on W (or rows of it) at each call, since W does not multiply the input as it is."""

    def __init__(self, module: nn.Module, name: str = "") -> None:
        self.module = module
        self.name = name

    @classmethod
    @abstractmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Whether this class is the host of such a module."""

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """The parameter that holds W, in the module's own layout."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """W as (out, in), in its own dtype, without a graph; a view of the parameter unless `quantised`."""

    def seen(self, weight: Tensor) -> Tensor:
        """A weight in the module's own layout as W, of a host that is not `quantised`."""
        raise NotImplementedError(f"The weight of {type(self).__name__} is packed.")

    @abstractmethod
    def stored(self, matrix: Tensor) -> Tensor:
        """A matrix (out, in) in the layout of the module's own weight."""

    @abstractmethod
    def set_matrix(self, matrix: Tensor) -> None:
        """Put `matrix` (out, in) in the place of W, as a new parameter: whoever shares the old one keeps it."""

    def check_merge(self) -> None:  # noqa: B027
        """Raise a ValueError if `set_matrix` is not possible."""

    @abstractmethod
    def keep(self) -> Kept:
        """What `restore` needs to undo a `set_matrix` to come."""

    @abstractmethod
    def restore(self, kept: Kept) -> None:
        """Put back what `keep` has returned, the same bits, on the device and in the dtype that the layer has now."""

    def call_folded(self, base_layer: nn.Module, fold: Fold, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output with `fold` applied to W, for a host that `folds`.

        Args:
            base_layer: what stands in the model for the host: the module itself, or another tuner's layer around it.
            fold: of type `Fold`.
            x, args, kwargs: of the layer's forward.
        """
        raise NotImplementedError(f"{type(self).__name__} multiplies its input by W, so nothing has to be folded.")

    @property
    @abstractmethod
    def in_features(self) -> int:
        """Columns of W."""

    @property
    @abstractmethod
    def out_features(self) -> int:
        """Rows of W."""


class WeightHost(Host):
    """A layer whose parameter named weight holds W, with the same elements in the same order.

    Raises:
        ValueError: the weight is not floating-point, or has another number of dimensions than `dimensions`.
    """

    parameter = "weight"
    """Its name in the module."""

    @property
    def dimensions(self) -> int:
        """How many the weight has."""
        return 2

    def __init__(self, module: nn.Module, name: str = "") -> None:
        super().__init__(module, name)
        if self.parameter not in own_parameters(module):
            raise ValueError(
                f"The weight of {name or type(module).__name__!r}, a {type(module).__module__}."
                f"{type(module).__qualname__}, is no parameter: it is computed from others, as weight_norm and "
                "parametrizations do, so no adapter can be merged into it. Remove the parametrisation first "
                "(torch.nn.utils.parametrize.remove_parametrizations), or exclude the module with exclude_modules."
            )
        weight, shape = self.weight, shape_of(self.weight)
        if _is_packed(weight):
            raise ValueError(
                f"The weight of {name or type(module).__name__!r} is a {type(weight).__module__}."
                f"{type(weight).__qualname__}, which only linear layers can have. Load the base model without "
                "quantising it, or choose others in target_modules and target_parameters."
            )
        if len(shape) != self.dimensions or weight.dtype not in _DTYPES:
            raise ValueError(
                f"The weight of {name or type(module).__name__!r}, a {type(module).__module__}."
                f"{type(module).__qualname__}, has shape {tuple(shape)} and dtype {weight.dtype}; "
                f"{self.dimensions} dimensions and floating-point numbers of 16 bits or more are needed. A layer "
                "packed or quantised by this library cannot be adapted: load the base model unquantised or quantised "
                "by another (see the guide on quantised bases), or exclude the layer with exclude_modules."
            )

    @property
    def weight(self) -> nn.Parameter:
        """The parameter named weight."""
        weight: nn.Parameter = getattr(self.module, self.parameter)
        return weight

    def refuse_gathered_at_calls(self) -> None:
        """Refuse `call_with` where DeepSpeed ZeRO-3 gathers the weight of the host at its calls.

        Raises:
            ValueError: it does.
        """
        weight = own_parameters(self.module).get(self.parameter)
        if weight is not None and is_partitioned(weight) and is_hooked(self.module):
            raise ValueError(
                f"Adapters on {self.name!r} put another weight into it at each call, and DeepSpeed ZeRO-3 gathers the "
                "original alone. Leave it out of target_modules or target_parameters, or use ZeRO-2 or FSDP2."
            )

    def call_with(self, base_layer: nn.Module, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of what stands in the model for the host, with another weight in the place of its own.

        Args:
            base_layer: the host's module, or another tuner's layer around it.
            weight: in the layout of the module; its gradient flows back.
            args, kwargs: of the layer's forward.
        """
        # Where FSDP1 and replicas of DataParallel keep it, and what a forward finds first; torch.jit.trace allows no
        # functional_call.
        if self.parameter in vars(self.module) or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            with attributes_of(self.module, {self.parameter: weight}):
                return base_layer(*args, **kwargs)  # type: ignore[no-any-return]
        name = next(name for name, module in base_layer.named_modules() if module is self.module)
        own = f"{name}.{self.parameter}" if name else self.parameter
        result: Tensor = functional_call(base_layer, {own: weight}, args, kwargs)
        return result

    def check_merge(self) -> None:
        """Refuse a weight of which this process holds a part only, but for the parts of tensor parallelism.

        Raises:
            ValueError: it does.
        """
        if not is_whole(self.weight) and mesh_of(self.module) is None:
            raise ValueError(
                f"The weight of {self.name!r} is spread over several processes, and nothing can be merged into a part "
                "of it; nothing was merged. Save the adapter, and merge it into the base model loaded in one process."
            )

    @property
    def in_features(self) -> int:
        """Columns of W."""
        return self._matrix_shape()[-1]

    @property
    def out_features(self) -> int:
        """Rows of W."""
        return self._matrix_shape()[-2]

    def _matrix_shape(self) -> torch.Size:
        # Also of a weight that is not here as a whole.
        return self.seen(torch.empty(shape_of(self.weight), device="meta")).shape

    def matrix(self) -> Tensor:
        """W; where it is spread over processes, every one that has a part must ask."""
        return self.seen(gathered(self.weight).detach())

    def seen(self, weight: Tensor) -> Tensor:
        """The weight as W: all dimensions but the first as one."""
        return weight.flatten(1)

    def stored(self, matrix: Tensor) -> Tensor:
        """W in the shape of the weight."""
        return matrix.reshape(shape_of(self.weight))

    def set_matrix(self, matrix: Tensor) -> None:
        """Replace the weight parameter by a new one, split over processes as it was."""
        before = self.weight
        weight = self.stored(matrix).contiguous().to(before.device, before.dtype)
        weight = weight if mesh_of(self.module) is None else split_like(weight, before)
        setattr(self.module, self.parameter, nn.Parameter(weight, requires_grad=before.requires_grad))

    def keep(self) -> Kept:
        """The parameter."""
        return Kept(self.weight)

    def restore(self, kept: Kept) -> None:
        """The very parameter object, so ties to other modules are ties again."""
        original, current = kept.weight, self.weight
        assert isinstance(original, nn.Parameter)
        if original.device != current.device or original.dtype != current.dtype:  # moved or cast meanwhile
            moved = original.data.to(current.device, current.dtype)
            if mesh_of(self.module) is not None:  # a DTensor takes no other data
                original = nn.Parameter(moved, requires_grad=original.requires_grad)
            else:
                original.data = moved
        setattr(self.module, self.parameter, original)


@contextmanager
def attributes_of(module: nn.Module, values: dict[str, Any]) -> Iterator[None]:
    """A block in which a module's own attributes have other values; its forward finds them before its parameters."""
    held = vars(module)
    before = {name: held[name] for name in values if name in held}
    held.update(values)
    try:
        yield
    finally:
        for name in values:
            del held[name]
        held.update(before)


def _is_packed(weight: Tensor) -> bool:
    """Whether it is of a library's own class, as torchao's, which name the dtype that they were packed from."""
    return hasattr(weight, "__tensor_flatten__") and not type(weight).__module__.startswith("torch.")


def widen(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least, itself if it is that wide."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
