"""What a training step keeps and multiplies, found by following it on tensors that have shapes and no numbers."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from isotune.experiments.measure import Kept, counted_operators
from isotune.internals.torch_state import GROUPED_PRODUCT, FakeTensorMode
from isotune.internals.transformers_state import attention_of


@dataclass
class Trace:
    """One training step of a model."""

    kept: int = 0
    """Bytes that the forward pass keeps for backward, parameters and buffers not included."""
    largest: int = 0
    """Bytes of the largest of these tensors: what one more of its kind, such as its gradient, needs."""
    blocks: list[int] = field(default_factory=list)
    """Bytes that each block of the model keeps, in order: what activation checkpointing computes again."""
    block_inputs: list[int] = field(default_factory=list)
    """Bytes of each block's inputs that no earlier block was given, which checkpointing keeps."""
    forward: int = 0
    """Floating-point operations of the products in the forward pass, two for a multiplication and its addition."""
    backward: int = 0
    """The same in the backward pass."""
    block_forward: int = 0
    """The part of `forward` that lies in blocks."""

    def kept_with(self, *, checkpointing: bool) -> int:
        """Bytes kept at most; with checkpointing, the inputs of all blocks and what the largest block keeps."""
        if not checkpointing or not self.blocks:
            return self.kept
        return self.kept - sum(self.blocks) + sum(self.block_inputs) + max(self.blocks)

    def operations_with(self, *, checkpointing: bool) -> int:
        """Floating-point operations of a step; with checkpointing, the blocks' forward passes count twice."""
        return self.forward + self.backward + (self.block_forward if checkpointing else 0)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The parts of a model that activation checkpointing and sharding take one at a time."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def trace(model: nn.Module, inputs: dict[str, Tensor]) -> Trace:
    """Run one training step under a counter of what is kept and multiplied; on the meta device it needs no memory.

    `inputs` are those of the model's forward, with labels where it takes them.
    """
    counter = Kept(model)
    flops = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    found = Trace()
    with flops, counter, _blocks_watched(model, found, counter, flops), counted_operators():
        output = model(**inputs)
        loss = output.loss if getattr(output, "loss", None) is not None else output[0].float().square().mean()
        found.forward = flops.get_total_flops()
        loss.backward()
    found.backward = flops.get_total_flops() - found.forward
    found.kept, found.largest = counter.nbytes, counter.largest
    return found


@contextlib.contextmanager
def autocast(model: nn.Module) -> Iterator[None]:
    """Let a step be followed under torch's autocast in bfloat16, with tensors of the CPU that have no numbers.

    The model is moved to them, as the meta device has no autocast.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16):
        model.to_empty(device="cpu")
        yield


@contextlib.contextmanager
def _blocks_watched(model: nn.Module, found: Trace, counter: Kept, flops: FlopCounterMode) -> Iterator[None]:
    """Note of every block what it keeps, what it is given and what it multiplies, while it runs."""
    before = [(0, 0)]
    given: dict[int, Tensor] = {}  # what a decoder is given of the encoder is the same for all of its blocks

    def enter(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        inputs = {id(t.untyped_storage()): t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)}
        found.block_inputs.append(sum(t.untyped_storage().nbytes() for key, t in inputs.items() if key not in given))
        given.update(inputs)
        before[0] = counter.nbytes, flops.get_total_flops()

    def leave(*_: Any) -> None:
        found.blocks.append(counter.nbytes - before[0][0])
        found.block_forward += flops.get_total_flops() - before[0][1]

    handles = []
    for block in blocks_of(model):
        handles += [block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


_FORMULAS = {
    torch.ops.aten.addmm_: lambda into, left, right, *_, **__: int(2 * left[0] * left[1] * right[1]),
    # The groups are parts of the rows, or of what is summed.
    GROUPED_PRODUCT: lambda left, right, *_, **__: int(2 * left[0] * left[1] * right[-1]),
}
"""Products that torch's own counter leaves out, by the shapes of their arguments."""


class _Attention(torch.autograd.Function):
    """What a fused attention kernel keeps and multiplies: no scores are kept, backward computes them again.

    A causal mask spares nothing. On the meta device, where torch would take its unfused form.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        batch, heads, length, _ = query.shape
        result = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        _products(query, key, value, scores=1, values=1)
        sums = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, result, sums, bias)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_, bias = ctx.saved_tensors
        _products(query, key, value, scores=3, values=2)
        return tuple(None if t is None else torch.empty_like(t) for t in (query, key, value, bias))


def _products(query: Tensor, key: Tensor, value: Tensor, *, scores: int, values: int) -> None:
    """Count that many products of the sizes of scores, and of scores times values."""
    heads = query.shape[1]
    rows = query.flatten(0, 1)
    columns, values_ = (t[:, :, None].expand(-1, -1, heads // t.shape[1], -1, -1).flatten(0, 2) for t in (key, value))
    for _ in range(scores):
        found = torch.bmm(rows, columns.mT)
    for _ in range(values):
        torch.bmm(found, values_)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *_: Any,
    position_bias: Tensor | None = None,
    **__: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers takes one, for a trace on the meta device.

    A bias of the scores by position, as T5 has, is kept by every layer: with the causal mask in it, or made contiguous.
    """
    if position_bias is not None:
        causal = getattr(module, "is_causal", True)
        layout = {"memory_format": torch.contiguous_format}
        position_bias = position_bias.clone(**layout) if causal else position_bias.contiguous()
    if torch.is_autocast_enabled("cpu"):  # as torch's own attention is computed then
        query, key, value = (t.to(torch.get_autocast_dtype("cpu")) for t in (query, key, value))
    result: Tensor = _Attention.apply(query, key, value, position_bias)  # type: ignore[no-untyped-call]
    return result.transpose(1, 2), None


def inputs_for(model: Any, batch: int, sequence: int, side: int | None = None) -> dict[str, Tensor]:
    """Inputs of a training step, of the kind that a model of transformers takes; images of its own size or `side`."""
    config: Any = model.config
    main = getattr(model, "main_input_name", "input_ids")
    if main == "input_ids":
        inputs = {"input_ids": torch.zeros(batch, sequence, dtype=torch.long, device=model.device)}
    elif main == "pixel_values":
        size = side or config.image_size
        size = size if isinstance(size, (list, tuple)) else (size,) * 2
        inputs = {
            "pixel_values": torch.zeros(batch, config.num_channels, *size, dtype=model.dtype, device=model.device)
        }
    else:
        raise ValueError(f"{type(model).__name__} takes {main}; only models of tokens or images can be planned.")
    accepted = inspect.signature(model.forward).parameters
    if "labels" in accepted and "Classifi" in type(model).__name__ and "Token" not in type(model).__name__:
        inputs["labels"] = torch.zeros(batch, dtype=torch.long, device=model.device)
        if config.problem_type is None and config.num_labels > 1:
            config.problem_type = "single_label_classification"  # which some models would find out from the labels
    elif "labels" in accepted and main == "input_ids":
        inputs["labels"] = inputs["input_ids"].clone()
    elif getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = inputs["input_ids"].clone()
    if main == "input_ids" and "attention_mask" in accepted and attention_of(config) == "eager":
        # Without one, transformers would look for padding among the tokens; fused attention gets none and makes none.
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "use_cache" in accepted:
        inputs["use_cache"] = False  # type: ignore[assignment]
    return inputs
