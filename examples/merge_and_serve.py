"""From a trained adapter to a server: merge it into the weights, export it as LoRA, and check both against it.

A merged model is one more copy of the weights and serves everywhere. A LoRA folder is small, and a server switches many
of them on one base; PSOFT, LoRA-XS and HRA are exactly of that form, of OFT and BOFT it is an approximation (--rank).
An adapter that was trained on a base in 4 bits belongs to that base: docs/guides/quantised.md.

Needs: pip install ., and memory for three copies of the base. Runs on a CPU. The servers themselves are installed
       apart; their command lines are printed.
Run:   python examples/merge_and_serve.py runs/grpo
       python examples/merge_and_serve.py --smoke
"""

import argparse

import torch
from peft import AutoPeftModelForCausalLM, PeftConfig
from transformers import AutoModelForCausalLM

import smoke
from isotune import PsoftConfig, get_peft_model
from isotune.files.export_lora import export_lora
from isotune.files.export_merged import export_merged
from isotune.files.lora_servers import describe_obstacles, vllm_max_rank

COMMANDS = """
vLLM, the merged model:   vllm serve {out}/merged
vLLM, base and adapter:   vllm serve {base} --enable-lora --max-lora-rank {room} --lora-modules mine={out}/lora
llama.cpp, merged:        python convert_hf_to_gguf.py {out}/merged --outfile merged.gguf
                          llama-server -m merged.gguf
llama.cpp, with adapter:  python convert_lora_to_gguf.py {out}/lora --base BASE_FOLDER --outfile mine.gguf
                          llama-server -m base.gguf --lora mine.gguf
"""


def an_adapter(base: str, folder: str) -> str:
    """For --smoke: an adapter off the identity, as if it had been trained."""
    smoke.begin()
    smoke.language_model(base)
    config = PsoftConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM", init_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("adapter", nargs="?", default="runs/grpo", help="its folder")
    parser.add_argument("--output", default="runs/served", help="a folder that does not exist yet")
    parser.add_argument("--rank", type=int, help="of the LoRA, for a rotation of all inputs")
    parser.add_argument("--smoke", action="store_true", help="a tiny stand-in made here")
    options = parser.parse_args()
    if options.smoke:
        an_adapter("Qwen/Qwen3-0.6B", options.adapter)

    # The same as `isotune export ADAPTER --to merged -o …` and `--to lora --uniform-rank -o …`.
    export_merged(options.adapter, f"{options.output}/merged")
    written = export_lora(options.adapter, f"{options.output}/lora", rank=options.rank, uniform_rank=True)
    print(f"LoRA: {written}")

    tokens = torch.arange(20, 40)[None]

    def logits(model: torch.nn.Module) -> torch.Tensor:
        with torch.inference_mode():
            return model.eval()(tokens).logits.float()

    adapted = AutoPeftModelForCausalLM.from_pretrained(options.adapter)
    expected = logits(adapted)
    with adapted.disable_adapter():
        print(f"the adapter changes logits by {(logits(adapted) - expected).abs().max():.1e} at most")
    for name, loader in (("merged", AutoModelForCausalLM), ("lora", AutoPeftModelForCausalLM)):
        found = logits(loader.from_pretrained(f"{options.output}/{name}"))
        print(f"{name}: logits differ by {(found - expected).abs().max():.1e} at most")

    print(describe_obstacles(f"{options.output}/lora"))
    base = PeftConfig.from_pretrained(options.adapter).base_model_name_or_path
    print(COMMANDS.format(out=options.output, base=base, room=vllm_max_rank(written.rank)))


if __name__ == "__main__":
    main()
