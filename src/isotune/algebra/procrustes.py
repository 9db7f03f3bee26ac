"""From matrices back to parameters: the nearest rotation, its Cayley generator, and reflections that make it.

Everything is computed in float64 and without gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from isotune.algebra.cayley import orthogonal_difference
from isotune.algebra.skew import skew_from_vector, skew_order, vector_from_skew

LARGEST_TANGENT = 1e4
"""Largest tan(θ/2) of a generator that is made here: a rotation by half a turn becomes one by 2e-4 less."""
_TOWARDS_IDENTITY = 1e-9
_IDLE = 1e-12


@torch.no_grad()
def nearest_rotation(cross: Tensor) -> Tensor:
    """The rotations R with determinant +1 for which ‖W' − W Rᵀ‖_F is smallest; of equal ones those nearest to I.

    Args:
        cross: W'ᵀ W, (..., n, n).

    Returns:
        (..., n, n), float64.

    Examples:
        >>> turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
        >>> weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
        >>> torch.allclose(nearest_rotation((weight @ turn.T).T @ weight).float(), turn)
        True

    Source: Schönemann, A generalized solution of the orthogonal Procrustes problem (1966); Kabsch (1976) for the
    determinant. Inputs that W does not see leave R open; a ten-millionth of a percent of ‖cross‖₂ I on the diagonal,
    which stands for a penalty on ‖R − I‖², closes it.
    """
    cross = cross.double()
    size = torch.linalg.matrix_norm(cross, 2).clamp_min(torch.finfo(cross.dtype).tiny)[..., None]
    left, _, right = torch.linalg.svd(cross + torch.diag_embed((_TOWARDS_IDENTITY * size).expand(cross.shape[:-1])))
    left[..., -1] *= torch.det(left @ right).sign()[..., None]
    rotation: Tensor = left @ right
    return rotation


@torch.no_grad()
def generator_of(rotation: Tensor) -> Tensor:
    """The free entries of the generators Q = (R − I)(R + I)⁻¹, the inverse of the Cayley transform.

    No Cayley transform turns a plane by half a turn. Such planes are turned by as much as `LARGEST_TANGENT` allows, in
    either direction, so that the result is the nearest rotation that a generator of that size can make.

    Args:
        rotation: R, (..., n, n), orthogonal with determinant +1.

    Returns:
        (..., n(n − 1)/2), float64.

    Source: Cayley (1846).
    """
    rotation = rotation.double()
    n = rotation.shape[-1]
    flat = rotation.reshape(-1, n, n)
    eye = torch.eye(n, dtype=flat.dtype, device=flat.device)
    cosines, vectors = torch.linalg.eigh((flat + flat.mT) / 2)
    lowest = (1 - LARGEST_TANGENT**2) / (1 + LARGEST_TANGENT**2)
    counts = (cosines < lowest).sum(-1)
    found = torch.empty_like(flat)
    whole = counts == 0
    found[whole] = torch.linalg.solve(flat[whole] + eye, flat[whole] - eye)
    for index in torch.nonzero(~whole).flatten().tolist():
        # Eigenvalues near −1 come in pairs, as the determinant is +1; R maps their space to itself.
        count = int(counts[index] + counts[index] % 2)
        half, rest = vectors[index].split([count, n - count], dim=1)
        inner = rest.T @ flat[index] @ rest
        own = torch.eye(n - count, dtype=flat.dtype, device=flat.device)
        turned = torch.kron(torch.eye(count // 2).to(flat), flat.new_tensor([[0.0, 1.0], [-1.0, 0.0]]))
        found[index] = LARGEST_TANGENT * half @ turned @ half.T
        found[index] += rest @ torch.linalg.solve(inner + own, inner - own) @ rest.T
    skew = (found - found.mT) / 2
    return vector_from_skew(skew).reshape(*rotation.shape[:-2], -1)


@torch.no_grad()
def reflections_of(entries: Tensor, count: int) -> tuple[Tensor, float, float]:
    """Directions of reflections whose product is nearest to a rotation, or is the rotation if they are enough.

    A product of r reflections, r even, turns at most r/2 planes, each by the two reflections in directions half its
    angle apart. Nearest in the Frobenius norm is the one with the planes that the rotation turns farthest: where M is
    the identity on a space F of n − r dimensions, ⟨R, M⟩ is at most r and the trace of the symmetric part of R on F,
    which by Cauchy's interlacing is at most the sum of the n − r largest cosines.

    Args:
        entries: free entries of the rotation's generator, (n(n − 1)/2,).
        count: r, even.

    Returns:
        The unit directions, (r, n), of M = H_r ⋯ H₂ H₁; ‖R − M‖_F; and ‖R − I‖_F.

    Source: Cartan and Dieudonné, for a rotation as a product of reflections.
    """
    n = skew_order(entries.shape[-1])
    values, vectors = torch.linalg.eigh(-1j * skew_from_vector(entries.double(), n))
    # Eigenvalues come in pairs ±λ, λ = tan(θ/2); R turns the imaginary part of the eigenvector of λ towards the real.
    tangents, planes = values.flip(0)[: n // 2].clamp_min(0), vectors.flip(1)[:, : n // 2].mT
    first, second = planes.imag * 2**0.5, planes.real * 2**0.5
    idle = (tangents <= _IDLE)[:, None]
    larger = torch.where(first.norm(dim=1, keepdim=True) < second.norm(dim=1, keepdim=True), second, first)
    first = torch.where(idle, larger / larger.norm(dim=1, keepdim=True), first)
    cosines = (1 + tangents.square()).rsqrt()[:, None]
    second = torch.where(idle, first, cosines * (first + tangents[:, None] * second))
    pairs = torch.stack([first, second], 1).flatten(0, 1)[:count]
    lengths = 8 * tangents.square() / (1 + tangents.square())  # ‖R − I‖² in each plane
    missing = float(lengths[count // 2 :].sum().sqrt())
    if len(pairs) < count:  # equal pairs, which cancel
        filling = torch.eye(n, dtype=pairs.dtype, device=pairs.device)[:1]
        pairs = torch.cat([pairs, filling.expand(count - len(pairs), -1)])
    return pairs, missing, float(lengths.sum().sqrt())


def rotation_of(entries: Tensor) -> Tensor:
    """R of the free entries of its generator, (..., n, n), float64."""
    n = skew_order(entries.shape[-1])
    return orthogonal_difference(entries.double(), n) + torch.eye(n, dtype=torch.float64, device=entries.device)
