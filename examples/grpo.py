"""Reinforcement learning with verifiable rewards (GRPO) with TRL and PSOFT.

Of eight answers to a problem right ones are made likelier, short ones a little; the reference is the base, adapter off.
Needs: pip install ".[math]", and a GPU: 8.8 GiB for a step of Qwen3-0.6B, by `isotune plan Qwen/Qwen3-0.6B
       --rank 64 --batch 8 --sequence 768 --checkpointing`. --smoke runs on a CPU.
Run:   python examples/grpo.py --model Qwen/Qwen3-0.6B --data trl-lib/DeepMath-103K
       python examples/grpo.py --smoke
"""

import argparse

import torch
from datasets import load_dataset
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, pipeline
from trl import GRPOConfig, GRPOTrainer
from trl.rewards import accuracy_reward

import smoke
from isotune import PsoftConfig

ON_GPU = torch.cuda.is_available()


def brevity_reward(completions: list[list[dict[str, str]]], **_: object) -> list[float]:
    """1 for an empty answer, 0.5 for one of 1,000 characters, towards 0 for longer ones."""
    return [1000 / (1000 + len(completion[0]["content"])) for completion in completions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="one that was trained to chat")
    parser.add_argument("--data", default="trl-lib/DeepMath-103K", help="columns `prompt` and `solution`")
    parser.add_argument("--output", default="runs/grpo")
    parser.add_argument("--smoke", action="store_true", help="tiny stand-ins made here, on a CPU")
    options = parser.parse_args()
    if options.smoke:
        smoke.begin()
        smoke.language_model(options.model)
        smoke.problems(options.data)
    steps, longest = (3, 16) if options.smoke else (500, 512)

    data = load_dataset(options.data, split="train")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    trainer = GRPOTrainer(
        model=options.model,
        reward_funcs=[accuracy_reward, brevity_reward],
        args=GRPOConfig(
            output_dir=options.output,
            model_init_kwargs={"dtype": "bfloat16" if ON_GPU else "float32"},
            reward_weights=[1.0, 0.1],
            scale_rewards="none",  # scaled to one spread, brevity would count in full where all answers are wrong
            beta=0.02,  # weight of the divergence from the reference
            learning_rate=1e-4,
            max_steps=steps,
            per_device_train_batch_size=8,
            num_generations=8,
            max_completion_length=longest,
            chat_template_kwargs={"enable_thinking": False},  # Qwen3 would use up the tokens before it answers
            bf16=ON_GPU,
            logging_steps=1,
            report_to="none",
        ),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=PsoftConfig(r=64, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model()
    first, *_, last = (entry for entry in trainer.state.log_history if "reward" in entry)
    for name in ("reward", "kl"):
        print(f"{name}: {first[name]:.4f} in the first step, {last[name]:.4f} in the last")

    model = AutoPeftModelForCausalLM.from_pretrained(options.output, dtype="auto").merge_and_unload()
    answer = pipeline("text-generation", model, tokenizer=tokenizer)(data[0]["prompt"], max_new_tokens=longest)
    print("answer:", answer[0]["generated_text"][-1]["content"])


if __name__ == "__main__":
    main()
