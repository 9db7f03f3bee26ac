"""Principal subspaces kept on disk between processes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import uuid
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from isotune.subspace.solvers import Subspace

DEFAULT_MAX_BYTES = 4 * 2**30
_SUFFIX = ".safetensors"
_TEMPORARY = ".partial"
_ABANDONED_SECONDS = 3600.0


class SubspaceCache:
    """Keep principal subspaces as safetensors files in one directory, the least recently used dropped first.

    `directory`: by default the environment's ISOTUNE_CACHE, else ~/.cache/isotune/subspaces; "off" or "0" there turns
    the cache off. `max_bytes`: by default ISOTUNE_CACHE_BYTES, else 4 GiB. Several processes may share a directory. A
    damaged or foreign entry counts as absent and is removed; a directory that cannot be written is no error: nothing
    is kept. Raises ValueError if ISOTUNE_CACHE_BYTES is not a whole number of bytes.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None, max_bytes: int | None = None) -> None:
        chosen = os.environ.get("ISOTUNE_CACHE", "") if directory is None else directory
        self.directory: Path | None
        if directory is None and str(chosen).strip().lower() in ("off", "0"):
            self.directory = None
        else:
            self.directory = Path(chosen or "~/.cache/isotune/subspaces").expanduser()
        self.max_bytes = _max_bytes_from_environment() if max_bytes is None else max_bytes

    def get(self, key: str, shape: tuple[int, int], device: torch.device | str = "cpu") -> Subspace | None:
        """Return the subspace stored under `key` with a basis of this `shape` (r, in), on `device`, or None."""
        if self.directory is None:
            return None
        path = self.directory / (key + _SUFFIX)
        try:
            found = _read(path, shape)
        except (FileNotFoundError, PermissionError, RuntimeError):
            return None  # RuntimeError: safetensors opens a file twice, and this one was evicted in between
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # the file's time is its last use, which eviction goes by
        return Subspace(
            found.basis.to(device),
            found.singular_values.to(device),
            found.energy,
            found.solver,
            found.iterations,
            found.converged,
        )

    def put(self, key: str, subspace: Subspace) -> None:
        """Store `subspace` under `key`, then drop the least recently used entries beyond the size bound."""
        if self.directory is None:
            return
        tensors = {
            "basis": subspace.basis.detach().cpu().contiguous(),
            "singular_values": subspace.singular_values.detach().cpu().contiguous(),
        }
        if sum(tensor.nbytes for tensor in tensors.values()) > self.max_bytes:
            return
        metadata = {
            "energy": repr(subspace.energy),
            "solver": subspace.solver,
            "iterations": str(subspace.iterations),
            "converged": str(int(subspace.converged)),
            "checksum": _checksum(tensors),
        }
        temporary = self.directory / f"{key}.{uuid.uuid4().hex}{_TEMPORARY}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            save_file(tensors, temporary, metadata=metadata)
            os.replace(temporary, self.directory / (key + _SUFFIX))
            self._evict()
        except (OSError, SafetensorError):
            with contextlib.suppress(OSError):
                temporary.unlink()

    def _evict(self) -> None:
        assert self.directory is not None
        entries: list[tuple[float, int, Path]] = []
        for path in self.directory.iterdir():
            try:
                status = path.stat()
                if path.suffix == _TEMPORARY and time.time() - status.st_mtime > _ABANDONED_SECONDS:
                    path.unlink()  # its writer was killed
                elif path.suffix == _SUFFIX:
                    entries.append((status.st_mtime, status.st_size, path))
            except FileNotFoundError:
                continue  # another process evicted it
        size = sum(entry[1] for entry in entries)
        for _, length, path in sorted(entries, key=lambda entry: entry[0]):
            if size <= self.max_bytes:
                break
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            size -= length


def _max_bytes_from_environment() -> int:
    given = os.environ.get("ISOTUNE_CACHE_BYTES", "").strip()
    if not given:
        return DEFAULT_MAX_BYTES
    if not given.isdecimal():
        raise ValueError(
            f"ISOTUNE_CACHE_BYTES is {given!r}; give a whole number of bytes, such as {DEFAULT_MAX_BYTES}, or unset it"
        )
    return int(given)


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path, shape: tuple[int, int]) -> Subspace:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in ("basis", "singular_values")}
    if tensors["basis"].shape != shape or tensors["singular_values"].shape != shape[:1]:
        raise ValueError(f"{path} holds a basis of another shape")
    if metadata["checksum"] != _checksum(tensors):
        raise ValueError(f"{path} is damaged")
    return Subspace(
        tensors["basis"],
        tensors["singular_values"],
        float(metadata["energy"]),
        metadata["solver"],
        int(metadata["iterations"]),
        metadata["converged"] == "1",
    )
