"""A weight that is computed at each use, of which a change would be lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_GET_DATA, _SET_DATA = Tensor.data.__get__, Tensor.data.__set__  # type: ignore[attr-defined]
_WRITTEN_AS_OPERATORS = {
    "__setitem__",
    *(f"__i{name}__" for name in ("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")),
}
_KEEP_VALUES = {"requires_grad_", "share_memory_"}
_BOUNDS = {"clamp_", "clamp_min_", "clamp_max_", "clip_"}


class ComputedWeight(Tensor):
    """The values of a layer's weight where no tensor holds them: reading is as usual, writing is refused."""

    instead = "Change what it is computed from."
    """What to do instead of writing."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Refuse what would write, and give what is read as plain tensors.

        Raises:
            ValueError: a function of torch writes into the weight; the message says what to change.
        """
        kwargs = kwargs or {}
        name = "data = …" if func == _SET_DATA else getattr(func, "__name__", "")
        in_place = (name.endswith("_") and not name.startswith("__")) or name in _WRITTEN_AS_OPERATORS
        written = kwargs.get("out", next(iter((*args, *kwargs.values()))) if in_place or func == _SET_DATA else None)
        if name in _BOUNDS and cls._lies_within(name, args, kwargs):
            return args[0]
        for weight in written if isinstance(written, (list, tuple)) else [written]:
            if isinstance(weight, ComputedWeight) and name not in _KEEP_VALUES:
                raise ValueError(
                    f"{name} on a weight that is computed at each use would be lost, and was left out. {weight.instead}"
                )
        return args[0].as_data() if func == _GET_DATA else cls.read(func, args, kwargs)

    @classmethod
    def _lies_within(cls, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether a bound on a weight changes nothing, as the one that some models set in every step of a training."""
        bounded = cls.read(getattr(Tensor, name[:-1]), args, kwargs)
        return bounded.is_meta or torch.equal(bounded, cls.read(Tensor.detach, args[:1], {}))

    @classmethod
    def read(cls, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call a function of torch that only reads."""
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
        return found.as_subclass(Tensor) if isinstance(found, ComputedWeight) else found

    def as_data(self) -> ComputedWeight:
        """What `.data` is: without a gradient, and as little to be written to."""
        return self.detach().as_subclass(type(self))
