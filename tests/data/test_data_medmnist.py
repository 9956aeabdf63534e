"""The MedMNIST reader against arrays that were written with numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medpfl.core.errors import DataError
from medpfl.data import MedMnistReader, load_dataset

RANDOM = np.random.default_rng(0)


def arrays(shape: tuple[int, ...] = (8, 8), entries: int = 1, classes: int = 3) -> dict[str, np.ndarray]:
    result = {}
    for split, count in (("train", 5), ("val", 2), ("test", 3)):
        result[f"{split}_images"] = RANDOM.integers(0, 256, (count, *shape), dtype=np.uint8)
        top = classes if entries == 1 else 2
        result[f"{split}_labels"] = RANDOM.integers(0, top, (count, entries), dtype=np.uint8)
    result["train_labels"][0] = 1 if entries > 1 else classes - 1
    return result


def write(path: Path, content: dict[str, np.ndarray]) -> Path:
    np.savez_compressed(path, **content)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("shape", [(8, 8), (8, 6, 3)])
def test_pixels_labels_and_items(shape: tuple[int, ...], tmp_path: Path) -> None:
    content = arrays(shape)
    samples = list(MedMnistReader(path=write(tmp_path / "x.npz", content)).read())
    assert [sample.item for sample in samples[4:8]] == ["x.npz#train/4", "x.npz#val/0", "x.npz#val/1", "x.npz#test/0"]
    labels = np.concatenate([content[f"{split}_labels"] for split in ("train", "val", "test")])[:, 0]
    assert [sample.label for sample in samples] == labels.tolist()
    images = np.concatenate([content[f"{split}_images"] for split in ("train", "val", "test")])
    for sample, image in zip(samples, images, strict=True):
        expected = image[None] if image.ndim == 2 else image.transpose(2, 0, 1)
        np.testing.assert_allclose(sample.image.double().numpy(), expected / 255, atol=1e-7)


def test_splits_are_chosen_in_order(tmp_path: Path) -> None:
    path = write(tmp_path / "x.npz", arrays())
    items = [sample.item for sample in MedMnistReader(path=path, splits=("test", "val")).read()]
    assert items == ["x.npz#test/0", "x.npz#test/1", "x.npz#test/2", "x.npz#val/0", "x.npz#val/1"]


def test_several_labels(tmp_path: Path) -> None:
    content = arrays(entries=14)
    dataset = load_dataset(
        MedMnistReader(path=write(tmp_path / "chestmnist.npz", content)), name="c", size=8, channels=1
    )
    assert dataset.class_names[:2] == ("atelectasis", "cardiomegaly")
    np.testing.assert_array_equal(dataset.targets[:5].numpy(), content["train_labels"])


def test_class_names(tmp_path: Path) -> None:
    content = arrays(classes=2)
    assert MedMnistReader(path=write(tmp_path / "mine.npz", content)).class_names() == ("0", "1")
    assert MedMnistReader(path=write(tmp_path / "pneumoniamnist_64.npz", content)).class_names() == (
        "normal",
        "pneumonia",
    )
    assert MedMnistReader(path=tmp_path / "mine.npz", classes=("a", "b")).class_names() == ("a", "b")
    with pytest.raises(DataError, match="2 classes and 1 names"):
        MedMnistReader(path=tmp_path / "mine.npz", classes=("a",)).class_names()


def test_cubes_are_volumes(tmp_path: Path) -> None:
    cubes = {
        f"{split}_images": np.random.default_rng(1).integers(0, 256, (2, 9, 9, 9), np.uint8)
        for split in ("train", "val", "test")
    }
    content = {
        **arrays(),
        **cubes,
        **{f"{split}_labels": np.array([[0], [1]], np.uint8) for split in ("train", "val", "test")},
    }
    found = [sample.image for sample in MedMnistReader(path=write(tmp_path / "x.npz", content)).read()]
    assert [tuple(image.shape) for image in found] == [(1, 9, 9, 9)] * 6
    np.testing.assert_allclose(found[3][0].numpy(), cubes["val_images"][1] / 255.0, atol=1e-7)


def changed(**changes: np.ndarray) -> dict[str, np.ndarray]:
    return {**arrays(), **changes}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train_images": np.zeros((1, 8, 8), np.uint8)}, "no array 'train_labels'"),
        (
            {"train_images": np.zeros((1, 8, 8), np.uint8), "train_labels": np.zeros((1, 1), np.uint8)},
            r"no array 'val_labels'; it has train_images, train_labels; set splits: \[train\]",
        ),
        (changed(val_images=np.zeros((2, 8, 8))), "val_images is float64; expected uint8"),
        (changed(test_images=np.zeros((3, 8, 8, 8), np.uint8)), "images and volumes are mixed"),
        (changed(test_images=np.zeros((3, 8, 8, 4), np.uint8)), r"\(3, 8, 8, 4\); expected .* or cubes"),
        (changed(test_images=np.zeros((3, 64), np.uint8)), r"\(3, 64\); expected \(N, H, W\)"),
        (changed(val_labels=np.zeros((3, 1), np.uint8)), "val has 2 images and 3 labels"),
        (changed(val_labels=np.zeros((2, 1))), "val_labels is float64"),
        (changed(val_labels=np.full((2, 1), -1)), "lie in -1..-1"),
        (changed(val_labels=np.full((2, 4), 1, np.uint8)), "label rows of different lengths"),
        (changed(train_images=np.zeros((5, 0, 8), np.uint8)), "size 0"),
    ],
)
def test_what_is_wrong_is_said(content: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.npz", content)
    with pytest.raises(DataError, match=message):
        load_dataset(MedMnistReader(path=path), name="d", size=8, channels=1)


def test_a_folder_is_no_archive(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder; give the path of one npz file"):
        MedMnistReader(path=tmp_path).class_names()


def test_python_objects_are_never_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "sprung",))  # type: ignore[return-value]

    content = changed(train_images=np.array([Trap()], dtype=object))
    np.savez(tmp_path / "x.npz", **content)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="could contain code"):
        list(MedMnistReader(path=tmp_path / "x.npz").read())
    assert not (tmp_path / "sprung").exists()
