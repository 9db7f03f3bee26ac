"""What a fine-tuning needs: memory and time of a step, from the model's configuration alone."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from isotune.adapter.subspace import SubspaceUpdate
from isotune.experiments import methods, paper, registry
from isotune.experiments.recipe import Method
from isotune.experiments.text import YamlError, from_yaml, shown
from isotune.experiments.trace import Trace, attention, blocks_of, inputs_for, trace
from isotune.files.base_model import quiet, resolve_base
from isotune.hosts import ExpertsHost
from isotune.methods.config import require_choice, require_positive_integer
from isotune.tuner.layer import Layer


@dataclass(frozen=True)
class Accelerator:
    """What its vendor publishes, dense."""

    half: float
    """Operations a second in bfloat16."""
    single: float
    """Operations a second in float32, without TF32, which torch leaves off."""
    memory: float
    """Bytes."""


ACCELERATORS = {
    "h200": Accelerator(989.4e12, 67e12, 141e9),  # SXM; the NVL card is slower
    "h100": Accelerator(989.4e12, 67e12, 80e9),  # SXM; the PCIe and NVL cards are slower
    "a100": Accelerator(312e12, 19.5e12, 80e9),  # SXM or PCIe with 80 GB
    "l40s": Accelerator(362.05e12, 91.6e12, 48e9),
    "l4": Accelerator(121e12, 30.3e12, 24e9),
}
"""NVIDIA's data sheets; figures that they give with sparsity are halved."""

BITS = {
    "none": None,
    "nf4": 4 + 32 / 64,  # a float32 scale for every 64 weights
    "nf4-double": 4 + 8 / 64 + 32 / (64 * 256),  # the scales themselves in 8 bits, with a scale for every 256
    "int8": 8.0,  # and a scale for a row, which is next to nothing
    "int4": 4 + 32 / 128,  # a scale and a zero point in half precision for every 128
}
"""Bits of a quantised weight with its scales."""

_OPTIMIZER_BYTES = {"adamw": 8, "adamw-8bit": 2, "sgd": 0}
_SHARDED = {
    "none": (),
    "ddp": (),
    "zero1": ("optimiser states",),
    "zero2": ("optimiser states", "gradients"),
    "zero3": ("base weights", "adapter weights", "optimiser states", "gradients"),
    "fsdp": ("base weights", "adapter weights", "optimiser states", "gradients"),
}
"""What each kind of sharding divides among the devices."""

_ATTENTION = "isotune_trace"

_DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class Setting:
    """What is to be trained and on what.

    Args:
        model: folder, Hub name or package:NAME; only its configuration is read.
        method: a name that recipes know; `options` are those of its configuration.
        devices: on which batches are computed side by side, `batch` sequences each.
        sharding: how the devices divide what is kept; "none" for one device.
        dtype: of the base model's weights and of the computation; None: what its configuration says.
        quantization: of the base's linear layers, a key of BITS.
        optimizer: adamw, adamw-8bit or sgd.
        batch, sequence: of one device and one step; a model of images has its own number of tokens, and the decoder
            of a model with an encoder gets a sequence as long as the encoder's.
        checkpointing: whether activations of blocks are computed again in backward.
        accelerator: a key of ACCELERATORS, for its speed and memory.
        flops: operations a second of one device, in the place of an accelerator's.
        utilization: share of that speed that is reached.

    Raises:
        ValueError: a value that is not allowed; the message says what is.
    """

    model: str
    method: str = "psoft"
    options: dict[str, Any] = field(default_factory=dict)
    devices: int = 1
    sharding: str | None = None
    dtype: str | None = None
    quantization: str = "none"
    optimizer: str = "adamw"
    batch: int = 1
    sequence: int = 2048
    checkpointing: bool = False
    accelerator: str = "h100"
    flops: float | None = None
    utilization: float = 0.4

    def __post_init__(self) -> None:
        require_choice("method", self.method, [name for name in registry.entries() if name != "head"])
        for name in ("devices", "batch", "sequence"):
            require_positive_integer(name, getattr(self, name))
        if self.sharding is None:
            self.sharding = "none" if self.devices == 1 else "ddp"
        require_choice("sharding", self.sharding, _SHARDED)
        if self.sharding == "none" and self.devices > 1:
            raise ValueError(f"devices={self.devices} needs a sharding: ddp, zero1, zero2, zero3 or fsdp.")
        if self.dtype is not None:
            require_choice("dtype", self.dtype, _DTYPES)
        require_choice("quantization", self.quantization, BITS)
        if self.quantization != "none" and self.method == "full":
            raise ValueError(f"quantization={self.quantization!r} cannot be trained in full; choose an adapter method.")
        require_choice("optimizer", self.optimizer, _OPTIMIZER_BYTES)
        require_choice("accelerator", self.accelerator, ACCELERATORS)
        if self.flops is not None and not self.flops > 0:
            raise ValueError(f"flops={self.flops!r} is not allowed; give operations a second, such as 300e12.")
        if not 0 < self.utilization <= 1:
            raise ValueError(f"utilization={self.utilization!r} is not allowed; it must be above 0 and at most 1.")


@dataclass
class Plan:
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


def plan(setting: Setting) -> Plan:
    """Estimate what a setting needs.

    Raises:
        ValueError: no such model or method, options that do not fit, or a model that cannot be followed.
    """
    with torch.device("meta"), quiet():
        base, dtype = _build(setting)
        base_parameters = sum(p.numel() for p in base.parameters())
        base_bytes, largest = _base_bytes(base, setting.quantization)
        blocks = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in blocks_of(base)]
        model = _adapted(base, setting).train()
        try:
            inputs = inputs_for(base, setting.batch, setting.sequence)
            step = trace(model, inputs)
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"A step of {type(base).__name__} cannot be followed without its weights: {first}"
            ) from error
        memory = _memory(setting, model, step, base_bytes, largest, blocks)
        trained = [p for p in model.parameters() if p.requires_grad]
        device = ACCELERATORS[setting.accelerator]
        speed = setting.flops or (device.single if dtype == "float32" else device.half)
        tokens = _tokens(base, inputs)
        operations = step.operations_with(checkpointing=setting.checkpointing)
        return Plan(
            setting=setting,
            architecture=type(base).__name__,
            dtype=dtype,
            base_parameters=base_parameters,
            trained_parameters=sum(p.numel() for p in trained),
            tokens=tokens,
            adapter_file=_file_bytes(model),
            memory=memory,
            adapter_activations=adapter_activations(model, tokens),
            paper_activations=paper_activations(setting, base, tokens),
            operations=operations,
            seconds=operations / (speed * setting.utilization),
            sent=_sent(setting, base_bytes, sum(p.numel() * p.element_size() for p in trained)),
            assumptions=_assumptions(setting, speed, pairs=_pairs(base.config)),
        )


def _pairs(config: Any) -> bool:
    """Whether the model reads one sequence and writes another."""
    return bool(getattr(config, "is_encoder_decoder", False))


def _tokens(base: nn.Module, inputs: dict[str, Tensor]) -> int:
    """How many vectors the layers are given for these inputs."""
    if "input_ids" in inputs:
        return inputs["input_ids"].numel()
    config: Any = base.config
    batch, _, height, width = inputs["pixel_values"].shape
    patch = getattr(config, "patch_size", height)
    patches = (height // patch) * (width // patch) if isinstance(patch, int) else 1
    return batch * (patches + 1)


def _build(setting: Setting) -> tuple[Any, str]:
    """The base model without weights, of the class that its configuration names, and its dtype."""
    import transformers

    path = resolve_base(setting.model)
    try:
        config = transformers.AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"The configuration of {setting.model!r} cannot be read: {first}") from error
    stored = getattr(config, "dtype", None)
    dtype = setting.dtype or (str(stored).removeprefix("torch.") if stored is not None else "float32")
    require_choice("dtype", dtype, _DTYPES)
    own = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        model: Any = transformers.AutoModel.from_config(config) if own is None else own(config)
    finally:
        torch.set_default_dtype(before)
    if getattr(model.config, "_attn_implementation", None) == "sdpa":
        # No masks are made for it either: whether one is needed cannot be read off tensors without numbers.
        transformers.AttentionInterface.register(_ATTENTION, attention)
        model.set_attn_implementation(_ATTENTION)
    return model, dtype


def _adapted(base: nn.Module, setting: Setting) -> nn.Module:
    method = Method(name=setting.method, **setting.options)
    methods.check(method)
    head = [name for name, _ in base.named_children() if name in registry.HEADS]
    kind = "SEQ_CLS" if "SequenceClassification" in type(base).__name__ else None
    model: nn.Module = methods.attach(method, base, head, kind)
    return model


def _base_bytes(base: Any, quantization: str) -> tuple[int, int]:
    """Bytes of the weights, and of the largest quantised one when it is unpacked for use."""
    bits = BITS[quantization]
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    packed = {
        id(module.weight) for module in base.modules() if bits and isinstance(module, nn.Linear) and module is not head
    }
    total, largest = 0.0, 0
    for parameter in base.parameters():
        size = parameter.numel() * parameter.element_size()
        if id(parameter) in packed:
            assert bits is not None
            total += parameter.numel() * bits / 8
            largest = max(largest, size)
        else:
            total += size
    return round(total), largest


def _memory(
    setting: Setting, model: nn.Module, step: Trace, base_bytes: int, largest: int, blocks: Sequence[int]
) -> dict[str, int]:
    trained = [p for p in model.parameters() if p.requires_grad]
    own = 0 if setting.method == "full" else sum(p.numel() * p.element_size() for p in trained)
    gradients = sum(p.numel() * p.element_size() for p in trained)
    memory = {
        "base weights": base_bytes,
        "adapter weights": own,
        "adapter's frozen factors": _factor_bytes(model),
        "gradients": gradients,
        "optimiser states": _OPTIMIZER_BYTES[setting.optimizer] * sum(p.numel() for p in trained),
    }
    for row in _SHARDED[str(setting.sharding)]:
        memory[row] = -(-memory[row] // setting.devices)
    working = step.largest + largest
    if setting.sharding == "ddp":
        working += gradients  # the buckets in which they are exchanged
    if setting.sharding in ("zero3", "fsdp"):
        working += 2 * max(blocks, default=0)  # one block in use and the next on its way
    memory["kept for backward"] = step.kept_with(checkpointing=setting.checkpointing)
    memory["working space"] = working
    return memory


def _factor_bytes(model: nn.Module) -> int:
    """Reader, writer and pin of every subspace; tensors that adapters share count once."""
    buffers = {id(b): b for layer in _layers(model) for form in layer.isotune_form.values() for b in form.buffers()}
    return sum(b.numel() * b.element_size() for b in buffers.values())


def _layers(model: nn.Module) -> list[Layer]:
    return [module for module in model.modules() if isinstance(module, Layer)]


def _file_bytes(model: nn.Module) -> int:
    """Bytes of the tensors that a saved adapter holds, or of the whole model where all of it is trained."""
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict

    state = get_peft_model_state_dict(model) if isinstance(model, PeftModel) else model.state_dict()
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def adapter_activations(model: nn.Module, tokens: int) -> int:
    """Bytes that isotune's adapters keep for backward beyond the frozen model, by formula.

    tokens × r for an update of a subspace, in the dtype of the base; at most tokens × in for a rotation of all inputs,
    which layers that read the same input share. The operators themselves come on top, whatever the tokens, and so does
    what convolutions and embeddings fold. Experts keep a folded copy of their parameter.

    Args:
        model: adapted.
        tokens: of one step.
    """
    total = 0
    for layer in _layers(model):
        if layer.host.folds:
            total += layer.host.weight.nbytes if isinstance(layer.host, ExpertsHost) else 0
            continue
        for name, form in layer.isotune_form.items():
            width = form.rank if isinstance(form, SubspaceUpdate) else layer.operator(name).size
            total += tokens * width * layer.host.weight.element_size()
    return total


_TERM = re.compile(r"(\d+)([bsharm]+)(\^2)?(\*log2\(h\))?")
_TABLE_9 = {
    "full": "FFT",
    "lora": "LoRA",
    "dora": "DoRA",
    "oft": "OFT",
    "boft": "BOFT",
    "goft": "GOFT",
    "lora_xs": "LoRA-XS",
    "psoft": "PSOFT",
    "psoft_so": "PSOFT",
}


def paper_activations(setting: Setting, base: nn.Module, tokens: int) -> float | None:
    """Bytes kept by all transformer layers by the formula of the paper's Table 9, which is for float32.

    Args:
        setting: method, rank and batch.
        base: whose configuration names its sizes.
        tokens: of all sequences.

    Returns:
        None where the paper has no formula for the method or the model is no plain transformer.
    """
    config: Any = base.config
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads")
    plain = all(hasattr(config, name) for name in names) and not _pairs(config)
    if setting.method not in _TABLE_9 or not plain:
        return None
    layers, width, heads = (int(getattr(config, name)) for name in names)
    rank = setting.options.get("r", 0)
    if not rank and setting.method not in ("full", "goft", "oft", "boft"):
        rank = methods.adapter_config(setting.method).r
    sizes = {
        "b": setting.batch,
        "s": tokens // setting.batch,
        "h": width,
        "a": heads,
        "r": rank,
        "m": setting.options.get("boft_n_butterfly_factor", 1),
    }
    formula = paper.results()["activation_memory_per_layer_bytes_fp32"][_TABLE_9[setting.method]]
    total = 0.0
    for term in formula.split(" + "):
        found = _TERM.fullmatch(term)
        assert found, term
        product = float(found[1]) * math.prod(sizes[letter] for letter in found[2])
        total += product * (sizes["s"] if found[3] else 1) * (math.log2(width) if found[4] else 1)
    scale = next(base.parameters()).element_size() / 4
    return float(layers * total * scale)


def _sent(setting: Setting, base_bytes: int, trained_bytes: int) -> int:
    """Bytes through one device in a step, by rings: a sum of all is sent twice, a gathering once."""
    share = (setting.devices - 1) / setting.devices
    if setting.sharding in ("zero3", "fsdp"):
        return round(share * (2 * (base_bytes + trained_bytes) + trained_bytes))
    return round(share * 2 * trained_bytes)


def _assumptions(setting: Setting, speed: float, *, pairs: bool) -> list[str]:
    own = (
        f"--flops {setting.flops:.3g}"
        if setting.flops
        else f"{setting.accelerator}: {speed / 1e12:,.0f} TFLOP/s, dense"
    )
    found = [
        f"speed: {own}, of which {setting.utilization:.0%} are reached; communication and the optimiser take no time",
        "activations: what autograd keeps of a step, counted on the model without weights; attention keeps no scores",
        "working space: one more tensor as large as the largest that is kept, and what the options below add",
        "fragmentation and the libraries' own memory, often 1 to 2 GB, come on top",
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
            f"{setting.sharding}: weights, gradients and optimiser states divided by {setting.devices}; two blocks "
            "gathered at a time; the adapter's frozen factors on every device"
        )
    return found


def parse_options(given: Sequence[str]) -> dict[str, Any]:
    """Options of a method from the command line, KEY=VALUE each.

    Raises:
        ValueError: one is not of that form.
    """
    options: dict[str, Any] = {}
    for text in given:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise ValueError(f"an option of the method is KEY=VALUE, such as oft_block_size=32, not {text!r}")
        try:
            options[key] = from_yaml(value)
        except YamlError as error:
            raise ValueError(f"{key}: the value {shown(value)} is not valid YAML: {error}") from error
    return options


def to_text(found: Plan) -> str:
    """The plan as a table with its assumptions."""
    setting = found.setting
    options = " ".join(f"{key}={value}" for key, value in setting.options.items())
    share = found.trained_parameters / found.base_parameters
    head = [
        f"{setting.model} ({found.architecture}), {setting.method} {options}".rstrip(),
        f"{setting.devices} × {setting.accelerator if not setting.flops else 'device'}, {setting.sharding}, "
        f"{found.dtype}, quantisation {setting.quantization}, batch {setting.batch} × {setting.sequence} a device"
        + (", checkpointing" if setting.checkpointing else ""),
        "",
        f"base parameters      {found.base_parameters:>18,}",
        f"trained parameters   {found.trained_parameters:>18,}   {share:.3%} of the base",
        f"adapter file         {_size(found.adapter_file):>18}",
        "",
        "memory of one device",
    ]
    rows = [f"  {name:<27}{_size(size):>11}" for name, size in found.memory.items()]
    rows += [f"  {'':─<38}", f"  {'together':<27}{_size(found.total):>11}{_fits(found)}", ""]
    notes = []
    if found.adapter_activations:
        notes.append(f"of what is kept for backward, the adapter's part by formula: {_size(found.adapter_activations)}")
    if found.paper_activations is not None:
        notes.append(
            f"kept for backward by the paper's Table 9, which keeps attention scores: {_size(found.paper_activations)}"
        )
    step = [
        f"operations of a step {found.operations / 1e12:>17.2f}T",
        f"time of a step       {_seconds(found.seconds):>18}   {found.tokens_per_second:,.0f} tokens a second in all",
    ]
    if setting.devices > 1:
        step.append(f"sent by a device     {_size(found.sent):>18}   a step")
    return "\n".join(
        [*head, *rows, *notes, "", *step, "", "assumptions", *(f"  · {line}" for line in found.assumptions)]
    )


def _fits(found: Plan) -> str:
    if found.setting.flops:
        return ""
    memory = ACCELERATORS[found.setting.accelerator].memory
    return f"   of {memory / 1e9:.0f} GB" + ("" if found.total <= memory else ", too much")


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.2f} GB"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms" if seconds < 1 else f"{seconds:,.2f} s"
