"""The adapter: a trainable operator in one form on one frozen layer; here its parameters and what they become."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from isotune.adapter.evaluation import Given, SharedEvaluation, evaluate_alone
from isotune.algebra.means import Means
from isotune.parallel.sharding import gathered, is_partitioned, is_whole
from isotune.parallel.tensor_parallel import Division

FrozenLinear = tuple[Tensor, Tensor | None]
"""Weight (out, in) and bias (out,) of a frozen layer that multiplies by them and does nothing more."""


class Adapter(nn.Module, ABC):
    """A trainable operator M on row vectors, x ↦ x M, the identity when training starts, in its form on one layer.

    A method's subclass registers its parameters and says how they become the tensors by which M acts. What those
    tensors do to a layer is the form's part, in `SubspaceAdapter` and `RotationAdapter`.

    Args:
        size: n of the n × n map.
    """

    evaluated: ClassVar[tuple[str, ...]]
    """Names of the parameters that `evaluate` reads; an attribute of such a name may also be None."""
    beside: ClassVar[tuple[str, ...]] = ()
    """Names of those that act as they are, and may differ in shape between layers; given after what is evaluated."""
    averages: Means = {}  # noqa: RUF012
    """Parameter name -> how it is averaged over several adapters; a method with a name missing has no mean."""
    orthogonal = True
    """Whether M, without vectors that scale it, is orthogonal at every value of the parameters."""
    additive: ClassVar[bool]
    """Whether the form adds an output of its own, or else rotates one side of the layer."""
    side: Literal["input", "output"] | None = None
    """Whether M rotates the inputs, W' = W Mᵀ, or the outputs without the bias, W' = M W; None for an update."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.dropout = 0.0
        """Probability of a random mask in training, where the method or the form has one."""
        self.shared: SharedEvaluation | None = None
        """The evaluation that this adapter shares with those of other layers, set by the model-level object."""
        self.slot = -1
        self.given = Given()

    # -- the operator: parameters -> tensors -----------------------------------------------------------------------

    @abstractmethod
    def evaluate(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Map parameters, each with any same leading dimensions, to the tensors of M with these dimensions in front."""

    @abstractmethod
    def batch_key(self) -> Hashable:
        """Adapters of one class with equal keys and parameter shapes are evaluated in one batch."""

    def complete(self, tensors: tuple[Tensor, ...], drop: bool = False) -> tuple[Tensor, ...]:
        """Make what acts on a layer of what `evaluate` gave; with `drop` parts of M are the identity at random."""
        return tensors

    def penalty(self) -> Tensor | None:
        """What training adds to the loss, a scalar that is already weighted; None where there is no regulariser."""
        return None

    def full_parameter(self, name: str) -> Tensor:
        """A gathered parameter in float32 or wider, for `penalty`; under FSDP2 every process must ask for it.

        Raises:
            ValueError: DeepSpeed ZeRO-3 has partitioned it, so that what is gathered here would have no gradient.
        """
        own = self.get_parameter(name)
        if is_partitioned(own):
            raise ValueError(
                "The regulariser of an adapter needs its parameters after the forward pass, when DeepSpeed ZeRO-3 has "
                "taken them away. Set regularizer_weight to 0, or use ZeRO-2 or FSDP2."
            )
        parameter = gathered(own)
        return parameter.to(torch.promote_types(parameter.dtype, torch.float32))

    def randomize_parameters(self) -> None:
        """Move every parameter off the identity at random, for tests that need a trained-looking adapter."""
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.5 / self.size**0.5))

    def parameters_read(self) -> tuple[Tensor, ...]:
        """The parameters that `evaluate` reads, in the order of `evaluated`.

        By attribute: in a replica of nn.DataParallel, and while FSDP has gathered them, they are nowhere else.
        """
        found = (getattr(self, name) for name in self.evaluated)
        return tuple(parameter for parameter in found if parameter is not None)

    def in_part(self, name: str, parameter: Tensor) -> Tensor:
        """A parameter as it acts at the scale in use."""
        return parameter

    def names_read(self) -> tuple[str, ...]:
        """The names that go with `parameters_read`."""
        return tuple(name for name in self.evaluated if getattr(self, name) is not None)

    def tensors(self, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """What `evaluate` gives, and the parameters beside it, from the evaluation shared with the other layers.

        Args:
            dtype: of the result; the computation itself is in float32 at least.
        """
        found = None if self.shared is None else self.shared.tensors(self, self.slot, dtype)
        if found is not None:
            return (*found, *(getattr(self, name) for name in self.beside)) if self.beside else found
        # Called as a module, so that whoever owns the parameters (accelerate, ZeRO-3, …) brings them for it.
        return self(dtype)  # type: ignore[no-any-return]

    def forward(self, dtype: torch.dtype | None = None, at: Tensor | None = None) -> tuple[Tensor, ...]:
        """The tensors of M, evaluated for this adapter alone.

        Args:
            dtype: of the result.
            at: which operators, where the parameters are those of many, (many, …); None for all.

        Raises:
            RuntimeError: DeepSpeed ZeRO-3 has partitioned the parameters and nobody has gathered them.
        """
        parameters = self.parameters_read()
        if not torch.compiler.is_compiling() and any(is_partitioned(p) and not is_whole(p) for p in parameters):
            raise RuntimeError(
                "The parameters of an adapter are partitioned by DeepSpeed ZeRO-3 and gathered in forward passes of "
                "the whole model only. Call the engine that deepspeed.initialize returned, or gather them with "
                "deepspeed.zero.GatheredParameters."
            )
        if at is not None:
            parameters = tuple(parameter.index_select(0, at) for parameter in parameters)
        parameters = tuple(map(self.in_part, self.names_read(), parameters))
        # Copies: whoever has brought the parameters for this call may take their numbers away after it.
        beside = (self.in_part(name, getattr(self, name)).clone() for name in self.beside)
        return (*evaluate_alone(self, parameters, dtype), *beside)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of one layer must not bring the whole model along; the copy of a model shares evaluations anew.
        return {**self.__dict__, "shared": None, "slot": -1}

    @abstractmethod
    def matrix(self) -> Tensor:
        """M itself, (n, n)."""

    def inverse(self) -> Tensor:
        """M⁻¹, (n, n)."""
        inverse: Tensor = torch.linalg.inv(self.matrix())
        return inverse

    @abstractmethod
    def operate(self, x: Tensor) -> Tensor:
        """x M for x of shape (..., n)."""

    def is_identity(self) -> bool:
        """Whether M is the identity to the last bit of every tensor, as before training."""
        return not any(bool(tensor.any()) for tensor in evaluate_alone(self, self.parameters_read(), None))

    def is_untrained(self) -> bool:
        """Whether nothing has been learnt yet, so that nothing is lost if the base is exchanged."""
        return self.is_identity()

    # -- the form: tensors -> what they do to a layer ------------------------------------------------------------------

    @abstractmethod
    def output(
        self,
        x: Tensor,
        tensors: tuple[Tensor, ...],
        host: Callable[[Tensor], Tensor],
        bias: Tensor | None,
        division: Division | None,
    ) -> Tensor:
        """The output of the layer with this adapter, on any host and under autocast.

        Args:
            x: (..., in).
            tensors: what `tensors` gives.
            host: the layer below: the frozen one, or one that already has other adapters.
            bias: of the frozen layer; None where it has none.
            division: how tensor parallelism has split the layer's inputs and outputs; None where it has not.
        """

    @abstractmethod
    def fused(self, x: Tensor, tensors: tuple[Tensor, ...], linear: FrozenLinear) -> Tensor | None:
        """The output on a frozen layer that is x Wᵀ + b and nothing more, in one node; None where that is not right."""

    @abstractmethod
    def fold(
        self,
        matrix: Tensor,
        tensors: tuple[Tensor, ...],
        *,
        drop: bool = False,
        rows: Tensor | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """The matrix with the adapter in it, differentiably, in its own dtype, which should be float32 at least.

        Args:
            matrix: (out, in): W, or what other adapters have made of it; (experts, out, in) for experts.
            tensors: what `tensors` gives, or for experts the call of the adapter with `at`.
            drop: use the random masks of training; nobody who reads the weights does.
            rows: where `matrix` holds some rows only (an embedding's look-up): these rows of W itself, up to a factor.
            at: which rows of W, or which experts, `matrix` holds; None for all.
        """

    @abstractmethod
    def low_rank(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Exact factors of the change of W (out, in), up (out, r) and down (r, in), float32 at least.

        Raises:
            ValueError: the change has no low rank.
        """

    @property
    @abstractmethod
    def has_low_rank(self) -> bool:
        """Whether `low_rank` has an answer."""

    def check_scale(self, scale: float) -> None:
        """Refuse by a ValueError what `set_scale` cannot do."""

    @abstractmethod
    def set_scale(self, scale: float) -> None:
        """Take `scale` of the configured adapter: 0 is the frozen layer, 1 what was trained.

        Raises:
            ValueError: a scale that the method has not, as `check_scale` says.
        """

    @property
    @abstractmethod
    def relative_scale(self) -> float:
        """The scale in use over the configured one."""

    @property
    def form_key(self) -> Hashable:
        """What the form depends on besides M: adapters of equal keys, of the operator and the form, compute alike."""
        return ()

    @abstractmethod
    def describe(self) -> str:
        """A few words for `repr`."""
