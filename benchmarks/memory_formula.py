"""What a training step keeps for backward: the formula of the PSOFT paper's Table 9 beside what is counted.

The formula is for float32 and for attention that keeps its scores, 9abs² bytes a layer. Attention is fused today, and
keeps none, so the table has the formula without that term, too. Counted are the bytes that autograd saves in a step of
training, on tensors that have shapes but no values (`isotune plan`): PSOFT, LoRA-XS and rotations are isotune's, LoRA,
DoRA and VeRA PEFT's. Nothing is loaded or computed; it takes a minute.

    python benchmarks/memory_formula.py
"""

from __future__ import annotations

import tempfile
from typing import Any

import transformers

from isotune.experiments.planning.estimate import estimate
from isotune.experiments.planning.setting import Setting
from isotune.files.base_model import quiet

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "full fine-tuning": ("full", {}),
    "LoRA r = 8": ("lora", {"r": 8}),
    "DoRA r = 8": ("dora", {"r": 8}),
    "VeRA r = 256": ("vera", {"r": 256}),
    "OFT b = 32": ("oft", {"oft_block_size": 32}),
    "BOFT m = 2, b = 8": ("boft", {"boft_block_size": 8, "boft_n_butterfly_factor": 2}),
    "GOFT": ("goft", {}),
    "LoRA-XS r = 46": ("lora_xs", {"r": 46}),
    "PSOFT r = 46": ("psoft", {"r": 46}),
    "PSOFT r = 256": ("psoft", {"r": 256}),
}
MODELS: dict[str, tuple[Any, int, int]] = {
    "BERT-base, 32 × 128 tokens, float32": (transformers.BertConfig(), 32, 128),
    "Llama-3.2-3B, 1 × 2,048 tokens, bfloat16": (
        transformers.LlamaConfig(
            hidden_size=3072,
            intermediate_size=8192,
            num_hidden_layers=28,
            num_attention_heads=24,
            num_key_value_heads=8,
            vocab_size=128256,
            tie_word_embeddings=True,
            dtype="bfloat16",
        ),
        1,
        2048,
    ),
}


def kept(memory: dict[str, int]) -> int:
    """What is kept for backward, of the rows of an estimate."""
    return memory["kept for backward"]


def main() -> None:
    """Print the tables."""
    for title, (config, batch, sequence) in MODELS.items():
        print(f"\n{title}\n\n| | formula | formula without scores | counted | counted less LoRA's |")
        print("|---|---|---|---|---|")
        architecture = "BertForSequenceClassification" if config.model_type == "bert" else "LlamaForCausalLM"
        config.architectures = [architecture]
        rows = {}
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            for name, (method, options) in METHODS.items():
                found = estimate(Setting(folder, method, options, batch=batch, sequence=sequence))
                rows[name] = (found.paper_activations, found.memory)
        width = 2 if found.dtype == "bfloat16" else 4
        scores = 9 * config.num_attention_heads * batch * sequence**2 * config.num_hidden_layers * width / 4
        reference = kept(rows["LoRA r = 8"][1])
        for name, (formula, memory) in rows.items():
            cells = ("–", "–") if formula is None else (f"{formula / 2**20:,.0f}", f"{(formula - scores) / 2**20:,.0f}")
            counted = kept(memory)
            print(f"| {name} | {' | '.join(cells)} | {counted / 2**20:,.0f} | {(counted - reference) / 2**20:+,.0f} |")


if __name__ == "__main__":
    with quiet():
        main()
