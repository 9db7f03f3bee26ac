"""The plug-in against axolotl's own classes; docs/guides/other-tools.md has the runs of its command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("axolotl.integrations.base", reason="axolotl is not installed: pip install axolotl")

from axolotl.integrations.base import PluginManager
from axolotl.utils.dict import DictDefault

from helpers import some_tokens, tiny_llama
from isotune.integrations.axolotl import IsotuneArgs, IsotunePlugin
from isotune.methods import METHODS


def settings(**given: Any) -> Any:
    block = {"method": "psoft", "r": 8, "target_modules": "all-linear"}
    return DictDefault({"adapter": "isotune", "isotune": block, **given})


def test_the_plugin_manager_knows_it() -> None:
    manager = PluginManager.get_instance()
    manager.register("isotune.integrations.axolotl.IsotunePlugin")
    assert manager.supports_adapter("isotune")
    assert not manager.adapter_supports_relora("isotune")
    assert manager.get_input_args() == ["isotune.integrations.axolotl.IsotuneArgs"]


@pytest.mark.parametrize("method", METHODS)
def test_trained_stored_and_loaded(method: str, tmp_path: Path) -> None:
    block = {"method": method, "target_modules": ["q_proj", "v_proj"], "init_weights": False}
    model, config = IsotunePlugin().load_adapter(
        tiny_llama(), settings(isotune=block, lora_modules_to_save=["lm_head"])
    )
    assert config.task_type == "CAUSAL_LM"
    assert config.modules_to_save == ["lm_head"]
    model.save_pretrained(tmp_path)
    stored = settings(isotune=block, lora_model_dir=str(tmp_path))
    again, _ = IsotunePlugin().load_adapter(tiny_llama(), stored, inference=True)
    assert not any(p.requires_grad for p in again.parameters())
    tokens = some_tokens()
    torch.testing.assert_close(again(tokens).logits, model.eval()(tokens).logits)


def test_another_adapter_is_left_alone_and_a_trainer_gets_the_configuration() -> None:
    plugin = IsotunePlugin()
    assert plugin.load_adapter(tiny_llama(), DictDefault({"adapter": "lora"})) is None
    model, config = plugin.load_adapter(tiny_llama(), settings(), config_only=True)
    assert model is None
    assert config.r == 8
    with pytest.raises(ValueError, match="lora_model_dir='x' has no effect"):
        plugin.load_adapter(tiny_llama(), settings(lora_model_dir="x", rl="dpo"), config_only=True)


def test_the_card_of_a_trainer_of_trl_s_gets_our_part_again(tmp_path: Path) -> None:
    model, _ = IsotunePlugin().load_adapter(tiny_llama(), settings())
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\ntags:\n- dpo\n---\nTrained with TRL.\n")
    IsotunePlugin().post_train(settings(output_dir=str(tmp_path), local_rank=0), model)
    text = (tmp_path / "README.md").read_text()
    assert "Trained with TRL." in text
    assert "ISOTUNE_PSOFT" in text
    assert "- dpo\n" in text


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"adapter": "lora"}, "only has an effect with adapter: isotune"),
        ({"isotune": None}, "needs a block"),
        ({"isotune": {"method": "oft", "oft_blok_size": 8}}, "Did you mean 'oft_block_size'"),
        ({"lora_r": 8}, "lora_r=8 is not allowed"),
        ({"load_in_4bit": True}, "stored quantised"),
        ({"merge_lora": True}, "merge_method: legacy"),
    ],
)
def test_refusals(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        IsotuneArgs.model_validate(dict(settings(**given)))
