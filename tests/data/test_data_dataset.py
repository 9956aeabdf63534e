"""Loading a whole data set: targets, notes, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch

from medpfl.core.domain import Sample
from medpfl.core.errors import DataError
from medpfl.core.tasks import MultiLabel, SingleLabel
from medpfl.data import Reader, load_dataset


@dataclass(frozen=True)
class ListReader(Reader):
    """Somebody's own reader that gives what the test wants."""

    samples: list[Sample]
    names: tuple[str, ...] = ("a", "b", "c")
    several: bool = field(default=False)

    @property
    def multi_label(self) -> bool:
        return self.several

    def class_names(self) -> tuple[str, ...]:
        return self.names

    def read(self, maximum: int | None = None) -> Iterator[Sample]:
        yield from self.samples[:maximum]

    def notes(self) -> tuple[str, ...]:
        return ("a note",)


def image(value: float = 0.0, shape: tuple[int, ...] = (1, 4, 5)) -> torch.Tensor:
    picture = torch.full(shape, 0.5)
    if picture.numel():
        picture.view(-1)[0] = value
    return picture


def load(*samples: Sample, **options: object) -> object:
    return load_dataset(ListReader(list(samples), **options), name="mine", size=4, channels=1)  # type: ignore[arg-type]


def test_images_targets_and_keys_are_kept_in_order() -> None:
    reader = ListReader([Sample(image(), 2, "x", "p", "s"), Sample(image(0.1, (3, 9, 9)), 0, "y")])
    dataset = load_dataset(reader, name="mine", size=(4, 6), channels=3)
    assert len(dataset) == 2
    assert dataset.images.shape == (2, 3, 4, 6)
    assert dataset.targets.tolist() == [2, 0]
    assert dataset.items == ("x", "y")
    assert dataset.patients == ("p", None)
    assert dataset.task == SingleLabel(3)
    assert dataset.notes == ("a note",)


def test_one_class_still_makes_a_task_with_two() -> None:
    dataset = load_dataset(ListReader([Sample(image(), 0, "x")], ("unlabeled",)), name="d", size=4, channels=1)
    assert dataset.task == SingleLabel(2)


def test_several_labels() -> None:
    reader = ListReader([Sample(image(), (1, 0, 1), "x")], several=True)
    dataset = load_dataset(reader, name="d", size=4, channels=1)
    assert dataset.targets.tolist() == [[1.0, 0.0, 1.0]]
    assert dataset.task == MultiLabel(3)


def test_constant_images_are_reported() -> None:
    samples = [Sample(image(0.5), 0, f"flat-{number}") for number in range(5)]
    dataset = load_dataset(ListReader([*samples, Sample(image(), 0, "z")]), name="d", size=4, channels=1)
    assert dataset.notes[1] == "5 of 6 images have one value in all pixels (flat-0, flat-1, flat-2 ...)."


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample(image(shape=(1, 0, 5)), 0, "x"), "item 'x': the image has size 0"),
        (Sample(image(float("nan")), 0, "x"), "item 'x': the image has NaN"),
        (Sample(image(float("inf")), 0, "x"), "item 'x': the image has NaN or infinite"),
        (Sample(image(1.5), 0, "x"), r"pixels lie in \[0.5, 1.5\]"),
        (Sample(image(), 3, "x"), "label 3 does not fit 3 classes"),
        (Sample(image(), (1, 0, 0), "x"), "does not fit"),
        (Sample(image(shape=(2, 4, 4)), 0, "x"), "2 channels cannot become 1"),
    ],
)
def test_bad_samples_are_named(sample: Sample, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load(sample)
    assert "data 'mine'" in str(caught.value)


def test_bad_label_vectors_are_named() -> None:
    with pytest.raises(DataError, match="does not fit"):
        load(Sample(image(), (1, 0), "x"), several=True)


def test_items_are_unique_and_data_is_not_empty() -> None:
    with pytest.raises(DataError, match="item 'x' comes more than once"):
        load(Sample(image(), 0, "x"), Sample(image(), 1, "x"))
    with pytest.raises(DataError, match="'mine' has no images"):
        load()


def test_size_must_fit_the_axes() -> None:
    with pytest.raises(DataError, match="size"):
        load_dataset(ListReader([Sample(image(), 0, "x")]), name="d", size=(4, 4, 4), channels=1)
