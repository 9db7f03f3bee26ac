"""The base classes of adapters: trained parameters in one form on one frozen layer, and those that are an operator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from isotune.adapter.evaluation import Given, SharedEvaluation, evaluate_alone
from isotune.algebra.means import Means
from isotune.parallel.sharding import gathered, is_partitioned, is_whole
from isotune.parallel.tensor_parallel import UNDIVIDED, Division

FrozenLinear = tuple[Tensor, Tensor | None]
"""Weight (out, in) and bias (out,) or None of a frozen layer that only computes x Wᵀ + b."""
Base = Tensor | FrozenLinear
"""What an update is added to: the output of any layer, (..., out), or a linear layer that is computed with it."""


class Below(NamedTuple):
    """The layer to which an adapter is applied."""

    call: Callable[[Tensor], Tensor]
    """Its forward, on x alone."""
    bias: Tensor | None
    """The frozen layer's bias; None if it has none."""
    division: Division = UNDIVIDED
    """How tensor parallelism splits the frozen layer's inputs and outputs."""
    key: str = ""
    """The layer's name."""

    def no_tensor(self, result: object) -> ValueError:
        """The error for a layer whose own forward returns something else, as some routers of experts do."""
        return ValueError(
            f"The layer {self.key!r} returns a {type(result).__name__}, and no tensor that this adapter could change. "
            "Leave it out with exclude_modules, or take a rotation of inputs, such as OFT."
        )


class Part(NamedTuple):
    """Which part of W a matrix is that adapters are folded into."""

    rows: Tensor | None = None
    """If the matrix holds only some rows (an embedding's look-up), these rows of W itself, up to a factor."""
    at: Tensor | None = None
    """Which rows of W, or which experts, it holds; None for all."""
    multiple: Tensor | None = None
    """By what the look-up has multiplied these rows, a scalar; None for 1."""


ALL = Part()


class Stored(nn.Module):
    """A module whose buffers are what a file stores: they keep their dtypes, whatever the model is cast to."""

    def held(self) -> dict[str, Tensor | None]:
        """All buffers by name."""
        return dict(self._buffers)

    def hold(self, buffers: Mapping[str, Tensor | None]) -> None:
        """Exchange the buffers of these names for other tensors, of any shape."""
        for name, tensor in buffers.items():
            setattr(self, name, tensor)

    def _apply(self, fn: Any, recurse: bool = True) -> Stored:
        before = self.held()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in before.items():
            now = self._buffers[name]
            if tensor is not None and now is not None and now.dtype != tensor.dtype:
                setattr(self, name, tensor.to(now.device))
        return self


class Adapter(Stored, ABC):
    """Trained parameters in their form on one layer, which they leave as it is when training starts.

    A method's subclass registers parameters and maps them to the tensors by which it acts. What these tensors do to a
    layer is defined by the form: `SubspaceAdapter`, `RotationAdapter` or `LowRankAdapter`.

    Args:
        size: n of an n × n operator, or the rank of an update without one.
    """

    evaluated: ClassVar[tuple[str, ...]]
    """Names of the parameters that `evaluate` reads; such an attribute may also be None."""
    beside: ClassVar[tuple[str, ...]] = ()
    """Names of parameters that act directly and may differ in shape between layers; they follow the evaluated ones."""
    near_one: ClassVar[tuple[str, ...]] = ()
    """Names of the parameters that start at 1, around which half precision is too coarse for training."""
    averages: Means = {}  # noqa: RUF012
    """Parameter name -> how to average it over several adapters; a method that lacks a name has no mean."""
    additive: ClassVar[bool]
    """Whether the form adds an output of its own; if not, it rotates one side of the layer."""
    principal: ClassVar[bool] = False
    """Whether it acts on the coordinates of its placement's subspace alone, so that it turns the principal weight."""
    side: Literal["input", "output"] | None = None
    """Whether M rotates the inputs, W' = W Mᵀ, or the outputs without the bias, W' = M W; None for an update."""
    batched: ClassVar[bool] = True
    """Whether `evaluate` reads parameters alone, so that alike adapters of all layers are evaluated in one batch.

    If not, it reads `placement` too, and its graph saves no tensors, so that it may be differentiated more than once.
    """
    needs_rows: ClassVar[bool] = False
    """Whether folding into looked-up rows of an embedding needs to know by what they were multiplied."""
    placement: object = None
    """Where the adapter acts on its layer's weight, exchanged as a whole; None if that is not or need not be found."""

    starts_by_placement: ClassVar[bool] = False
    """Whether the values at which its parameters start follow from a placement; until then they are zero."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.dropout = 0.0
        """Probability of dropout in training, if the method or the form has it."""
        self.shared: SharedEvaluation | None = None
        """The evaluation shared with the adapters of other layers, set by the model-level object."""
        self.slot = -1
        self.given = Given()
        """The tensors that compiled code takes from an earlier evaluation."""

    # -- parameters -> tensors -----------------------------------------------------------------------

    @abstractmethod
    def evaluate(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Map parameters, all with the same leading dimensions, to tensors with these dimensions in front."""

    def batch_key(self) -> Hashable:
        """Adapters of one class with equal keys and parameter shapes are evaluated in one batch: n or r alone."""
        return self.size

    def complete(self, tensors: tuple[Tensor, ...], drop: bool = False) -> tuple[Tensor, ...]:
        """Turn the result of `evaluate` into what acts on a layer; with `drop`, random parts of it do nothing."""
        return tensors

    def penalty(self) -> Tensor | None:
        """The weighted regulariser to add to the loss, a scalar; None if there is none."""
        return None

    def full_parameter(self, name: str) -> Tensor:
        """A gathered parameter, at least float32, for `penalty`; under FSDP2 every process must call this.

        Raises:
            ValueError: DeepSpeed ZeRO-3 has partitioned the parameter, so a gathered copy would have no gradient.
        """
        own = self.get_parameter(name)
        if is_partitioned(own):
            raise ValueError(
                "The regulariser of an adapter needs its parameters after the forward pass, but DeepSpeed ZeRO-3 has "
                "taken them away by then. Set regularizer_weight=0, or use ZeRO-2 or FSDP2."
            )
        parameter = gathered(own)
        return parameter.to(torch.promote_types(parameter.dtype, torch.float32))

    def randomize_parameters(self) -> None:
        """Move every parameter away from its start at random, for tests that need an adapter as if trained."""
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.5 / self.size**0.5))

    def parameters_read(self) -> tuple[Tensor, ...]:
        """The parameters that `evaluate` reads, in the order of `evaluated`.

        They are read as attributes: in a replica of nn.DataParallel, and while FSDP has gathered them, they are nowhere
        else.
        """
        found = [getattr(self, name) for name in self.evaluated]
        return tuple([parameter for parameter in found if parameter is not None])

    def in_part(self, name: str, parameter: Tensor) -> Tensor:
        """A parameter as it acts at the current scale."""
        return parameter

    def names_read(self) -> tuple[str, ...]:
        """The names of `parameters_read`."""
        return tuple(name for name in self.evaluated if getattr(self, name) is not None)

    def tensors(self, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """The result of `evaluate`, from the evaluation shared with other layers, and the parameters in `beside`.

        Args:
            dtype: dtype of the result; the computation itself is at least float32.
        """
        found = None if self.shared is None else self.shared.tensors(self, self.slot, dtype)
        if found is not None:
            return (*found, *(getattr(self, name) for name in self.beside)) if self.beside else found
        # Called as a module, so that the parameters' owner (accelerate, ZeRO-3, …) brings them here.
        return self(dtype)  # type: ignore[no-any-return]

    def forward(self, dtype: torch.dtype | None = None, at: Tensor | None = None) -> tuple[Tensor, ...]:
        """The result of `tensors`, evaluated for this adapter alone.

        Args:
            dtype: dtype of the result.
            at: indices of adapters, if the parameters are those of many, (many, …); None for all.

        Raises:
            RuntimeError: DeepSpeed ZeRO-3 has partitioned the parameters and they are not gathered.
        """
        parameters = self.parameters_read()
        if not torch.compiler.is_compiling() and any(is_partitioned(p) and not is_whole(p) for p in parameters):
            raise RuntimeError(
                "The parameters of an adapter are partitioned by DeepSpeed ZeRO-3 and only gathered in forward passes "
                "of the whole model. Call the engine that deepspeed.initialize returned, or gather them with "
                "deepspeed.zero.GatheredParameters."
            )
        if at is not None:
            parameters = tuple(parameter.index_select(0, at) for parameter in parameters)
        parameters = tuple(map(self.in_part, self.names_read(), parameters))
        # Copies, since the owner that brought the parameters for this call may take them away afterwards.
        beside = (self.in_part(name, getattr(self, name)).clone() for name in self.beside)
        return (*evaluate_alone(self, parameters, dtype), *beside)

    def __getstate__(self) -> dict[str, Any]:
        # Copying one layer must not copy the whole model; a copied model groups its evaluations again.
        return {**self.__dict__, "shared": None, "slot": -1}

    def refresh(self, dtype: torch.dtype | None = None) -> None:
        """Make what follows from the adapter's buffers, if they have changed; nothing, unless a form has any.

        Args:
            dtype: the dtype in which the layer computes; None leaves it.
        """

    def is_identity(self) -> bool:
        """Whether the layer is exactly as without the adapter, as before training."""
        return not any(bool(tensor.any()) for tensor in evaluate_alone(self, self.parameters_read(), None))

    def is_untrained(self) -> bool:
        """Whether nothing has been learnt yet, so that nothing is lost if the base is replaced."""
        return self.is_identity()

    # -- the form: tensors -> what they do to a layer ------------------------------------------------------------------

    @abstractmethod
    def output(self, x: Tensor, tensors: tuple[Tensor, ...], below: Below) -> Tensor:
        """The output of the layer with this adapter, on any host and under autocast.

        Args:
            x: (..., in).
            tensors: the result of `tensors`.
            below: the frozen layer, or one that already has other adapters.
        """

    @abstractmethod
    def fused(self, x: Tensor, tensors: tuple[Tensor, ...], linear: FrozenLinear) -> Tensor | None:
        """The output on a frozen layer that only computes x Wᵀ + b, in one node; None if that does not apply."""

    @abstractmethod
    def fold(self, matrix: Tensor, tensors: tuple[Tensor, ...], part: Part = ALL, *, drop: bool = False) -> Tensor:
        """Fold the adapter into a matrix, differentiably, in its own dtype, which should be at least float32.

        Args:
            matrix: (out, in), W or what other adapters have made of it; (experts, out, in) for experts.
            tensors: the result of `tensors`, or for experts of calling the adapter with `part.at`.
            part: which part of W `matrix` is.
            drop: whether to apply dropout; never when weights are merged or read.
        """

    @abstractmethod
    def low_rank(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Exact factors of the update of W (out, in): up (out, r) and down (r, in), at least float32.

        Raises:
            ValueError: the update is not of low rank.
        """

    @property
    @abstractmethod
    def has_low_rank(self) -> bool:
        """Whether the update has low rank, so that `low_rank` works."""

    def check_scale(self, scale: float) -> None:
        """Refuse, by a ValueError, a scale that `set_scale` cannot set."""

    @abstractmethod
    def set_scale(self, scale: float) -> None:
        """Scale the adapter relative to its configuration: 0 gives the frozen layer, 1 the adapter as trained.

        Raises:
            ValueError: the method does not support this scale, as `check_scale` says.
        """

    @property
    @abstractmethod
    def relative_scale(self) -> float:
        """The current scale divided by the configured one."""

    @property
    def form_key(self) -> Hashable:
        """What the form depends on besides; adapters with equal `batch_key` and `form_key` compute alike."""
        return ()

    def kept(self, in_features: int) -> int:
        """Numbers that a plain layer of this many inputs keeps for backward, for each token and beyond the frozen one.

        What layers that read the same input share is counted for each.
        """
        return self.size

    @abstractmethod
    def describe(self) -> str:
        """A few words for `repr`."""


class Operator(Adapter):
    """An adapter that is an operator M on row vectors, x ↦ x M: the identity when training starts."""

    orthogonal = True
    """Whether M, without its scaling vectors, is orthogonal for all values of the parameters."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """M itself, (n, n)."""
