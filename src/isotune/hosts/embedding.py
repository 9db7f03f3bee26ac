"""nn.Embedding as a host: each token's vector is one row of W."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from isotune.hosts.host import Fold, Host, widen
from isotune.parallel.tensor_parallel import mesh_of


class _ScaleGradient(torch.autograd.Function):
    """The identity whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x.clone()  # a model may write into the output, as into no view that is made here

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return gradient * factor, None


class _Rows(TorchFunctionMode):
    """Records which rows an embedding looks up, and what they hold."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Tensor | None = None
        self.rows: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is nn.functional.embedding:
            self.found, self.rows = args[0], result
        return result


def _multiple(found: Tensor, rows: Tensor) -> Tensor:
    """The factor between two tensors, one of which is a multiple of the other; 1 where both are zero."""
    found, rows = widen(found.detach()), widen(rows.detach())
    squares = rows.square().sum()
    return torch.where(squares > 0, (found * rows).sum() / squares, 1.0)


class EmbeddingHost(Host):
    """An embedding, y = the rows of W indexed by x; W is (num_embeddings, embedding_dim), so adapters change vectors.

    The adapters only process the rows that are looked up. padding_idx and scale_grad_by_freq affect their gradients as
    they do the embedding's own: padding has none, and a token's gradient is divided by its count in the batch.
    """

    kinds = ("torch.nn.Embedding",)
    modules = (nn.Embedding,)
    folds = True
    sides = ("input",)

    @property
    def gives_rows(self) -> bool:  # type: ignore[override]
        """Whether a process sees by what the module's own forward multiplies the rows; it may have none of them."""
        return type(self.module).forward is nn.Embedding.forward or mesh_of(self.module) is None

    def check(self) -> None:
        """Also refuse max_norm."""
        super().check()
        if getattr(self.module, "max_norm", None) is not None:
            raise ValueError(
                f"The embedding {self.name!r} has max_norm={self.module.max_norm}, so it rewrites its frozen weight "
                "whenever it is used. Set max_norm to None, or exclude the module with exclude_modules."
            )

    def call_folded(self, base_layer: nn.Module, fold: Fold, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The folded rows, rounded once to the dtype of the weight."""
        found, tokens, multiple = self._look_up(base_layer, x, *args, **kwargs)
        rows = widen(found).reshape(-1, found.shape[-1])
        folded = fold(rows, rows=rows, at=tokens, multiple=multiple)
        factor = self._gradient_factor(tokens, folded.dtype) if folded.requires_grad else None
        if factor is not None:
            folded = _ScaleGradient.apply(folded, factor)  # type: ignore[no-untyped-call]
        return folded.to(found.dtype).view(found.shape)

    def _look_up(
        self, base_layer: nn.Module, x: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The output, the row of W of which each output vector is a multiple, and this multiple; None for 1."""
        if base_layer is self.module and type(self.module).forward is nn.Embedding.forward:
            return base_layer(x, *args, **kwargs), x.reshape(-1), None
        with _Rows() as seen:  # learned positions, for example, look up other rows than given
            found: Tensor = base_layer(x, *args, **kwargs)
        if not isinstance(found, Tensor):
            raise ValueError(
                f"{self.name!r}, a {type(self.module).__name__}, returns a {type(found).__name__} and no tensor, so no "
                "adapter can act on it; exclude the module with exclude_modules."
            )
        if seen.found is None or seen.rows is None:
            return found, x.reshape(-1), None
        plain = type(self.module).forward is nn.Embedding.forward
        return found, seen.found.reshape(-1), None if plain else _multiple(found, seen.rows)

    def _gradient_factor(self, tokens: Tensor, dtype: torch.dtype) -> Tensor | None:
        """A factor for each token's gradient, (tokens, 1); None if all are 1."""
        padding, by_frequency = self.module.padding_idx, self.module.scale_grad_by_freq
        if padding is None and not by_frequency:
            return None
        factor = torch.ones(tokens.shape, dtype=dtype, device=tokens.device)
        if by_frequency:
            counts = torch.zeros(len(self.weight), dtype=dtype, device=tokens.device).index_add_(0, tokens, factor)
            factor = factor / counts.index_select(0, tokens)
        if padding is not None:
            factor = factor * (tokens != padding)
        return factor[:, None]
