"""Float32 products in full precision, whatever speed settings the process has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

_FULL = ("none", "ieee", "highest")
_CHUNK = 2**24
"""Elements of a matrix that are converted to float64 at a time."""
_DEPTH = 1024
"""Terms that a tensor core adds up on its own: it truncates where float32 rounds, so longer sums would drift."""


def reduces_float32(device: torch.device | str = "cpu") -> bool:
    """Whether products of float32 matrices may be rounded to TF32 or bfloat16 in this process.

    Torch has two interfaces for this, `torch.set_float32_matmul_precision` and, from 2.9, the `fp32_precision`
    attributes of `torch.backends`; it raises if the first is read after the second was used. Both are only read here.
    """
    try:
        precisions = [torch.get_float32_matmul_precision()]
    except RuntimeError:
        return True  # set through both interfaces, to values that disagree
    backend = torch.backends.cuda if torch.device(device).type == "cuda" else torch.backends.mkldnn
    matmul = getattr(backend, "matmul", None)
    if hasattr(torch.backends, "fp32_precision") and matmul is not None:
        precisions.append(matmul.fp32_precision)
    return any(precision not in _FULL for precision in precisions)


def spares_float64(device: torch.device) -> bool:
    """Whether to use float64 only for small matrices on a device: on consumer GPUs it has 1/64 of float32's speed."""
    return device.type == "cuda"


def doubled(matrix: Tensor) -> Tensor:
    """A matrix in float64, moved to the CPU if its device has no float64."""
    return (matrix.cpu() if matrix.device.type == "mps" else matrix).double()


def full_precision(matrix: Tensor) -> Tensor:
    """A matrix whose products are at least as accurate as float32's: itself, or float64 if `reduces_float32`.

    The process's settings are never changed for this, since other threads multiply under them too.
    """
    return matrix.double() if matrix.dtype == torch.float32 and reduces_float32(matrix.device) else matrix


def exact_product(left: Tensor, right: Tensor, *, narrow: bool = False) -> Tensor:
    """left @ right of two matrices, or stacks of them, of one dtype and device, with no more rounding than float32's.

    Args:
        left: a matrix.
        right: the thinner of the two, of which copies are made.
        narrow: whether the values of `left` come from a dtype of at most 16 bits, which TF32 represents exactly.
    """
    exact = left.dtype != torch.float32 or not reduces_float32(left.device)
    if exact or left.device.type == "mps":  # which has neither float64 nor a faster float32
        return left @ right
    if spares_float64(left.device):
        return _product_of_parts(left, right, narrow=narrow)
    if left.ndim > 2:
        return torch.stack([exact_product(one, other) for one, other in zip(left, right, strict=True)])
    wide = right.double()
    return torch.cat([(part.double() @ wide).to(left.dtype) for part in rows_in_parts(left)])


def rows_in_parts(matrix: Tensor) -> tuple[Tensor, ...]:
    """The rows of a matrix in parts small enough to be converted to float64 one after the other."""
    return torch.split(matrix, max(1, _CHUNK // max(1, matrix.shape[1])))


def _product_of_parts(left: Tensor, right: Tensor, *, narrow: bool) -> Tensor:
    """left @ right as a sum of products whose factors TF32 and bfloat16 hold exactly.

    Source: Ootomo and Yokota (2022), Recovering single precision accuracy from Tensor Cores while surpassing the FP32
    theoretical peak performance.
    """
    total = left.new_zeros(*left.shape[:-1], right.shape[-1])
    for columns, rows in zip(torch.split(left, _DEPTH, -1), torch.split(right, _DEPTH, -2), strict=True):
        thin = _parts(rows)
        for index, part in enumerate([columns] if narrow else _parts(columns)):
            # The omitted products are 2⁻²⁷ of the whole, beyond float32.
            found = part @ torch.cat(thin[: len(thin) - index], dim=-1)
            total += torch.unflatten(found, -1, (-1, right.shape[-1])).sum(-2)
    return total


def _parts(matrix: Tensor) -> list[Tensor]:
    """Three matrices that add up to the given one exactly: float32's 24 bits, 8 in each, as in bfloat16."""
    high = matrix.bfloat16().float()
    rest = matrix - high
    middle = rest.bfloat16().float()
    return [high, middle, rest.sub_(middle)]


@contextlib.contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """Turn autocast off within this block, on the CPU and on a device."""
    with contextlib.ExitStack() as stack:
        for kind in {"cpu", device.type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def gram_by_rows(tall: Tensor) -> Tensor:
    """MᵀM of a matrix M in float64, (columns, columns), without a float64 copy of M."""
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=tall.device)
    for part in rows_in_parts(tall):
        double = part.double()
        gram.addmm_(double.mT, double)
    return gram
