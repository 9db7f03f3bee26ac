"""PyTorch Lightning: an adapted model in a LightningModule, trained, resumed from its checkpoint, and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.utils.data import DataLoader

from helpers import OPTIONS_FOR_TINY, relative_error, some_tokens, tiny_llama, trainable
from isotune import get_peft_model
from isotune.methods import METHODS

lightning = pytest.importorskip("lightning")


def module(method: str) -> Any:
    class Adapted(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)  # HRA starts at random
            config = METHODS[method](target_modules=["q_proj", "v_proj"], **OPTIONS_FOR_TINY[method])
            self.model, self.losses = get_peft_model(tiny_llama(), config), []

        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            loss = self.model(input_ids=batch, labels=batch).loss
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(trainable(self).values(), lr=0.02)

    return Adapted()


def fit(method: str, folder: Path, steps: int, checkpoint: Path | None = None) -> tuple[Any, Any]:
    adapted = module(method)
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    loader = DataLoader(some_tokens(4), batch_size=4)  # one batch: where in an epoch a run resumes is Lightning's own
    trainer.fit(adapted, loader, ckpt_path=checkpoint)
    return adapted, trainer


@pytest.mark.parametrize("method", ["psoft", "oft", "hra"])
def test_train_resume_and_save(method: str, tmp_path: Path) -> None:
    tokens = some_tokens()
    whole, _ = fit(method, tmp_path, 6)
    assert whole.losses[-1] < whole.losses[0]
    base = dict(tiny_llama().named_parameters())
    for name, parameter in whole.model.get_base_model().named_parameters():
        if "isotune" not in name:
            assert torch.equal(parameter, base[name.replace(".base_layer", "")]), name
    half, trainer = fit(method, tmp_path, 4)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(method, tmp_path, 6, tmp_path / "half.ckpt")
    assert half.losses + resumed.losses == pytest.approx(whole.losses, abs=1e-5)
    whole.model.save_pretrained(tmp_path / "saved")
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "saved")
    with torch.no_grad():
        expected = whole.model.eval()(input_ids=tokens).logits
        assert relative_error(again.eval()(input_ids=tokens).logits, expected) < 1e-5
