"""The readers on real image sets, where they are there."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pytest

from medpfl.data import CsvReader, FolderReader, MedMnistReader, check_named, load_dataset, split

pytestmark = pytest.mark.shared_data


@pytest.mark.parametrize(
    ("name", "channels", "counts"),
    [("brain_mri", 1, [24, 24, 24, 24]), ("covid_cxr", 1, [24, 24, 24]), ("melanoma", 3, [24, 24])],
)
def test_image_sets(shared_data: Path, name: str, channels: int, counts: list[int]) -> None:
    dataset = load_dataset(FolderReader(path=shared_data / name), name=name, size=32, channels=channels)  # type: ignore[arg-type]
    assert dataset.images.shape == (sum(counts), channels, 32, 32)
    assert [Counter(dataset.targets.tolist())[label] for label in range(len(counts))] == counts
    assert dataset.notes == ()
    assert 0.1 < float(dataset.images.mean()) < 0.8
    (finding,) = check_named(name, shared_data / name)
    assert finding.startswith(f"{sum(counts)} images are there")
    result = split(dataset, victims=16, images_per_victim=1, seed=0)
    victims = Counter(int(dataset.targets[index]) for (index,) in result.victims)
    assert max(victims.values()) - min(victims.values()) <= 1
    assert min(len(result.training), len(result.auxiliary), len(result.null)) >= 4


@pytest.mark.parametrize(
    ("file", "shape", "splits", "count", "classes"),
    [
        ("pneumoniamnist_subset.npz", (1, 28, 28), ("test",), 464, ("normal", "pneumonia")),
        ("isic2017_28.npz", (3, 28, 28), ("train", "val", "test"), 720, ("0", "1")),
        ("mednist_64_subset.npz", (1, 64, 64), ("train", "val", "test"), 600, tuple("012345")),
    ],
)
def test_npz_sets(
    shared_data: Path, file: str, shape: tuple[int, ...], splits: tuple[str, ...], count: int, classes: tuple[str, ...]
) -> None:
    reader = MedMnistReader(path=shared_data / "medmnist" / file, splits=splits)  # type: ignore[arg-type]
    dataset = load_dataset(reader, name="m", size=shape[1], channels=shape[0])  # type: ignore[arg-type]
    assert dataset.images.shape == (count, *shape)
    assert dataset.class_names == classes
    assert dataset.items[0] == f"{file}#{splits[0]}/0"


def test_manifest_with_patient_groups(shared_data: Path, tmp_path: Path) -> None:
    with (shared_data / "index.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["dataset"] == "covid_cxr"]
    table = tmp_path / "table.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "patient"])
        writer.writerows([shared_data / row["file"], row["class"], row["group"]] for row in rows)
    dataset = load_dataset(CsvReader(path=table), name="covid_cxr", size=32, channels=1)
    assert len(set(dataset.patients)) == len({row["group"] for row in rows}) == 66
    result = split(dataset, victims=16, images_per_victim=1, seed=0)
    used = {dataset.patients[index] for (index,) in result.victims}
    pool = {dataset.patients[index] for part in (result.training, result.auxiliary, result.null) for index in part}
    assert not used & pool
