"""PyTorch alone: a small network of your own, trained on digits, then adapted to mirrored ones in a loop of your own.

Needs: pip install ".[train]" (scikit-learn carries the 1,797 digits of 8 × 8). Runs on a CPU in seconds.
Run:   python examples/plain_pytorch.py
       python examples/plain_pytorch.py --smoke
"""

import argparse
from pathlib import Path

import torch
from peft import PeftModel
from sklearn.datasets import load_digits
from torch import Tensor, nn

import smoke
from isotune import PsoftConfig, get_peft_model


def network() -> nn.Sequential:
    convolutions = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*convolutions, nn.Linear(64 * 3 * 3, 128), nn.ReLU(), nn.Linear(128, 10))


def train(model: nn.Module, images: Tensor, labels: Tensor, rate: float, epochs: int) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((model(images).argmax(1) == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=10, help="for the network, and for the adapter")
    parser.add_argument("--output", type=Path, default=Path("runs/digits"))
    parser.add_argument("--smoke", action="store_true", help="three epochs each, in a temporary folder")
    options = parser.parse_args()
    if options.smoke:
        smoke.begin()
        options.epochs = 3

    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    mirrored, labels = images.flip(-1), torch.tensor(digits.target)
    kept, tested = slice(0, 1400), slice(1400, None)
    base = network().eval()
    train(base, images[kept], labels[kept], rate=2e-3, epochs=options.epochs)
    before = accuracy(base, images[tested], labels[tested]), accuracy(base, mirrored[tested], labels[tested])
    print(f"the network: {before[0]:.1%} of the digits, {before[1]:.1%} of the mirrored ones")
    options.output.mkdir(parents=True, exist_ok=True)
    torch.save(base.state_dict(), options.output / "base.pt")

    model = get_peft_model(base, PsoftConfig(r=64, target_modules=["2", "5"]))  # a convolution and a linear layer
    model.print_trainable_parameters()
    train(model, mirrored[kept], labels[kept], rate=1e-2, epochs=options.epochs)
    print(f"with the adapter: {accuracy(model, mirrored[tested], labels[tested]):.1%} of the mirrored ones")
    with model.disable_adapter():
        print(f"adapter off: {accuracy(model, images[tested], labels[tested]):.1%} of the digits, as before")
    model.save_pretrained(options.output / "adapter")

    again = network().eval()
    again.load_state_dict(torch.load(options.output / "base.pt", weights_only=True))
    plain = PeftModel.from_pretrained(again, options.output / "adapter").merge_and_unload()  # nn.Sequential again
    with torch.no_grad():
        difference = (plain(mirrored) - model(mirrored)).abs().max()
    print(f"reloaded and merged: outputs differ by {difference:.1e} at most")


if __name__ == "__main__":
    main()
