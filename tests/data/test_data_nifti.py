"""The NIfTI reader against nibabel and volumes made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as annotated_nibabel
import numpy as np
import pytest

from medpfl.core.errors import DataError
from medpfl.data import NiftiReader, load_dataset

nibabel: Any = annotated_nibabel  # annotated in parts only

EXAMPLES = Path(nibabel.__file__).parent / "tests" / "data"


def write(path: Path, values: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine), path)
    return path


def stack(reader: NiftiReader) -> np.ndarray:
    return np.stack([sample.image[0].double().numpy() for sample in reader.read()])


VOLUME = np.random.default_rng(0).integers(0, 1000, (6, 7, 8)).astype(np.int16)
FULL: dict[str, Any] = {"percentiles": (0, 100), "minimum_content": 0.0}


def expected(values: np.ndarray) -> np.ndarray:
    return np.asarray((values - values.min()) / (values.max() - values.min()))


def test_axial_slices_have_anterior_up_and_right_on_the_right(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii.gz", VOLUME)
    slices = stack(NiftiReader(path=path, **FULL))
    assert slices.shape == (8, 7, 6)
    right, anterior, superior = 4, 5, 2
    np.testing.assert_allclose(
        slices[superior, 7 - 1 - anterior, right], expected(VOLUME)[right, anterior, superior], atol=1e-6
    )
    np.testing.assert_allclose(slices, expected(VOLUME).transpose(2, 1, 0)[:, ::-1], atol=1e-6)


@pytest.mark.parametrize(("axis", "order"), [(0, (0, 2, 1)), (1, (1, 2, 0))])
def test_sagittal_and_coronal_slices_have_superior_up(axis: int, order: tuple[int, ...], tmp_path: Path) -> None:
    slices = stack(NiftiReader(path=write(tmp_path / "a.nii", VOLUME), axis=axis, **FULL))  # type: ignore[arg-type]
    np.testing.assert_allclose(slices, expected(VOLUME).transpose(order)[:, ::-1], atol=1e-6)


def test_orientation_in_the_file_does_not_matter(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain.nii", VOLUME)
    flipped_affine = np.array([[0, -1, 0, 6], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=float)
    turned = write(tmp_path / "turned.nii", VOLUME.transpose(2, 0, 1)[:, ::-1], flipped_affine)
    assert nibabel.aff2axcodes(flipped_affine) == ("S", "L", "A")
    np.testing.assert_array_equal(stack(NiftiReader(path=plain, **FULL)), stack(NiftiReader(path=turned, **FULL)))


def test_real_volume_agrees_with_nibabel() -> None:
    path = EXAMPLES / "anatomical.nii"
    values = nibabel.as_closest_canonical(nibabel.load(path)).get_fdata()
    low, high = np.percentile(values, [0.5, 99.5])
    windowed = np.clip((values - low) / (high - low), 0, 1)
    slices = stack(NiftiReader(path=path, minimum_content=0.0))
    np.testing.assert_allclose(slices, windowed.transpose(2, 1, 0)[:, ::-1], atol=1e-6)


def numbers(reader: NiftiReader) -> list[int]:
    return [int(sample.item.split("#")[1]) for sample in reader.read()]


@pytest.mark.parametrize(
    ("slices", "wanted"),
    [
        ((0.0, 1.0, 1), [0, 1, 2, 3, 4, 5, 6, 7]),
        ((0.25, 0.75, 1), [2, 3, 4, 5]),
        ((0, 0.5, 2), [0, 2]),
        ((1, 7, 3), [1, 4]),
        ((6, 100, 1), [6, 7]),
    ],
)
def test_slices_by_number_and_by_fraction(slices: tuple[float, float, int], wanted: list[int], tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii", VOLUME)
    assert numbers(NiftiReader(path=path, slices=slices, **FULL)) == wanted


def test_nearly_empty_slices_are_left_out(tmp_path: Path) -> None:
    values = VOLUME.copy()
    values[:, :, :3] = 0
    values[0, 0, 1] = 900
    path = write(tmp_path / "a.nii", values)
    assert numbers(NiftiReader(path=path)) == [3, 4, 5, 6, 7]
    assert numbers(NiftiReader(path=path, minimum_content=0.0)) == list(range(8))
    assert numbers(NiftiReader(path=path, minimum_content=1 / 42)) == [1, 3, 4, 5, 6, 7]
    assert [int(sample.item.split("#")[1]) for sample in NiftiReader(path=path).read(2)] == [4, 6]


def test_volume_of_a_4d_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii", np.stack([VOLUME, VOLUME[::-1]], axis=-1))
    plain = stack(NiftiReader(path=write(tmp_path / "b.nii", VOLUME[::-1]), **FULL))
    np.testing.assert_array_equal(stack(NiftiReader(path=path, volume=1, **FULL)), plain)
    with pytest.raises(DataError, match="has 2 volumes; volume 2 was asked for"):
        list(NiftiReader(path=path, volume=2).read())


def test_trailing_axes_of_one_are_dropped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii", VOLUME[..., None, None])
    assert len(list(NiftiReader(path=path, **FULL).read())) == 8


def test_patients_are_files_or_bids_subjects(tmp_path: Path) -> None:
    for name in ("sub-01/anat/sub-01_T1w.nii", "sub-01/anat/sub-01_T2w.nii", "sub-02/anat/sub-02_T1w.nii"):
        write(tmp_path / "bids" / name, VOLUME)
    with pytest.raises(DataError, match="subjects, not classes; set labels: none"):
        NiftiReader(path=tmp_path / "bids").class_names()
    samples = list(NiftiReader(path=tmp_path / "bids", labels="none", slices=(3, 4, 1)).read())
    assert samples[0].patient == samples[1].patient != samples[2].patient
    assert len({sample.item for sample in samples}) == 3
    for name in ("x/a.nii", "y/b.nii.gz"):
        write(tmp_path / "classes" / name, VOLUME)
    reader = NiftiReader(path=tmp_path / "classes", slices=(3, 4, 1))
    assert reader.class_names() == ("x", "y")
    first, second = reader.read()
    assert (first.label, second.label) == (0, 1)
    assert first.patient != second.patient


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (VOLUME[:, :, 0], "expected three or four axes"),
        (VOLUME.astype(np.complex64), "complex voxels"),
        (np.zeros((4, 4, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")]), "color voxels"),
        (np.stack([VOLUME, np.full_like(VOLUME, 3)], axis=-1)[..., None].repeat(2, -1), "expected three or four axes"),
        (np.where(VOLUME < 10, np.nan, VOLUME).astype(np.float32), "NaN or infinite"),
    ],
)
def test_other_contents_are_refused(values: np.ndarray, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as caught:
        list(NiftiReader(path=write(tmp_path / "odd.nii", values)).read())
    assert "odd.nii" in str(caught.value)


def test_matrices_in_nifti_files_are_refused() -> None:
    with pytest.raises(DataError, match="row_major"):
        list(NiftiReader(path=EXAMPLES / "row_major.dconn.nii").read())


@pytest.mark.parametrize(("values", "options"), [(np.zeros((4, 4, 4)), {}), (VOLUME, {"slices": (90, 99, 1)})])
def test_no_slice_to_show_is_said(values: np.ndarray, options: dict[str, Any], tmp_path: Path) -> None:
    reader = NiftiReader(path=write(tmp_path / "a.nii", values.astype(np.float32)), **options)
    for maximum in (None, 3):
        with pytest.raises(DataError, match=r"a\.nii': no slice of \[.*minimum_content"):
            list(reader.read(maximum))


def test_options_are_checked() -> None:
    for options in (
        {"slices": (5, 2, 1)},
        {"slices": (0.5, 3, 1)},
        {"slices": (0, 5, 0)},
        {"axis": 3},
        {"percentiles": (5, 5)},
    ):
        with pytest.raises(ValueError):
            NiftiReader(path=Path("x"), **options)


def test_whole_volumes_are_the_slices_one_behind_the_other(tmp_path: Path) -> None:
    path = write(tmp_path / "a.nii.gz", VOLUME)
    for axis in (0, 1, 2):
        slices = stack(NiftiReader(path=path, axis=axis, **FULL))
        (sample,) = NiftiReader(path=path, axis=axis, whole=True, **FULL).read()
        assert sample.image.shape == (1, *slices.shape)
        np.testing.assert_array_equal(sample.image[0].double().numpy(), slices)
        assert "#" not in sample.item
    (part,) = NiftiReader(path=path, whole=True, slices=(2, 8, 3), percentiles=(0, 100)).read()
    np.testing.assert_array_equal(part.image[0].double().numpy(), stack(NiftiReader(path=path, **FULL))[[2, 5]])
    with pytest.raises(DataError, match="has 8 slices, none of them in"):
        list(NiftiReader(path=path, whole=True, slices=(20, 30, 1)).read())


def test_whole_volumes_are_spread_over_classes_and_resized(tmp_path: Path) -> None:
    for name in ("sick", "well"):
        for number in range(3):
            write(tmp_path / name / f"{number}.nii", VOLUME)
    reader = NiftiReader(path=tmp_path, whole=True)
    samples = list(reader.read(maximum=2))
    assert [sample.label for sample in samples] == [0, 1]
    assert len({sample.patient for sample in reader.read()}) == 6
    dataset = load_dataset(reader, name="heads", size=(6, 5, 4), channels=1)
    assert dataset.images.shape == (6, 1, 6, 5, 4)
