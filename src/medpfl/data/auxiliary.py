"""Auxiliary knowledge from a data set of its own: what of it may stand beside the victims of another data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from medpfl.data.dataset import Dataset
from medpfl.data.near_duplicates import near_duplicates_of


@dataclass(frozen=True)
class Borrowed:
    """Indices into the data set that knowledge is taken from.

    `dropped_by_patient` counts its other images of patients whose images are attacked, `near_duplicates` those of the
    rest that resemble an attacked image. `notes` say in plain sentences what was left out or cannot be told.
    """

    indices: tuple[int, ...]
    near_duplicates: int
    dropped_by_patient: int
    notes: tuple[str, ...] = ()


def borrow(source: Dataset, attacked: Dataset, private: Sequence[int], threshold: float) -> Borrowed:
    """The images of `source` that show none of the patients of `attacked`'s images `private` and resemble none of them.

    Patients are compared by their opaque keys, which mean the same in all data sets of a process.
    """
    patients = {attacked.patients[index] for index in private} - {None}
    others = [index for index, patient in enumerate(source.patients) if patient is None or patient not in patients]
    repeated = near_duplicates_of(source.images[others], attacked.images[list(private)], threshold).tolist()
    kept = tuple(index for index, repeats in zip(others, repeated, strict=True) if not repeats)
    dropped = len(source) - len(others)
    return Borrowed(kept, len(others) - len(kept), dropped, tuple(_notes(source, attacked, private, dropped)))


def _notes(source: Dataset, attacked: Dataset, private: Sequence[int], dropped: int) -> list[str]:
    notes = []
    if dropped:
        notes.append(
            f"{dropped} images bear a patient of the victims of '{attacked.name}' and were left out. If the two number "
            "different people alike, leave the patients of one out."
        )
    unknown = [
        data.name
        for data, indices in ((attacked, private), (source, range(len(source))))
        if any(data.patients[index] is None for index in indices)
    ]
    if unknown:
        listed = " and ".join(f"'{name}'" for name in unknown)
        notes.append(f"Patients of {listed} are not all known: images of victims' patients can be auxiliary knowledge.")
    return notes
