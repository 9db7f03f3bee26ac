"""Run the README's Python as it stands, on a tiny model and some chats in folders named like those on the Hub.

Needs isotune with its extra `language`, nothing of the tests: `make release-check` runs it with the wheel alone. What
the README prints of trainable parameters is checked by the real model's sizes, without its numbers.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import tempfile
from pathlib import Path

import torch
import trl
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from isotune import PsoftConfig, get_peft_model

README = Path(__file__).parents[2] / "README.md"
NAME, DATA = "Qwen/Qwen3-0.6B", "trl-lib/Capybara"
# As its config.json on the Hub says.
REAL = Qwen3Config(
    vocab_size=151936,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=True,
)
TINY = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 32}
WORDS = ["<pad>", "<eos>", "<unk>", "<", ">", "user", "assistant", "Rotations", "keep", "angles", "why", "?", "."]
TEMPLATE = (
    "{% for m in messages %}< {{ m.role }} > {{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}< assistant > {% endif %}"
)


def store() -> None:
    """The tiny model with its tokenizer, and the chats, where they are looked for before the Hub."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=TEMPLATE
    )
    fast.save_pretrained(NAME)
    config = Qwen3Config(vocab_size=len(WORDS), num_key_value_heads=2, pad_token_id=0, eos_token_id=1, **TINY)
    Qwen3ForCausalLM(config).save_pretrained(NAME)
    turns = [{"role": "user", "content": "why ?"}, {"role": "assistant", "content": "Rotations keep angles ."}]
    Path(DATA).mkdir(parents=True)
    (Path(DATA) / "train.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(4)))


def trainable_parameters() -> str:
    """What PEFT prints for the real model with the README's configuration."""
    with torch.device("meta"):
        model = Qwen3ForCausalLM(REAL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        get_peft_model(model, PsoftConfig(r=64, target_modules="all-linear")).print_trainable_parameters()
    return printed.getvalue().strip()


def main() -> None:
    """Fails where the README holds no Python, or it raises or says something else than it prints."""
    text = README.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert blocks
    (said,) = re.findall(r"print_trainable_parameters\(\)  # (\S+) of (\S+), or (\S+) %$", text, re.MULTILINE)
    assert trainable_parameters() == "trainable params: {} || all params: {} || trainable%: {}".format(*said)
    before, original = Path.cwd(), trl.SFTConfig
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        store()
        # TRL's default of bfloat16 is refused without a GPU.
        trl.SFTConfig = functools.partial(original, use_cpu=True, bf16=False, report_to=[])  # type: ignore[assignment,misc]
        try:
            names: dict[str, object] = {"__name__": "__main__"}
            for block in blocks:
                exec(compile(block, str(README), "exec"), names)
            assert Path("runs/chat/adapter_model.safetensors").is_file()
        finally:
            trl.SFTConfig = original  # type: ignore[misc]
            os.chdir(before)
    print(f"{README.name}: {len(blocks)} Python examples ran")


if __name__ == "__main__":
    main()
