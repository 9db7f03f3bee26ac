"""The next subspace of a layer: singular vectors of the current weight or of its full gradient, or the present one."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd.graph import GradientEdge, get_gradient_edge

from isotune.hosts import widen
from isotune.internals.torch_state import version_of
from isotune.parallel.processes import several
from isotune.subspace.precision import doubled, without_autocast
from isotune.subspace.selection import SELECTIONS
from isotune.subspace.solvers import principal_subspace
from isotune.tuner.batches import evaluating, groups_that_fit, on_device
from isotune.tuner.layer import Layer

CHOICES = (*(one for one in SELECTIONS if one != "mixed"), "warm", "gradient")

Loss = Callable[[nn.Module, Any], Tensor]
"""loss(model, batch) -> a scalar."""


def present_subspace(layer: Layer, adapter_name: str) -> Tensor:
    """An orthonormal basis of the subspace that an adapter acts in now, (r, in): the one nearest to its own rows.

    Of two factors these are the rows of A, as trained; of an operator the basis that it stands on.

    Source: Higham, Computing the polar decomposition (1986): the polar factor is the nearest matrix with such rows.
    """
    left, _, right = torch.linalg.svd(doubled(layer.subspace(adapter_name).spanning()), full_matrices=False)
    basis: Tensor = left @ right
    return basis


def gradient_subspaces(
    model: nn.Module, layers: Sequence[Layer], adapter_name: str, batches: Iterable[Any], loss: Loss, memory: int
) -> list[Tensor]:
    """The strongest right singular vectors of the full gradient of each layer's weight, summed over batches.

    The model runs in evaluation mode, so that nothing is drawn at random, and no `.grad` is touched. A full gradient is
    as large as the weight: only as many are held at once as fit `memory`, at least one, and the batches are run
    again for the next ones. Of several processes, each runs its own batches and all get the subspaces of the mean; one
    of them may have no batch.

    Args:
        model: the model that `loss` is given.
        layers: the layers.
        adapter_name: the adapter, which must be active.
        batches: what `loss` is given, several times over.
        loss: the loss of one batch.
        memory: bytes.

    Returns:
        (r, in) for each layer.

    Raises:
        ValueError: no process has a batch, a layer takes part in the loss of none, or a gradient is not finite. All
            processes raise it.
    """
    given = list(batches)
    # Whatever is refused is refused by all processes: one that raised alone would leave the others waiting for it.
    if not int(_summed(torch.tensor(len(given), device=layers[0].base_weight.device))):
        raise ValueError("batches is empty; give at least one batch, from whose gradient the next subspace is chosen.")
    found: list[Tensor] = []
    for group in groups_that_fit(layers, memory, lambda layer: 4 * layer.out_features * layer.in_features):
        totals = _gradients(model, group, given, loss)
        for layer in group:
            total = _summed(totals.pop(layer.key))
            if not bool(total.any()):
                raise ValueError(
                    f"The loss does not depend on {layer.key!r} in any of the batches, so there is no gradient to "
                    "choose its next subspace from. Give batches in which it takes part, or exclude it with "
                    "exclude_modules."
                )
            rank = layer.subspace(adapter_name).size
            found.append(principal_subspace(total, rank, solver="full", name=f"gradient of {layer.key!r}").basis)
    return found


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    """The loss that a model of transformers computes from a batch with labels.

    Raises:
        ValueError: the batch is not a mapping, or the model gives no loss.
    """
    found = getattr(model(**batch), "loss", None) if isinstance(batch, Mapping) else None
    if not isinstance(found, Tensor):
        raise ValueError(
            "A batch gives no loss: it must be a mapping of the model's arguments with labels. For other models give "
            "loss=, a function of model and batch."
        )
    return found


def _gradients(model: nn.Module, group: Sequence[Layer], batches: Sequence[Any], loss: Loss) -> dict[str, Tensor]:
    """Layer name -> the sum of its full gradients, (out, in)."""
    totals = {
        layer.key: torch.zeros(layer.out_features, layer.in_features, device=layer.base_weight.device)
        for layer in group
    }
    with evaluating(model), torch.enable_grad():
        for batch in batches:
            with _calls_of(group) as calls:
                value = loss(model, on_device(batch, group[0].base_weight.device))
            used = calls if value.requires_grad else []
            gradients = torch.autograd.grad(value, [edge for _, edge, _ in used], allow_unused=True) if used else ()
            with torch.no_grad(), without_autocast(value.device):
                for (layer, _, read), gradient in zip(used, gradients, strict=True):
                    if gradient is not None:
                        read(totals[layer.key], widen(gradient))
            del calls, used, gradients, value
    return totals


def _summed(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if several():
        dist.all_reduce(tensor)
    return tensor


class _Copies:
    """Copies of tensors as they are now; layers that are given the same tensor one after the other share one."""

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[Tensor], int, Tensor] | None = None
        """The tensor that was copied last, its version then, and the copy."""

    def __call__(self, tensor: Tensor) -> Tensor:
        last, version = self._last, version_of(tensor)
        if last is None or last[0]() is not tensor or last[1] != version:
            last = self._last = weakref.ref(tensor), version, tensor.detach().clone()
        return last[2]


_Call = tuple[Layer, GradientEdge, Callable[[Tensor, Tensor], Any]]
"""A layer, where a tensor of it enters the graph, and what adds to the layer's gradient, given that of the tensor."""


@contextmanager
def _calls_of(group: Sequence[Layer]) -> Iterator[list[_Call]]:
    """Within this block, note each call of the layers that takes part in a graph.

    The model may write into what a layer is given and into what it returns, once it has returned. So inputs are copied,
    the model gets a copy of the output, and the gradient is taken where the output itself entered the graph.
    """
    calls: list[_Call] = []
    copied = _Copies()

    def note(layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        if not output.requires_grad:
            return None
        given: Tensor = next(iter((*args, *kwargs.values())))
        x = copied(given).flatten(0, -2)

        def read(total: Tensor, gradient: Tensor) -> None:
            total.addmm_(gradient.flatten(0, -2).T.to(total), x.to(total))

        calls.append((layer, get_gradient_edge(output), read))
        # A write into a view, as the output may be, would leave the place out of the graph that was noted here.
        return output.clone()

    def folding(layer: Layer) -> Callable[..., Tensor]:
        def fold(names: Sequence[str], matrix: Tensor, **given: Any) -> Tensor:
            folded = type(layer).fold(layer, names, matrix, **given)
            at, multiple = given.get("at"), given.get("multiple")

            def read(total: Tensor, gradient: Tensor) -> None:
                gradient = gradient.to(total) if multiple is None else gradient.to(total) * multiple
                total.add_(gradient) if at is None else total.index_add_(0, at, gradient)

            if folded.requires_grad:
                calls.append((layer, get_gradient_edge(folded), read))
            return folded

        return fold

    with ExitStack() as stack:
        for layer in group:
            if layer.host.folds:  # a convolution or an embedding has its gradient where the adapter is folded in
                vars(layer)["fold"] = folding(layer)
                stack.callback(vars(layer).pop, "fold")
            else:
                stack.callback(layer.register_forward_hook(note, with_kwargs=True).remove)
        yield calls
