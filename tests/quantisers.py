"""Layers and models quantised by each library that is tested, made from plain ones."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from isotune.internals.quantised_state import keep_readable


@dataclass(frozen=True)
class Quantiser:
    """One way to quantise a linear layer."""

    package: str
    """What must be installed."""
    layer: Callable[[nn.Linear], nn.Module]
    """A quantised layer from a plain one, which may be used up."""
    configuration: Callable[[], Any] | None = None
    """torchao's configuration, which transformers keeps on the model."""
    rounds_inputs: bool = False
    """Whether an evaluation forward rounds its input too, so that it is no product with the dequantised weight."""
    residue: float = 0.0
    """The relative rounding error of the weight, roughly."""
    merges: bool = True
    """Whether a changed weight can be written back."""
    precision: float = 1e-5
    """How closely its product with a float32 input is that with the dequantised weight."""


def _four_bits(kind: str) -> Callable[[nn.Linear], nn.Module]:
    def quantise(layer: nn.Linear) -> nn.Module:
        from bitsandbytes.nn import Linear4bit

        shape, bias, dtype = (layer.in_features, layer.out_features), layer.bias is not None, layer.weight.dtype
        packed = Linear4bit(*shape, bias=bias, quant_type=kind, compute_dtype=dtype)
        packed.load_state_dict(layer.state_dict())
        return packed.to(layer.weight.device)

    return quantise


def _eight_bits(layer: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear8bitLt

    bias = layer.bias is not None
    packed = Linear8bitLt(layer.in_features, layer.out_features, bias=bias, has_fp16_weights=False)
    packed.load_state_dict(layer.state_dict())
    return packed.to(layer.weight.device)


def _torchao(name: str) -> tuple[Callable[[nn.Linear], nn.Module], Callable[[], Any]]:
    def configuration() -> Any:
        from torchao import quantization

        if name == "int4":
            groups = quantization.PerGroup(16)
            return quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=groups)
        return {"int8": quantization.Int8WeightOnlyConfig, "float8": quantization.Float8WeightOnlyConfig}[name]()

    def quantise(layer: nn.Linear) -> nn.Module:
        from torchao.quantization import quantize_

        quantize_(layer, configuration())
        return layer

    return quantise, configuration


def _quanto(kind: str) -> Callable[[nn.Linear], nn.Module]:
    def quantise(layer: nn.Linear) -> nn.Module:
        from optimum import quanto

        packed = quanto.QLinear.from_module(layer, weights=getattr(quanto, kind))
        packed.freeze()
        return packed

    return quantise


def _hqq(layer: nn.Linear) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    options = BaseQuantizeConfig(nbits=4, group_size=16, axis=1)
    return HQQLinear(layer, options, compute_dtype=layer.weight.dtype, device="cpu")


def _group_scales(layer: nn.Linear, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point, (out, groups) each, of 4-bit numbers by rounding to the nearest."""
    groups = layer.weight.detach().unflatten(1, (-1, size))
    scales = (groups.amax(-1) - groups.amin(-1)).clamp_min(1e-5) / 15
    return scales, (-groups.amin(-1) / scales).round().clamp(0, 15)


def _gptqmodel(kind: str) -> Callable[[nn.Linear], nn.Module]:
    def quantise(layer: nn.Linear) -> nn.Module:
        from gptqmodel.nn_modules.qlinear.torch import TorchLinear
        from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

        size = 16
        scales, zeros = _group_scales(layer, size)
        packed = {"gptq": TorchLinear, "awq": AwqTorchLinear}[kind](
            bits=4,
            group_size=size,
            sym=False,
            desc_act=False,
            in_features=layer.in_features,
            out_features=layer.out_features,
            bias=layer.bias is not None,
            register_buffers=True,
        )
        index = torch.arange(layer.in_features, dtype=torch.int32) // size
        packed.pack(layer, scales, zeros, index)
        packed.post_init()
        return packed

    return quantise


def _aqlm(layer: nn.Linear) -> nn.Module:
    """Packed without loss: one codebook of 2^16 entries holds every group of 4 numbers of a weight this small."""
    from aqlm import QuantizedLinear

    groups = layer.weight.detach().reshape(-1, 4)
    order = groups[:, 0].argsort()
    own = QuantizedLinear(layer.in_features, layer.out_features, 4, 1, 1, 16, bias=layer.bias is not None)
    with torch.no_grad():
        own.codebooks.zero_()[0, : len(groups), 0] = groups[order]
        own.codes.copy_(order.argsort().to(torch.int16).view(own.codes.shape))
        own.scales.fill_(1)
        if layer.bias is not None:
            own.bias.copy_(layer.bias)
    return own


QUANTISERS = {
    "bitsandbytes-nf4": Quantiser("bitsandbytes", _four_bits("nf4"), residue=0.1),
    "bitsandbytes-fp4": Quantiser("bitsandbytes", _four_bits("fp4"), residue=0.13),
    "bitsandbytes-int8": Quantiser("bitsandbytes", _eight_bits, rounds_inputs=True, residue=0.01),
    "torchao-int8": Quantiser("torchao", *_torchao("int8"), residue=0.01),
    "torchao-int4": Quantiser("torchao", *_torchao("int4"), residue=0.1),
    "torchao-float8": Quantiser("torchao", *_torchao("float8"), residue=0.04),
    "quanto-int8": Quantiser("optimum.quanto", _quanto("qint8"), residue=0.01),
    "quanto-int4": Quantiser("optimum.quanto", _quanto("qint4"), residue=0.15),
    "hqq-int4": Quantiser("hqq", _hqq, residue=0.1),
    "gptqmodel-gptq": Quantiser("gptqmodel", _gptqmodel("gptq"), merges=False, precision=1e-3),
    "gptqmodel-awq": Quantiser("gptqmodel", _gptqmodel("awq"), merges=False, precision=1e-3),
    "aqlm-1x16": Quantiser("aqlm", _aqlm, merges=False),
}
IN_CI = ("bitsandbytes-nf4", "bitsandbytes-int8", "torchao-int8", "torchao-int4")
OTHERS = tuple(name for name in QUANTISERS if name not in IN_CI)


def parameters(*names: str) -> list[Any]:
    """For `pytest.mark.parametrize`: those that CI does not have are slow, and skipped where the library is missing."""
    return [pytest.param(name, marks=() if name in IN_CI else pytest.mark.slow) for name in names or QUANTISERS]


def quantise(model: nn.Module, name: str, *leave: str) -> nn.Module:
    """A copy of a model whose linear layers are quantised, but for those whose name ends in one of `leave`."""
    quantiser = QUANTISERS[name]
    try:
        importlib.import_module(quantiser.package)
    except ImportError:
        pytest.skip(f"{quantiser.package} is not installed; see requirements/")
    model = copy.deepcopy(model)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and not path.endswith(leave):
            parent, _, attribute = path.rpartition(".")
            packed = quantiser.layer(module)
            if module.out_features % 32:
                keep_readable(packed)  # for other widths bitsandbytes itself fails on a CPU with AVX512-BF16
            setattr(model.get_submodule(parent), attribute, packed)
    if quantiser.configuration is not None:
        configuration = SimpleNamespace(get_apply_tensor_subclass=quantiser.configuration)
        model.hf_quantizer = SimpleNamespace(quantization_config=configuration)  # as transformers' loader does
    return model.requires_grad_(False)


LEFT = ("o_proj", "lm_head")
"""What `load` leaves unquantised."""


def load(folder: Path, name: str) -> Any:
    """A saved model as transformers loads and quantises it, by its own configuration of the library.

    AWQ can only be loaded packed: see `save_packed`.
    """
    from transformers import AutoModelForCausalLM

    pytest.importorskip(QUANTISERS[name].package, reason="see requirements/")
    configuration = _CONFIGURATIONS[name.partition("-")[0]](name.partition("-")[2])
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=configuration, device_map="cpu")
    for module in model.modules():
        keep_readable(
            module
        )  # where a CPU has AVX512-BF16, the base alone would fail for widths that 32 does not divide
    return model


def _bitsandbytes_configuration(kind: str) -> Any:
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(LEFT))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=list(LEFT),
    )


def _torchao_configuration(kind: str) -> Any:
    from transformers import TorchAoConfig

    configuration = QUANTISERS[f"torchao-{kind}"].configuration
    assert configuration is not None
    return TorchAoConfig(configuration(), modules_to_not_convert=[f".*{name}.weight" for name in LEFT])


def _quanto_configuration(kind: str) -> Any:
    from transformers import QuantoConfig

    return QuantoConfig(weights=kind, modules_to_not_convert=list(LEFT))


def _gptqmodel_configuration(kind: str) -> Any:
    from transformers import AwqConfig, GPTQConfig

    if kind == "awq":
        return AwqConfig(bits=4, group_size=16, backend="torch_awq", modules_to_not_convert=list(LEFT))
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(4, 96, (1, 16), generator=generator) for _ in range(8)]
    return GPTQConfig(
        bits=4,
        group_size=16,
        backend="torch",  # what it chooses by itself on some CPUs is compiled first, for minutes
        dataset=[{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in tokens],
        modules_in_block_to_quantize=[[f"self_attn.{kind}_proj" for kind in "qkv"]],  # 32 must divide their sizes
    )


_CONFIGURATIONS: dict[str, Callable[[str], Any]] = {
    "bitsandbytes": _bitsandbytes_configuration,
    "torchao": _torchao_configuration,
    "quanto": _quanto_configuration,
    "gptqmodel": _gptqmodel_configuration,
}
BY_TRANSFORMERS = tuple(name for name in QUANTISERS if name.partition("-")[0] in _CONFIGURATIONS)
"""Those that transformers can load: not HQQ, for which it has no way to quantise a weight any more."""


def save_packed(model: nn.Module, folder: Path) -> None:
    """A model packed as AWQ, which transformers does not do, saved with the configuration by which it is loaded."""
    packed: Any = quantise(model, "gptqmodel-awq", *LEFT)
    packed.config.quantization_config = _gptqmodel_configuration("awq").to_dict()
    packed.save_pretrained(folder)
