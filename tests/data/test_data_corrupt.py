"""Broken files of every kind: one sentence that names the file, never another exception."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image
from pydicom.data import get_testdata_file

from medpfl.core.errors import DataError
from medpfl.data import DicomReader, FolderReader, MedMnistReader, NiftiReader, Reader, load_dataset

RANDOM = np.random.default_rng(0)


def picture(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(RANDOM.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def archive() -> bytes:
    buffer = io.BytesIO()
    arrays = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = RANDOM.integers(0, 256, (5, 8, 8), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.array([[0], [1], [0], [1], [1]], np.uint8)
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def volume(name: str) -> bytes:
    return (Path(nibabel.__file__).parent / "tests" / "data" / name).read_bytes()


def scan(name: str) -> bytes:
    return Path(str(get_testdata_file(name, download=False))).read_bytes()


FILES: dict[str, tuple[Callable[[], bytes], type[Reader]]] = {
    "a.png": (lambda: picture("PNG"), FolderReader),
    "a.jpg": (lambda: picture("JPEG"), FolderReader),
    "a.npz": (archive, MedMnistReader),
    "a.nii": (lambda: volume("functional.nii"), NiftiReader),
    "a.nii.gz": (lambda: volume("example_nifti2.nii.gz"), NiftiReader),
    "plain.dcm": (lambda: scan("MR_small.dcm"), DicomReader),
    "run_length.dcm": (lambda: scan("MR_small_RLE.dcm"), DicomReader),
    "jpeg.dcm": (lambda: scan("SC_rgb_small_odd_jpeg.dcm"), DicomReader),
    "palette.dcm": (lambda: scan("examples_palette.dcm"), DicomReader),
    "deflated.dcm": (lambda: scan("image_dfl.dcm"), DicomReader),
}


def load(path: Path, reader: type[Reader]) -> None:
    load_dataset(reader(path=path), name="d", size=16, channels=1)  # type: ignore[call-arg]


def message(path: Path, reader: type[Reader]) -> str | None:
    try:
        load(path, reader)
    except DataError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_truncated_files_are_named(name: str, share: float, tmp_path: Path) -> None:
    content, reader = FILES[name]
    data = content()
    path = tmp_path / name
    path.write_bytes(data)
    load(path, reader)
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(DataError) as caught:
        load(path, reader)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_raise_nothing_else(name: str, tmp_path: Path) -> None:
    content, reader = FILES[name]
    data = content()
    path = tmp_path / name
    random = np.random.default_rng(1)
    for _ in range(40):
        damaged = bytearray(data)
        reach = int(random.choice([200, 2000, len(data)]))
        for position in random.integers(0, min(reach, len(data)), int(random.choice([1, 4, 20]))):
            damaged[position] = random.integers(256)
        path.write_bytes(bytes(damaged))
        outcome = message(path, reader)
        assert outcome is None or str(path) in outcome or "data 'd'" in outcome


@pytest.mark.parametrize("name", FILES)
def test_other_content_under_the_name_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"<html>404 not found</html>" * 40)
    with pytest.raises(DataError, match=name):
        load(path, FILES[name][1])


def test_decompression_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (60, 60)).save(tmp_path / "a.png")
    for limit in (3000, 1000):  # Pillow warns above the limit and raises above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(DataError, match=rf"a\.png.*more than {limit} pixels.*decompression bomb"):
            load(tmp_path / "a.png", FolderReader)


def test_other_formats_under_a_png_name_are_refused(tmp_path: Path) -> None:
    Image.new("L", (6, 6)).save(tmp_path / "a.png", "BMP")
    with pytest.raises(DataError, match="unknown format"):
        load(tmp_path / "a.png", FolderReader)
