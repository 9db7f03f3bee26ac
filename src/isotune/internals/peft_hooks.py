"""A tuner's control over its adapter file: methods of the tuner from PEFT 0.21 on, functions of PEFT before.

`Tuner` has the methods under every version. Before 0.21, PEFT selects an adapter's tensors by the prefix in their names
whatever the tuner says, and has no check of a file. So `install_hooks` wraps the two public functions that save and
load: for tuners derived from `Tuner` they do what PEFT 0.21 does, and for all others what they did before.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import save_and_load
from torch import Tensor, nn

from isotune.internals.torch_state import uncompiled

HAS_HOOKS = hasattr(BaseTuner, "_remap_adapter_state_dict_for_load")
"""Whether PEFT calls the tuner's own methods, as it does from 0.21 on."""

# Only looked up if needed: a later PEFT may not have it.
_insert_name: Any = None if HAS_HOOKS else save_and_load._insert_adapter_name_into_state_dict
_loading: ContextVar[tuple[Any, type[Any]] | None] = ContextVar("loading", default=None)


class _Hooks(BaseTuner):
    """The methods by which PEFT 0.21 lets a tuner control its file, for earlier versions."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model including its hooks, which PEFT before 0.21 bypasses."""
        return self.model(*args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put an adapter into the model; adding another one leaves what was trainable unchanged.

        Raises:
            ValueError: no module matches this adapter, even if one matched an earlier adapter.
        """
        added = any(isinstance(module, BaseTunerLayer) for module in model.modules())
        before = {parameter: parameter.requires_grad for parameter in model.parameters()} if added else {}
        modules, parameters = self.targeted_module_names, self.targeted_parameter_names
        self.targeted_module_names, self.targeted_parameter_names = [], []
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            self.targeted_module_names = list(dict.fromkeys(modules + self.targeted_module_names))
            self.targeted_parameter_names = list(dict.fromkeys(parameters + self.targeted_parameter_names))
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)

    def delete_adapter(self, adapter_name: str) -> None:
        """Refuse to delete an adapter while it is merged."""
        for layer in self.model.modules():
            if isinstance(layer, BaseTunerLayer) and adapter_name in layer.merged_adapters:
                raise ValueError(f"Cannot delete the adapter {adapter_name!r} while it is merged; unmerge it first.")
        super().delete_adapter(adapter_name)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        bias = config.bias
        layers = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
        wanted = {f"{name.removeprefix('_fsdp_wrapped_module.')}.base_layer.bias" for name in layers}
        return {
            key: tensor
            for key, tensor in state_dict.items()
            if f".{cls.prefix}" in f".{key}"
            or (bias == "all" and f".{key}".endswith(".bias"))
            or (bias.endswith("_only") and key in wanted)
        }

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        named: dict[str, Tensor] = _insert_name(state_dict, adapter_name=adapter_name, parameter_prefix=cls.prefix)
        return named


if TYPE_CHECKING or HAS_HOOKS:  # noqa: SIM108 - a type checker reads no conditional class
    Tuner = BaseTuner
else:
    Tuner = _Hooks


def install_hooks() -> None:
    """Let a `Tuner` control its file under PEFT before 0.21; repeated calls, or any under a later PEFT, do nothing.

    The two functions are also replaced in modules that have already imported them by name.
    """
    if HAS_HOOKS or save_and_load._insert_adapter_name_into_state_dict is _insert:
        return
    save_and_load._insert_adapter_name_into_state_dict = _insert
    for wrap in (_get_peft_model_state_dict, _set_peft_model_state_dict):
        name = wrap.__name__[1:]
        original = getattr(save_and_load, name)
        replaced = functools.wraps(original)(functools.partial(wrap, original))
        for module in list(sys.modules.values()):
            if getattr(module, "__dict__", {}).get(name) is original:
                setattr(module, name, replaced)


def _tuner_of(model: Any, adapter_name: str) -> type[Any] | None:
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(model.peft_config[adapter_name].peft_type)
    return tuner if tuner is not None and issubclass(tuner, _Hooks) else None


def _get_peft_model_state_dict(
    original: Callable[..., dict[str, Tensor]],
    model: Any,
    state_dict: dict[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: Any = "auto",
) -> dict[str, Tensor]:
    model = uncompiled(model) if unwrap_compiled else model
    tuner = _tuner_of(model, adapter_name)
    state_dict = model.state_dict() if state_dict is None else state_dict
    if tuner is None:
        return original(model, state_dict, adapter_name, save_embedding_layers=save_embedding_layers)
    # PEFT's part: saved modules and embeddings. The tuner's part follows.
    others = {key: tensor for key, tensor in state_dict.items() if tuner.prefix not in key}
    saved = original(model, others, adapter_name, save_embedding_layers=save_embedding_layers)
    unwanted = [name for name in model.peft_config if name != adapter_name]
    left = {key: tensor for key, tensor in state_dict.items() if not any(f".{name}." in f"{key}." for name in unwanted)}
    own = tuner._get_adapter_state_dict(
        model, model.peft_config[adapter_name], adapter_name, left or state_dict, unwanted
    )
    saved.update((tuner._remove_adapter_name_from_key(key, adapter_name), tensor) for key, tensor in own.items())
    return saved


def _set_peft_model_state_dict(
    original: Callable[..., Any],
    model: Any,
    peft_model_state_dict: dict[str, Tensor],
    adapter_name: str = "default",
    *args: Any,
    **kwargs: Any,
) -> Any:
    tuner = _tuner_of(model, adapter_name)
    if tuner is None:
        return original(model, peft_model_state_dict, adapter_name, *args, **kwargs)
    token = _loading.set((model, tuner))
    try:
        return original(
            model, dict(peft_model_state_dict), adapter_name, *args, **kwargs
        )  # it empties what it is given
    finally:
        _loading.reset(token)


def _insert(state_dict: dict[str, Tensor], adapter_name: str, parameter_prefix: str) -> dict[str, Tensor]:
    call = _loading.get()
    if call is None:
        named: dict[str, Tensor] = _insert_name(
            state_dict, adapter_name=adapter_name, parameter_prefix=parameter_prefix
        )
        return named
    model, tuner = call
    remapped: dict[str, Tensor] = tuner._remap_adapter_state_dict_for_load(
        model=model, config=model.peft_config[adapter_name], adapter_name=adapter_name, state_dict=state_dict
    )
    return remapped
