"""Evaluating operators: a pure function of their parameters, called once for all layers of a forward pass.

An evaluation is a value: the tensors of M, and the parameters they were computed from. It is never changed, and is used
only while it is still true of the current parameters. So threads, replicas, interrupted and nested calls, and optimiser
steps between or within forward passes need no rules of their own.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from operator import attrgetter, is_
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from isotune.algebra.recording import is_plain
from isotune.internals.torch_state import (
    backward_pass,
    has_own_values,
    is_rerun_within_its_graph,
    is_symbolic,
    outside_selective_checkpointing,
    version_of,
)
from isotune.parallel.sharding import is_sharded, shape_of


class Evaluable(Protocol):
    """What an evaluation needs from an operator; `operator.Adapter` says what each is."""

    given: Given
    batched: ClassVar[bool]
    placement: object

    def evaluate(self, parameters: Mapping[str, Tensor]) -> tuple[Tensor, ...]: ...

    def batch_key(self) -> Hashable: ...

    def parameters_read(self) -> tuple[Tensor, ...]: ...

    def names_read(self) -> tuple[str, ...]: ...


def wide(names: Sequence[str], parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """Parameters by name, at least float32: half precision has no factorisations and loses small rotations."""
    found = (parameter.to(torch.promote_types(parameter.dtype, torch.float32)) for parameter in parameters)
    return dict(zip(names, found, strict=True))


def cast(tensors: tuple[Tensor, ...], dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    """Cast tensors to a dtype; None leaves them as they are."""
    return tensors if dtype is None else tuple(tensor.to(dtype) for tensor in tensors)


class _Evaluated(torch.autograd.Function):
    """The tensors of M from the parameters of `count` alike operators, as one node that holds the graph inside.

    Unlike an ordinary graph, which the first backward pass frees, such a node supports many backward passes: two losses
    of one forward pass share it. Its contents are hidden from offloading and from checkpointing, which would otherwise
    have to find the same saved tensors when it reruns a part of the model.

    Tensors of one kind are grouped: (first of operator 1, first of operator 2, …, second of operator 1, …).
    """

    @staticmethod
    def forward(
        ctx: Any, operator: Evaluable, dtype: torch.dtype | None, count: int, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.count = count
        ctx.leaves = [stacked.requires_grad_() for stacked in _stack([p.detach() for p in parameters], count)]
        with torch.enable_grad(), hidden_from_hooks(), without_autocast(ctx.leaves[0]):
            results = cast(operator.evaluate(wide(operator.names_read(), ctx.leaves)), dtype)
        ctx.results = results
        return tuple(one for result in results for one in result.detach().unbind(0))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        count: int = ctx.count
        kinds = [gradients[i : i + count] for i in range(0, len(gradients), count)]
        # An operator that does not affect the loss gets no gradient: with zeros, momentum and weight decay would still
        # move it.
        used = [any(g is not None for g in own) for own in zip(*kinds, strict=True)]
        stacked = []
        for result, kind in zip(ctx.results, kinds, strict=True):
            zero = torch.zeros_like(result[0]) if any(g is None for g in kind) else None
            stacked.append(torch.stack([zero if g is None else g for g in kind]))  # type: ignore[misc]
        found = torch.autograd.grad(ctx.results, ctx.leaves, stacked, retain_graph=True, allow_unused=True)
        flat: list[Tensor | None] = []
        for gradient in found:
            rows = [None] * count if gradient is None else gradient.unbind(0)
            flat.extend(g if use else None for g, use in zip(rows, used, strict=True))
        return None, None, None, *flat


def hidden_from_hooks() -> AbstractContextManager[Any]:
    """A scope that hides saved tensors from outer hooks; benchmarks replace it to count activation memory.

    The pack hook must not return the tensor itself: an output saved by its own node would be a reference cycle that the
    garbage collector cannot see.
    """
    return torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda tensor: tensor)


def _stack(parameters: Sequence[Tensor], count: int) -> list[Tensor]:
    """Stack all operators' parameters into one tensor per name; they come as all of the first name, the second, …"""
    return [torch.stack(tuple(parameters[i : i + count])) for i in range(0, len(parameters), count)]


def evaluate_alone(
    operator: Evaluable, parameters: tuple[Tensor, ...], dtype: torch.dtype | None, count: int = 1
) -> tuple[Tensor, ...]:
    """Evaluate one operator from these parameters; with gradients also several alike ones, as `_Evaluated` does."""
    tracked = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters)
    if not tracked or is_recorded() or not operator.batched:
        with without_autocast(parameters[0]):
            return cast(operator.evaluate(wide(operator.names_read(), parameters)), dtype)
    result: tuple[Tensor, ...] = _Evaluated.apply(operator, dtype, count, *parameters)  # type: ignore[no-untyped-call]
    return result


def is_recorded() -> bool:
    """Whether torch.compile, an export or a transform of torch.func follows, which know no node that holds a graph."""
    return torch.compiler.is_compiling() or is_plain()


@dataclass(frozen=True)
class _Evaluation:
    """The tensors of M of several alike operators, and the parameters they were computed from."""

    tensors: tuple[Tensor, ...]
    parameters: tuple[Tensor, ...]
    versions: tuple[int, ...]
    placement: object = None
    """The placement they were computed from, if `evaluate` reads it."""
    values: tuple[Tensor, ...] = ()
    """Stacked copies of the parameters; empty with gradients, where an evaluation serves only one forward pass."""
    call: Call | None = None
    """The call of `generate` in which it was made."""

    def is_of(self, slot: int, parameters: Sequence[Tensor]) -> bool:
        """Whether these parameter objects were read, and their versions have not changed since."""
        place, count = slot, len(self.parameters) // len(parameters)
        for parameter in parameters:  # not by a generator, since every layer asks in every pass
            if self.parameters[place] is not parameter or self.versions[place] != version_of(parameter):
                return False
            place += count
        return True


_requires_grad = attrgetter("requires_grad")
_Results = dict[tuple[torch.dtype | None, bool], _Evaluation]


class Given(threading.local):
    """One operator's tensors of M, made in advance for compiled code in this thread; None outside of a call.

    Compiled code takes them as inputs and is guarded only by their shapes, since the next call has other tensors. Each
    operator has its own, since neither a slot nor a call may become part of the code.
    """

    tensors: tuple[Tensor, ...] | None = None
    made: tuple[tuple[object, ...], Any] | None = None
    """What the form has derived from them for its layer, preceded by the values it was derived from."""

    def __reduce__(self) -> tuple[type[Given], tuple[()]]:
        return Given, ()


class Call:
    """A call of `generate` or a similar loop in one thread, during which parameters do not change."""

    def __init__(self) -> None:
        self._given: set[Given] | None = set()

    def give(self, operator: Evaluable, tensors: tuple[Tensor, ...]) -> None:
        """Let compiled code use these tensors of an operator until the call ends."""
        if self._given is not None:
            operator.given.tensors = tensors
            self._given.add(operator.given)

    def end(self) -> None:
        """Take the tensors back, since parameters may change from now on."""
        given, self._given = self._given or (), None
        for one in given:
            one.tensors = one.made = None


class SharedEvaluation:
    """The shared evaluation of operators of the same class, key, shapes and device, for a forward pass of their model.

    The first layer that asks in a pass has all of them evaluated. A layer called by itself, outside of a pass of the
    model, is evaluated alone. Writing to `parameter.data` leaves no trace but is noticed by the next pass, which
    evaluates afresh. Only without gradients is an earlier evaluation reused: on a CPU if the parameters have the same
    values, elsewhere within one call of `generate`.

    Args:
        members: one or more alike operators; the caller gives each its slot.
    """

    def __init__(self, members: Sequence[Evaluable]) -> None:
        self.members = tuple(members)
        self.apart = False
        """Whether to evaluate each operator in its own layer, since the parameters are not all here at once."""
        self._here = _Here()
        self._again: tuple[int, _Results] = (-1, {})
        self._kept: Mapping[torch.dtype | None, _Evaluation] = {}
        self._traced: tuple[Tensor, ...] | None = None

    def is_given(self) -> bool:
        """Whether compiled code already has the tensors of all members."""
        return all(given_to(member) is not None for member in self.members)

    def begin(self, call: Call | None = None) -> None:
        """Begin a forward pass of the model in this thread, possibly within a call of `generate`."""
        if is_recorded():
            # A part that checkpointing will trace again must not be the first to ask; a graph drops what it does not
            # need.
            self._traced = self._untracked(self._stacked(), None)
            return
        self._again = (-1, {})
        self._here.results, self._here.call = {}, call

    def end(self) -> None:
        """End the forward pass."""
        self._traced = None
        if not is_recorded():
            self._here.results = None

    def tensors(self, operator: Evaluable, slot: int, dtype: torch.dtype | None) -> tuple[Tensor, ...] | None:
        """The tensors of the operator in a slot, or None if it must be evaluated alone."""
        if is_recorded():
            given = given_to(operator)
            if given is not None and given[0].dtype == dtype:
                return given
            # If a block is compiled by itself, neither its slot nor the batch may become part of the code.
            if self._traced is None:
                return None
            return tuple(one if dtype is None else one.to(dtype) for one in self._traced[slot :: len(self.members)])
        parameters = operator.parameters_read()
        tracked = torch.is_grad_enabled() and any(map(_requires_grad, parameters))
        results = self._results(tracked)
        if results is None or self.apart or self.members[slot] is not operator:  # a replica of DataParallel
            return None
        found, placement = results.get((dtype, tracked)), self._placement()
        if found is None or not found.is_of(slot, parameters) or found.placement is not placement:
            flat = tuple(self._parameters())
            if len({parameter.is_meta for parameter in flat}) > 1 or any(map(is_sharded, flat)):
                return None
            versions = tuple(map(version_of, flat))
            with outside_selective_checkpointing():
                if tracked:
                    made = evaluate_alone(operator, flat, dtype, len(self.members))
                    found = _Evaluation(made, flat, versions, placement)
                else:
                    found = self._kept_or_made(dtype, flat, versions)
            results[dtype, tracked] = found
        tensors = found.tensors[slot :: len(self.members)]
        if self._here.call is not None and not tracked:
            self._here.call.give(operator, tensors)
        return tensors

    def _results(self, tracked: bool) -> _Results | None:
        """The evaluations of this thread's forward pass; during backward, those for the parts that are rerun."""
        running = backward_pass()
        if running is None:
            return self._here.results
        if tracked and not is_rerun_within_its_graph():
            # Re-entrant checkpointing differentiates each part by itself. From a node of all layers it would reach the
            # parameters of all, and whoever waits for their gradients by hooks, as DDP does, would take them for done.
            return None
        number, results = self._again
        if number != running:
            results = {}
            self._again = running, results
        return results

    def _kept_or_made(
        self, dtype: torch.dtype | None, flat: tuple[Tensor, ...], versions: tuple[int, ...]
    ) -> _Evaluation:
        """An evaluation without gradients, reusing one of an earlier pass if it still holds."""
        # Not in inference mode, whose tensors a later pass with gradients could not save for backward.
        with torch.inference_mode(False), torch.no_grad():
            kept = self._kept.get(dtype)
            if kept is not None and self._is_true(kept, flat, versions):
                return replace(kept, parameters=flat, versions=versions)
            values = self._stacked()
            tensors = self._untracked(values, dtype)
        found = _Evaluation(tensors, flat, versions, self._placement(), tuple(values), self._here.call)
        if all(map(has_own_values, values)):
            self._kept = {**self._kept, dtype: found}
        return found

    def _is_true(self, kept: _Evaluation, flat: tuple[Tensor, ...], versions: tuple[int, ...]) -> bool:
        """Whether an evaluation of an earlier pass still holds, without waiting for a GPU."""
        if is_symbolic(flat[0]) or kept.placement is not self._placement():
            return False
        if flat[0].device.type == "cpu":
            now = self._stacked()
            return all(map(has_own_values, now)) and all(map(torch.equal, now, kept.values))
        same = all(map(is_, flat, kept.parameters)) and versions == kept.versions
        return same and kept.call is not None and kept.call is self._here.call

    def _placement(self) -> object:
        return None if self.members[0].batched else self.members[0].placement

    def _parameters(self) -> list[Tensor]:
        by_name = zip(*(member.parameters_read() for member in self.members), strict=True)
        return [parameter for same_name in by_name for parameter in same_name]

    def _stacked(self) -> list[Tensor]:
        return _stack(self._parameters(), len(self.members))

    def _untracked(self, values: Sequence[Tensor], dtype: torch.dtype | None) -> tuple[Tensor, ...]:
        """All tensors from stacked parameters, by plain operations instead of one node."""
        operator = self.members[0]
        with without_autocast(values[0]):
            results = cast(operator.evaluate(wide(operator.names_read(), values)), dtype)
        # Not unbind: a trace can neither keep its list of results nor recompute it for a checkpointed part.
        return tuple(result[slot] for result in results for slot in range(len(self.members)))


class _Here(threading.local):
    """The state of the forward pass that is running in this thread."""

    results: _Results | None = None
    call: Call | None = None


def given_to(operator: Evaluable) -> tuple[Tensor, ...] | None:
    """The tensors of an operator that compiled code may use without computing them: in a call, without gradients."""
    return None if torch.is_grad_enabled() or is_plain() else operator.given.tensors


def share_evaluations(operators: Iterable[Evaluable]) -> list[SharedEvaluation]:
    """Group operators that can share one evaluation.

    Args:
        operators: the operators of one adapter, in the model's order.

    Returns:
        One evaluation for each distinct class, key, parameter shapes, dtypes and device; one for
        each operator that is not `batched`.
    """
    groups: dict[Hashable, list[Evaluable]] = {}
    for operator in operators:
        parameters = zip(operator.names_read(), operator.parameters_read(), strict=True)
        shapes = tuple((name, shape_of(p), p.dtype, p.device) for name, p in parameters)
        alone = None if operator.batched else id(operator)
        groups.setdefault((type(operator), operator.batch_key(), shapes, alone), []).append(operator)
    return [SharedEvaluation(group) for group in groups.values()]


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast would cast the tensor: not float64, nor on the meta device, where torch raises if asked."""
    return not tensor.is_meta and tensor.dtype != torch.float64 and torch.is_autocast_enabled(tensor.device.type)


def working_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer computes with this input.

    Raises:
        TypeError: its numbers are not floating-point; those of a rotation would be rounded to integers.
    """
    if not x.is_floating_point():
        raise TypeError(f"An adapted linear layer was given {x.dtype}; give it floating-point numbers, by x.float().")
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else x.dtype


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """A scope without autocast on the tensor's device."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def keep_mask(probability: float, like: Tensor, *shape: int) -> Tensor:
    """A random mask of this shape, 0 with this probability and 1 otherwise, with the dtype and device of `like`."""
    return (torch.rand(*shape, device=like.device) >= probability).to(like.dtype)
