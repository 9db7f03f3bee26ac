"""The tensors of an adapter as its file names them, and what a file may hold: one check for everything that loads."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from isotune.errors import AdapterFileError
from isotune.methods.config import IsotuneConfig
from isotune.tuner.layer import Layer

KEY_PREFIX = "base_model.model."
"""What PEFT puts before every name of the base model."""

ORTHONORMAL = 1e-2
"""How far an embedded basis V may be from V Vᵀ = I, in any entry: rounding V to bfloat16 leaves at most 0.004."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What the tensors of an adapter may be stored as."""

THE_FILE = "the adapter file"

_SAVED_MODULE = re.compile(r"\.modules_to_save\.[^.]+\.")
_NAMED_FORMS = re.compile(r"\.isotune_form\.[^.]+\.forms\.")


def adapted_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Layer]]:
    """The layers of a PeftModel or an injected model that hold an adapter, each with its name in the base model."""
    for name, module in model.named_modules():
        if isinstance(module, Layer) and adapter_name in module.isotune_operator:
            yield name.removeprefix(KEY_PREFIX), module


def keys_in_model(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, str]]:
    """The names of an adapter's tensors in a model, maybe wrapped by FSDP: that of each layer, and that within it."""
    for name, module in model.named_modules():
        if isinstance(module, Layer):
            for group in ("isotune_operator", "isotune_form"):
                modules = getattr(module, group)
                if adapter_name in modules:
                    for key in modules[adapter_name].state_dict(keep_vars=True):
                        yield name.removeprefix("_fsdp_wrapped_module."), f"{group}.{adapter_name}.{key}"


def current_key(name: str) -> str:
    """A tensor's name in a file as it is written now.

    Args:
        name: as it stands in a file; the first release left the adapter's name in those of experts' bases.

    Examples:
        >>> current_key("mlp.experts.isotune_form.default.forms.0.pin")
        'mlp.experts.isotune_form.forms.0.pin'
    """
    return _NAMED_FORMS.sub(".isotune_form.forms.", name)


def check_tensors(
    needed: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    where: str,
    *,
    also: Collection[str] = (),
    base: Collection[str] = (),
    file: str = THE_FILE,
) -> None:
    """Refuse a file that lacks what an adapter needs, holds what cannot be, or holds more than that.

    Args:
        needed: by name, with the shapes that are needed; they may be on the meta device.
        given: what the file holds.
        where: ends the message of a wrong shape, "(…) is needed WHERE".
        also: names of tensors that the file may hold besides, such as trained biases.
        base: names of the base model's own tensors.
        file: what the messages call it.

    Raises:
        AdapterFileError: a tensor is missing, of another shape, of a type that no adapter has, an empty basis or one
            that is not orthonormal, not finite, or has no place in this model; names the tensor.
    """
    for name, tensor in needed.items():
        if name not in given:
            raise AdapterFileError(
                f"{file.replace('the', 'The', 1) if file.startswith(THE_FILE) else file} has no {name!r}. It is "
                "incomplete, or was made for other target_modules, another rank or another basis than its "
                "adapter_config.json says, or for a base of another class than this; load the base with the class that "
                "the adapter was trained on, or save the adapter again."
            )
        if given[name].shape != tensor.shape:
            raise AdapterFileError(
                f"{name!r} has shape {tuple(given[name].shape)} in {file}, and {tuple(tensor.shape)} is needed {where}."
            )
        check_values(name, given[name], file=file, like=tensor)
    for name in sorted(given.keys() - needed.keys() - set(also)):
        if name in base:
            raise AdapterFileError(
                f"{name!r} in {file} is a tensor of the base model, which it would overwrite. By adapter_config.json "
                "(bias, modules_to_save) the adapter does not train it; take it out of the file."
            )
        if ".isotune_" in f".{name}":
            raise AdapterFileError(
                f"{name!r} in {file} has no place in this model: there is no such adapted layer, or by "
                "adapter_config.json the layer has no such tensor. Load the adapter on the base model that it was "
                "trained on, with the configuration that it was saved with."
            )
        raise AdapterFileError(
            f"{name!r} in {file} has no place in this model. Load the base with the class that the adapter was "
            "trained on, or take the tensor out of the file."
        )


def check_values(name: str, tensor: Tensor, *, file: str = THE_FILE, like: Tensor | None = None) -> None:
    """Refuse a tensor of a file whose type or values no adapter has.

    Args:
        name: in the file; ".basis" and ".pin" at its end say what it is.
        like: what it is loaded into; where that is no floating point tensor, as a saved module's counter is none, the
            types must agree.

    Raises:
        AdapterFileError: as `check_tensors`, but for shapes.
    """
    other = None if like is None or like.dtype in FLOATS else like.dtype
    if tensor.dtype not in FLOATS if other is None else tensor.dtype != other:
        stored = str(tensor.dtype).removeprefix("torch.")
        allowed = "float32, float64, float16 or bfloat16" if other is None else str(other).removeprefix("torch.")
        raise AdapterFileError(f"{name!r} is stored as {stored} in {file}; it must be {allowed}. Save it again.")
    if name.endswith((".pin", ".basis")) and not tensor.any():
        raise AdapterFileError(f"{name!r} is empty in {file}: it was saved before its base had weights. Save it again.")
    if not torch.isfinite(tensor).all():
        raise AdapterFileError(f"{name!r} holds NaN or infinity in {file}; load an earlier checkpoint.")
    if name.endswith(".basis"):
        defect = _orthonormality_defect(tensor)
        if not defect <= ORTHONORMAL:
            raise AdapterFileError(
                f"{name!r} in {file} is a basis whose rows are not orthonormal: V Vᵀ − I has an entry of {defect:.2g}, "
                f"and {ORTHONORMAL} is allowed. It is damaged; load an earlier checkpoint."
            )


def _orthonormality_defect(basis: Tensor) -> float:
    """The largest entry of |V Vᵀ − I|; infinite where there are more rows than columns."""
    if basis.ndim != 2 or basis.shape[0] > basis.shape[1]:
        return float("inf")
    wide = basis.double() if basis.device.type != "mps" else basis.cpu().double()
    return float((wide @ wide.T - torch.eye(len(wide), dtype=wide.dtype, device=wide.device)).abs().max())


def check_file(model: nn.Module, config: IsotuneConfig, adapter_name: str, state: Mapping[str, Tensor]) -> None:
    """Refuse a file, before any of it is loaded, that does not fit the adapter as it has been injected.

    Args:
        state: what the file holds, by name, as PEFT hands it to the tuner.

    Raises:
        AdapterFileError: as `check_tensors`.
    """
    needed = {
        f"{name}.{group}.{key}": tensor
        for name, layer in adapted_layers(model, adapter_name)
        for group, parts in (("isotune_operator", layer.isotune_operator), ("isotune_form", layer.isotune_form))
        if adapter_name in parts
        for key, tensor in parts[adapter_name].state_dict().items()
    }
    held = {name.removeprefix(KEY_PREFIX) for name in model.state_dict(keep_vars=True)}
    given = {name.removeprefix(KEY_PREFIX): tensor for name, tensor in state.items()}
    origin = config.origin
    check_tensors(
        needed,
        given,
        "on this base model by its adapter_config.json; check that both belong together",
        also=_saved_besides(model, config, adapter_name, held, given),
        base={name for name in held if ".isotune_" not in name},
        file=f"{THE_FILE} of {origin}" if origin else THE_FILE,
    )


def _saved_besides(
    model: nn.Module, config: IsotuneConfig, adapter_name: str, held: Collection[str], given: Collection[str]
) -> Collection[str]:
    """What of a file `save_pretrained` writes of such a model besides the adapter's own tensors, by name."""
    names: set[str] = set()
    if config.bias == "all":
        # PEFT writes those of saved modules twice, the second time under a name that may hold the adapter's.
        biases = {name for name in held if name.endswith(".bias")}
        biases |= {_SAVED_MODULE.sub(".modules_to_save.", name) for name in biases}
        names |= {name for name in given if {name, _SAVED_MODULE.sub(".modules_to_save.", name)} & biases}
    elif config.bias != "none":
        names |= {f"{name}.base_layer.bias" for name, _ in adapted_layers(model, adapter_name)}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            keys = module.adapter_state_dict_load_map(adapter_name)  # type: ignore[no-untyped-call]
            names |= {f"{name.removeprefix(KEY_PREFIX)}.{key}" for key in keys.values()}
    embeddings: set[Any] = set()
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            embeddings.add(getattr(model, getter)())
        except (AttributeError, NotImplementedError):
            continue
    for name, module in model.named_modules():
        if module in embeddings:  # saved by PEFT where the vocabulary was resized or they are adapted
            prefix = f"{name.removeprefix(KEY_PREFIX)}."
            names |= {key for key in held if key.startswith(prefix) and ".isotune_" not in key}
    return names
