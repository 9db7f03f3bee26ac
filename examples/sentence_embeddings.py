"""Sentence embeddings with sentence-transformers and PSOFT.

Needs: pip install ".[train]" sentence-transformers datasets. A CPU will do for MiniLM: 0.4 GiB by `isotune plan
       sentence-transformers/all-MiniLM-L6-v2 --rank 32 --batch 32 --sequence 64`.
Run:   python examples/sentence_embeddings.py --model sentence-transformers/all-MiniLM-L6-v2
       python examples/sentence_embeddings.py --smoke
"""

import argparse

import numpy as np
import torch
from datasets import load_dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.losses import CoSENTLoss

import smoke
from isotune import PsoftConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--data", default="sentence-transformers/stsb", help="sentence1, sentence2, score from 0 to 1")
    parser.add_argument("--output", default="runs/sentence-embeddings")
    parser.add_argument("--smoke", action="store_true", help="tiny stand-ins made here, on a CPU")
    options = parser.parse_args()
    if options.smoke:
        smoke.begin()
        smoke.encoder(options.model)
        smoke.sentence_pairs(options.data)

    data = load_dataset(options.data)
    model = SentenceTransformer(options.model)
    # transformers' own add_adapter, which sentence-transformers passes on; the base stays as it is.
    model.add_adapter(PsoftConfig(r=32, target_modules=["query", "key", "value"]))
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    print(f"trainable parameters: {sum(n for n, trained in sizes if trained):,} of {sum(n for n, _ in sizes):,}")

    test = data["test"]
    score = EmbeddingSimilarityEvaluator(list(test["sentence1"]), list(test["sentence2"]), list(test["score"]))
    before = score(model)[score.primary_metric]
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=options.output,
            learning_rate=4e-3,  # for an encoder as small as MiniLM; 1e-3 for one of 100 million parameters
            warmup_steps=0.1,  # as a share of all steps
            num_train_epochs=4,
            per_device_train_batch_size=32,
            bf16=torch.cuda.is_available(),
            report_to="none",
        ),
        train_dataset=data["train"],
        loss=CoSENTLoss(model),
    )
    trainer.train()
    print(f"Spearman correlation on the test set: {before:.3f} before, {score(model)[score.primary_metric]:.3f} after")

    # The adapter and the names of the modules, not the base, which is found by its own name again.
    model.save_pretrained(f"{options.output}/final")
    again = SentenceTransformer(f"{options.output}/final")
    difference = np.abs(model.encode(test["sentence1"][:8]) - again.encode(test["sentence1"][:8])).max()
    print(f"reloaded from {options.output}/final: vectors differ by {difference:.1e} at most")


if __name__ == "__main__":
    main()
