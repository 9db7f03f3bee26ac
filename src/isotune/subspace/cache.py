"""A cache of principal subspaces on disk, shared between processes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import time
import uuid
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from isotune.internals.safetensors_files import readable
from isotune.subspace.precision import doubled, exact_product, without_autocast
from isotune.subspace.result import Subspace

DEFAULT_MAX_BYTES = 4 * 2**30
AGREEMENT = 1e-3
"""Largest deviation of an entry from its weight, as a share of each squared singular value."""

_SUFFIX = ".safetensors"
_TEMPORARY = ".partial"
_ENTRY_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
_TEMPORARY_NAME = re.compile(r"[0-9a-f]{64}\.[0-9a-f]{32}\.partial")
_TENSORS = ("basis", "singular_values")
_METADATA = {"energy", "solver", "iterations", "checksum"}
_ABANDONED_SECONDS = 3600.0


class SubspaceCache:
    """Principal subspaces on disk, one safetensors file each; the least recently used are dropped first.

    Processes and other programs may share a directory: only files whose names and contents show that they were written
    here are removed. An entry that is damaged, or does not belong to the weight it is requested for, counts as absent
    and is removed. Anything but a regular file (a pipe, a socket, a folder) is never opened. If the directory cannot be
    written, nothing is cached and no error is raised.

    Args:
        directory: by default the environment variable ISOTUNE_CACHE, or else ~/.cache/isotune/subspaces; "off" or "0"
            in the environment turns the cache off.
        max_bytes: by default the environment variable ISOTUNE_CACHE_BYTES, or else 4 GiB.

    Raises:
        ValueError: ISOTUNE_CACHE_BYTES is not a whole number of bytes.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None, max_bytes: int | None = None) -> None:
        chosen = os.environ.get("ISOTUNE_CACHE", "") if directory is None else directory
        off = directory is None and str(chosen).strip().lower() in ("off", "0")
        self.directory = None if off else Path(chosen or "~/.cache/isotune/subspaces").expanduser()
        given = os.environ.get("ISOTUNE_CACHE_BYTES", "").strip() or str(DEFAULT_MAX_BYTES)
        if max_bytes is None and not given.isdecimal():
            raise ValueError(
                f"ISOTUNE_CACHE_BYTES={given!r} is not allowed; set it to a whole number of bytes, such as "
                f"{DEFAULT_MAX_BYTES}, or unset it."
            )
        self.max_bytes = int(given) if max_bytes is None else max_bytes

    def get(
        self, key: str, shape: tuple[int, int], *, weight: Tensor | None = None, tolerance: float = 0.0
    ) -> Subspace | None:
        """The subspace stored under a key.

        Args:
            key: the key, from `subspace_key`.
            shape: (r, in) of the basis.
            weight: W, (out, in), whose device the result is put on. If given, an entry that by `spans` belongs to
                another weight counts as absent.
            tolerance: as in `spans`.

        Returns:
            The subspace, or None if there is no such entry, or it is damaged or belongs to another weight.
        """
        if self.directory is None:
            return None
        path = self.directory / (key + _SUFFIX)
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                return None
            found = _read(path, shape, "cpu" if weight is None else weight.device)
            if weight is not None and not spans(found, weight, tolerance):
                raise ValueError(f"{path} belongs to another weight")  # caught below, like all errors of `_read`
        except (FileNotFoundError, PermissionError, RuntimeError):
            return None  # RuntimeError: safetensors opens a file twice, and it was evicted in between
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # eviction goes by the file's time, its last use
        return found

    def put(self, key: str, subspace: Subspace) -> None:
        """Store a subspace if it fits into `max_bytes`, then drop the least recently used entries beyond that."""
        if self.directory is None:
            return
        tensors = {name: getattr(subspace, name).detach().cpu().contiguous() for name in _TENSORS}
        if sum(tensor.nbytes for tensor in tensors.values()) > self.max_bytes:
            return
        metadata = {
            "energy": repr(subspace.energy),
            "solver": subspace.solver,
            "iterations": str(subspace.iterations),
            "checksum": _checksum(tensors),
        }
        entry = self.directory / (key + _SUFFIX)
        temporary = self.directory / f"{key}.{uuid.uuid4().hex}{_TEMPORARY}"
        try:
            if entry.exists() and not entry.is_file():
                return  # another program's pipe or folder
            self.directory.mkdir(parents=True, exist_ok=True)
            save_file(tensors, temporary, metadata=metadata)
            readable(temporary)
            os.replace(temporary, entry)
            self._evict()
        except (OSError, SafetensorError):
            with contextlib.suppress(OSError):
                temporary.unlink()

    def _evict(self) -> None:
        assert self.directory is not None
        entries: list[tuple[float, int, Path]] = []
        for path in self.directory.iterdir():
            try:
                status = path.lstat()
                if not stat.S_ISREG(status.st_mode):
                    continue
                if _TEMPORARY_NAME.fullmatch(path.name) and time.time() - status.st_mtime > _ABANDONED_SECONDS:
                    path.unlink()  # the process that wrote it was killed
                elif _ENTRY_NAME.fullmatch(path.name):
                    entries.append((status.st_mtime, status.st_size, path))
            except FileNotFoundError:
                continue  # another process evicted it
        size = sum(entry[1] for entry in entries)
        for _, length, path in sorted(entries):
            if size <= self.max_bytes:
                break
            if _is_entry(path):
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()
            size -= length


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _is_entry(path: Path) -> bool:
    """Whether, by its header, a file was written by `SubspaceCache.put`."""
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys()) == set(_TENSORS) and set(file.metadata() or {}) >= _METADATA
    except (OSError, RuntimeError, SafetensorError):
        return False


def _read(path: Path, shape: tuple[int, int], device: torch.device | str) -> Subspace:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in _TENSORS}
    if tensors["basis"].shape != shape or tensors["singular_values"].shape != shape[:1]:
        raise ValueError(f"{path} holds a basis of another shape")
    if metadata["checksum"] != _checksum(tensors):
        raise ValueError(f"{path} is damaged")
    basis, values = (tensors[name].to(device) for name in _TENSORS)
    return Subspace(basis, values, float(metadata["energy"]), metadata["solver"], int(metadata["iterations"]))


@torch.no_grad()
def spans(subspace: Subspace, weight: Tensor, tolerance: float = 0.0) -> bool:
    """Whether a subspace can be the principal one of a weight, checked by one product with it.

    The basis B must have orthonormal rows, and (W Bᵀ)ᵀ(W Bᵀ) must be diag(σ²) with descending singular values σ, both
    to within `AGREEMENT`, where row i is measured in units of σᵢ, or σ₁ / 100 if that is larger.

    Args:
        subspace: the subspace, on the weight's device.
        weight: W, (out, in), of any floating dtype.
        tolerance: the sine of the angle to which the subspace was solved; 4 times its square is added to `AGREEMENT`.

    Source: Golub and Van Loan, Matrix Computations, 4th ed., section 8.1.2 (Rayleigh-Ritz).
    """
    basis, values = subspace.basis, subspace.singular_values.cpu().double()
    matrix = weight.detach().to(basis)
    with without_autocast(matrix.device):
        gram = _gram(basis.T)
        image = _gram(exact_product(matrix, basis.T))
    allowed = AGREEMENT + 4.0 * tolerance**2
    scale = values.clamp_min(1e-2 * float(values[0])).clamp_min(1e-150)
    defects = (
        gram - torch.eye(len(values), dtype=torch.float64),
        (image - values.square().diag()) / scale.outer(scale),
    )
    descending = bool((values[:-1] >= values[1:]).all())
    return descending and all(float(defect.abs().max()) <= allowed for defect in defects)


def _gram(columns: Tensor) -> Tensor:
    wide = doubled(columns)
    return (wide.T @ wide).cpu()
