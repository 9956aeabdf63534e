"""Masks from phantoms, folders and NIfTI: classes, sizes, orientation, resizing, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as annotated_nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from medpfl.core.errors import DataError
from medpfl.data import FolderReader, NiftiReader, PhantomReader, Reader, load_dataset
from medpfl.data.resizing import Aspect, resize, resize_mask

nibabel: Any = annotated_nibabel  # annotated in parts only


def save(path: Path, values: np.ndarray, mode: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    (image.convert(mode) if mode else image).save(path)
    return path


def read_one(reader: Reader) -> torch.Tensor:
    (sample,) = reader.read()
    assert sample.mask is not None
    assert sample.mask.dtype == torch.int64
    return sample.mask


SQUARE = np.zeros((12, 16), dtype=np.uint8)
SQUARE[2:6, 3:9] = 1
GRAY = np.random.default_rng(0).integers(0, 256, (12, 16), dtype=np.uint8)


@pytest.mark.parametrize(("kind", "region"), [("brain", "tumor"), ("chest", "lungs"), ("skin", "lesion")])
def test_phantoms_know_what_they_drew(kind: Any, region: str) -> None:
    reader = PhantomReader(kind=kind, count=24, resolution=64)
    assert reader.mask_names() == ("background", region)
    shares = []
    for sample in reader.read():
        assert sample.mask is not None
        assert sample.mask.shape == (64, 64)
        inside = sample.mask.bool()
        shares.append(float(inside.float().mean()))
        healthy = kind == "brain" and sample.label == reader.class_names().index("no_tumor")
        assert bool(inside.any()) != healthy
        if kind == "skin":  # a lesion is darker than the skin around it
            assert float(sample.image.mean(0)[inside].mean()) < float(sample.image.mean(0)[~inside].mean())
        if kind == "chest":  # lungs are darker than the rest of the body
            assert float(sample.image[0][inside].mean()) < float(sample.image[0][~inside][200:].median())
    assert 0.005 < float(np.mean(shares)) < 0.45


def test_phantom_masks_do_not_depend_on_the_resolution() -> None:
    small = PhantomReader(kind="skin", count=4, resolution=48).read()
    large = PhantomReader(kind="skin", count=4, resolution=144).read()
    for one, other in zip(small, large, strict=True):
        assert one.mask is not None
        assert other.mask is not None
        assert float((one.mask != resize_mask(other.mask, (48, 48))).float().mean()) < 0.02


@pytest.mark.parametrize("values", [SQUARE, 255 * SQUARE, np.stack([255 * SQUARE] * 3, axis=-1)])
def test_two_valued_masks_of_a_folder(values: np.ndarray, tmp_path: Path) -> None:
    save(tmp_path / "images" / "a" / "x.png", GRAY)
    save(tmp_path / "masks" / "a" / "x.png", values)
    reader = FolderReader(path=tmp_path / "images", mask_path=tmp_path / "masks")
    assert reader.mask_names() == ("background", "foreground")
    assert torch.equal(read_one(reader), torch.from_numpy(SQUARE.astype(np.int64)))


def test_named_classes_palettes_and_jpeg_images(tmp_path: Path) -> None:
    values = SQUARE * 1
    values[8:, :] = 2
    image = Image.fromarray(values, mode="P")
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    save(tmp_path / "images" / "x.jpg", GRAY)
    (tmp_path / "masks").mkdir()
    image.save(tmp_path / "masks" / "x.png")
    names = ("background", "edema", "tumor")
    reader = FolderReader(path=tmp_path / "images", mask_path=tmp_path / "masks", mask_classes=names)
    assert torch.equal(read_one(reader), torch.from_numpy(values.astype(np.int64)))


def test_masks_inside_the_folder_are_no_images(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(tmp_path / name / "x.png", GRAY)
        save(tmp_path / "masks" / name / "x.png", SQUARE)
    reader = FolderReader(path=tmp_path, mask_path=tmp_path / "masks")
    assert reader.class_names() == ("a", "b")
    assert [sample.item for sample in reader.read()] == ["a/x.png", "b/x.png"]


def folder(tmp_path: Path, mask: np.ndarray | None, **settings: Any) -> FolderReader:
    save(tmp_path / "images" / "x.png", GRAY)
    (tmp_path / "masks").mkdir()
    if mask is not None:
        save(tmp_path / "masks" / "x.png", mask)
    return FolderReader(path=tmp_path / "images", mask_path=tmp_path / "masks", **settings)


@pytest.mark.parametrize(
    ("mask", "settings", "message"),
    [
        (None, {}, "'x.png' has no mask: there is no file .*masks/x.png'"),
        (SQUARE[:6], {}, "item 'x.png': the mask has size 6x16 and the image 12x16"),
        (SQUARE * 7 + (GRAY > 128) * np.uint8(3), {}, "mask value 3 is no class; expected 0 to 1"),
        (SQUARE * 3, {"mask_classes": ("none", "left", "right")}, "mask value 3 is no class; expected 0 to 2"),
        (np.stack([SQUARE, SQUARE, SQUARE * 9], axis=-1), {}, "is a color image; a mask holds class numbers"),
    ],
)
def test_masks_that_do_not_fit_are_refused(
    mask: np.ndarray | None, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset(folder(tmp_path, mask, **settings), name="x", size=12, channels=1)


def test_a_jpeg_or_broken_file_is_no_mask(tmp_path: Path) -> None:
    reader = folder(tmp_path, None)
    Image.fromarray(SQUARE).save(tmp_path / "masks" / "x.png", format="JPEG")
    with pytest.raises(DataError, match=r"x\.png' is not a readable PNG file"):
        list(reader.read())


def test_classes_without_masks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mask_classes without mask_path"):
        FolderReader(path=tmp_path, mask_classes=("a", "b"))
    with pytest.raises(ValueError, match="at least one class more"):
        FolderReader(path=tmp_path, mask_path=tmp_path, mask_classes=("a",))


@pytest.mark.parametrize("aspect", ["squash", "crop", "pad"])
@pytest.mark.parametrize("size", [(12, 16), (24, 24), (9, 7), (30, 11)])
def test_masks_are_resized_where_their_images_are_and_never_between_classes(
    aspect: Aspect, size: tuple[int, int]
) -> None:
    mask = torch.zeros(40, 56, dtype=torch.int64)
    mask[8:24, 12:40] = 5
    resized = resize_mask(mask, size, aspect)
    assert resized.shape == size
    assert set(resized.flatten().tolist()) <= {0, 5}
    image = resize((mask == 5).float()[None], size, aspect)[0]
    assert bool(((image > 0.85) <= (resized == 5)).all())
    assert bool(((image < 0.15) <= (resized == 0)).all())


def test_every_second_pixel_remains_at_half_the_size() -> None:
    mask = torch.arange(64).reshape(8, 8)
    assert torch.equal(resize_mask(mask, (4, 4)), mask[1::2, 1::2])
    assert torch.equal(resize_mask(mask, (8, 8)), mask)


def volume(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.array(
        [[-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=float
    )  # towards left, posterior
    nibabel.save(nibabel.Nifti1Image(values, affine), path)
    return path


LABELS = np.zeros((12, 11, 13), dtype=np.int16)
LABELS[2:5, 6:9, 3:8] = 1
LABELS[3, 7, 4] = 2
SCAN = (100 * LABELS + 10).astype(np.int16)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("whole", [False, True])
def test_label_volumes_lie_as_their_scans_do(axis: Any, whole: bool, tmp_path: Path) -> None:
    volume(tmp_path / "scans" / "a.nii.gz", SCAN)
    volume(tmp_path / "labels" / "a.nii", LABELS)
    reader = NiftiReader(
        path=tmp_path / "scans",
        mask_path=tmp_path / "labels",
        mask_classes=("background", "edema", "core"),
        axis=axis,
        whole=whole,
        slices=(2, 9, 1),
        percentiles=(0, 100),
        minimum_content=0.0,
    )
    samples = list(reader.read())
    assert len(samples) == (1 if whole else 7)
    seen = set()
    for sample in samples:
        assert sample.mask is not None
        brightness = torch.tensor([0.0, 0.5, 1.0])[sample.mask]
        torch.testing.assert_close(sample.image[0], brightness)
        seen |= set(sample.mask.flatten().tolist())
    assert seen == {0, 1, 2}


def test_label_volumes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    scan = volume(tmp_path / "a.nii.gz", SCAN)
    other = volume(tmp_path / "b.nii.gz", LABELS[:, :, 1:])
    with pytest.raises(DataError, match=r"has shape \(12, 11, 12\) and its volume \(12, 11, 13\)"):
        list(NiftiReader(path=scan, mask_path=other).read())
    halves = volume(tmp_path / "c.nii.gz", (LABELS * 0.5).astype(np.float32))
    with pytest.raises(DataError, match=r"mask value 0\.5 is no class"):
        list(NiftiReader(path=scan, mask_path=halves).read())


def test_a_data_set_keeps_masks_beside_images(tmp_path: Path) -> None:
    dataset = load_dataset(PhantomReader(kind="chest", count=6, resolution=48), name="c", size=24, channels=3)
    assert dataset.masks is not None
    assert dataset.masks.shape == (6, 24, 24)
    assert dataset.mask_names == ("background", "lungs")
    save(tmp_path / "x.png", GRAY)
    assert load_dataset(FolderReader(path=tmp_path), name="x", size=12, channels=1).masks is None
