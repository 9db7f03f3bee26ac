"""What is to be trained and on what, and what is known of the hardware."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from isotune.experiments import registry
from isotune.experiments.loading import assignment
from isotune.methods.checks import require_choice, require_positive_integer


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

OPTIMIZER_BYTES = {"adamw": 8, "adamw-8bit": 2, "sgd": 0}
SHARDED = {
    "none": (),
    "ddp": (),
    "zero1": ("optimiser states",),
    "zero2": ("optimiser states", "gradients"),
    "zero3": ("base weights", "adapter weights", "optimiser states", "gradients"),
    "fsdp": ("base weights", "adapter weights", "optimiser states", "gradients"),
}
"""What each kind of sharding spreads over the devices."""

ASSUMED_UTILIZATION = 0.4
"""Share of an accelerator's speed that a step reaches where nothing was measured."""

DTYPES = ("float32", "bfloat16", "float16")


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
        batch, sequence: of one device and one step; a model of images has its own number of tokens, and the decoder
            of a model with an encoder gets a sequence as long as the encoder's.
        image_size: the side in pixels of the squares that a model of images is given; None: its own.
        checkpointing: whether activations of blocks are computed again in backward.
        autocast: whether a step is computed under torch's autocast in bfloat16, whatever the dtype of the weights.
        flops: operations a second of one device, in the place of an accelerator's.
        utilization: share of that speed that is reached; None: what was measured on this accelerator with this method,
            or else `ASSUMED_UTILIZATION`.
        new_head: whether the model has a head that the method "head" can train, which no configuration describes.
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
    image_size: int | None = None
    checkpointing: bool = False
    autocast: bool = False
    accelerator: str = "h100"
    flops: float | None = None
    utilization: float | None = None
    new_head: bool = False

    def __post_init__(self) -> None:
        require_choice("method", self.method, [name for name in registry.entries() if name != "head" or self.new_head])
        for name in ("devices", "batch", "sequence"):
            require_positive_integer(name, getattr(self, name))
        if self.sharding is None:
            self.sharding = "none" if self.devices == 1 else "ddp"
        require_choice("sharding", self.sharding, SHARDED)
        if self.sharding == "none" and self.devices > 1:
            raise ValueError(f"devices={self.devices} needs a sharding: ddp, zero1, zero2, zero3 or fsdp.")
        if self.dtype is not None:
            require_choice("dtype", self.dtype, DTYPES)
        require_choice("quantization", self.quantization, BITS)
        if self.quantization != "none" and self.method == "full":
            raise ValueError(f"quantization={self.quantization!r} cannot be trained in full; choose an adapter method.")
        require_choice("optimizer", self.optimizer, OPTIMIZER_BYTES)
        require_choice("accelerator", self.accelerator, ACCELERATORS)
        if self.flops is not None and not 0 < self.flops < math.inf:
            raise ValueError(f"flops={self.flops!r} is not allowed; give operations a second, such as 300e12.")
        if self.utilization is not None and not 0 < self.utilization <= 1:
            raise ValueError(f"utilization={self.utilization!r} is not allowed; it must be above 0 and at most 1.")


def parse_options(given: Sequence[str]) -> dict[str, Any]:
    """Options of a method from the command line, KEY=VALUE each."""
    return dict(assignment(text, "an option of the method is KEY=VALUE, such as oft_block_size=32") for text in given)
