"""Merging adapters into the weight of their layer, unmerging them, and computing their updates."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from isotune.adapter.evaluation import without_autocast
from isotune.adapter.operator import Adapter, Part
from isotune.errors import IsotuneWarning
from isotune.hosts import Host, Kept, host_for, widen
from isotune.internals.offloading import brought
from isotune.parallel.sharding import whole
from isotune.tuner.quantisation import backend_of, refuse_without_gradient


@dataclass(frozen=True)
class Requantised:
    """How much re-quantising a merged weight W' changed it, in Frobenius norms."""

    of_weight: float
    """The change divided by ‖W'‖: the relative change of the output for inputs without a preferred direction."""
    of_update: float
    """The change divided by ‖W' − W‖, the update by the adapters themselves."""

    @classmethod
    def measure(cls, before: Tensor, wanted: Tensor, found: Tensor) -> Requantised:
        """Compare W, the wanted W' and the W' found after quantising."""
        before, wanted, found = widen(before), widen(wanted), widen(found)
        error = torch.linalg.vector_norm(found - wanted)
        norm, update = torch.linalg.vector_norm(wanted), torch.linalg.vector_norm(wanted - before)
        tiny = torch.finfo(norm.dtype).tiny
        return cls(float(error / norm.clamp_min(tiny)), float(error / update.clamp_min(tiny)))


def warn_of_requantising(layers: Iterable[MergingLayer]) -> None:
    """Warn once about how much re-quantising changed the merged weights."""
    found = {layer.key: layer.requantised for layer in layers if layer.requantised is not None}
    if not found:
        return
    worst = max(found, key=lambda key: found[key].of_weight)
    mean = [sum(getattr(one, name) for one in found.values()) / len(found) for name in ("of_weight", "of_update")]
    warnings.warn(
        f"The merged weights of {len(found)} layers were quantised again, which changed them by {mean[0]:.2g} of their "
        f"norm on average (at most {found[worst].of_weight:.2g}, in {worst!r}): {mean[1]:.2g} times the update by the "
        "adapters. Unmerged adapters on a quantised base are exact.",
        IsotuneWarning,
        stacklevel=3,
    )


class Owner(Protocol):
    """What a layer needs from the model-level object."""

    has_exchanged: bool
    """Set by a layer whose base was exchanged where nothing was trained."""

    def tuners_around(self, layer: nn.Module) -> list[BaseTunerLayer]:
        """Layers of other tuners that contain the layer."""

    def see(self, layer: Any) -> None:
        """Note that the layer is called."""

    def forget(self) -> None:
        """Have the layers found again before the next forward pass."""

    def place(self, layers: Sequence[Any]) -> bool:
        """Place the adapters of layers again where the base weight has changed since."""


class MergingLayer(nn.Module, BaseTunerLayer):
    """The part of the tuner layer that merges: a new parameter replaces W, and unmerging restores W bit for bit."""

    key: str
    base_layer: nn.Module
    parameter: str | None
    quantization_backend: Any
    _host: Host
    isotune_operator: nn.ModuleDict

    def __init__(self) -> None:
        super().__init__()
        self.merged_adapters: list[str] = []
        self.requantised: Requantised | None = None
        self.owner: Owner | None = None
        """The model-level object, which sets this itself."""
        self._kept: Kept | None = None

    @property
    def host(self) -> Host:
        """The base's own layer, seen as a matrix: the one that is in the model now, if it was exchanged for another.

        Raises:
            ValueError: it was, and adapters cannot act on the new one.
        """
        module, host = self.get_base_layer(), self._host
        if torch.compiler.is_compiling():
            return host
        # Looked up here, and not as an attribute, since every pass asks several times.
        other = type(module._parameters.get(host.parameter)) is not host.weight_class
        if module is not host.module or (other and self._kept is None and host.is_exchanged()):
            self._follow(module)
        return self._host

    @host.setter
    def host(self, host: Host) -> None:
        self._host = host
        # Code around a layer reads its sizes from it, as MobileNet does the stride of its first.
        for name in getattr(host.module, "__constants__", ()):
            value = getattr(host.module, name, None)
            if not (hasattr(self, name) or isinstance(value, nn.Module | Tensor)):
                setattr(self, name, value)

    def _follow(self, module: nn.Module) -> None:
        if module is not self._host.module and any(part is self._host.module for part in module.modules()):
            return  # a wrapper of the layer that was there before, as of FSDP1 or torch.compile
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        why = f"it was exchanged for a {kind} after adapters were added. Exchange it first, or merge and unload them."
        try:
            backend, known = backend_of(module, self.key), self.quantization_backend
            if backend is not None and known is not None and backend.backend_name == known.backend_name:
                backend = known  # which knows how to quantise again, if the model was loaded so
            host = host_for(module, self.key, backend, self.parameter)
        except ValueError as error:
            raise ValueError(
                f"The adapters of {self.key!r} cannot act on the layer that is there now: {why}"
            ) from error
        now, then = (host.out_features, host.in_features), (self._host.out_features, self._host.in_features)
        if now != then:
            raise ValueError(f"The weight of {self.key!r} is {now} and not {then}, as its adapters are: {why}")
        if self.training and torch.is_grad_enabled():
            self.refuse_to_train(host)
        elif self.owner is not None:
            self.owner.has_exchanged = True
        self._host, self.quantization_backend = host, backend

    def refuse_to_train(self, host: Host) -> None:
        """Refuse to train adapters on a layer that gives what is before it no gradient."""
        if any(parameter.requires_grad for parameter in self.parameters()):
            refuse_without_gradient(host, self.key)

    def adapter(self, adapter_name: str) -> Adapter:
        """The adapter of this name."""
        raise NotImplementedError

    def tuners_inside(self) -> list[BaseTunerLayer]:
        """Layers of other tuners inside this one."""
        return [m for m in self.modules() if isinstance(m, BaseTunerLayer) and not isinstance(m, MergingLayer)]

    def other_tuners(self) -> list[BaseTunerLayer]:
        """Layers of other tuners around and inside this one."""
        return [*([] if self.owner is None else self.owner.tuners_around(self)), *self.tuners_inside()]

    def _see_the_base(self) -> None:
        """Notice a change of the base's weight, as the next forward pass would."""
        if self.owner is not None:
            self.owner.place([self])

    def fold(self, names: Sequence[str], matrix: Tensor, *, drop: bool = False, **part: Tensor | None) -> Tensor:
        """Fold these adapters into `matrix`, a `Part` of W, in this order, with autocast off."""
        own = Part(**part)
        with without_autocast(matrix):
            for name in names:
                adapter = self.adapter(name)
                tensors = adapter.tensors(matrix.dtype) if matrix.ndim == 2 else adapter(matrix.dtype, own.at)
                matrix = adapter.fold(matrix, tensors, own, drop=drop)
        return matrix

    def unmerged_matrix(self) -> Tensor:
        """The base's W (out, in), even while adapters are merged into the host."""
        with brought(self.host.module), self.unmerged():
            return self.host.matrix()

    @property
    def base_weight(self) -> Tensor:
        """The base's own weight parameter, even while adapters are merged into the host."""
        return self.host.weight if self._kept is None else self._kept.weight

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The update of the host's weight by one adapter alone, in the weight's layout and at least float32.

        Raises:
            BaseMismatchError: the weight is no longer the one the adapter was trained on.
        """
        self._see_the_base()
        matrix = widen(self.unmerged_matrix())
        # Folding an update into zero keeps its precision.
        start = torch.zeros_like(matrix) if self.adapter(adapter_name).additive else matrix
        with whole(self.adapter(adapter_name).parameters()):
            return self.host.stored(self.fold([adapter_name], start) - start)

    @torch.no_grad()
    def low_rank(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Exact factors up (out, r) and down (r, in) of the update by one adapter alone, at least float32.

        Raises:
            ValueError: the update is not of low rank.
        """
        self._see_the_base()
        matrix, adapter = self.unmerged_matrix(), self.adapter(adapter_name)
        with without_autocast(matrix), whole(adapter.parameters()):
            return adapter.low_rank(matrix)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace the host's weight by W with the adapters in it, computed in float32 and rounded once.

        The original parameter is kept, and `unmerge` restores it bit for bit; modules that share it (tied embeddings)
        are not affected. On a quantised host the result is quantised as the layer was, and `requantised` says how much
        that changed it.

        Raises:
            ValueError: with `safe_merge`, the result would hold NaN or infinity; the host is quantised by a library
                that cannot write back; or another tuner has an adapter on the same layer. Nothing is changed then.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.isotune_operator]
        if not names:
            return
        self._refuse_to_merge()
        self._see_the_base()
        merged = self._merged_matrix(names, safe_merge)
        if self._kept is None:
            self._kept = self.host.keep()
        self.host.set_matrix(merged)
        self.merged_adapters.extend(names)
        if self.host.quantised:
            self.requantised = Requantised.measure(self.unmerged_matrix(), merged, self.host.matrix())

    @torch.no_grad()
    def check_merge(self, adapter_names: list[str] | None = None, safe_merge: bool = True) -> None:
        """Raise what `merge` would raise, without changing anything."""
        names = self.active_adapters if adapter_names is None else adapter_names
        names = [n for n in names if n in self.isotune_operator and n not in self.merged_adapters]
        if names:
            self._refuse_to_merge()
            self._see_the_base()
        if names and safe_merge:
            self._merged_matrix(names, safe_merge=True)

    def _refuse_to_merge(self) -> None:
        self.host.check_merge()
        others = self.other_tuners()
        if others:
            names = ", ".join(type(other).__name__ for other in others)
            raise ValueError(
                f"Another tuner's adapter is on {self.key!r} too ({names}). Merged into one weight, each would take "
                "the other's update for part of the base, so nothing was merged. Merge and unload the other adapter "
                "first and put this one on the result, or leave both unmerged."
            )

    def _merged_matrix(self, names: list[str], safe_merge: bool) -> Tensor:
        matrix = self.unmerged_matrix()
        merged = self.fold([*self.merged_adapters, *names], widen(matrix)).to(matrix.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(
                f"Merging {', '.join(names)} into {self.key!r} gives NaN or infinite weights, so nothing was merged. "
                "Either the adapter holds such values (did its training diverge?) or the result exceeds the range of "
                f"{matrix.dtype}: load an earlier checkpoint, or load the base in float32."
            )
        return merged

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the original weight bit for bit."""
        if not self.merged:
            warnings.warn("Nothing is merged, so there is nothing to unmerge.", IsotuneWarning, stacklevel=2)
            return
        if self._kept is not None:
            self.host.restore(self._kept)
        self._kept = self.requantised = None
        self.merged_adapters.clear()

    @contextmanager
    def unmerged(self) -> Iterator[None]:
        """While the block runs, the base's own weight is in the layer."""
        if self._kept is None:
            yield
            return
        merged = self.host.keep()
        self.host.restore(self._kept)
        try:
            yield
        finally:
            self.host.restore(merged)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the update has low rank, so that it can be exported as LoRA of the base model."""
        if adapter_name not in self.isotune_operator:
            return True
        return not self.host.stands_in and self.adapter(adapter_name).has_low_rank
