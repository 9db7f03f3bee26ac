"""Float32 products in full precision, whatever the process has set for speed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

_FULL = ("none", "ieee", "highest")
_CHUNK = 2**24
"""Elements of a matrix that are widened at a time."""
_DEPTH = 1024
"""Terms of a sum that a tensor core adds up by itself: it cuts off where float32 rounds, so long sums would drift."""


def reduces_float32(device: torch.device | str = "cpu") -> bool:
    """Say whether products of float32 matrices may be rounded to TF32 or bfloat16 in this process.

    Torch has two interfaces for this, `torch.set_float32_matmul_precision` and, from 2.9, `fp32_precision` attributes
    of `torch.backends`; it raises where the first is asked after the second was used. Both are only read here.
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
    """Say whether float64 is kept to small matrices on a device: consumer GPUs have it at 1/64 of float32's speed."""
    return device.type == "cuda"


def doubled(matrix: Tensor) -> Tensor:
    """A matrix in float64, on the CPU where its device has none."""
    return (matrix.cpu() if matrix.device.type == "mps" else matrix).double()


def full_precision(matrix: Tensor) -> Tensor:
    """A matrix whose products are at least as accurate as float32's: itself, or in float64 where `reduces_float32`.

    A setting of the process is never changed for it, since other threads multiply under the same one.
    """
    return matrix.double() if matrix.dtype == torch.float32 and reduces_float32(matrix.device) else matrix


def exact_product(left: Tensor, right: Tensor, *, narrow: bool = False) -> Tensor:
    """left @ right of two matrices, or stacks of them, of one dtype and device, rounded no more than by float32.

    Args:
        left: a matrix.
        right: the thinner of the two, of which copies are made.
        narrow: whether the numbers of `left` came from a dtype of at most 16 bits, which TF32 leaves as they are.
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
    """The rows of a matrix in parts that are small enough to be widened one after the other."""
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
            # The products left out are 2⁻²⁷ of the whole: beyond float32.
            found = part @ torch.cat(thin[: len(thin) - index], dim=-1)
            total += torch.unflatten(found, -1, (-1, right.shape[-1])).sum(-2)
    return total


def _parts(matrix: Tensor) -> list[Tensor]:
    """Three matrices whose sum is the given one to the bit: float32's 24 digits, 8 in each, as bfloat16 has."""
    high = matrix.bfloat16().float()
    rest = matrix - high
    middle = rest.bfloat16().float()
    return [high, middle, rest.sub_(middle)]


@contextlib.contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """Compute in the dtypes that are given, on the CPU and on a device, inside of an autocast region too."""
    with contextlib.ExitStack() as stack:
        for kind in {"cpu", device.type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield
