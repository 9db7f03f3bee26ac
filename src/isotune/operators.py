"""The operator: a trainable map on a small vector space; and the one evaluation that all layers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping
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
        batch = self._batch
        if batch is None or torch.compiler.is_compiling() or not batch.holds(self, self._slot):
            result: Tensor = _compute(self, dict(self.named_parameters()))
            return result if dtype is None else result.to(dtype)
        return batch.difference(self._slot, dtype)

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


def _compute(operator: Operator, parameters: Mapping[str, Tensor]) -> Tensor:
    """M − I in float32 at least: a factorisation does not exist, and a small rotation is lost, in half precision."""
    device_type = next(iter(parameters.values())).device.type
    wide = {name: p.float() if p.dtype in (torch.float16, torch.bfloat16) else p for name, p in parameters.items()}
    with torch.autocast(device_type, enabled=False):
        return operator.compute(wide)


class _Batched(torch.autograd.Function):
    """All operators of a batch from all their parameters, as one node of the graph that may be passed many times.

    Two forward passes may share one evaluation while each has its own backward pass (gradient accumulation, pipeline
    schedules, two losses). An ordinary graph is freed by the first; this node keeps its inner graph on itself.
    """

    @staticmethod
    def forward(ctx: Any, operator: Operator, dtype: torch.dtype | None, *stacked: Tensor) -> Tensor:
        # Neither checkpointing nor saved-tensor accounting should see the inner graph: it is recomputed by nobody.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            leaves = [s.detach().requires_grad_() for s in stacked]
            result = _compute(operator, dict(zip(operator.parameter_names(), leaves, strict=True)))
        ctx.leaves, ctx.result = leaves, result
        return result.detach() if dtype is None else result.detach().to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradients = torch.autograd.grad(ctx.result, ctx.leaves, gradient.to(ctx.result.dtype), retain_graph=True)
        return None, None, *gradients


class _Evaluation:
    """One result of a batch and what it was computed from."""

    def __init__(self, differences: tuple[Tensor, ...], sources: list[tuple[Tensor, ...]], snapshot: list[Tensor]):
        self.differences = differences
        self.sources = sources
        self.versions = [tuple(p._version for p in source) for source in sources]
        self.snapshot = snapshot
        self.served = [False] * len(sources)

    def current(self, slot: int, parameters: tuple[Tensor, ...]) -> bool:
        """Whether the layer at `slot` still has the very parameters that this evaluation used."""
        source, versions = self.sources[slot], self.versions[slot]
        for i, parameter in enumerate(parameters):
            if parameter is not source[i] or parameter._version != versions[i]:
                return False
        return len(parameters) == len(source)


class OperatorBatch:
    """The operators of one adapter that one computation can serve: the same class, key, shapes and device.

    The operators depend on parameters and not on tokens, so a forward pass of the model needs each once. The first
    layer that asks makes the computation for all. When a layer asks a second time a new forward pass has begun: with
    gradients everything is computed afresh; without, the parameters are compared with those that were used (by
    content, since `param.data` can be written without a trace) and the result is kept if they are the same.

    Args:
        operators: at least one, all of them alike; they are told of the batch.
    """

    def __init__(self, operators: list[Operator]) -> None:
        self.operators = operators
        self._evaluations: dict[tuple[bool, torch.dtype | None], _Evaluation] = {}
        for slot, operator in enumerate(operators):
            operator._batch, operator._slot = self, slot

    @property
    def representative(self) -> Operator:
        """Any of the operators: they compute alike."""
        return self.operators[0]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parameters, the same for every operator."""
        return self.representative.parameter_names()

    def __getstate__(self) -> dict[str, Any]:
        # Results belong to a graph, which can be neither copied nor pickled, and are made again when asked for.
        return {"operators": self.operators, "_evaluations": {}}

    def holds(self, operator: Operator, slot: int) -> bool:
        """Whether `operator` is the one this batch knows at `slot`; a replica or a shallow copy is not."""
        return slot < len(self.operators) and self.operators[slot] is operator

    def stack(self, parameters: tuple[Tensor, ...]) -> list[Tensor]:
        """One tensor for each parameter name from the flat list (all of the first name, then the second, …)."""
        count = len(self.operators)
        return [torch.stack(parameters[i : i + count]) for i in range(0, len(parameters), count)]

    def difference(self, slot: int, dtype: torch.dtype | None) -> Tensor:
        """M − I of the operator at `slot`, (n, n)."""
        own = self.operators[slot].parameter_tuple()
        tracked = torch.is_grad_enabled() and any(p.requires_grad for p in own)
        key = (tracked, dtype)
        evaluation = self._evaluations.get(key)
        if evaluation is not None and evaluation.served[slot] and not tracked:
            self._restart(key, evaluation)
            evaluation = self._evaluations.get(key)
        if evaluation is None or evaluation.served[slot] or not evaluation.current(slot, own):
            self._evaluations.pop(key, None)  # the old one is freed before the new one is made
            evaluation = self._evaluations[key] = self._evaluate(tracked, dtype)
        evaluation.served[slot] = True
        return evaluation.differences[slot]

    def forget(self) -> None:
        """Drop every result."""
        self._evaluations.clear()

    def _flat(self, sources: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        return tuple(parameter for same_name in zip(*sources, strict=True) for parameter in same_name)

    def _evaluate(self, tracked: bool, dtype: torch.dtype | None) -> _Evaluation:
        sources = [operator.parameter_tuple() for operator in self.operators]
        parameters = self._flat(sources)
        if tracked:
            inputs = self.stack(parameters)
            stacked: Tensor = _Batched.apply(self.representative, dtype, *inputs)  # type: ignore[no-untyped-call]
            return _Evaluation(stacked.unbind(0), sources, [])
        with torch.no_grad():
            snapshot = self.stack(parameters)
            stacked = _compute(self.representative, dict(zip(self.names, snapshot, strict=True)))
            stacked = stacked if dtype is None else stacked.to(dtype)
        return _Evaluation(stacked.unbind(0), sources, snapshot)

    def _restart(self, key: tuple[bool, torch.dtype | None], evaluation: _Evaluation) -> None:
        """A new forward pass without gradients: keep the evaluation if every parameter is what it was."""
        sources = [operator.parameter_tuple() for operator in self.operators]
        same = all(map(evaluation.current, range(len(sources)), sources)) and not is_symbolic(sources[0][0])
        if same:
            with torch.no_grad():
                fresh = self.stack(self._flat(sources))
                same = all(map(torch.equal, fresh, evaluation.snapshot))
        if same:
            evaluation.served = [False] * len(sources)
        else:
            del self._evaluations[key]


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
