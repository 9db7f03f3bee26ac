"""Image classification with a Vision Transformer and OFT.

Needs: pip install ".[train]" datasets pillow, and a GPU: 3.9 GiB for ViT-B/16, by `isotune plan
       google/vit-base-patch16-224 --method oft oft_block_size=32 --batch 32`. --smoke runs on a CPU.
Run:   python examples/vit_images.py --model google/vit-base-patch16-224 --data AI-Lab-Makerere/beans
       python examples/vit_images.py --smoke
"""

import argparse

import numpy as np
import torch
from datasets import load_dataset
from peft import PeftModel
from transformers import AutoImageProcessor, AutoModelForImageClassification, EvalPrediction, Trainer, TrainingArguments

import smoke
from isotune import OFTConfig, get_peft_model


def accuracy(predicted: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(predicted.predictions.argmax(-1) == predicted.label_ids))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="google/vit-base-patch16-224")
    parser.add_argument("--data", default="AI-Lab-Makerere/beans", help="columns `image` and `labels`")
    parser.add_argument("--output", default="runs/vit-images")
    parser.add_argument("--smoke", action="store_true", help="tiny stand-ins made here, on a CPU")
    options = parser.parse_args()
    if options.smoke:
        smoke.begin()
        smoke.vision_model(options.model)
        smoke.images(options.data)

    data = load_dataset(options.data)
    names = data["train"].features["labels"].names
    processor = AutoImageProcessor.from_pretrained(options.model)

    def pixels(rows: dict) -> dict:
        images = processor([image.convert("RGB") for image in rows["image"]], return_tensors="pt")
        return {"pixel_values": images["pixel_values"], "labels": rows["labels"]}

    def base() -> torch.nn.Module:  # with a new head in the place of the one for ImageNet's classes
        head = {"id2label": dict(enumerate(names)), "ignore_mismatched_sizes": True}
        return AutoModelForImageClassification.from_pretrained(options.model, **head)

    config = OFTConfig(oft_block_size=32, target_modules="all-linear", modules_to_save=["classifier"])
    model = get_peft_model(base(), config)
    model.print_trainable_parameters()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=options.output,
            learning_rate=1e-3,
            warmup_steps=0.1,  # as a share of all steps
            num_train_epochs=4,
            per_device_train_batch_size=32,
            bf16=torch.cuda.is_available(),
            remove_unused_columns=False,  # `image`, which becomes pixels when a batch is read
            report_to="none",
        ),
        train_dataset=data["train"].with_transform(pixels),
        eval_dataset=data["test"].with_transform(pixels),
        compute_metrics=accuracy,
    )
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    print(f"accuracy: {before:.1%} before, {trainer.evaluate()['eval_accuracy']:.1%} after")
    model.save_pretrained(options.output)
    plain = PeftModel.from_pretrained(base(), options.output).merge_and_unload().eval()  # a ViT again, for any tool
    image = pixels(data["test"][:1])["pixel_values"]
    with torch.inference_mode():
        difference = (plain(image).logits - model.cpu().eval()(image).logits).abs().max()
    print(f"reloaded from {options.output} and merged: logits differ by {difference:.1e} at most")


if __name__ == "__main__":
    main()
