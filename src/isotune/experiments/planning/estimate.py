"""Memory and time of a training step, estimated on the model without its weights."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isotune.experiments import methods, registry
from isotune.experiments.planning.formula import adapter_activations, factor_bytes, paper_activations
from isotune.experiments.planning.measured import Measured
from isotune.experiments.planning.setting import (
    ACCELERATORS,
    ASSUMED_UTILIZATION,
    BITS,
    DTYPES,
    OPTIMIZER_BYTES,
    SHARDED,
    Setting,
)
from isotune.experiments.planning.trace import attention, autocast, blocks_of, inputs_for, trace
from isotune.experiments.recipe import Method
from isotune.experiments.text import first_line
from isotune.files.base_model import quiet, resolve_base
from isotune.internals.torch_state import GROUPED_PRODUCT
from isotune.internals.transformers_state import attention_of
from isotune.methods.checks import require_choice

_ATTENTION = "isotune_trace"


@dataclass
class Estimate:
    """What a setting needs; bytes and seconds are of one device."""

    setting: Setting
    architecture: str
    dtype: str
    base_parameters: int
    trained_parameters: int
    tokens: int
    """Of one device in a step; what an encoder is given where there is one."""
    adapter_file: int
    memory: dict[str, int]
    """Row -> bytes on one device."""
    adapter_activations: int
    """Of what is kept, the adapter's own part by formula."""
    paper_activations: float | None
    """What is kept by the formula of the paper's Table 9, scaled to the dtype; None for a method it does not have."""
    operations: int
    """Floating-point operations of a step of one device."""
    utilization: float
    """Share of the device's speed that is reached: as given, measured or assumed."""
    seconds: float
    sent: int
    """Bytes that one device sends and receives in a step."""
    assumptions: list[str]

    @property
    def total(self) -> int:
        """Bytes on one device."""
        return sum(self.memory.values())

    def to_dict(self) -> dict[str, Any]:
        """What --json prints."""
        return {**asdict(self), "total": self.total, "tokens_per_second": self.tokens_per_second}

    @property
    def tokens_per_second(self) -> float:
        """Of all devices together."""
        return self.setting.devices * self.tokens / self.seconds


@dataclass(frozen=True)
class Built:
    """A model on the meta device, as a task makes it, in the place of the one that a configuration describes.

    Args:
        head: the names of its modules that are trained beside an adapter.
        kind: what PEFT calls the kind of model; None where it has no name for it.
    """

    base: Any
    dtype: str
    head: list[str]
    kind: str | None


def estimate(setting: Setting, built: Built | None = None) -> Estimate:
    """Estimate what a setting needs.

    Args:
        setting: what is to be trained and on what.
        built: the model, where it is not the one that the configuration of `setting.model` describes.

    Raises:
        ValueError: no such model or method, options that do not fit, or a model that cannot be followed.
    """
    with quiet():
        with torch.device("meta"):
            built = built or _build(setting)
            base, dtype = built.base, built.dtype
            _check_experts(base)
            _let_attention_be_followed(base)
            base_parameters = sum(p.numel() for p in base.parameters())
            base_bytes, largest = _base_bytes(base, setting.quantization)
            blocks = [sum(p.nbytes for p in block.parameters()) for block in blocks_of(base)]
            model = _adapted(built, setting).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        trained_parameters, trained_bytes = sum(p.numel() for p in trained), sum(p.nbytes for p in trained)
        factors, file = factor_bytes(model), _file_bytes(model)
        try:  # not on the meta device: a number that a model draws, whether to leave layers out, must be one
            with autocast(model) if setting.autocast else nullcontext():
                inputs = inputs_for(base, setting.batch, setting.sequence, setting.image_size)
                step = trace(model, inputs)
        except Exception as error:
            raise ValueError(
                f"A step of {type(base).__name__} cannot be followed without its weights: {first_line(error)}"
            ) from error
    memory = {
        "base weights": base_bytes,
        "adapter weights": 0 if registry.is_plain(setting.method) else trained_bytes,
        "adapter's frozen factors": factors,
        "gradients": trained_bytes,
        "optimiser states": OPTIMIZER_BYTES[setting.optimizer] * trained_parameters,
    }
    for row in SHARDED[str(setting.sharding)]:
        memory[row] = -(-memory[row] // setting.devices)
    working = step.largest + largest
    if setting.sharding == "ddp":
        working += memory["gradients"]  # the buckets in which they are exchanged
    if setting.sharding in ("zero3", "fsdp"):
        working += 2 * max(blocks, default=0)  # one block in use and the next on its way
    memory["kept for backward"] = step.kept_with(checkpointing=setting.checkpointing)
    memory["working space"] = working
    device = ACCELERATORS[setting.accelerator]
    speed = setting.flops or (device.single if dtype == "float32" else device.half)
    utilization, source = _utilization(setting, dtype)
    tokens = _tokens(base, inputs)
    operations = step.operations_with(checkpointing=setting.checkpointing)
    return Estimate(
        setting=setting,
        architecture=type(base).__name__,
        dtype=dtype,
        base_parameters=base_parameters,
        trained_parameters=trained_parameters,
        tokens=tokens,
        adapter_file=file,
        memory=memory,
        adapter_activations=adapter_activations(model, tokens),
        paper_activations=paper_activations(setting, base, tokens),
        operations=operations,
        utilization=utilization,
        seconds=operations / (speed * utilization),
        sent=_sent(setting, base_bytes, trained_bytes),
        assumptions=_assumptions(
            setting,
            speed,
            f"{utilization:.0%} are reached ({source})",
            pairs=getattr(base.config, "is_encoder_decoder", False),
        ),
    )


def _tokens(base: nn.Module, inputs: dict[str, Tensor]) -> int:
    """How many vectors the layers are given for these inputs."""
    if "input_ids" in inputs:
        return inputs["input_ids"].numel()
    config: Any = base.config
    batch, _, height, width = inputs["pixel_values"].shape
    patch = getattr(config, "patch_size", height)
    patches = (height // patch) * (width // patch) if isinstance(patch, int) else 1
    return batch * (patches + 1)


def _build(setting: Setting) -> Built:
    """The base model without weights, of the class that its configuration names, and its dtype."""
    import transformers

    path = resolve_base(setting.model)
    try:
        config = transformers.AutoConfig.from_pretrained(path)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"The configuration of {setting.model!r} cannot be read: {first_line(error)}") from error
    stored = getattr(config, "dtype", None)
    dtype = setting.dtype or (str(stored).removeprefix("torch.") if stored is not None else "float32")
    require_choice("dtype", dtype, DTYPES)
    own = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        model: Any = transformers.AutoModel.from_config(config) if own is None else own(config)
    finally:
        torch.set_default_dtype(before)
    head = [name for name, _ in model.named_children() if name in registry.HEADS]
    return Built(model, dtype, head, "SEQ_CLS" if "SequenceClassification" in type(model).__name__ else None)


def _check_experts(model: nn.Module) -> None:
    """Refuse a mixture of experts where torch has no product of them all: then values decide what is computed."""
    if GROUPED_PRODUCT is not None:
        return
    kinds = ((module, parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    if any(p.ndim == 3 and len(p) > 1 and "Conv" not in type(module).__name__ for module, p in kinds):
        raise ValueError(
            f"A step of {type(model).__name__} cannot be followed without its weights: PyTorch {torch.__version__} "
            "does not compute a mixture's experts by one product; a later one does."
        )


def _let_attention_be_followed(model: Any) -> None:
    import transformers

    # No masks are made for it either: whether one is needed cannot be read off tensors without numbers.
    transformers.AttentionInterface.register(_ATTENTION, attention)
    for part in model.modules():  # an encoder inside of a classifier has a configuration of its own
        if isinstance(part, transformers.PreTrainedModel) and attention_of(part.config) == "sdpa":
            part.set_attn_implementation(_ATTENTION)


def _adapted(built: Built, setting: Setting) -> nn.Module:
    method = methods.checked(Method(name=setting.method, **setting.options))
    model: nn.Module = methods.attach(method, built.base, built.head, built.kind)
    return model


def _base_bytes(base: Any, quantization: str) -> tuple[int, int]:
    """Bytes of the weights, and of the largest quantised one when it is unpacked for use."""
    bits = BITS[quantization]
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    linear = [module.weight for module in base.modules() if isinstance(module, nn.Linear) and module is not head]
    packed = {id(weight): weight for weight in linear} if bits else {}
    total = sum(p.numel() * (bits or 0) / 8 if id(p) in packed else p.nbytes for p in base.parameters())
    return round(total), max((weight.nbytes for weight in packed.values()), default=0)


def _file_bytes(model: nn.Module) -> int:
    """Bytes of the tensors that a saved adapter holds, or of the whole model where all of it is trained."""
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict

    state = get_peft_model_state_dict(model) if isinstance(model, PeftModel) else model.state_dict()
    return sum(tensor.nbytes for tensor in state.values())


def _sent(setting: Setting, base_bytes: int, trained_bytes: int) -> int:
    """Bytes through one device in a step, by rings: a sum of all is sent twice, a gathering once."""
    share = (setting.devices - 1) / setting.devices
    if setting.sharding in ("zero3", "fsdp"):
        return round(share * (2 * (base_bytes + trained_bytes) + trained_bytes))
    return round(share * 2 * trained_bytes)


def _utilization(setting: Setting, dtype: str) -> tuple[float, str]:
    """The share of the device's speed that a step reaches, and where that is known from."""
    if setting.utilization is not None:
        return setting.utilization, "as given"
    measured = None if setting.flops else Measured.on(setting.accelerator)
    if measured is None or setting.method not in measured.utilization:
        return ASSUMED_UTILIZATION, "assumed, not measured"
    if dtype != measured.dtype or setting.quantization != "none":
        return ASSUMED_UTILIZATION, f"assumed; measured are unquantised weights in {measured.dtype} alone"
    return measured.utilization[setting.method], f"measured: {measured.about}"


def _assumptions(setting: Setting, speed: float, reached: str, *, pairs: bool) -> list[str]:
    own = (
        f"--flops {setting.flops:.3g}"
        if setting.flops
        else f"{setting.accelerator}: {speed / 1e12:,.0f} TFLOP/s, dense"
    )
    found = [
        f"speed: {own}, of which {reached}; communication and the optimiser take no time",
        "activations: what autograd keeps of a step, counted on the model without weights; attention keeps no scores",
        "working space: one more tensor as large as the largest that is kept, and what the options below add",
        "fragmentation and the libraries' own memory, often 1 to 2 GiB, come on top",
    ]
    if pairs:
        found.append(
            f"encoder and decoder: {setting.sequence} tokens each; tokens a second counts pairs, one token of either"
        )
    if setting.quantization != "none":
        found.append(
            f"{setting.quantization}: {BITS[setting.quantization]:.3g} bits for each weight of a linear layer but the "
            "head; the largest is unpacked once at a time"
        )
    if setting.checkpointing:
        found.append("checkpointing: the inputs of all blocks are kept, and one block at a time in full")
    if setting.sharding == "ddp":
        found.append("ddp: gradients once more, in the buckets in which they are exchanged")
    if setting.sharding in ("zero3", "fsdp"):
        found.append(
            f"{setting.sharding}: weights, gradients and optimiser states split between {setting.devices}; two blocks "
            "gathered at a time; the adapter's frozen factors on every device"
        )
    return found
