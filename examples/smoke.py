"""Stand-ins for `--smoke`: tiny random models and a little data, made here, under the names of the real ones.

transformers, diffusers and datasets take a folder with a repository's name in the current folder before they ask the
Hub. So a script that is told to smoke runs as it stands, in a temporary folder, without a network, in seconds on a CPU.
That shows that everything works together; what the model learns and scores says nothing about the real one.
"""

from __future__ import annotations

import atexit
import os
import random
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

WIDTH = 128
ANSWERS = {
    "What does a rotation keep?": "Lengths and angles.",
    "What does an adapter train?": "A few parameters.",
    "What is a singular value?": "How far one direction is stretched.",
    "What does merging do?": "It changes the weights.",
}
TOPICS = {"Sports": ["match", "goal", "team", "coach"], "Business": ["market", "price", "bank", "share"]}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def begin() -> Path:
    """Go to a new folder, which is removed when Python ends; nothing is read from or written to a cache."""
    folder = Path(tempfile.mkdtemp(prefix="isotune-smoke-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.chdir(folder)
    os.environ["ISOTUNE_CACHE"] = "off"
    torch.manual_seed(0)
    print(f"smoke: tiny random stand-ins in {folder}; no figure below says anything about a real model")
    return folder


def tokenizer(**options: Any) -> Any:
    """A tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    of_bytes = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
    of_bytes.pre_tokenizer, of_bytes.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=of_bytes, chat_template=TEMPLATE, **special, **options)


def language_model(name: str) -> None:
    """A Qwen3 with two layers."""
    from transformers import AutoModelForCausalLM

    _save(name, AutoModelForCausalLM, "qwen3", num_key_value_heads=2, head_dim=WIDTH // 4)


def encoder(name: str, kind: str = "bert") -> None:
    """A bare BERT with two layers, or an encoder of another kind with its head for masked words."""
    from transformers import AutoModel, AutoModelForMaskedLM

    _save(name, AutoModel if kind == "bert" else AutoModelForMaskedLM, kind)


def vision_model(name: str) -> None:
    """A ViT with two layers that tells ten kinds of images of 32 × 32 apart."""
    from transformers import AutoModelForImageClassification, ViTImageProcessor

    _save(name, AutoModelForImageClassification, "vit", image_size=32, patch_size=8, num_labels=10)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(name)


def _save(name: str, auto: Any, kind: str, **sizes: Any) -> None:
    from transformers import AutoConfig

    text = tokenizer(model_max_length=256)
    sizes |= {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = dict.fromkeys(["bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"], text.eos_token_id)
    # The usual spread of 0.02 leaves so narrow a model with next to nothing for an adapter to turn.
    config = AutoConfig.for_model(kind, vocab_size=len(text), pad_token_id=0, initializer_range=0.2, **ids, **sizes)
    auto.from_config(config).save_pretrained(name)
    text.save_pretrained(name)


def diffusion_pipeline(name: str) -> None:
    """A Stable Diffusion with two blocks on each side, for images of 32 × 32."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    text = tokenizer(model_max_length=32)
    channels = {"block_out_channels": (32, 64), "norm_num_groups": 8}
    unet = UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **channels,
    )
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        **channels,
    )
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    clip = CLIPTextModel(
        CLIPTextConfig(vocab_size=len(text), max_position_embeddings=32, bos_token_id=1, eos_token_id=1, **sizes)
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=clip,
        tokenizer=text,
        unet=unet,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(name)


def conversations(name: str, count: int = 160) -> None:
    """Questions with their answers, as `messages`."""
    _store(name, [{"messages": [*_said("user", q), *_said("assistant", ANSWERS[q])]} for q in _questions(count)])


def preferences(name: str, count: int = 80) -> None:
    """Two answers to each question, a better and a worse one."""
    answers = list(ANSWERS.values())
    rows = [
        {
            "chosen": [*_said("user", question), *_said("assistant", ANSWERS[question])],
            "rejected": [*_said("user", question), *_said("assistant", answers[answers.index(ANSWERS[question]) - 1])],
        }
        for question in _questions(count)
    ]
    _store(name, rows)


def problems(name: str, count: int = 32) -> None:
    """Sums with their results."""
    rows = [{"prompt": _said("user", f"What is {i} + {i + 1}?"), "solution": f"${2 * i + 1}$"} for i in range(count)]
    _store(name, rows)


def news(name: str, count: int = 128) -> None:
    """Lines about two topics."""
    from datasets import ClassLabel, Features, Value

    draw = random.Random(0)
    rows = [{"text": " ".join(draw.choices(list(TOPICS.values())[i % 2], k=4)), "label": i % 2} for i in range(count)]
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(TOPICS))})
    _store(name, rows, features, splits=("train", "test"))


def sentence_pairs(name: str, count: int = 96) -> None:
    """Pairs of sentences: of one topic, which are alike, and of two, which are not."""
    draw = random.Random(0)
    topics = list(TOPICS.values())
    rows = [
        {
            "sentence1": " ".join(draw.choices(topics[i % 2], k=3)),
            "sentence2": " ".join(draw.choices(topics[i // 2 % 2], k=3)),
            "score": float(i % 2 == i // 2 % 2),
        }
        for i in range(count)
    ]
    _store(name, rows, splits=("train", "test"))


def images(name: str, count: int = 64, size: int = 32, labels: Sequence[str] = ("dark", "light")) -> None:
    """Noise around two levels of brightness."""
    import numpy as np
    from datasets import ClassLabel, Features, Image

    draw = np.random.default_rng(0)
    noise = draw.integers(0, 128, (count, size, size, 3))
    pixels = [(noise[i] + 127 * (i % len(labels))).astype("uint8") for i in range(count)]
    features = Features({"image": Image(), "labels": ClassLabel(names=list(labels))})
    _store(name, [{"image": p, "labels": i % len(labels)} for i, p in enumerate(pixels)], features, ("train", "test"))


def _questions(count: int) -> list[str]:
    return random.Random(0).choices(list(ANSWERS), k=count)


def _said(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def _store(name: str, rows: list[Mapping[str, Any]], features: Any = None, splits: Sequence[str] = ("train",)) -> None:
    import datasets

    datasets.config.HF_DATASETS_CACHE = Path("cache").absolute()
    for split in splits:
        datasets.Dataset.from_list(rows, features=features).to_parquet(f"{name}/{split}.parquet")
