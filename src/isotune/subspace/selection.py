"""Which right singular vectors of a weight a subspace consists of: its strongest, its weakest, or others."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from isotune.subspace.result import Subspace
from isotune.subspace.solvers import subspace_at

SELECTIONS = ("top", "bottom", "mixed", "band")


def chosen(count: int, rank: int, selection: str = "top", *, start: int | None = None, name: str = "weight") -> Tensor:
    """The places of the chosen triplets among singular triplets in the order of descending singular values.

    A choice of more triplets by "top", "bottom" or "mixed" holds every choice of fewer by the same name, and choosing
    fewer among the chosen ones gives the same as choosing them among all.

    Args:
        count: n, the number of triplets.
        rank: r, from 1 to n.
        selection: "top" are the first r, "bottom" the last r, "mixed" half of them from each end, the odd one from the
            top, and "band" r neighbours.
        start: the first place of a band, from 0 to n − r; with "band" alone.
        name: begins every error message.

    Returns:
        (r,), int64, ascending.

    Raises:
        ValueError: an argument is not allowed.

    Examples:
        >>> chosen(10, 3, "mixed")
        tensor([0, 1, 9])
        >>> chosen(10, 3, "band", start=4)
        tensor([4, 5, 6])

    Source of "band": the authors' code of ROSA (Hameed et al., arXiv 2407.07802), whose "random" is such a band.
    """
    if selection not in SELECTIONS:
        raise ValueError(f"{name}: selection is {selection!r}; choose one of {', '.join(map(repr, SELECTIONS))}.")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= count:
        raise ValueError(
            f"{name}: rank is {rank!r}, but of {count} singular triplets 1 to {count} can be chosen; choose a smaller "
            f"rank, or leave this layer out."
        )
    if (selection == "band") != (start is not None):
        needs = "needs the first place of the band" if start is None else "has no first place"
        raise ValueError(f"{name}: start is {start!r}, but selection={selection!r} {needs}.")
    if start is not None and (isinstance(start, bool) or not isinstance(start, int) or not 0 <= start <= count - rank):
        raise ValueError(
            f"{name}: start is {start!r}, but a band of {rank} of {count} singular triplets may begin at an integer "
            f"from 0 to {count - rank}."
        )
    if selection == "mixed":
        strong = (rank + 1) // 2
        return torch.cat([torch.arange(strong), torch.arange(count - (rank - strong), count)])
    first = {"top": 0, "bottom": count - rank}.get(selection, start or 0)
    return torch.arange(first, first + rank)


def generator_for(seed: int, number: int, name: str) -> torch.Generator:
    """A generator on the CPU whose draws depend on these alone, so that every process and a resumed one draw the same.

    Args:
        seed: a configuration's or a schedule's.
        number: of the boundary at which a subspace is chosen; 0 when an adapter is made.
        name: the layer's name.
    """
    digest = hashlib.blake2b(f"{seed} {number} {name}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def drawn_start(count: int, rank: int, generator: torch.Generator) -> int:
    """The first place of a random band of r = `rank` of n = `count` triplets, uniform from 0 to n − r.

    Args:
        count, rank: as in `chosen`.
        generator: on the CPU; its state alone decides, and is moved on.
    """
    return int(torch.randint(0, count - rank + 1, (), generator=generator))


def singular_subspace(
    weight: Tensor, rank: int, selection: str = "top", *, start: int | None = None, name: str = "weight"
) -> Subspace:
    """Find chosen right singular vectors of a weight by a full decomposition.

    There are n = min(out, in) of them, so that those of the null space beyond are never chosen. Directions whose
    singular values are rounding noise are filled in as in `principal_subspace`.

    Args:
        weight: W, (out, in), of any floating dtype, layout and device.
        rank, selection, start, name: as in `chosen`.

    Returns:
        The basis, (r, in), in the order of descending singular values, with these and the share of ‖W‖²_F that they
        hold. As every decomposition, it is unique only up to signs and up to rotations among equal singular values.

    Raises:
        ValueError: the weight is not a finite, real floating matrix, or an argument is not allowed.

    Examples:
        >>> import torch
        >>> found = singular_subspace(torch.diag(torch.tensor([1.0, 3.0, 2.0])), 2, "bottom")
        >>> found.singular_values
        tensor([2., 1.])
        >>> found.basis.abs()
        tensor([[0., 0., 1.],
                [1., 0., 0.]])
    """
    if weight.dim() != 2 or not weight.numel():
        return subspace_at(weight, (), name=name)  # which refuses it, with the reason
    return subspace_at(weight, chosen(min(weight.shape), rank, selection, start=start, name=name).tolist(), name=name)
