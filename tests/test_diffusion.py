"""A UNet of diffusers with adapted attention and convolutions, by itself and in a text-to-image pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from helpers import layers_of, randomize, relative_error, tiny_unet, trainable
from isotune import OFTConfig, PsoftConfig, get_peft_model

diffusers = pytest.importorskip("diffusers")

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]
WORDS = ["a", "red", "cat", "dog", "small"]


def make_config(method: str, **options: Any) -> PeftConfig:
    if method == "oft":
        return OFTConfig(**{"oft_block_size": 8, "target_modules": TARGETS, **options})
    return PsoftConfig(**{"r": 8, "target_modules": TARGETS, **options})


@pytest.fixture(params=["oft", "psoft"])
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def make_unet(seed: int = 0) -> Any:
    """A random UNet with one block of cross attention on each side; equal seeds give equal weights."""
    return tiny_unet(seed)


def some_latents(count: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy images, time steps and text states."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(count, 4, 8, 8, generator=generator)
    return images, torch.arange(count) * 400, torch.randn(count, 5, 32, generator=generator)


@torch.no_grad()
def output(model: Any, **options: Any) -> Tensor:
    return model.eval()(*some_latents(), **options).sample


def train(model: Any, steps: int = 5) -> list[float]:
    """Fit one batch of noise with AdamW."""
    target = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    optimizer, losses = torch.optim.AdamW(trainable(model).values(), lr=0.02), []
    model.train()
    for _ in range(steps):
        loss = nn.functional.mse_loss(model(*some_latents()).sample, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all that is not the adapter's."""
    return {
        name.replace(".base_layer", "").removeprefix("base_model.model."): p.detach().clone()
        for name, p in model.named_parameters()
        if "isotune" not in name
    }


# -- a UNet under PEFT ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_train_merge_and_unmerge(method: str) -> None:
    base = make_unet()
    before, expected = weights_of(base), output(base)
    model = get_peft_model(base, make_config(method))
    hosts = [type(layer.get_base_layer()) for layer in layers_of(model)]
    assert (hosts.count(nn.Linear), hosts.count(nn.Conv2d)) == (32, 16)
    assert torch.equal(output(model), expected)
    losses = train(model)
    assert losses[-1] < 0.9 * losses[0]
    adapted = output(model)
    assert relative_error(adapted, expected) > 0.05
    model.merge_adapter()
    torch.testing.assert_close(output(model), adapted, rtol=1e-4, atol=1e-4)
    assert all(not torch.equal(layer.host.weight, layer._kept.weight) for layer in layers_of(model))
    model.unmerge_adapter()
    assert torch.equal(output(model), adapted)
    after = weights_of(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    merged = model.merge_and_unload()
    assert type(merged) is type(base)
    assert layers_of(merged) == []
    torch.testing.assert_close(output(merged), adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_gradient_checkpointing_gives_the_same_gradients(method: str) -> None:
    found = []
    for checkpointing in (False, True):
        unet = make_unet()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        model = get_peft_model(unet, make_config(method))
        randomize(model)
        model.train()(*some_latents()).sample.square().mean().backward()
        found.append([p.grad for p in trainable(model).values()])
    for first, second in zip(*found, strict=True):
        assert bool(first.any())
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_the_merged_unet_is_saved_and_loaded_by_diffusers(method: str, tmp_path: Path) -> None:
    model = get_peft_model(make_unet(), make_config(method))
    randomize(model, std=0.3)
    expected = output(model)
    assert relative_error(expected, output(make_unet())) > 0.05
    model.merge_and_unload().save_pretrained(tmp_path)
    loaded = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    torch.testing.assert_close(output(loaded), expected, rtol=1e-4, atol=1e-4)


# -- diffusers' own integration ------------------------------------------------------------------------------------


def adapted_unet(method: str, **options: Any) -> Any:
    """A UNet whose adapter "mine" came through diffusers and is no longer the identity."""
    unet = make_unet()
    unet.add_adapter(make_config(method, **options), adapter_name="mine")
    randomize(unet, "mine", std=0.3)
    return unet


def test_add_adapter_and_train(method: str) -> None:
    unet = make_unet()
    expected, before = output(unet), weights_of(unet)
    unet.add_adapter(make_config(method), adapter_name="mine")
    assert unet.active_adapters() == ["mine"]
    assert torch.equal(output(unet), expected)
    assert all("isotune_operator.mine" in name for name in trainable(unet))
    losses = train(unet)
    assert losses[-1] < 0.9 * losses[0]
    after = weights_of(unet)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.slow
def test_switching_disabling_and_deleting(method: str) -> None:
    base, unet = output(make_unet()), adapted_unet(method)
    mine = output(unet)
    assert relative_error(mine, base) > 0.05
    unet.add_adapter(make_config(method, target_modules=["to_q", "conv2"]), adapter_name="other")
    assert unet.active_adapters() == ["other"]
    assert torch.equal(output(unet), base)
    randomize(unet, "other", std=0.3)
    other = output(unet)
    unet.set_adapter("mine")
    assert torch.equal(output(unet), mine)
    unet.set_adapter(["mine", "other"])
    both = output(unet)
    assert min(relative_error(both, single) for single in (base, mine, other)) > 0.01
    unet.disable_adapters()
    assert torch.equal(output(unet), base)
    unet.enable_adapters()
    assert torch.equal(output(unet), both)
    unet.delete_adapters("mine")
    unet.set_adapter("other")
    assert torch.equal(output(unet), other)
    unet.delete_adapters("other")
    assert torch.equal(output(unet), base)
    unet.add_adapter(make_config(method), adapter_name="mine")
    assert torch.equal(output(unet), base)


def test_save_and_load_the_adapter(method: str, tmp_path: Path) -> None:
    """diffusers writes only LoRA by itself; for all else its users take PEFT's functions on the bare model."""
    unet = adapted_unet(method)
    expected = output(unet)
    state = get_peft_model_state_dict(unet, adapter_name="mine")
    assert set(state) <= {name.replace(".mine", "") for name in unet.state_dict()}
    assert all("isotune" in name for name in state)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "adapter_model.safetensors")
    unet.peft_config["mine"].save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert type(config) is type(make_config(method))
    other = make_unet()
    other.add_adapter(config, adapter_name="yours")
    loaded = load_file(tmp_path / "adapter_model.safetensors")
    result = set_peft_model_state_dict(other, loaded, adapter_name="yours", low_cpu_mem_usage=True)
    assert result.unexpected_keys == []
    assert not [name for name in result.missing_keys if "isotune" in name]
    torch.testing.assert_close(output(other), expected, rtol=1e-4, atol=1e-4)


def test_a_pinned_adapter_refuses_another_unet() -> None:
    state = get_peft_model_state_dict(adapted_unet("psoft"), adapter_name="mine")
    other = make_unet(seed=1)
    other.add_adapter(make_config("psoft"), adapter_name="mine")
    with pytest.raises(ValueError, match="base model"):
        set_peft_model_state_dict(other, state, adapter_name="mine")


@pytest.mark.slow
def test_peft_and_diffusers_read_each_others_adapters(method: str, tmp_path: Path) -> None:
    model = get_peft_model(make_unet(), make_config(method))
    randomize(model, std=0.3)
    expected = output(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(output(PeftModel.from_pretrained(make_unet(), tmp_path)), expected, rtol=1e-4, atol=1e-4)
    unet = make_unet()
    unet.add_adapter(PeftConfig.from_pretrained(tmp_path), adapter_name="mine")
    state = load_file(tmp_path / "adapter_model.safetensors")
    state = {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}
    set_peft_model_state_dict(unet, state, adapter_name="mine")
    torch.testing.assert_close(output(unet), expected, rtol=1e-4, atol=1e-4)


def test_fuse_and_unfuse(method: str) -> None:
    """What diffusers calls fusing is our merge, whatever the method."""
    unet = adapted_unet(method)
    before, expected = weights_of(unet), output(unet)
    unet.fuse_lora(safe_fusing=True, adapter_names=["mine"])
    assert all(layer.merged_adapters == ["mine"] for layer in layers_of(unet))
    torch.testing.assert_close(output(unet), expected, rtol=1e-4, atol=1e-4)
    unet.unfuse_lora()
    assert torch.equal(output(unet), expected)
    after = weights_of(unet)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_unloading_and_adapting_again(method: str) -> None:
    base, unet = output(make_unet()), adapted_unet(method)
    mine = output(unet)
    unet.unload_lora()
    assert layers_of(unet) == []
    assert not [name for name in unet.state_dict() if "isotune" in name or "base_layer" in name]
    assert torch.equal(output(unet), base)
    unet.add_adapter(make_config(method), adapter_name="mine")
    randomize(unet, "mine", std=0.3)
    torch.testing.assert_close(output(unet), mine, rtol=1e-5, atol=1e-5)


def test_set_adapters_with_a_weight(method: str) -> None:
    unet = adapted_unet(method)
    base, full = output(make_unet()), output(unet)
    if method == "hra":
        with pytest.raises(ValueError, match="reflections have no parts"):
            unet.set_adapters("mine", 0.5)
        assert torch.equal(output(unet), full)
        unet.set_adapters("mine", 0.0)
        torch.testing.assert_close(output(unet), base, rtol=1e-5, atol=1e-5)
        return
    unet.set_adapters("mine", 0.5)
    half = output(unet)
    assert relative_error(half, base) > 0.01
    assert relative_error(half, full) > 0.01
    unet.set_adapters("mine", 0.0)
    torch.testing.assert_close(output(unet), base, rtol=1e-5, atol=1e-5)
    unet.set_adapters("mine", 1.0)
    torch.testing.assert_close(output(unet), full, rtol=1e-5, atol=1e-5)


def test_scale_of_one_call(method: str) -> None:
    unet = adapted_unet(method)
    full = output(unet)
    assert torch.equal(output(unet, cross_attention_kwargs={"scale": 1.0}), full)
    if method == "hra":
        with pytest.raises(ValueError, match="reflections have no parts"):
            output(unet, cross_attention_kwargs={"scale": 0.5})
        assert torch.equal(output(unet), full)
        return
    half = output(unet, cross_attention_kwargs={"scale": 0.5})
    torch.testing.assert_close(output(unet), full, rtol=1e-5, atol=1e-5)
    unet.set_adapters("mine", 0.5)
    torch.testing.assert_close(half, output(unet), rtol=1e-5, atol=1e-5)


# -- a pipeline ----------------------------------------------------------------------------------------------------


def make_tokenizer() -> Any:
    """CLIP's tokenizer over a few words, without any download."""
    from transformers import CLIPTokenizer

    letters = sorted(set("".join(WORDS)))
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = ["".join(parts[:2]), *parts[2:]]
            tokens.append(parts[0])
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=list(dict.fromkeys(merges)), model_max_length=10)


def make_pipeline(unet: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = make_tokenizer()
    torch.manual_seed(2)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=10,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    decoder = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )
    pipeline = diffusers.StableDiffusionPipeline(
        vae=decoder,
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def image(pipeline: Any, prompt: str = "a small red cat", **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    found = pipeline(prompt, num_inference_steps=2, generator=generator, output_type="np", **options).images
    return torch.from_numpy(found)


@pytest.mark.slow
def test_pipeline(method: str) -> None:
    pipeline = make_pipeline(make_unet())
    base = image(pipeline)
    assert base.shape == (1, 16, 16, 3)
    assert relative_error(image(pipeline, "a dog"), base) > 1e-4  # the text has a part in it
    pipeline.unet.add_adapter(make_config(method), adapter_name="mine")
    assert torch.equal(image(pipeline), base)
    randomize(pipeline.unet, "mine", std=0.3)
    adapted = image(pipeline)
    assert relative_error(adapted, base) > 1e-2
    pipeline.fuse_lora(components=["unet"], adapter_names=["mine"])
    torch.testing.assert_close(image(pipeline), adapted, rtol=1e-3, atol=1e-4)
    pipeline.unfuse_lora(components=["unet"])
    assert torch.equal(image(pipeline), adapted)
    pipeline.unet.disable_adapters()
    assert torch.equal(image(pipeline), base)
    pipeline.unet.enable_adapters()
    assert pipeline.get_active_adapters() == ["mine"]
    pipeline.delete_adapters("mine")
    assert torch.equal(image(pipeline), base)


@pytest.mark.slow
def test_pipeline_with_the_text_encoder_too(method: str) -> None:
    pipeline = make_pipeline(make_unet())
    base = image(pipeline)
    pipeline.unet.add_adapter(make_config(method), adapter_name="mine")
    config = make_config(method, target_modules=["q_proj", "v_proj", "token_embedding"])
    pipeline.text_encoder.add_adapter(config, adapter_name="mine")
    assert torch.equal(image(pipeline), base)
    randomize(pipeline.text_encoder, "mine", std=0.5)
    adapted = image(pipeline)
    assert relative_error(adapted, base) > 1e-4
    pipeline.text_encoder.disable_adapters()
    assert torch.equal(image(pipeline), base)


@pytest.mark.slow
def test_pipeline_around_a_peft_model(method: str, tmp_path: Path) -> None:
    model = get_peft_model(make_unet(), make_config(method))
    randomize(model, std=0.3)
    expected = image(make_pipeline(model))
    model.save_pretrained(tmp_path)
    pipeline = make_pipeline(make_unet())
    assert relative_error(image(pipeline), expected) > 1e-2
    pipeline.unet = PeftModel.from_pretrained(pipeline.unet, tmp_path)
    torch.testing.assert_close(image(pipeline), expected, rtol=1e-3, atol=1e-4)
    pipeline.unet = pipeline.unet.merge_and_unload()
    torch.testing.assert_close(image(pipeline), expected, rtol=1e-3, atol=1e-4)
    pipeline.save_pretrained(tmp_path / "pipeline")
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline", safety_checker=None)
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(image(loaded), expected, rtol=1e-3, atol=1e-4)
