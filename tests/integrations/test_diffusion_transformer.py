"""A diffusion transformer (SD3's) with adapters of both forms: trained, saved, loaded, and its weights in a mixture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from helpers import layers_of, randomize, relative_error, trainable
from isotune import OFTConfig, PsoftConfig, get_peft_model

diffusers = pytest.importorskip("diffusers")

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"]


def config(method: str) -> Any:
    if method == "oft":
        return OFTConfig(oft_block_size=8, target_modules=TARGETS)
    return PsoftConfig(r=8, target_modules=TARGETS)


pytestmark = pytest.mark.parametrize("method", ["oft", "psoft"])


def transformer() -> Any:
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    ).eval()


def call(model: nn.Module, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return model(
        hidden_states=torch.randn(2, 4, 8, 8, generator=generator),
        encoder_hidden_states=torch.randn(2, 5, 32, generator=generator),
        pooled_projections=torch.randn(2, 16, generator=generator),
        timestep=torch.tensor([10, 400]),
        **options,
    ).sample


@torch.no_grad()
def output(model: nn.Module, **options: Any) -> Tensor:
    return call(model.eval(), **options)


def test_train_save_and_load(method: str, tmp_path: Path) -> None:
    base = output(transformer())
    model = get_peft_model(transformer(), config(method))
    assert torch.equal(output(model), base)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer, losses = torch.optim.AdamW(trainable(model).values(), lr=0.02), []
    target = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    for _ in range(5):
        loss = nn.functional.mse_loss(call(model.train()), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if not p.requires_grad)
    trained = output(model)
    model.save_pretrained(tmp_path)
    assert relative_error(output(PeftModel.from_pretrained(transformer(), tmp_path)), trained) < 1e-5
    assert relative_error(output(model.merge_and_unload()), trained) < 1e-4


def test_weights_and_the_scale_of_a_call(method: str) -> None:
    base, model = output(transformer()), transformer()
    model.add_adapter(config(method), adapter_name="mine")
    randomize(model, "mine", std=0.3)
    full = output(model)
    assert relative_error(full, base) > 0.01
    half = output(model, joint_attention_kwargs={"scale": 0.5})
    torch.testing.assert_close(output(model), full, rtol=1e-5, atol=1e-5)
    model.set_adapters("mine", 0.5)
    torch.testing.assert_close(output(model), half, rtol=1e-5, atol=1e-5)
    assert all(layer.adapter("mine").relative_scale == 0.5 for layer in layers_of(model))
    model.set_adapters("mine", 0.0)
    torch.testing.assert_close(output(model), base, rtol=1e-5, atol=1e-5)
