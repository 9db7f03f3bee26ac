"""Run the README's Python as it stands, on a tiny model in a folder named like the one on the Hub.

Needs isotune and what it depends on, nothing of the tests: `make release-check` runs it in an environment of the wheel
alone.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

README = Path(__file__).parents[2] / "README.md"


def main() -> None:
    """Fails where the README holds no Python, or it raises."""
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (name,) = {name for block in blocks for name in re.findall(r'^name = "(.+)"$', block, re.MULTILINE)}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # where a folder of a repository's name is taken before the Hub
        words = {
            word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "Rotations", "keep", "angles", "."])
        }
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(name)
        sizes = {"hidden_size": 128, "word_embed_proj_dim": 128, "ffn_dim": 256, "num_attention_heads": 2}
        config = OPTConfig(vocab_size=len(words), num_hidden_layers=1, max_position_embeddings=32, **sizes)
        OPTForCausalLM(config).save_pretrained(name)
        names: dict[str, object] = {"__name__": "__main__"}
        for block in blocks:
            exec(compile(block, str(README), "exec"), names)
        assert Path("adapter/adapter_model.safetensors").is_file()
        os.chdir("/")
    print(f"{README.name}: {len(blocks)} Python examples ran")


if __name__ == "__main__":
    main()
