"""Chat fine-tuning with TRL on a base in 4 bits: QLoRA's recipe, with PSOFT in the place of LoRA.

Needs: pip install ".[language]" bitsandbytes, and a GPU: 5.7 GiB for Qwen3-0.6B, by `isotune plan Qwen/Qwen3-0.6B
       --rank 64 --quantization nf4-double --batch 4 --sequence 1024 --checkpointing`. --smoke runs on a CPU.
Run:   python examples/sft_nf4.py --model Qwen/Qwen3-0.6B --data trl-lib/Capybara
       python examples/sft_nf4.py --smoke
"""

import argparse

import torch
from datasets import load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

import smoke
from isotune import PsoftConfig

ON_GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if ON_GPU else torch.float32


def in_4_bits(name: str) -> torch.nn.Module:
    packed = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": DTYPE}
    packing = BitsAndBytesConfig(load_in_4bit=True, **packed)
    return AutoModelForCausalLM.from_pretrained(name, dtype=DTYPE, quantization_config=packing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B")
    parser.add_argument("--data", default="trl-lib/Capybara", help="conversations, in a column `messages`")
    parser.add_argument("--output", default="runs/sft-nf4")
    parser.add_argument("--smoke", action="store_true", help="tiny stand-ins made here, on a CPU")
    options = parser.parse_args()
    if options.smoke:
        smoke.begin()
        smoke.language_model(options.model)
        smoke.conversations(options.data)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    trainer = SFTTrainer(
        model=in_4_bits(options.model),
        args=SFTConfig(
            output_dir=options.output,
            learning_rate=2e-2 if options.smoke else 5e-4,  # try 2e-4 and 1e-3 too
            warmup_steps=0.05,  # as a share of all steps
            num_train_epochs=1,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
            max_length=1024,
            bf16=ON_GPU,
            logging_first_step=True,
            report_to="none",
        ),
        train_dataset=load_dataset(options.data, split="train"),
        processing_class=tokenizer,
        peft_config=PsoftConfig(r=64, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    # TRL rounds what is trained on a quantised base to bfloat16, which is too coarse for PSOFT's magnitudes near 1.
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trainer.model.print_trainable_parameters()
    trainer.train()
    trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss: {losses[0]:.3f} in the first step, {losses[-1]:.3f} at the end")

    trained = trainer.model.eval()
    again = PeftModel.from_pretrained(in_4_bits(options.model), options.output).eval()
    question = tokenizer("What does a rotation keep?", return_tensors="pt").to(trained.device)
    with torch.inference_mode():
        difference = (trained(**question).logits - again(**question).logits).abs().max()
    print(f"reloaded from {options.output}: logits differ by {difference:.1e} at most")


if __name__ == "__main__":
    main()
