"""Batches whose samples have different adapters (`adapter_names`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from isotune.internals.peft_state import set_active_of

BASE = "__base__"
"""PEFT's name for a sample without an adapter."""


@dataclass
class MixedBatch:
    """Which adapter each sample of a batch uses."""

    names: tuple[str, ...]
    """One name per sample; "__base__" means no adapter."""
    copies: int = 1
    """How many adjacent copies of each sample generation makes, for beams or several answers."""
    length: int = 1
    """Positions per sample in the current forward pass."""
    rows: int | None = None
    """Samples in the current forward pass, if its inputs show it."""

    def of(self, x: Tensor) -> list[str]:
        """The adapter names for the rows of an input: of samples, of their copies, or of all their positions.

        Args:
            x: the input; (rows, n) if the positions of all samples follow each other.

        Raises:
            ValueError: the number of rows fits none of these.
        """
        for copies in dict.fromkeys((1, self.copies)):
            if self.rows is not None and self.rows != len(self.names) * copies:
                continue
            for repeats in (copies, copies * self.length) if x.ndim == 2 else (copies,):
                if len(x) == len(self.names) * repeats:
                    return [name for name in self.names for _ in range(repeats)]
        if self.rows in (len(self.names), len(self.names) * self.copies):
            raise ValueError(
                f"adapter_names names {len(self.names)} samples, and an adapted layer has an input of {len(x)} rows, "
                "of which each belongs to no sample or to several, as of positions, or of texts beside images. Leave "
                "such layers out of target_modules, or call the model once for each adapter."
            )
        raise ValueError(
            f"adapter_names has {len(self.names)} entries for a batch of "
            f"{len(x) if self.rows is None else self.rows} samples; give one name for each sample."
        )


def check_names(names: Sequence[str], known: Mapping[str, Any]) -> None:
    """Refuse names of adapters that a model does not have.

    Raises:
        ValueError: a name is unknown; says which, and which the model has.
    """
    unknown = sorted(set(names) - {BASE, *known})
    if unknown:
        raise ValueError(
            f"adapter_names holds {', '.join(map(repr, unknown))}; this model has {', '.join(map(repr, known))}, and "
            f"{BASE!r} means no adapter."
        )


def batch_of(model: nn.Module, names: Sequence[str], kwargs: Mapping[str, Any]) -> MixedBatch:
    """The batch of one call; the arguments of `generate` say how often each sample is repeated."""
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    counts = [kwargs.get(name) or getattr(config, name, None) for name in ("num_beams", "num_return_sequences")]
    return MixedBatch(tuple(names), max(count or 1 for count in counts))


@contextmanager
def measured(model: nn.Module, batch: MixedBatch) -> Iterator[None]:
    """Within this block, record the number of samples and their length in each forward pass of a model."""

    def measure(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        inputs = (named.get(name) for name in ("decoder_input_ids", "input_ids", "inputs_embeds"))
        tensors = [value for value in (*given, *inputs) if isinstance(value, Tensor) and value.ndim > 1]
        batch.length = tensors[0].shape[1] if tensors else 1
        batch.rows = tensors[0].shape[0] if tensors else None

    with model.register_forward_pre_hook(measure, with_kwargs=True, prepend=True):
        yield


@contextmanager
def saved_modules_routed(model: nn.Module, batch: MixedBatch) -> Iterator[None]:
    """Within this block, PEFT's wrappers of modules_to_save use for each sample the module of its own adapter."""

    def name_adapters(wrapper: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        assert isinstance(wrapper, ModulesToSaveWrapper)
        names = batch.of(given[0]) if given else batch.names
        known = [name if name in wrapper.modules_to_save else BASE for name in names]
        return given, {**named, "adapter_names": known}

    disabled = any(isinstance(module, BaseTunerLayer) and module.disable_adapters for module in model.modules())
    with ExitStack() as undo:
        for wrapper in [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]:
            undo.enter_context(wrapper.register_forward_pre_hook(name_adapters, with_kwargs=True))
            undo.callback(set_active_of, wrapper, wrapper.active_adapter, wrapper.disable_adapters)
            # A wrapper without a module for the active adapter would return before it reads the names.
            set_active_of(wrapper, list(wrapper.modules_to_save)[:1], disabled)
        yield
