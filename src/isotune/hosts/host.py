"""The base class of hosts: a frozen layer seen as a matrix W of shape (out, in)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from isotune.internals.deepspeed_state import is_partitioned
from isotune.internals.offloading import brought, is_offloaded
from isotune.internals.torch_state import is_bare
from isotune.parallel.sharding import gathered, is_whole, shape_of
from isotune.parallel.tensor_parallel import mesh_of, split_like

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

Fold = Callable[..., Tensor]
"""fold(matrix, rows=…, at=…, multiple=…) -> matrix with the active adapters in it, in its own dtype; the
options say which part of W the matrix is, as in `adapter.operator.Part`."""


class Kept(NamedTuple):
    """What `Host.restore` restores."""

    weight: Tensor
    """The former `Host.weight`."""
    module: nn.Module | None = None
    """A copy of the layer that holds whatever else belongs to the weight, if anything does."""


class Host:
    """A frozen layer seen as a matrix W of shape (out, in), whose elements are those of one parameter.

    Args:
        module: the layer.
        name: its name in the model, for messages.

    Raises:
        ValueError: adapters cannot act on its weight.
    """

    kinds: ClassVar[tuple[str, ...]]
    modules: ClassVar[tuple[type[nn.Module], ...]] = ()
    """Module classes that this host is chosen for, unless a parameter's name or a back end decides."""
    quantised: ClassVar[bool] = False
    """Whether W is packed: `matrix` dequantises it at each call, and `set_matrix` rounds it."""
    sides: ClassVar[tuple[str, ...]] = ("input", "output")
    """The sides of the layer that can be rotated."""
    folds: ClassVar[bool] = False
    """Whether adapters act on W (or rows of it) at each call, since the layer does not simply multiply by W."""
    gives_rows = True
    """Whether, if rows of W are looked up, it is known by what they are multiplied."""
    multiplies = False
    """Whether the module only computes x Wᵀ + b from its weight and bias, so that this may be computed in its place."""
    stands_in = False
    """Whether the module approximates the base's own layer, so that an update means something on it alone."""
    parameter = "weight"
    """Name of the parameter that holds W."""
    transposed = False
    """Whether the parameter is Wᵀ."""

    def __init__(self, module: nn.Module, name: str = "") -> None:
        self.module = module
        self.name = name
        self._in_use = threading.RLock()
        self.check()
        self.weight_class = self._weight_class()
        self.out_features, self.in_features = self.shape()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_in_use": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _in_use=threading.RLock())

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Whether this is the host for a module."""
        return isinstance(module, cls.modules)

    @property
    def dimensions(self) -> int:
        """The number of dimensions of the parameter."""
        return 2

    def check(self) -> None:
        """Refuse a layer that adapters cannot act on, by the errors of the class."""
        module, name = self.module, self.name or type(self.module).__name__
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        if self.parameter not in dict(module.named_parameters(recurse=False, remove_duplicate=False)):
            raise ValueError(
                f"The weight of {name!r}, a {kind}, is not a parameter: it is computed from others, as by weight_norm, "
                "parametrizations or pruning, so no adapter can be merged into it. Make it a parameter again first "
                "(torch.nn.utils.parametrize.remove_parametrizations, prune.remove), or exclude the module with "
                "exclude_modules."
            )
        weight, shape = self.weight, shape_of(self.weight)
        if is_packed(type(weight)):
            raise ValueError(
                f"The weight of {name!r} is a {type(weight).__module__}.{type(weight).__qualname__}, which is only "
                "supported in linear layers. Load the base model without quantising it, or choose others in "
                "target_modules and target_parameters."
            )
        if len(shape) != self.dimensions or weight.dtype not in _DTYPES:
            raise ValueError(
                f"The weight of {name!r}, a {kind}, has shape {tuple(shape)} and dtype {weight.dtype}; it must have "
                f"{self.dimensions} dimensions and floating-point numbers of 16 bits or more. A layer packed or "
                "quantised by this library cannot be adapted: load the base model unquantised or quantised by another "
                "library (see the guide on quantised bases), or exclude the layer with exclude_modules."
            )

    def is_exchanged(self) -> bool:
        """Whether the weight has been packed by a library since, or unpacked, in the same module."""
        now = self._weight_class()
        if is_packed(self.weight_class):
            return now in (nn.Parameter, Tensor)  # a shard of what is packed is no other weight
        return is_packed(now)

    def _weight_class(self) -> type:
        return type(getattr(self.module, self.parameter, None))  # a layer may call what it has packed otherwise

    @property
    def weight(self) -> Tensor:
        """The tensor that holds W, in the module's own layout."""
        weight: Tensor = getattr(self.module, self.parameter)
        return weight

    @property
    def as_read(self) -> Tensor:
        """The weight that code finds which reads it from the module instead of calling it."""
        return self.weight

    def shape(self) -> tuple[int, int]:
        """The shape of W, even if this process holds only a part of it."""
        *_, rows, columns = self.seen(torch.empty(shape_of(self.weight), device="meta")).shape
        return rows, columns

    def matrix(self) -> Tensor:
        """W in its own dtype, without a graph: a view of the parameter unless it is gathered or `quantised`.

        If it is sharded or partitioned, every process that holds a part must call this.
        """
        return self.seen(gathered(self.weight).detach())

    def seen(self, weight: Tensor) -> Tensor:
        """Convert a weight from the module's own layout to W, (out, in)."""
        return weight.mT if self.transposed else weight

    def stored(self, matrix: Tensor) -> Tensor:
        """Convert a matrix (out, in) to the module's own layout."""
        return matrix.mT if self.transposed else matrix

    def call_folded(self, base_layer: nn.Module, fold: Fold, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output with adapters in its weight, for a host that `folds`.

        Args:
            base_layer: the module itself, or another tuner's layer around it.
            fold: folds the adapters into a matrix.
            x, args, kwargs: arguments of the layer's forward.

        Raises:
            ValueError: DeepSpeed ZeRO-3 gathers the weight when the module is called.
        """
        module = self.module
        forward: Callable[..., Any] = base_layer
        if is_partitioned(self.weight) and not is_bare(module):
            raise ValueError(
                f"Adapters on {self.name!r} replace its weight at each call, but DeepSpeed ZeRO-3 only gathers the "
                "original. Leave it out of target_modules or target_parameters, or use ZeRO-2 or FSDP2."
            )
        if base_layer is module and is_offloaded(module):
            # accelerate's wrapper would bring the base's weight a second time.
            forward = partial(type(module).forward, module)
        # Otherwise another thread would find this thread's weight in the module.
        with nullcontext() if torch.compiler.is_compiling() else self._in_use, brought(module):
            if self.is_computed():
                self.check()  # what the layer computes would come before what is put here
            weight = self.folded(fold, (*args, *kwargs.values()))
            with _attribute_of(module, self.parameter, weight):
                result: Tensor = forward(x, *args, **kwargs)
        return result

    def folded(self, fold: Fold, arguments: tuple[Any, ...]) -> Tensor:
        """The weight with `fold` applied to W for a call with these arguments, rounded once to its own dtype."""
        return self.stored(fold(widen(self.seen(self.weight)))).to(self.weight.dtype)

    def is_computed(self) -> bool:
        """Whether the module computes its weight from other parameters, at each reading or by a hook before each call.

        As parametrisations do, or prune and the former weight_norm.
        """
        if isinstance(self.weight, nn.Parameter):
            return False
        by_hook = self.parameter in vars(self.module)  # and there FSDP1 and replicas of DataParallel keep it
        own = dict(self.module.named_parameters(recurse=False)) if by_hook else {}
        return is_parametrized(self.module, self.parameter) or any(f.startswith(f"{self.parameter}_") for f in own)

    def check_merge(self) -> None:
        """Refuse a layer into which `set_matrix` cannot write.

        Raises:
            ValueError: this process holds only a part of the weight, except under tensor parallelism; or the weight has
                been parametrised since.
        """
        self.check()
        if not is_whole(self.weight) and mesh_of(self.module) is None:
            raise ValueError(
                f"The weight of {self.name!r} is spread over several processes, and no adapter can be merged into a "
                "part of it, so nothing was merged. Save the adapter, and merge it into the base model loaded in one "
                "process."
            )

    def set_matrix(self, matrix: Tensor) -> None:
        """Replace W by `matrix` (out, in), as a new parameter; modules that share the old one keep it."""
        before, weight = self.weight, self.stored(matrix)
        if mesh_of(self.module) is None:
            weight = torch.empty_like(before).copy_(weight)  # channels last too
        else:
            weight = split_like(weight.contiguous().to(before.device, before.dtype), before)
        setattr(self.module, self.parameter, nn.Parameter(weight, requires_grad=before.requires_grad))

    def shared(self, down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """The factors of an update, down (rank or more, in) and up (out, rank or more), or the layer's own for them."""
        return down, up

    def keep(self) -> Kept:
        """Save what `restore` needs to undo a later `set_matrix`."""
        return Kept(self.weight)

    def restore(self, kept: Kept) -> None:
        """Put the same parameter object back, so that ties are restored, on the layer's device and in its dtype."""
        original, current = kept.weight, self.weight
        assert isinstance(original, nn.Parameter)
        if original.device != current.device or original.dtype != current.dtype:  # moved or cast meanwhile
            moved = original.data.to(current.device, current.dtype)
            if current.is_meta or mesh_of(self.module) is not None:  # then torch cannot replace the data
                original = nn.Parameter(moved, requires_grad=original.requires_grad)
            else:
                original.data = moved
        setattr(self.module, self.parameter, original)


def is_packed(kind: type) -> bool:
    """Whether a class of tensors is a library's own, such as torchao's, with the dtype its values were packed from."""
    return hasattr(kind, "__tensor_flatten__") and not kind.__module__.startswith("torch.")


@contextmanager
def _attribute_of(module: nn.Module, name: str, value: Tensor) -> Iterator[None]:
    """Within this block, give a module an attribute that its forward finds before the parameter of the same name."""
    held = vars(module)
    before = {name: held[name]} if name in held else {}  # FSDP1 and replicas of DataParallel keep the weight here
    held[name] = value
    try:
        yield
    finally:
        del held[name]
        held.update(before)


def widen(tensor: Tensor) -> Tensor:
    """The tensor in at least float32; itself if it is wide enough."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
