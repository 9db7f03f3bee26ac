"""The start of a training: the principal subspaces of all layers, by which solver, and reading them from a file."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor

import isotune
from gpu_bench.journal import Note
from gpu_bench.models import PROJECTIONS, Settings, decay, llama, stir
from gpu_bench.timing import attempt, seconds_of
from isotune.subspace.solvers import principal_subspace
from subspace import sine

SVD_LOWRANK_ROUNDS = 4
"""Power iterations of torch.svd_lowrank: twice its default."""
SVD_LOWRANK = f"torch.svd_lowrank niter={SVD_LOWRANK_ROUNDS}"


@torch.no_grad()
def whole_model(settings: Settings, note: Note, shape: str, rank: int) -> None:
    """All subspaces of a whole model by injection, then the adapter saved and put onto the base again from its file."""
    about = settings.shapes[shape]
    layers = about.layers
    base = llama(settings, about, layers, distinct=True)
    note(shape=shape, layers=layers, rank=rank, subspaces=layers * len(PROJECTIONS))
    x = torch.randn(1, 16, about.width, device=settings.device, dtype=settings.dtype)

    def output(model: Any) -> Tensor:
        found: Tensor = model(inputs_embeds=x).last_hidden_state.double()
        return found

    plain, models, before = output(base), list[Any](), settings.allocated()
    memory: dict[str, Any] = {}
    config = isotune.PsoftConfig(r=rank, target_modules=PROJECTIONS)
    with settings.peak(memory, "peak_gib_beyond_model"):
        seconds = seconds_of(settings, lambda: models.append(peft.get_peft_model(base, config)))
    kept = (settings.allocated() - before) / 2**30
    note(seconds_to_solve=round(seconds, 3), kept_gib=None if settings.dry else round(kept, 4), **memory)
    adapted = output(stir(models[0], 1e-2))
    with tempfile.TemporaryDirectory() as name:
        # The embeddings are the base model's; asking whether they changed would ask the Hub.
        saved = seconds_of(settings, lambda: models[0].save_pretrained(name, save_embedding_layers=False))
        size = (Path(name) / "adapter_model.safetensors").stat().st_size
        base = models.pop().unload()
        loaded = seconds_of(settings, lambda: models.append(peft.PeftModel.from_pretrained(base, name)))
    error = float((output(models.pop()) - adapted).norm() / (adapted - plain).norm())
    note(seconds_to_save=round(saved, 3), file_mib=round(size / 2**20, 3), seconds_to_reload=round(loaded, 3))
    note(error_of_update_after_reload=error)


def _right_vectors(weight: Tensor, rank: int) -> Tensor:
    """The leading right singular vectors, (rank, in), from the eigenvectors of the smaller Gram matrix in float64."""
    wide = weight.double()
    rows, columns = wide.shape
    gram = wide @ wide.T if rows < columns else wide.T @ wide
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1).T
    if rows >= columns:
        return vectors
    return torch.linalg.qr((vectors @ wide).T).Q.T


@torch.no_grad()
def one_layer(settings: Settings, note: Note, size: tuple[int, int], ranks: tuple[int, ...], svd: bool) -> None:
    """Every solver on one weight: seconds, the sine of the largest angle to the true subspace, memory.

    Args:
        size: (out, in).
        svd: whether torch.linalg.svd is timed, in float32, and the reference compared to it in float64.
    """
    torch.manual_seed(0)
    errors: dict[str, str] = {}
    weight = decay(torch.empty(size, device=settings.device, dtype=settings.dtype))
    ranks = tuple(rank for rank in ranks if rank <= min(size))
    true = _right_vectors(weight, max(ranks))
    best = torch.linalg.vector_norm(weight.double() @ true.T, dim=0).square().cumsum(0)
    wide = weight.float()
    solvers: dict[str, dict[str, Any]] = {}

    def measured(name: str, rank: int, solve: Any) -> bool:
        solve()  # loads the libraries
        row: dict[str, Any] = {}
        found: list[Any] = []
        with settings.peak(row, "peak_gib"):
            row["seconds"] = round(seconds_of(settings, lambda: found.append(solve())), 5)
        basis = found[0].basis if hasattr(found[0], "basis") else found[0]
        captured = float(torch.linalg.matrix_norm(weight.double() @ basis.double().T).square())
        row |= {"sine": sine(basis, true[:rank]), "energy_missed": 1 - captured / float(best[rank - 1])}
        solvers[f"{name} r={rank}"] = row
        return True

    for rank in ranks:
        for solver in ("auto", "lowrank", "full"):
            solve = lambda solver=solver, rank=rank: principal_subspace(weight, rank, solver=solver)  # noqa: E731
            attempt(f"{solver} r={rank}", errors, lambda s=solver, r=rank, solve=solve: measured(s, r, solve))
        lowrank = lambda rank=rank: torch.svd_lowrank(wide, rank, niter=SVD_LOWRANK_ROUNDS)[2].T  # noqa: E731
        attempt(f"{SVD_LOWRANK} r={rank}", errors, lambda r=rank, solve=lowrank: measured(SVD_LOWRANK, r, solve))
        note(size=list(size), solvers=solvers, errors=errors)
    if svd:
        rank = max(ranks)
        full = lambda: torch.linalg.svd(wide, full_matrices=False).Vh[:rank]  # noqa: E731
        attempt("torch.linalg.svd", errors, lambda: measured("torch.linalg.svd", rank, full))
        note(solvers=solvers, errors=errors)
        exact = torch.linalg.svd(weight.double(), full_matrices=False).Vh[:rank]
        note(reference_to_float64_svd=sine(true, exact))
