"""Auxiliary knowledge from another data set: nobody who is attacked is in it, as far as patients and pixels tell."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
import torch
from PIL import Image

from medpfl.core.tasks import SingleLabel
from medpfl.data import CsvReader, Dataset, NiftiReader, borrow


def dataset(name: str, patients: Sequence[str | None], seed: int) -> Dataset:
    count = len(patients)
    return Dataset(
        name=name,
        images=torch.rand((count, 1, 16, 16), generator=torch.Generator().manual_seed(seed)),
        targets=torch.zeros(count, dtype=torch.int64),
        items=tuple(str(index) for index in range(count)),
        patients=tuple(patients),
        class_names=("a", "b"),
        task=SingleLabel(2),
    )


def test_other_images_of_the_victims_patients_and_near_duplicates_are_left_out() -> None:
    attacked = dataset("here", ["p", "q", "r"], seed=0)
    source = dataset("there", ["x", "p", None, "q", "p", "y"], seed=1)
    source.images[5] = 0.8 * attacked.images[1] + 0.1
    borrowed = borrow(source, attacked, [0, 1], threshold=0.95)
    assert borrowed.indices == (0, 2)
    assert (borrowed.dropped_by_patient, borrowed.near_duplicates) == (3, 1)
    assert "3 images bear a patient of the victims of 'here'" in borrowed.notes[0]
    assert "Patients of 'there' are not all known" in borrowed.notes[1]


def test_unknown_patients_never_agree() -> None:
    borrowed = borrow(dataset("there", [None, None], 1), dataset("here", [None, "p"], 0), [0, 1], threshold=0.95)
    assert borrowed.indices == (0, 1)
    assert "'here' and 'there'" in borrowed.notes[0]


def test_two_csv_files_name_one_patient_alike(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "image.png")
    found = []
    for name, patients in (("one", ["Jane", "Joe"]), ("two", ["Jim", "Jane"])):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "label", "patient"])
            writer.writerows(["image.png", "a", patient] for patient in patients)
        found.append([sample.patient for sample in CsvReader(path=tmp_path / f"{name}.csv").read()])
    assert found[0][0] == found[1][1]
    assert len({*found[0], *found[1]}) == 3


def test_bids_subjects_mean_somebody_inside_their_own_data_set_only(tmp_path: Path) -> None:
    values = np.arange(512, dtype=np.float32).reshape(8, 8, 8)

    def patients(path: Path) -> set[str | None]:
        return {sample.patient for sample in NiftiReader(path=path, labels="none").read()}

    for place in ("first", "second"):
        for subject in ("sub-01", "sub-02"):
            file = tmp_path / place / subject / "anat" / f"{subject}_T1w.nii"
            file.parent.mkdir(parents=True)
            nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), file)  # type: ignore[no-untyped-call]
    whole = patients(tmp_path / "first")
    assert len(whole) == 2
    assert patients(tmp_path / "first" / "sub-01") < whole
    assert patients(tmp_path / "first" / "sub-01" / "anat" / "sub-01_T1w.nii") < whole
    assert not whole & patients(tmp_path / "second")
