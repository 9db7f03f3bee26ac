"""timm: a vision transformer and a convolutional network adapted, trained, saved, loaded and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from helpers import layers_of, relative_error, trainable
from isotune import HRAConfig, OFTConfig, PsoftConfig, get_peft_model

pytest.importorskip("torchvision", reason="timm needs torchvision", exc_type=(ImportError, RuntimeError))
timm = pytest.importorskip("timm")

CONFIGS = {
    "psoft": lambda targets: PsoftConfig(r=8, target_modules=targets, modules_to_save=["fc", "head"]),
    "oft": lambda targets: OFTConfig(oft_block_size=8, target_modules=targets, modules_to_save=["fc", "head"]),
    "hra": lambda targets: HRAConfig(r=4, target_modules=targets, modules_to_save=["fc", "head"]),
}
TARGETS = {"test_vit": ["qkv", "proj", "fc1", "fc2"], "resnet18": [r"layer1.0.conv1", r"layer2.0.conv2"]}


def network(name: str) -> Any:
    torch.manual_seed(0)
    # A residual branch that ends in zeros, as a new ResNet's does, gives its convolutions no gradient.
    options = {"img_size": 64} if "vit" in name else {"zero_init_last": False}
    return timm.create_model(name, pretrained=False, num_classes=10, **options).eval()


@pytest.mark.parametrize("name", list(TARGETS))
@pytest.mark.parametrize("method", list(CONFIGS))
def test_train_save_load_and_merge(method: str, name: str, tmp_path: Path) -> None:
    images, labels = torch.randn(6, 3, 64, 64), torch.arange(6)
    base, model = network(name), get_peft_model(network(name), CONFIGS[method](TARGETS[name]))
    with torch.no_grad():
        assert relative_error(model.eval()(images), base(images)) < 1e-5
    assert layers_of(model)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer, losses = torch.optim.AdamW(trainable(model).values(), lr=0.01), []
    for _ in range(5):
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if not p.requires_grad)
    assert all(not layer.adapter("default").is_untrained() for layer in layers_of(model))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        trained = model(images)
        assert relative_error(PeftModel.from_pretrained(network(name), tmp_path).eval()(images), trained) < 1e-5
        assert relative_error(model.merge_and_unload()(images), trained) < 1e-4
