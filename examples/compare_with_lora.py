"""LoRA, PSOFT and OFT on the same data for the same steps: trainable parameters, activation memory and score.

One seed and one learning rate each do not show which is better. `isotune compare RECIPE` gives every method the same
search over learning rates, several seeds, and error bars.

Needs: pip install ".[train]" datasets. With MiniLM it runs on a CPU.
Run:   python examples/compare_with_lora.py --model sentence-transformers/all-MiniLM-L6-v2 --data fancyzhx/ag_news
       python examples/compare_with_lora.py --smoke
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

import smoke
from isotune import OFTConfig, PsoftConfig, get_peft_model
from isotune.experiments.measure import kept_by_batch

TARGETS = {"target_modules": r".*encoder\.layer\..*\.(query|key|value|dense)", "task_type": "SEQ_CLS"}
METHODS = {  # and the learning rate of each
    "LoRA r=8": (LoraConfig(r=8, lora_alpha=16, **TARGETS), 2e-3),
    "PSOFT r=46": (PsoftConfig(r=46, **TARGETS), 4e-3),
    "OFT b=32": (OFTConfig(oft_block_size=32, **TARGETS), 1e-3),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--data", default="fancyzhx/ag_news", help="columns `text` and `label`")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--smoke", action="store_true", help="tiny stand-ins made here")
    options = parser.parse_args()
    if options.smoke:
        smoke.begin()
        smoke.encoder(options.model)
        smoke.news(options.data)
        options.steps = 12
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    data = load_dataset(options.data)
    data = data.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=64), batched=True)
    data = data.remove_columns("text")
    collate = DataCollatorWithPadding(tokenizer)
    test = DataLoader(data["test"].shuffle(seed=0).take(2000), 128, collate_fn=collate)
    print(f"{'':12}{'trainable':>12}{'activations':>14}{'first loss':>12}{'last loss':>11}{'accuracy':>10}")
    for name, (config, rate) in METHODS.items():
        torch.manual_seed(0)  # the same head
        labels = data["train"].features["label"].num_classes
        base = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=labels)
        model = get_peft_model(base, config).to(device).train()
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=options.steps, pct_start=0.1)
        torch.manual_seed(1)  # the same batches
        rows = torch.randint(len(data["train"]), (options.steps, 32)).tolist()
        losses = []
        for chosen in tqdm(rows, name, leave=False):
            batch = collate([data["train"][row] for row in chosen]).to(device)
            if not losses:
                kept = kept_by_batch(model, batch, lambda model, inputs: model(**inputs).loss)
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        model.eval()
        with torch.inference_mode():
            right = sum(int((model(**b.to(device)).logits.argmax(1) == b["labels"]).sum()) for b in test)
        print(f"{name:12}{model.get_nb_trainable_parameters()[0]:12,}{kept / 2**20:10.1f} MiB", end="")
        print(f"{losses[0]:12.3f}{losses[-1]:11.3f}{right / len(test.dataset):10.1%}")


if __name__ == "__main__":
    main()
