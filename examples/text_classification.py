"""Text classification with transformers' Trainer and PSOFT.

The head is new, so it is trained whole and saved with the adapter: task_type="SEQ_CLS" sees to that.

Needs: pip install ".[train]" datasets, and a GPU: 5.5 GiB for ModernBERT-base, by `isotune plan
       answerdotai/ModernBERT-base --rank 64 --batch 32 --sequence 128`. --smoke runs on a CPU.
Run:   python examples/text_classification.py --model answerdotai/ModernBERT-base --data fancyzhx/ag_news
       python examples/text_classification.py --smoke
"""

import argparse

import numpy as np
import torch
from datasets import load_dataset
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoModelForSequenceClassification, AutoTokenizer, EvalPrediction, Trainer, TrainingArguments

import smoke
from isotune import PsoftConfig, get_peft_model


def accuracy(predicted: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(predicted.predictions.argmax(-1) == predicted.label_ids))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="answerdotai/ModernBERT-base")
    parser.add_argument("--data", default="fancyzhx/ag_news", help="columns `text` and `label`")
    parser.add_argument("--output", default="runs/text-classification")
    parser.add_argument("--smoke", action="store_true", help="tiny stand-ins made here, on a CPU")
    options = parser.parse_args()
    if options.smoke:
        smoke.begin()
        smoke.encoder(options.model, "modernbert")
        smoke.news(options.data)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    data = load_dataset(options.data)
    names = data["train"].features["label"].names
    data = data.map(lambda rows: tokenizer(rows["text"], truncation=True, max_length=128), batched=True)

    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    base = AutoModelForSequenceClassification.from_pretrained(options.model, **labels)
    model = get_peft_model(base, PsoftConfig(r=64, target_modules="all-linear", task_type="SEQ_CLS"))
    model.print_trainable_parameters()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=options.output,
            learning_rate=2e-3,  # adapters want higher rates than full fine-tuning; try 8e-4 and 4e-3 too
            warmup_steps=0.05,  # as a share of all steps
            num_train_epochs=1,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=64,
            bf16=torch.cuda.is_available(),
            logging_steps=50,
            report_to="none",
        ),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,  # pads each batch to its longest text
        compute_metrics=accuracy,
    )
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    print(f"accuracy: {before:.1%} before, {trainer.evaluate()['eval_accuracy']:.1%} after")
    model.save_pretrained(options.output)

    again = AutoPeftModelForSequenceClassification.from_pretrained(options.output, **labels).eval()
    text = tokenizer(data["test"][0]["text"], return_tensors="pt")
    with torch.inference_mode():
        print("reloaded:", names[int(again(**text).logits.argmax())], "for", data["test"][0]["text"][:60])


if __name__ == "__main__":
    main()
