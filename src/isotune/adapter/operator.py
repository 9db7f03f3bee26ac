"""The operator: a trainable map on a small vector space; and the one evaluation that all layers share."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from isotune.algebra.factors import Chain, apply_chain, keep_if_alive, transpose_chain
from isotune.algebra.means import Means
from isotune.parallel.processes import gathered, in_group, is_divided, is_sharded, is_whole, shape_of


class Operator(nn.Module, ABC):
    """A trainable M on row vectors, x ↦ x M, which is the identity when training starts.

    A subclass registers its parameters and says how they become the tensors by which M acts. Everything else
    (precision, batching over layers, the graph) follows from that. Called as `operator(x)`, since `apply` is a method
    that every module already has.

    Args:
        size: n of the n × n map.
    """

    recompute: ClassVar[bool] = False
    """Whether `evaluate` takes many small steps, whose results backward computes again and does not keep."""
    averages: Means = {}  # noqa: RUF012
    """How each parameter of several such operators is averaged; one that is missing has no mean."""
    unevaluated: ClassVar[tuple[str, ...]] = ()
    """Names of parameters that `evaluate` does not read, which may differ in shape within a batch."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.sharded = False
        """Whether the parameters were ever seen in parts."""
        self._batch: OperatorBatch | None = None
        self._slot = -1

    @abstractmethod
    def evaluate(self, parameters: Mapping[str, Tensor], noise: Tensor | None) -> tuple[Tensor, ...]:
        """Map parameters, each with any same leading dimensions, and noise with the same, to the tensors of M."""

    @abstractmethod
    def batch_key(self) -> Hashable:
        """Operators of one class with equal keys and parameter shapes are computed in one batch."""

    def sample_noise(self, count: int) -> Tensor | None:
        """Random numbers for `count` evaluations in training, (count, …), or None for an operator without dropout."""
        return None

    def penalty(self) -> Tensor | None:
        """What training adds to the loss, a scalar that is already weighted; None where there is no regulariser."""
        return None

    def whole(self, name: str) -> Tensor:
        """A parameter for `penalty`, in float32 at least; where it is in parts, every process must ask.

        Raises:
            ValueError: DeepSpeed ZeRO-3 has divided it, of which what is gathered here would have no gradient.
        """
        own = self.get_parameter(name)
        if is_divided(own):
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

    def tensors(self, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """The tensors of M, from the evaluation shared with the other layers where there is one.

        Args:
            dtype: of the result; the computation itself is in float32 at least.
        """
        shared = None if self._batch is None else self._batch.tensors(self, self._slot, dtype)
        return self.own_tensors(dtype) if shared is None else shared

    def own_tensors(self, dtype: torch.dtype | None = None, at: Tensor | None = None) -> tuple[Tensor, ...]:
        """The tensors of M, computed for this operator alone.

        Args:
            dtype: of the result.
            at: which operators, where the parameters are those of many, (many, …); None for all.
        """
        parameters = self.parameter_tuple()
        if not torch.compiler.is_compiling() and any(is_divided(p) and not is_whole(p) for p in parameters):
            raise RuntimeError(
                "The parameters of an adapter are divided by DeepSpeed ZeRO-3 and gathered in forward passes of the "
                "whole model only. Call the engine that deepspeed.initialize returned, or gather them with "
                "deepspeed.zero.GatheredParameters."
            )
        if at is not None:
            parameters = tuple(parameter.index_select(0, at) for parameter in parameters)
        noise = self._noise_alone()
        if torch.is_grad_enabled() and any(p.requires_grad for p in parameters) and not torch.compiler.is_compiling():
            tracked: tuple[Tensor, ...] = _Evaluation.apply(self, dtype, 1, noise, *parameters)  # type: ignore[no-untyped-call]
            return tracked
        return _compute(self, self.parameter_names(), parameters, None if noise is None else noise[0], dtype)

    def without_parameters(self) -> Operator:
        """A copy that can evaluate given parameters and holds none, for a graph that must keep no model alive."""
        twin = copy.copy(self)
        twin.__dict__["_parameters"] = {}
        return twin

    def _noise_alone(self) -> Tensor | None:
        # What is drawn for a pass holds for all of it: re-entrant checkpointing runs
        # a layer again in backward, and must find the noise of the forward pass.
        if self._batch is not None and not torch.compiler.is_compiling() and (self._batch.apart or _in_backward()):
            return self._batch.noise(self._slot)
        return self.sample_noise(1)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of one layer must not bring the whole model along; the copy of a model links its operators anew.
        return {**self.__dict__, "_batch": None, "_slot": -1}

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """x M for x of shape (..., n)."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """M itself, (n, n)."""

    def inverse(self) -> Tensor:
        """M⁻¹, (n, n)."""
        inverse: Tensor = torch.linalg.inv(self.matrix())
        return inverse

    def is_identity(self) -> bool:
        """Whether M is the identity to the last bit of every tensor, as before training."""
        return not any(bool(tensor.any()) for tensor in self.own_tensors())

    def is_untrained(self) -> bool:
        """Whether nothing has been learnt yet, so that nothing is lost if the base is exchanged."""
        return self.is_identity()

    def parameter_tuple(self) -> tuple[Tensor, ...]:
        """The parameters that `evaluate` reads, in the order of their names' registration."""
        return tuple(p for name, p in self._parameters.items() if p is not None and name not in self.unevaluated)

    def parameter_names(self) -> tuple[str, ...]:
        """The names that go with `parameter_tuple`."""
        return tuple(name for name, p in self._parameters.items() if p is not None and name not in self.unevaluated)


class DenseOperator(Operator):
    """An operator on so few coordinates that M − I is formed, (n, n)."""

    @abstractmethod
    def compute(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Map parameters, each with any same leading dimensions, to M − I of shape (..., n, n)."""

    def evaluate(self, parameters: Mapping[str, Tensor], noise: Tensor | None) -> tuple[Tensor, ...]:
        """M − I."""
        return (self.compute(parameters),)

    def difference(self, dtype: torch.dtype | None = None) -> Tensor:
        """M − I, (n, n), from the evaluation shared with the other layers where there is one."""
        return self.tensors(dtype)[0]

    def matrix(self) -> Tensor:
        """M itself, (n, n)."""
        difference = self.difference()
        return difference + torch.eye(self.size, dtype=difference.dtype, device=difference.device)

    def forward(self, x: Tensor) -> Tensor:
        """x M for x of shape (..., n)."""
        return x + x @ self.difference(x.dtype)


class Rotation(Operator):
    """An operator on all inputs of a layer, too many to form M: a chain of structured factors.

    Args:
        size: n.
        chain: the factors whose tensors `evaluate` returns, the one that acts first in front.
    """

    orthogonal = True
    """Whether M is orthogonal at every value of the parameters, so that M⁻¹ = Mᵀ."""

    def __init__(self, size: int, chain: Chain) -> None:
        super().__init__(size)
        self.chain = chain

    @property
    def gain(self) -> nn.Parameter | None:
        """Trained factors of the layer's outputs, (out,), where the method has them."""
        return None

    def watch(self, output: Tensor) -> None:
        """Let backward find the gain's gradient in the layer's output if the forward pass leaves that in memory."""
        if self.gain is not None and self._batch is not None and not torch.compiler.is_compiling():
            self._batch.watch(output, self.gain)

    def is_identity(self) -> bool:
        """Whether M is the identity and every gain one."""
        return super().is_identity() and (self.gain is None or bool((self.gain == 1).all()))

    def forward(self, x: Tensor) -> Tensor:
        """x M for x of shape (..., n)."""
        return apply_chain(x, self.chain, self.tensors(x.dtype))

    def transposed(self, x: Tensor) -> Tensor:
        """x Mᵀ for x of shape (..., n): the rows of a weight W become those of W Mᵀ."""
        chain, tensors = transpose_chain(self.chain, self.tensors(x.dtype))
        return apply_chain(x, chain, tensors)

    def matrix(self) -> Tensor:
        """M itself, (n, n)."""
        tensors = self.tensors()
        eye = torch.eye(self.size, dtype=tensors[0].dtype, device=tensors[0].device)
        return apply_chain(eye, self.chain, tensors)

    def inverse(self) -> Tensor:
        """M⁻¹, (n, n)."""
        return self.matrix().mT if self.orthogonal else super().inverse()


def _compute(
    operator: Operator,
    names: Sequence[str],
    parameters: Sequence[Tensor],
    noise: Tensor | None,
    dtype: torch.dtype | None,
) -> tuple[Tensor, ...]:
    """The tensors of M in float32 at least: a factorisation does not exist, and a small rotation is lost, in half."""
    wide = [p.float() if p.dtype in (torch.float16, torch.bfloat16) else p for p in parameters]
    with without_autocast(parameters[0]):
        result = operator.evaluate(dict(zip(names, wide, strict=True)), noise)
    return result if dtype is None else tuple(tensor.to(dtype) for tensor in result)


class _Evaluation(torch.autograd.Function):
    """The tensors of M from its parameters as one node of the graph that keeps its inner graph on itself.

    Such a node may be passed backward many times, which an ordinary graph, freed by the first, may not: two losses of
    one forward pass share it. And what it keeps is seen neither by checkpointing, which would have to find the same
    saved tensors when it computes a part of the model again, nor by offloading.

    For `count` operators, all of a tensor's kind come together: (first of operator 1, first of operator 2, …, second
    of operator 1, …).
    """

    @staticmethod
    def forward(
        ctx: Any, operator: Operator, dtype: torch.dtype | None, count: int, noise: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.inner = inner = _InnerGraph(operator, dtype, count, noise, parameters)
        if operator.recompute:
            ctx.makes_again = inner.output  # by which a layer need not keep the tensors
            with torch.no_grad():
                results = inner.results()
        else:
            results = inner.record()[1]
        return tuple(one for result in results for one in result.detach().unbind(0))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        inner: _InnerGraph = ctx.inner
        leaves, results = inner.record()
        kinds = [gradients[i : i + inner.count] for i in range(0, len(gradients), inner.count)]
        # An operator that had no part in the loss has no gradient: a zero would let an optimiser's momentum and weight
        # decay move it.
        used = [any(g is not None for g in own) for own in zip(*kinds, strict=True)]
        stacked = []
        for result, kind in zip(results, kinds, strict=True):
            zero = torch.zeros_like(result[0]) if any(g is None for g in kind) else None
            stacked.append(torch.stack([zero if g is None else g for g in kind]))  # type: ignore[misc]
        found = torch.autograd.grad(results, leaves, stacked, retain_graph=True, allow_unused=True)
        flat: list[Tensor | None] = []
        for gradient in found:
            rows = [None] * inner.count if gradient is None else gradient.unbind(0)
            flat.extend(g if use else None for g, use in zip(rows, used, strict=True))
        if inner.operator.recompute:
            inner.recorded = None
        return None, None, None, None, *flat


class _InnerGraph:
    """How the tensors of operators come from their parameters, and the graph of that while it is there.

    A graph that is made again in backward is made of the parameters themselves, of which nothing is kept meanwhile.

    Args:
        operator, dtype, count, noise, parameters: as of `_Evaluation`.
    """

    def __init__(
        self,
        operator: Operator,
        dtype: torch.dtype | None,
        count: int,
        noise: Tensor | None,
        parameters: Sequence[Tensor],
    ) -> None:
        self.operator, self.names = operator.without_parameters(), operator.parameter_names()
        self.dtype, self.count, self.noise = dtype, count, noise
        self.parameters = [parameter.detach() for parameter in parameters]
        self.versions = [version_of(parameter) for parameter in parameters]
        self.recorded: tuple[list[Tensor], tuple[Tensor, ...]] | None = None

    def results(self, leaves: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
        """The tensors, each of all operators."""
        given = _stack(self.parameters, self.count) if leaves is None else leaves
        return _compute(self.operator, self.names, given, self.noise, self.dtype)

    def record(self) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """The stacked parameters, and the tensors as a function of them that can be passed backward.

        Raises:
            RuntimeError: a parameter has been written to since the forward pass.
        """
        if self.recorded is None:
            if self.versions != [version_of(parameter) for parameter in self.parameters]:
                raise RuntimeError(
                    "A parameter of an adapter was changed in place between the forward and the backward pass that "
                    "needs it; call backward() before the optimiser's step."
                )
            with torch.enable_grad(), hidden_from_hooks():
                leaves = [stacked.requires_grad_() for stacked in _stack(self.parameters, self.count)]
                self.recorded = leaves, self.results(leaves)
        return self.recorded

    def output(self, index: int) -> Tensor:
        """An output of the node, once more."""
        return self.record()[1][index // self.count][index % self.count].detach()


def version_of(tensor: Tensor) -> int:
    """How often the tensor was written to."""
    return 0 if tensor.is_inference() else tensor._version


def hidden_from_hooks() -> AbstractContextManager[Any]:
    """A scope in which what is saved for backward is seen by no hooks from outside; benchmarks replace it to count."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def _stack(parameters: Sequence[Tensor], count: int) -> list[Tensor]:
    """One tensor for each parameter name, of all operators, from the list of all of the first name, the second, …"""
    return [torch.stack(tuple(parameters[i : i + count])) for i in range(0, len(parameters), count)]


class OperatorBatch:
    """The operators of one adapter that one computation can serve: the same class, key, shapes and device.

    Operators depend on parameters and not on the input, so one forward pass of the model needs each once, and the first
    layer that asks has all of them computed. A result holds for that pass: with gradients the next one computes afresh;
    without, it first compares the parameters with those that were used, by their content, since `param.data` can be
    written without a trace. Outside of a pass (a layer called by itself) every operator is computed alone.

    Args:
        operators: at least one, all of them alike; they are told of the batch.
    """

    def __init__(self, operators: Sequence[Operator]) -> None:
        self.operators = list(operators)
        self.running = False
        self.apart = False
        """Whether the operators are computed alone in this pass, since their parameters are not here all at once."""
        self._compared = False
        self._noise: Tensor | None = None
        # None for what was given up after the pass: checkpointing, which runs parts of it again, makes it again.
        self._tracked: dict[torch.dtype | None, tuple[Tensor, ...] | None] = {}
        self._watched: list[tuple[TensorWeakRef, int, Tensor]] = []
        self._untracked: dict[torch.dtype | None, tuple[Tensor, ...]] = {}
        self._traced: tuple[Tensor, ...] | None = None
        self._snapshot: list[Tensor] = []
        for slot, operator in enumerate(self.operators):
            operator._batch, operator._slot = self, slot

    def begin(self) -> None:
        """A forward pass begins."""
        if torch.compiler.is_compiling():
            # A part that checkpointing will trace again must not be the first to ask, and a graph drops what it does
            # not need.
            noise = self.operators[0].sample_noise(len(self.operators))
            self._traced = self._evaluated(self._stacked(), noise, None)
            return
        self._tracked.clear()
        self._watched.clear()
        self._compared = self.apart = False
        # Drawn here, not where it is first needed: that may lie in a part of the model that checkpointing runs again
        # from a saved state of the random numbers, and then finds the evaluation done.
        before, self._noise = self._noise, self.operators[0].sample_noise(len(self.operators))
        if before is not None or self._noise is not None:
            self._untracked.clear()
        self.running = True

    def end(self) -> None:
        """The forward pass is over; its result stays for checkpointing, which repeats parts of it in backward."""
        self.running = self.apart = False
        self._traced = None
        if self.operators[0].recompute:
            self._tracked = dict.fromkeys(self._tracked)
        for reference, version, gain in self._watched:
            keep_if_alive(reference(), version, gain)
        self._watched.clear()

    def watch(self, output: Tensor, gain: Tensor) -> None:
        """Let a layer's backward use its output if that is still there, and the same, when the pass is over."""
        if self.running and output.grad_fn is not None and not is_symbolic(output):
            self._watched.append((TensorWeakRef(output), output._version, gain))

    def noise(self, slot: int) -> Tensor | None:
        """The noise of one operator in the last forward pass, (1, …)."""
        return None if self._noise is None else self._noise[slot : slot + 1]

    def tensors(self, operator: Operator, slot: int, dtype: torch.dtype | None) -> tuple[Tensor, ...] | None:
        """The tensors of an operator, or None where it must be computed alone."""
        if torch.compiler.is_compiling():
            # Where a block is compiled by itself, neither its slot nor the batch may become a part of the code.
            if self._traced is None:
                return None
            return tuple(one.to(dtype) for one in self._traced[slot :: len(self.operators)])
        if self.operators[slot] is not operator:
            return None  # a replica on another device
        if torch.is_grad_enabled() and any(p.requires_grad for p in operator.parameter_tuple()):
            found = self._with_graph(dtype)
        else:
            found = self._without_graph(dtype)
        return None if found is None else found[slot :: len(self.operators)]

    def _with_graph(self, dtype: torch.dtype | None) -> tuple[Tensor, ...] | None:
        found = self._tracked.get(dtype)
        again = dtype in self._tracked and _in_backward()
        if found is None and (self.running or again) and not self.apart:
            flat = self._parameters()
            if self._must_be_apart(flat):
                return None
            found = _Evaluation.apply(self.operators[0], dtype, len(self.operators), self._noise, *flat)  # type: ignore[no-untyped-call]
            self._tracked[dtype] = found
        return found if self.running or _in_backward() else None

    def _without_graph(self, dtype: torch.dtype | None) -> tuple[Tensor, ...] | None:
        if not self.running or self.apart:
            return None
        if not self._compared:
            if self._must_be_apart(self._parameters()):
                return None
            self._compare()
        if dtype not in self._untracked:
            with torch.no_grad():
                self._snapshot = self._stacked()
                self._untracked[dtype] = self._evaluated(self._snapshot, self._noise, dtype)
        return self._untracked[dtype]

    def _evaluated(
        self, parameters: Sequence[Tensor], noise: Tensor | None, dtype: torch.dtype | None
    ) -> tuple[Tensor, ...]:
        first = self.operators[0]
        results = _compute(first, first.parameter_names(), parameters, noise, dtype)
        # Not by unbind, whose list of results a trace can neither keep nor make again for a checkpointed part.
        return tuple(result[slot] for result in results for slot in range(len(self.operators)))

    def _parameters(self) -> list[Tensor]:
        by_name = zip(*(operator.parameter_tuple() for operator in self.operators), strict=True)
        return [parameter for same_name in by_name for parameter in same_name]

    def _must_be_apart(self, parameters: Sequence[Tensor]) -> bool:
        # With `fully_shard` the parameters of a block are whole while that block runs, and their gradients must be
        # there when backward leaves it: the latter also where a forward pass without backward has left all blocks
        # whole (reshard_after_forward=False). With ZeRO-3 those of a layer are whole while that layer runs.
        if is_divided(parameters[0]) or (in_group() and any(map(is_sharded, parameters))):
            for operator in self.operators:
                operator.sharded = True
        self.apart = self.operators[0].sharded
        return self.apart

    def _stacked(self) -> list[Tensor]:
        return _stack(self._parameters(), len(self.operators))

    def _compare(self) -> None:
        """Keep the results without gradients if every parameter is what it was."""
        self._compared = True
        if self._untracked:
            with torch.no_grad():
                fresh = self._stacked()
            if is_symbolic(fresh[0]) or not all(map(torch.equal, fresh, self._snapshot)):
                self._untracked.clear()


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on where the tensor is; the meta device has none, and torch refuses to say so."""
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """A scope without autocast where the tensor is."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def keep_mask(operator: Operator, dropout: float, count: int, *shape: int) -> Tensor | None:
    """1 for what stays and 0 for what is dropped with this probability, (count, *shape); None unless training."""
    if not dropout or not operator.training:
        return None
    device = next(operator.parameters()).device
    return (torch.rand(count, *shape, device=device) >= dropout).float()


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def is_symbolic(tensor: Tensor) -> bool:
    """Whether the tensor has no values to compare, as under FakeTensorMode or on the meta device."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor) or tensor.is_meta


def batch_operators(operators: Iterable[Operator]) -> list[OperatorBatch]:
    """Put operators that one computation can serve together into batches.

    Args:
        operators: of one adapter, in the order in which the model has them.

    Returns:
        One batch for each distinct class, key, parameter shapes, dtypes and device.
    """
    groups: dict[Hashable, list[Operator]] = {}
    for operator in operators:
        parameters = zip(operator.parameter_names(), operator.parameter_tuple(), strict=True)
        shapes = tuple((name, shape_of(p), p.dtype, p.device) for name, p in parameters)
        groups.setdefault((type(operator), operator.batch_key(), shapes), []).append(operator)
    return [OperatorBatch(group) for group in groups.values()]
