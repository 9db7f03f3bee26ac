"""Learning from preferences (DPO) with TRL and OFT.

Without a reference model the reference is the base with the adapter switched off, so no second copy is in memory. A new
adapter is the identity: the first loss is ln 2 = 0.6931, and another number would mean that the reference is wrong.

Needs: pip install ".[language]", and a GPU: 11.5 GiB for Qwen3-0.6B, by `isotune plan Qwen/Qwen3-0.6B --method oft
       oft_block_size=32 --batch 8 --sequence 1024 --checkpointing` (4 pairs are 8 sequences). --smoke runs on a CPU.
Run:   python examples/dpo.py --model Qwen/Qwen3-0.6B --data trl-lib/ultrafeedback_binarized
       python examples/dpo.py --smoke
"""

import argparse

import torch
from datasets import load_dataset
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

import smoke
from isotune import OFTConfig

ON_GPU = torch.cuda.is_available()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="one that was trained to chat")
    parser.add_argument("--data", default="trl-lib/ultrafeedback_binarized", help="columns `chosen` and `rejected`")
    parser.add_argument("--output", default="runs/dpo")
    parser.add_argument("--smoke", action="store_true", help="tiny stand-ins made here, on a CPU")
    options = parser.parse_args()
    if options.smoke:
        smoke.begin()
        smoke.language_model(options.model)
        smoke.preferences(options.data)

    trainer = DPOTrainer(
        model=options.model,
        args=DPOConfig(
            output_dir=options.output,
            model_init_kwargs={"dtype": "bfloat16" if ON_GPU else "float32"},
            beta=0.1,
            learning_rate=1e-4,  # lower than for SFT
            warmup_steps=0.1,  # as a share of all steps
            num_train_epochs=1,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_length=1024,
            bf16=ON_GPU,
            logging_first_step=True,
            report_to="none",
        ),
        train_dataset=load_dataset(options.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        # "all-linear" leaves the head out, as it must be here: DPO reads lm_head.weight itself.
        peft_config=OFTConfig(oft_block_size=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.model.print_trainable_parameters()
    trainer.train()
    trainer.save_model()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss: {steps[0]['loss']:.4f} in the first step, {steps[-1]['loss']:.4f} at the end")
    print(f"the chosen answer has the higher reward in {steps[-1]['rewards/accuracies']:.0%} of the pairs")

    trained = trainer.model.eval()
    again = AutoPeftModelForCausalLM.from_pretrained(options.output, dtype=trained.dtype).to(trained.device).eval()
    tokens = torch.arange(20, 40, device=trained.device)[None]
    with torch.inference_mode():
        difference = (trained(tokens).logits - again(tokens).logits).abs().max()
    print(f"reloaded from {options.output}: logits differ by {difference:.1e} at most")


if __name__ == "__main__":
    main()
