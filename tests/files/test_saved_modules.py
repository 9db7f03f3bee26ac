"""Modules trained whole beside an adapter, tied to others or not: saved, reloaded, merged and exported."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from helpers import METHODS, move, relative_error, some_tokens, tiny_llama
from isotune import PeftModel, PsoftConfig, get_peft_model
from isotune.files.export_lora import export_lora
from isotune.files.export_merged import export_merged


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")  # PEFT's, of merging elsewhere
@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_heads(tied: bool, saved: list[str], tmp_path: Path) -> None:
    tiny_llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    options = {"target_modules": ["q_proj"], "modules_to_save": saved, "task_type": "CAUSAL_LM"}
    load = AutoModelForCausalLM.from_pretrained
    model = move(get_peft_model(load(tmp_path / "base"), PsoftConfig(r=4, **options))).eval()
    tokens = some_tokens()
    expected = model(tokens).logits.detach()
    model.save_pretrained(tmp_path / "adapter")
    export_lora(tmp_path / "adapter", tmp_path / "lora")
    export_merged(tmp_path / "adapter", tmp_path / "merged")
    again = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter").eval()
    lora = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "lora").eval()
    for found in (again, lora, load(tmp_path / "merged").eval(), again.merge_and_unload()):
        assert relative_error(found(tokens).logits.detach(), expected) < 1e-5


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (
            {"ensure_weight_tying": True},
            r"ensure_weight_tying=True .* only LoRA .*modules_to_save=\['embed_tokens', 'lm_",
        ),
        ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices=\[1, 2\] .* only LoRA .*whole embedding"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_what_only_lora_has_is_refused_by_name(method: str, option: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        METHODS[method](**option)
