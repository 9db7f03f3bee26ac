"""The operator: a trainable map on a small vector space; and the one evaluation that all layers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Operator(nn.Module, ABC):
    """A trainable M on row vectors, x ↦ x M, which is the identity when training starts.

    A subclass registers its parameters and says how they become M − I. Everything else (applying, inverting, batching
    over layers) follows from that. Called as `operator(x)`, since `apply` is a method that every module already has.

    Args:
        size: n of the n × n map.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self._batch: OperatorBatch | None = None
        self._slot = -1

    @abstractmethod
    def compute(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Map parameters, each with any same leading dimensions, to M − I of shape (..., n, n)."""

    @abstractmethod
    def batch_key(self) -> Hashable:
        """Operators of one class with equal keys and parameter shapes are computed in one batch."""

    def randomize_parameters(self) -> None:
        """Move every parameter off the identity at random, for tests that need a trained-looking adapter."""
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.5 / self.size**0.5))

    def difference(self, dtype: torch.dtype | None = None) -> Tensor:
        """M − I, (n, n), from the evaluation shared with the other layers where there is one.

        Args:
            dtype: of the result; the computation itself is in float32 at least.
        """
        shared = None if self._batch is None else self._batch.difference(self, self._slot, dtype)
        return self.own_difference(dtype) if shared is None else shared

    def own_difference(self, dtype: torch.dtype | None = None) -> Tensor:
        """M − I, (n, n), computed for this operator alone."""
        parameters = self.parameter_tuple()
        if torch.is_grad_enabled() and any(p.requires_grad for p in parameters):
            tracked: tuple[Tensor] = _Evaluation.apply(self, dtype, 1, *parameters)  # type: ignore[no-untyped-call]
            return tracked[0]
        return _compute(self, parameters, dtype)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of one layer must not bring the whole model along; the copy of a model links its operators anew.
        return {**self.__dict__, "_batch": None, "_slot": -1}

    def matrix(self) -> Tensor:
        """M itself, (n, n)."""
        difference = self.difference()
        return difference + torch.eye(self.size, dtype=difference.dtype, device=difference.device)

    def inverse(self) -> Tensor:
        """M⁻¹, (n, n)."""
        inverse: Tensor = torch.linalg.inv(self.matrix())
        return inverse

    def forward(self, x: Tensor) -> Tensor:
        """x M for x of shape (..., n)."""
        return x + x @ self.difference(x.dtype)

    def parameter_tuple(self) -> tuple[Tensor, ...]:
        """The parameters in the order of their names' registration."""
        return tuple(p for p in self._parameters.values() if p is not None)

    def parameter_names(self) -> tuple[str, ...]:
        """The names that go with `parameter_tuple`."""
        return tuple(name for name, p in self._parameters.items() if p is not None)


def _compute(operator: Operator, parameters: Sequence[Tensor], dtype: torch.dtype | None) -> Tensor:
    """M − I in float32 at least: a factorisation does not exist, and a small rotation is lost, in half precision."""
    wide = [p.float() if p.dtype in (torch.float16, torch.bfloat16) else p for p in parameters]
    with torch.autocast(parameters[0].device.type, enabled=False):
        result = operator.compute(dict(zip(operator.parameter_names(), wide, strict=True)))
    return result if dtype is None else result.to(dtype)


class _Evaluation(torch.autograd.Function):
    """M − I from its parameters as one node of the graph that keeps its inner graph on itself.

    Such a node may be passed backward many times, which an ordinary graph, freed by the first, may not: two losses of
    one forward pass share it. And what it keeps is seen neither by checkpointing, which would have to find the same
    saved tensors when it computes a part of the model again, nor by offloading.
    """

    @staticmethod
    def forward(
        ctx: Any, operator: Operator, dtype: torch.dtype | None, count: int, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            leaves = [stacked.detach().requires_grad_() for stacked in _stack(parameters, count)]
            result = _compute(operator, leaves, dtype)
        ctx.leaves, ctx.result = leaves, result
        return result.detach().unbind(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        # An operator that had no part in the loss has no gradient: a zero would let an optimiser's momentum and weight
        # decay move it.
        used = [gradient is not None for gradient in gradients]
        zero = torch.zeros_like(ctx.result[0])
        gradient = torch.stack([zero if g is None else g for g in gradients])
        found = torch.autograd.grad(ctx.result, ctx.leaves, gradient, retain_graph=True)
        flat = [g if use else None for stacked in found for g, use in zip(stacked.unbind(0), used, strict=True)]
        return None, None, None, *flat


def _stack(parameters: Sequence[Tensor], count: int) -> list[Tensor]:
    """One tensor for each parameter name, of all operators, from the list of all of the first name, the second, …"""
    return [torch.stack(tuple(parameters[i : i + count])) for i in range(0, len(parameters), count)]


class OperatorBatch:
    """The operators of one adapter that one computation can serve: the same class, key, shapes and device.

    Operators depend on parameters and not on tokens, so one forward pass of the model needs each once, and the first
    layer that asks has all of them computed. A result holds for that pass: with gradients the next one computes afresh;
    without, it first compares the parameters with those that were used, by their content, since `param.data` can be
    written without a trace. Outside of a pass (a layer called by itself) every operator is computed alone.

    Args:
        operators: at least one, all of them alike; they are told of the batch.
    """

    def __init__(self, operators: Sequence[Operator]) -> None:
        self.operators = list(operators)
        self.running = False
        self._compared = False
        self._tracked: dict[torch.dtype | None, tuple[Tensor, ...]] = {}
        self._untracked: dict[torch.dtype | None, tuple[Tensor, ...]] = {}
        self._snapshot: list[Tensor] = []
        for slot, operator in enumerate(self.operators):
            operator._batch, operator._slot = self, slot

    def begin(self) -> None:
        """A forward pass begins."""
        self._tracked.clear()
        self._compared = False
        self.running = True

    def end(self) -> None:
        """The forward pass is over; its result stays for checkpointing, which repeats parts of it in backward."""
        self.running = False

    def difference(self, operator: Operator, slot: int, dtype: torch.dtype | None) -> Tensor | None:
        """M − I of an operator, (n, n), or None where it must be computed alone."""
        if self.operators[slot] is not operator or torch.compiler.is_compiling():
            return None  # a replica on another device, or a trace, which needs no sharing by hand
        if torch.is_grad_enabled() and any(p.requires_grad for p in operator.parameter_tuple()):
            found = self._tracked.get(dtype)
            if found is None and self.running:
                flat = self._parameters()
                found = _Evaluation.apply(self.operators[0], dtype, len(self.operators), *flat)  # type: ignore[no-untyped-call]
                self._tracked[dtype] = found
            elif not self.running and not _in_backward():
                return None
            return None if found is None else found[slot]
        if not self.running:
            return None
        if not self._compared:
            self._compare()
        found = self._untracked.get(dtype)
        if found is None:
            with torch.no_grad():
                self._snapshot = self._stacked()
                found = self._untracked[dtype] = _compute(self.operators[0], self._snapshot, dtype).unbind(0)
        return found[slot]

    def _parameters(self) -> list[Tensor]:
        by_name = zip(*(operator.parameter_tuple() for operator in self.operators), strict=True)
        return [parameter for same_name in by_name for parameter in same_name]

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
        shapes = tuple((name, p.shape, p.dtype, p.device) for name, p in operator.named_parameters())
        groups.setdefault((type(operator), operator.batch_key(), shapes), []).append(operator)
    return [OperatorBatch(group) for group in groups.values()]
