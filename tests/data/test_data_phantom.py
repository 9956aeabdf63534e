"""Phantoms: any size, the same anatomy at every size, different patients, classes that can be told apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from medpfl.data import DATASETS, PhantomReader, load_dataset, near_duplicates_of, resize

KINDS = ("brain", "chest", "skin")


@pytest.mark.parametrize("kind", KINDS)
def test_classes_are_those_of_the_named_data_sets(kind: str) -> None:
    named = {"brain": "brain_mri", "chest": "covid_cxr", "skin": "melanoma"}[kind]
    reader = PhantomReader(kind=kind, count=1)  # type: ignore[arg-type]
    assert reader.class_names() == DATASETS[named].item.classes
    (sample,) = reader.read()
    assert sample.image.shape[0] == DATASETS[named].item.channels


@pytest.mark.parametrize("kind", KINDS)
def test_the_anatomy_does_not_depend_on_the_resolution(kind: str) -> None:
    small = list(PhantomReader(kind=kind, count=6, resolution=48).read())  # type: ignore[arg-type]
    large = list(PhantomReader(kind=kind, count=6, resolution=144).read())  # type: ignore[arg-type]
    for a, b in zip(small, large, strict=True):
        assert float((a.image - resize(b.image, (48, 48))).abs().mean()) < 0.035
        assert a.label == b.label


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_one_seed_are_no_near_duplicates(kind: str) -> None:
    dataset = load_dataset(PhantomReader(kind=kind, count=40), name="p", size=64, channels=1)  # type: ignore[arg-type]
    assert int(near_duplicates_of(dataset.images[20:], dataset.images[:20]).sum()) <= 2
    other = load_dataset(PhantomReader(kind=kind, count=40, seed=1), name="p", size=64, channels=1)  # type: ignore[arg-type]
    assert not torch.equal(dataset.images, other.images)


def test_patients_share_class_and_anatomy() -> None:
    samples = list(PhantomReader(count=12, patients=4, resolution=48).read())
    patients = [sample.patient for sample in samples]
    assert len(set(patients)) == 4
    assert patients[:4] == patients[4:8] == patients[8:]
    assert [sample.label for sample in samples[:4]] == [sample.label for sample in samples[4:8]]
    assert not torch.equal(samples[0].image, samples[4].image)
    assert {sample.patient for sample in PhantomReader(count=3).read()} == {None}


def test_a_longer_set_begins_with_the_shorter_one() -> None:
    for short, long in zip(PhantomReader(count=3).read(), PhantomReader(count=9).read(), strict=False):
        assert torch.equal(short.image, long.image)


def test_tumors_are_brighter_than_the_same_brain_without() -> None:
    """The classes differ in what is drawn: a linear rule on the center tells pituitary tumors from healthy brains."""
    dataset = load_dataset(PhantomReader(count=200, resolution=32), name="p", size=32, channels=1)
    center = dataset.images[:, 0, 13:19, 13:19].flatten(1).amax(1) - dataset.images[:, 0].flatten(1).median(1).values
    healthy, pituitary = (dataset.targets == dataset.class_names.index(name) for name in ("no_tumor", "pituitary"))
    assert float(center[pituitary].median()) > float(center[healthy].quantile(0.75))


def test_there_is_no_file_to_read() -> None:
    with pytest.raises(ValueError):
        PhantomReader(path=Path("x"))  # type: ignore[call-arg]
