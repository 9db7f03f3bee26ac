"""Names of an adapter's tensors in its file, and the one check of a file's tensors that every loader uses."""

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
"""PEFT's prefix to every name in the base model."""

ORTHONORMAL = 1e-2
"""Largest allowed entry of |V Vᵀ − I| for an embedded basis V; rounding V to bfloat16 leaves at most 0.004."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The dtypes in which an adapter's tensors may be stored."""

THE_FILE = "the adapter file"

_SAVED_MODULE = re.compile(r"\.modules_to_save\.[^.]+\.")
_COUNTS, _BOUNDARY, _SHARE = (f"isotune_operator.reinit{end}" for end in ("ializations", "_boundary", "_weight"))
_NAMED_FORMS = re.compile(r"\.isotune_form\.[^.]+\.forms\.")


def adapted_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Layer]]:
    """Layers of a PeftModel or an injected model that have an adapter, each with its name in the base model."""
    for name, module in model.named_modules():
        if isinstance(module, Layer) and adapter_name in module.isotune_operator:
            yield name.removeprefix(KEY_PREFIX), module


def keys_in_model(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, str]]:
    """Names of an adapter's tensors in a model, even wrapped by FSDP: the layer's name and the name within it."""
    for name, module in model.named_modules():
        if isinstance(module, Layer):
            for group in ("isotune_operator", "isotune_form"):
                modules = getattr(module, group)
                if adapter_name in modules:
                    for key in modules[adapter_name].state_dict(keep_vars=True):
                        yield name.removeprefix("_fsdp_wrapped_module."), f"{group}.{adapter_name}.{key}"


def current_key(name: str) -> str:
    """The name under which the current release would write a tensor.

    Args:
        name: the name in a file; the first release kept the adapter's name in the names of experts' bases.

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
    """Refuse a file in which tensors are missing, invalid or superfluous.

    Args:
        needed: tensors of the required shapes, by name; they may be on the meta device.
        given: the tensors in the file, by name.
        where: end of the message about a wrong shape, "(…) is needed WHERE".
        also: names of further tensors that the file may hold, such as trained biases.
        base: names of the base model's own tensors.
        file: how messages refer to the file.

    Raises:
        AdapterFileError: a tensor is missing, has the wrong shape or dtype, is not finite, is an empty or
            non-orthonormal basis, or has no place in this model; names the tensor.
    """
    for name, tensor in needed.items():
        if name not in given:
            raise AdapterFileError(
                f"{file.replace('the', 'The', 1) if file.startswith(THE_FILE) else file} has no {name!r}. It is "
                "incomplete, or was saved with other target_modules, another rank or another basis than its "
                "adapter_config.json says, or with a base of another class than this; load the base with the class "
                "that the adapter was trained on, as isotune.files.adapter.named_base(FOLDER) does, or save the "
                "adapter again."
            )
        if given[name].shape != tensor.shape:
            raise AdapterFileError(
                f"{name!r} has shape {tuple(given[name].shape)} in {file}, and {tuple(tensor.shape)} is needed {where}."
            )
        check_values(name, given[name], file=file, like=tensor)
    for name in needed:
        if name.endswith(_COUNTS):
            _check_history(name, given, file)
    for name in sorted(given.keys() - needed.keys() - set(also)):
        if name in base:
            raise AdapterFileError(
                f"{name!r} in {file} would overwrite a tensor of the base model that the adapter does not train "
                "according to adapter_config.json (bias, modules_to_save); remove it from the file."
            )
        if ".isotune_" in f".{name}":
            raise AdapterFileError(
                f"{name!r} in {file} has no place in this model: there is no such adapted layer, or the layer has no "
                "such tensor according to adapter_config.json. Load the adapter on the base model it was trained on, "
                "with the configuration it was saved with."
            )
        raise AdapterFileError(
            f"{name!r} in {file} has no place in this model. Load the base with the class that the adapter was "
            "trained on, or remove the tensor from the file."
        )


def check_values(name: str, tensor: Tensor, *, file: str = THE_FILE, like: Tensor | None = None) -> None:
    """Refuse a tensor of a file whose dtype or values an adapter cannot have.

    Args:
        name: the name in the file; an ending ".basis" or ".pin" says what the tensor is.
        tensor: the tensor.
        file: how messages refer to the file.
        like: the tensor it is loaded into; if that is not a floating point tensor (such as a saved module's counter),
            the dtypes must agree.

    Raises:
        AdapterFileError: as in `check_tensors`, except for shapes.
    """
    other = None if like is None or like.dtype in FLOATS else like.dtype
    if tensor.dtype not in FLOATS if other is None else tensor.dtype != other:
        stored = str(tensor.dtype).removeprefix("torch.")
        allowed = "float32, float64, float16 or bfloat16" if other is None else str(other).removeprefix("torch.")
        raise AdapterFileError(
            f"{name!r} is stored as {stored} in {file}; it must be {allowed}. Save the adapter again."
        )
    if name.endswith((".pin", ".basis")) and not tensor.any():
        raise AdapterFileError(
            f"{name!r} is empty in {file}: it was saved before the base model's weights were loaded. Save the adapter "
            "again."
        )
    if not torch.isfinite(tensor).all():
        raise AdapterFileError(f"{name!r} holds NaN or infinity in {file}; load an earlier checkpoint.")
    if name.endswith("isotune_form.moves") and (tensor.ndim or tensor < 0 or tensor != tensor.round()):
        raise AdapterFileError(
            f"{name!r} in {file} holds {tensor.flatten()[:3].tolist()}; it counts moves, so it must be one whole "
            "number of at least 0. It is damaged; load an earlier checkpoint."
        )
    if ".isotune_operator.reinit" in f".{name}":
        _check_reinitialised(name, tensor, file)
    if name.endswith(".basis"):
        defect = _orthonormality_defect(tensor)
        if not defect <= ORTHONORMAL:
            raise AdapterFileError(
                f"{name!r} in {file} is a basis whose rows are not orthonormal: V Vᵀ − I has an entry of {defect:.2g}, "
                f"and at most {ORTHONORMAL} is allowed. It is damaged; load an earlier checkpoint."
            )


def _check_reinitialised(name: str, tensor: Tensor, file: str) -> None:
    """Refuse counts of re-initialised rows, or the share of a new row, that no training can have."""
    share = name.endswith("_weight")
    if not bool((((tensor <= 1.0) if share else (tensor == tensor.round())) & (tensor >= 0.0)).all()):
        what = "be from 0 to 1" if share else "hold whole numbers of at least 0"
        raise AdapterFileError(
            f"{name!r} in {file} holds {tensor.flatten()[:3].tolist()}; it says how rows were re-initialised, so it "
            f"must {what}. It is damaged; load an earlier checkpoint."
        )


def _check_history(name: str, given: Mapping[str, Tensor], file: str) -> None:
    """Refuse counts of re-initialised rows that do not go with the boundaries or the share of a new row."""
    most = float(given[name].max())
    boundary, share = (float(given[name.removesuffix(_COUNTS) + key]) for key in (_BOUNDARY, _SHARE))
    if most > boundary or (most and not share):
        raise AdapterFileError(
            f"{name!r} in {file} says that a row was re-initialised {most:g} times, which can be neither more than the "
            f"boundaries ({boundary:g}) nor without a share of the new row ({share:g}). It is damaged; load an earlier "
            "checkpoint."
        )


def _orthonormality_defect(basis: Tensor) -> float:
    """The largest entry of |V Vᵀ − I|; infinite if V has more rows than columns."""
    if basis.ndim != 2 or basis.shape[0] > basis.shape[1]:
        return float("inf")
    wide = basis.double() if basis.device.type != "mps" else basis.cpu().double()
    return float((wide @ wide.T - torch.eye(len(wide), dtype=wide.dtype, device=wide.device)).abs().max())


def check_file(model: nn.Module, config: IsotuneConfig, adapter_name: str, state: Mapping[str, Tensor]) -> None:
    """Refuse a file that does not fit the injected adapter, before any of it is loaded.

    Args:
        model: the model with the adapter injected.
        config: the adapter's configuration.
        adapter_name: the adapter.
        state: the file's tensors by name, as PEFT passes them to the tuner.

    Raises:
        AdapterFileError: as in `check_tensors`.
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
        "on this base model according to its adapter_config.json; check that the two belong together",
        also=_saved_besides(model, config, adapter_name, held, given),
        base={name for name in held if ".isotune_" not in name},
        file=f"{THE_FILE} of {origin}" if origin else THE_FILE,
    )


def _saved_besides(
    model: nn.Module, config: IsotuneConfig, adapter_name: str, held: Collection[str], given: Collection[str]
) -> Collection[str]:
    """Names of the tensors in a file that `save_pretrained` writes besides the adapter's own."""
    names: set[str] = set()
    if config.bias == "all":
        # PEFT writes the biases of saved modules twice, the second time under a name that may hold the adapter's.
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
        if module in embeddings:  # PEFT saves it if the vocabulary was resized or it is adapted
            prefix = f"{name.removeprefix(KEY_PREFIX)}."
            names |= {key for key in held if key.startswith(prefix) and ".isotune_" not in key}
    return names
