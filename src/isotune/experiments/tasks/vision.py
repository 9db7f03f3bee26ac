"""Images and their class, read when they are needed: a test set need not fit into memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn

from isotune.experiments import data, models
from isotune.experiments.builtin_images import BuiltinImage
from isotune.experiments.sections import Data
from isotune.experiments.tables import DataError, Row, StoredImage
from isotune.experiments.tasks.classification import Classifier


class ImageClassification(Classifier):
    """A class for each image, from logits (images, classes); see `Task`.

    Images lie in files, in tables on the Hub, or in a package. The fingerprint is that of paths, or of places in a
    table or a set, and labels: no image is read twice for it.
    """

    peft_type = None

    def load(self) -> data.Examples:
        recipe = self.recipe.data
        self._stored: dict[str, StoredImage | BuiltinImage] = {}
        if recipe.text == Data.model_fields["text"].get_default(call_default_factory=True):
            recipe = recipe.model_copy(update={"text": ["image"]})
        found = data.load(recipe, text_of=self._name)
        every = [example for split in (found.train, found.validation, found.test) for example in split]
        counts = Counter(example.label for example in every)
        for example in every:
            if counts[example.label] == 1:
                raise DataError(
                    f"{example.text} is the only image of the class {found.labels[int(example.label)]}; a class needs "
                    "at least two, to train on and to judge by"
                )
        return found

    def _name(self, row: Row, column: str) -> str:
        """What an image is called: its path, once its header has been read, or its place in a table or a set."""
        value = data.given(row, column)
        if not isinstance(value, (StoredImage, BuiltinImage)):
            return _checked(row, column)
        if self._stored.setdefault(row.where, value) is not value:
            raise DataError(f"two images are called {row.where}: give the tables that they are in names of their own")
        return row.where

    def build(self) -> tuple[Any, list[str]]:
        return models.load_image_classifier(self.recipe.model, self.examples.labels, self.recipe.image_size)

    def last_layer(self, model: Any, head: Sequence[str]) -> nn.Module | None:
        found: nn.Module | None = model.get_submodule(head[0]) if len(head) == 1 else None
        return found

    def rows(self, split: Sequence[data.Example]) -> list[dict[str, Any]]:
        return [{"image": example.text, "labels": example.label} for example in split]

    @cached_property
    def processor(self) -> Any:
        """The model's image processor, for images of the recipe's size."""
        return models.image_processor_for(self.recipe.model, self.recipe.image_size)

    def collator(self) -> Any:
        processor = self.processor

        def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
            pixels = processor(images=[self._read(row["image"]) for row in rows], return_tensors="pt")["pixel_values"]
            return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}

        return collate

    def _read(self, name: str) -> Any:
        stored = self._stored.get(name)
        try:
            with Image.open(name) if stored is None else stored.read() as image:
                return _rgb(image)
        except (OSError, DataError) as error:
            raise DataError(f"cannot read the image {name}: {error}") from error


def _checked(row: Row, column: str) -> str:
    """The path of an image whose header can be read, so that a wrong file is met before training."""
    path = data.cell(row, column)
    if not Path(path).is_file():
        raise DataError(f"{row.where}: there is no image {path}")
    try:
        with Image.open(path) as image:
            _check_range(image)
            return path
    except (OSError, Image.DecompressionBombError, DataError) as error:
        where = "" if row.where == path else f"{row.where}: "
        raise DataError(f"{where}{path} is no image that can be read: {error}") from error


def _check_range(image: Image.Image) -> None:
    """Refuse an image whose values have no range of which 8 bits could be made."""
    if image.mode in ("I", "F"):
        raise DataError(
            f"its pixels are {'numbers with a point' if image.mode == 'F' else 'integers'} whose range is not known. "
            "Save it as a PNG of 8 or 16 bits."
        )


def _rgb(image: Image.Image) -> Image.Image:
    """The image as it is looked at: upright, in three channels of 8 bits."""
    _check_range(image)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # which Pillow would clip at 255
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    return image.convert("RGB")
