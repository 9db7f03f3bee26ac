"""A tiny Llama with a tokenizer and data, as folders and files that a trainer's command line takes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def rows() -> list[dict[str, str]]:
    """Forty questions with their answers."""
    return [
        {"instruction": f"What is {i} and {i + 1}?", "input": "", "output": f"It is {2 * i + 1}."} for i in range(40)
    ]


def write(folder: Path) -> None:
    """Write the model as FOLDER/base; data.json (Alpaca), chat.jsonl (messages) and pairs.json (preferences)."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [f"{row['instruction']} {row['output']} system user assistant\n" for row in rows()]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    fast.save_pretrained(folder / "base")
    (folder / "data.json").write_text(json.dumps(rows()), encoding="utf-8")
    pairs = [{"instruction": r["instruction"], "chosen": r["output"], "rejected": "I do not know."} for r in rows()]
    (folder / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    chats = [
        {"messages": [{"role": "user", "content": r["instruction"]}, {"role": "assistant", "content": r["output"]}]}
        for r in rows()
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps(c) + "\n" for c in chats), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
