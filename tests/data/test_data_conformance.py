"""What every reader promises, in one table."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from pydicom.data import get_testdata_file

from medpfl.core.domain import Sample
from medpfl.core.tasks import MultiLabel, SingleLabel
from medpfl.data import (
    READERS,
    CsvReader,
    DicomReader,
    FolderReader,
    MedMnistReader,
    NiftiReader,
    PhantomReader,
    Reader,
    load_dataset,
)

SECRETS = ("Doe", "Jane", "4MR1", "1CT1", "CompressedSamples", "MR_small", "CT_small", "subject-jane", "Berlin")
"""Patient names, ids, hospitals and file names that are in the files below and in no sample."""


def noise(height: int, width: int, channels: int, seed: int) -> np.ndarray:
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def folder(root: Path) -> Reader:
    for name, label in (("a", "x"), ("b", "x"), ("c", "y")):
        (root / label).mkdir(exist_ok=True)
        Image.fromarray(noise(20, 24, 3, ord(name))).save(root / label / f"{name}.png")
    return FolderReader(path=root)


def flat_folder(root: Path) -> Reader:
    for name in ("a", "b"):
        Image.fromarray(noise(20, 24, 1, ord(name))).save(root / f"{name}.jpg")
    return FolderReader(path=root)


def table(root: Path, **options: object) -> Reader:
    rows = [("a", "cat", "Jane Doe"), ("b", "dog|cat", "Jane Doe"), ("c", "dog", "")]
    for name, _, _ in rows:
        Image.fromarray(noise(20, 24, 1, ord(name))).save(root / f"{name}.png")
    with (root / "t.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "patient", "site"])
        writer.writerows([f"{name}.png", label, patient, "Berlin"] for name, label, patient in rows)
    return CsvReader(path=root / "t.csv", **options)  # type: ignore[arg-type]


def multi_label_table(root: Path) -> Reader:
    return table(root, separator="|")


def single_label_table(root: Path) -> Reader:
    return table(root)


def medmnist(root: Path) -> Reader:
    arrays: dict[str, Any] = {}
    for split, count in (("train", 4), ("val", 2), ("test", 3)):
        arrays[f"{split}_images"] = np.stack([noise(28, 28, 1, seed) for seed in range(count)])
        arrays[f"{split}_labels"] = np.arange(count, dtype=np.uint8)[:, None] % 3
    np.savez(root / "m.npz", **arrays)
    return MedMnistReader(path=root / "m.npz")


def multi_label_medmnist(root: Path) -> Reader:
    arrays: dict[str, Any] = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = np.stack([noise(28, 28, 3, seed) for seed in range(4)])
        arrays[f"{split}_labels"] = np.array([[0, 0, 1], [1, 0, 1], [0, 0, 0], [1, 1, 1]], dtype=np.uint8)
    np.savez(root / "m.npz", **arrays)
    return MedMnistReader(path=root / "m.npz")


def dicom(root: Path) -> Reader:
    for label, name in (("x", "MR_small.dcm"), ("y", "CT_small.dcm"), ("y", "examples_rgb_color.dcm")):
        (root / label).mkdir(exist_ok=True)
        shutil.copy(str(get_testdata_file(name, download=False)), root / label / name)
    return DicomReader(path=root)


def nifti(root: Path) -> Reader:
    source = Path(nibabel.__file__).parent / "tests" / "data" / "anatomical.nii"
    shutil.copy(source, root / "subject-jane.nii")
    return NiftiReader(path=root, slices=(8, 14, 2))


def phantom(root: Path) -> Reader:
    return PhantomReader(kind="skin", count=5, resolution=24, patients=3)


TABLE: dict[str, list[Callable[[Path], Reader]]] = {
    "folder": [folder, flat_folder],
    "csv": [single_label_table, multi_label_table],
    "medmnist": [medmnist, multi_label_medmnist],
    "dicom": [dicom],
    "nifti": [nifti],
    "phantom": [phantom],
}
CASES = [pytest.param(name, make, id=make.__name__) for name, makes in TABLE.items() for make in makes]


def test_every_registered_reader_is_in_the_table() -> None:
    assert READERS.names() == sorted(TABLE)


@pytest.mark.parametrize(("name", "make"), CASES)
def test_samples_keep_the_contract(name: str, make: Callable[[Path], Reader], tmp_path: Path) -> None:
    reader = make(tmp_path)
    assert type(reader) is READERS[name].item
    classes = reader.class_names()
    samples = list(reader.read())
    assert samples
    assert len({sample.item for sample in samples}) == len(samples)
    for sample in samples:
        assert sample.image.dtype == torch.float32
        assert sample.image.ndim == 3
        assert sample.image.shape[0] in (1, 3)
        assert 0.0 <= float(sample.image.min()) < float(sample.image.max()) <= 1.0
        if reader.multi_label:
            assert isinstance(sample.label, tuple)
            assert len(sample.label) == len(classes)
            assert set(sample.label) <= {0, 1}
        else:
            assert sample.label in range(len(classes))


@pytest.mark.parametrize(("name", "make"), CASES)
def test_reading_twice_gives_the_same(name: str, make: Callable[[Path], Reader], tmp_path: Path) -> None:
    reader = make(tmp_path)
    for first, second in zip(reader.read(), reader.read(), strict=True):
        assert torch.equal(first.image, second.image)
        assert key(first) == key(second)


@pytest.mark.parametrize(("name", "make"), CASES)
def test_no_patient_text_leaves(name: str, make: Callable[[Path], Reader], tmp_path: Path) -> None:
    reader = make(tmp_path)
    for sample in reader.read():
        text = " ".join(str(part) for part in (sample.item, sample.patient, sample.site, *reader.notes()))
        assert not [secret for secret in SECRETS if secret.lower() in text.lower()]
        assert str(tmp_path) not in text


@pytest.mark.parametrize(("name", "make"), CASES)
def test_maximum_bounds_and_selects(name: str, make: Callable[[Path], Reader], tmp_path: Path) -> None:
    reader = make(tmp_path)
    everything = [key(sample) for sample in reader.read()]
    some = [key(sample) for sample in reader.read(2)]
    assert len(some) == 2
    assert [entry for entry in everything if entry in some] == some
    assert [key(sample) for sample in reader.read(1000)] == everything


@pytest.mark.parametrize(("name", "make"), CASES)
@pytest.mark.parametrize("channels", [1, 3])
def test_data_sets_have_one_shape(name: str, make: Callable[[Path], Reader], channels: int, tmp_path: Path) -> None:
    reader = make(tmp_path)
    dataset = load_dataset(reader, name="d", size=16, channels=channels)  # type: ignore[arg-type]
    assert dataset.images.shape == (len(list(reader.read())), channels, 16, 16)
    assert dataset.images.dtype == torch.float32
    assert 0.0 <= float(dataset.images.min()) <= float(dataset.images.max()) <= 1.0
    classes = max(2, len(dataset.class_names))
    if reader.multi_label:
        assert dataset.task == MultiLabel(len(dataset.class_names))
        assert dataset.targets.shape == (len(dataset), len(dataset.class_names))
    else:
        assert dataset.task == SingleLabel(classes)
        assert dataset.targets.dtype == torch.int64
    loss = dataset.task.loss(torch.zeros(len(dataset), dataset.task.classes), dataset.targets)
    assert bool(torch.isfinite(loss))


def key(sample: Sample) -> tuple[object, ...]:
    return sample.item, sample.label, sample.patient, sample.site
