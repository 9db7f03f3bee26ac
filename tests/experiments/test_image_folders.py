"""Folders of images by class: splits, labels, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isotune.experiments import tasks
from isotune.experiments.recipe import validate
from isotune.experiments.tables import DataError

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten images each of two classes."""
    paint(tmp_path / "photos", 10)
    return tmp_path / "photos"


def paint(folder: Path, count: int) -> None:
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (8, 8), (number, 9, 9)).save(folder / name / f"{number}.png")


def made(folder: Path, **files: str) -> tasks.Task:
    raw = {"task": "image-classification", "model": "m", "method": "psoft"}
    return tasks.make(validate({**raw, "data": {"files": {"train": str(folder), **files}}}))


def test_one_folder_is_split(photos: Path) -> None:
    (photos / ".hidden").write_text("")
    task = made(photos)
    assert task.sizes == {"train": 16, "validation": 2, "test": 2}
    assert task.about()["labels"] == ["cat", "dog"]
    for split in ("train", "validation", "test"):
        examples = getattr(task.examples, split)  # type: ignore[attr-defined]
        assert {(Path(e.text).parent.name, e.label) for e in examples} == {("cat", 0), ("dog", 1)}
    assert made(photos).fingerprint() == task.fingerprint()


def test_folders_of_the_splits_are_found(tmp_path: Path) -> None:
    for split, count in (("train", 4), ("val", 3), ("test", 2)):
        paint(tmp_path / "photos" / split, count)
    assert made(tmp_path / "photos").sizes == {"train": 8, "validation": 6, "test": 4}
    named = made(tmp_path / "photos", test=str(tmp_path / "photos" / "val"))
    assert named.sizes == {"train": 8, "validation": 6, "test": 6}
    # Beside other classes "train" is one of them.
    paint(tmp_path / "vehicles", 4)
    (tmp_path / "vehicles" / "dog").rename(tmp_path / "vehicles" / "train")
    assert made(tmp_path / "vehicles").about()["labels"] == ["cat", "train"]


def text_for_an_image(folder: Path) -> None:
    (folder / "cat" / "3.png").write_text("no image")


def only_one(folder: Path) -> None:
    for number in range(1, 10):
        (folder / "dog" / f"{number}.png").unlink()


def none_at_all(folder: Path) -> None:
    only_one(folder)
    (folder / "dog" / "0.png").unlink()


def numbers_with_a_point(folder: Path) -> None:
    Image.fromarray(np.ones((8, 8), np.float32)).save(folder / "cat" / "3.tiff")


def integers_of_32_bits(folder: Path) -> None:
    Image.fromarray(np.ones((8, 8), np.int32)).save(folder / "cat" / "3.tiff")


def a_file_beside(folder: Path) -> None:
    (folder / "labels.csv").write_text("a,b")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (text_for_an_image, r"cat/3\.png is no image that can be read: "),
        (only_one, r"dog/0\.png is the only image of the class dog; a class needs at least two"),
        (none_at_all, r"the folder .*dog of a class has no image"),
        (
            numbers_with_a_point,
            r"cat/3\.tiff is no image that can be read: its pixels are numbers with a point whose range",
        ),
        (integers_of_32_bits, r"cat/3\.tiff .*: its pixels are integers whose range"),
        (a_file_beside, r"labels\.csv lies beside the folders of the classes"),
    ],
)
def test_what_cannot_be_learnt_from_is_named(photos: Path, change: Callable[[Path], None], said: str) -> None:
    change(photos)
    with pytest.raises(DataError, match=said) as caught:
        made(photos)
    assert "\n" not in str(caught.value)


def turned(image: Any, path: Path) -> None:
    """As a camera saves it that was held upright: on its side, with a note."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(path.with_suffix(".png"), exif=exif)


def in_16_bits(image: Any, path: Path, **options: Any) -> None:
    values = np.asarray(image.convert("L")).astype(np.uint16) * 257
    Image.fromarray(values).save(path.with_suffix(".png"), **options)


def in_16_bits_and_turned(image: Any, path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    in_16_bits(image.transpose(Image.Transpose.ROTATE_90), path, exif=exif)


def in_16_bits_of_the_other_order(image: Any, path: Path) -> None:
    values = np.asarray(image.convert("L")).astype(np.uint16) * 257
    Image.frombytes("I;16B", image.size, values.astype(">u2").tobytes()).save(path.with_suffix(".tiff"))


def with_transparency(image: Any, path: Path) -> None:
    image.convert("RGBA").save(path.with_suffix(".png"))


@pytest.mark.parametrize(
    "save", [turned, in_16_bits, in_16_bits_and_turned, in_16_bits_of_the_other_order, with_transparency]
)
def test_an_image_is_read_as_it_is_looked_at(save: Callable[[Any, Path], None], photos: Path) -> None:
    shade = np.linspace(0, 255, 8 * 6).astype(np.uint8).reshape(6, 8)
    image = Image.fromarray(np.stack([shade] * 3, -1))
    (photos / "cat" / "3.png").unlink()
    save(image, photos / "cat" / "3")
    (name,) = {str(path) for path in (photos / "cat").glob("3.*")}
    read = made(photos)._read(name)  # type: ignore[attr-defined]
    assert (read.mode, read.size) == ("RGB", (8, 6))
    np.testing.assert_array_equal(np.asarray(read), np.asarray(image))
