"""The DICOM reader against pydicom's own processing and closed forms."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.pixels.processing import apply_modality_lut, apply_windowing, convert_color_space
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

from medpfl.core.errors import DataError
from medpfl.data import DicomReader


def example(name: str) -> Path:
    path = get_testdata_file(name, download=False)
    assert path is not None, name
    return Path(str(path))


def image(path: Path, **options: object) -> np.ndarray:
    (sample,) = DicomReader(path=path, **options).read()  # type: ignore[arg-type]
    return sample.image.double().numpy()


def write(path: Path, pixels: np.ndarray, **attributes: object) -> Path:
    """A gray file with 16-bit pixels (frames, rows, columns) or (rows, columns)."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = MRImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID = MRImageStorage
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    if pixels.ndim == 3:
        dataset.NumberOfFrames = len(pixels)
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.dtype.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes()
    for name, value in attributes.items():
        setattr(dataset, name, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


RAMP = np.arange(0, 1200, 10, dtype=np.uint16).reshape(10, 12)


def windowed_by_pydicom(dataset: Dataset) -> np.ndarray:
    """pydicom's window, whose output range is that of the stored or rescaled integers, scaled to [0, 1]."""
    values = apply_windowing(apply_modality_lut(dataset.pixel_array, dataset), dataset)
    top = 2.0**dataset.BitsStored
    low, high = (-top / 2, top / 2 - 1) if dataset.PixelRepresentation else (0.0, top - 1)
    slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
    return np.asarray((values - (low * slope + intercept)) / ((high - low) * slope))


@pytest.mark.parametrize("name", ["MR_small.dcm", "693_J2KI.dcm", "J2K_pixelrep_mismatch.dcm", "examples_overlay.dcm"])
def test_rescale_and_window_agree_with_pydicom(name: str) -> None:
    expected = windowed_by_pydicom(pydicom.dcmread(example(name)))
    np.testing.assert_allclose(image(example(name), window="voi")[0], expected, atol=1e-6)
    np.testing.assert_array_equal(image(example(name), window="voi"), image(example(name)))


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(("center", "width"), [(500.0, 300.0), (40.5, 1.0), (-20.0, 2000.0)])
def test_window_functions_agree_with_pydicom(function: str, center: float, width: float, tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", RAMP, WindowCenter=center, WindowWidth=width, VOILUTFunction=function)
    np.testing.assert_allclose(image(path)[0], windowed_by_pydicom(pydicom.dcmread(path)), atol=1e-6)


def test_own_window_is_applied_to_rescaled_values(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", RAMP, RescaleSlope=2, RescaleIntercept=-1000, WindowCenter=0, WindowWidth=10)
    expected = np.clip(((RAMP * 2.0 - 1000) - (40 - 0.5)) / (400 - 1) + 0.5, 0, 1)
    np.testing.assert_allclose(image(path, window=(40, 400))[0], expected, atol=1e-6)


def test_percentile_window_is_the_one_without_voi(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", RAMP)
    low, high = np.percentile(RAMP, [10, 90])
    expected = np.clip((RAMP - low) / (high - low), 0, 1)
    np.testing.assert_allclose(image(path, percentiles=(10, 90))[0], expected, atol=1e-6)
    with pytest.raises(DataError, match="no VOI window"):
        image(path, window="voi")


def test_padding_does_not_stretch_the_percentile_window(tmp_path: Path) -> None:
    padded = RAMP.astype(np.int16)
    padded[:3] = -2000
    path = write(tmp_path / "a.dcm", padded, PixelPaddingValue=-2000)
    inside = padded[3:]
    expected = np.clip((padded - inside.min()) / (inside.max() - inside.min()), 0, 1)
    np.testing.assert_allclose(image(path, percentiles=(0, 100))[0], expected, atol=1e-6)


def test_inverted_film() -> None:
    dataset = pydicom.dcmread(example("dicomdirtests/77654033/CR1/6154"))
    assert dataset.PhotometricInterpretation == "MONOCHROME1"
    np.testing.assert_allclose(
        image(example("dicomdirtests/77654033/CR1/6154"))[0], 1 - windowed_by_pydicom(dataset), atol=1e-6
    )


def lut_item(values: np.ndarray, first: int) -> Dataset:
    item = Dataset()
    item.LUTDescriptor = [len(values), first, 16]
    item.LUTData = values.astype(np.uint16).tolist()
    item["LUTData"].VR = "US"
    item["LUTDescriptor"].VR = "US"
    return item


def test_modality_lut(tmp_path: Path) -> None:
    table = np.linspace(0, 1200, 1200) ** 2 / 1200
    item = lut_item(table, 0)
    item.ModalityLUTType = "US"
    path = write(tmp_path / "a.dcm", RAMP, ModalityLUTSequence=Sequence([item]))
    expected = table.astype(np.uint16)[RAMP].astype(float)
    np.testing.assert_allclose(image(path, window=(600.5, 1201))[0], np.clip(expected / 1200, 0, 1), atol=1e-6)


def test_voi_lut(tmp_path: Path) -> None:
    table = np.linspace(0, 65535, 1001)[::-1]
    path = write(tmp_path / "a.dcm", RAMP, VOILUTSequence=Sequence([lut_item(table, 100)]))
    expected = table.astype(np.uint16)[np.clip(RAMP.astype(int) - 100, 0, 1000)] / 65535
    np.testing.assert_allclose(image(path, window="voi")[0], expected, atol=1e-6)


def test_functional_groups_of_enhanced_files(tmp_path: Path) -> None:
    def group(slope: float, center: float) -> Dataset:
        transformation, voi, frame = Dataset(), Dataset(), Dataset()
        transformation.RescaleSlope, transformation.RescaleIntercept = slope, -5
        voi.WindowCenter, voi.WindowWidth = center, 1001
        frame.PixelValueTransformationSequence = Sequence([transformation])
        frame.FrameVOILUTSequence = Sequence([voi])
        return frame

    path = write(
        tmp_path / "a.dcm",
        np.stack([RAMP, RAMP]),
        PerFrameFunctionalGroupsSequence=Sequence([group(1, 500.5), group(3, 700.5)]),
    )
    first, second = (sample.image[0].double().numpy() for sample in DicomReader(path=path).read())
    np.testing.assert_allclose(first, np.clip((RAMP - 5.0) / 1000, 0, 1), atol=1e-6)
    np.testing.assert_allclose(second, np.clip((RAMP * 3.0 - 5 - 200) / 1000, 0, 1), atol=1e-6)


@pytest.mark.parametrize("name", ["RLE", "jp2klossless", "implicit", "bigendian", "expb", "padded"])
def test_transfer_syntaxes_give_the_same_pixels(name: str) -> None:
    np.testing.assert_array_equal(image(example(f"MR_small_{name}.dcm")), image(example("MR_small.dcm")))


def test_color() -> None:
    path = example("examples_rgb_color.dcm")
    dataset = pydicom.dcmread(path)
    stored = np.frombuffer(dataset.PixelData, np.uint8).reshape(240, 320, 3)
    np.testing.assert_allclose(image(path), stored.transpose(2, 0, 1) / 255, atol=1e-7)


def test_luma_chroma_becomes_rgb() -> None:
    path = example("SC_ybr_full_422_uncompressed.dcm")
    dataset = pydicom.dcmread(path)
    pairs = np.frombuffer(dataset.PixelData, np.uint8).reshape(100, 50, 4)
    full = np.stack([pairs[..., :2].reshape(100, 100), *(np.repeat(pairs[..., c], 2, axis=1) for c in (2, 3))], axis=-1)
    expected = convert_color_space(full, "YBR_FULL", "RGB")
    np.testing.assert_allclose(image(path), expected.transpose(2, 0, 1) / 255, atol=1e-7)


def test_color_with_16_and_32_bits() -> None:
    eight = image(example("SC_rgb_rle.dcm"))
    for name in ("SC_rgb_rle_16bit.dcm", "SC_rgb_rle_32bit.dcm"):
        np.testing.assert_allclose(image(example(name)), eight, atol=1 / 255)


def test_palette_color() -> None:
    path = example("examples_palette.dcm")
    dataset = pydicom.dcmread(path)
    tables = [
        np.frombuffer(dataset[f"{name}PaletteColorLookupTableData"].value, np.uint16)
        for name in ("Red", "Green", "Blue")
    ]
    entries, first, bits = dataset.RedPaletteColorLookupTableDescriptor
    index = np.clip(dataset.pixel_array.astype(int) - first, 0, entries - 1)
    expected = np.stack([table[index] for table in tables]) / (2**bits - 1)
    np.testing.assert_allclose(image(path), expected, atol=1e-6)


def test_frames() -> None:
    path = example("examples_ybr_color.dcm")
    frames = pydicom.dcmread(path).pixel_array
    samples = list(DicomReader(path=path).read())
    assert len(samples) == 30
    assert len({sample.patient for sample in samples}) == 1
    name = samples[0].item.split("#")[0]
    assert [sample.item for sample in samples] == [f"{name}#{frame}" for frame in range(30)]
    for frame in (0, 29):
        expected = frames[frame].transpose(2, 0, 1) / 255
        np.testing.assert_allclose(samples[frame].image.double().numpy(), expected, atol=1e-7)
    assert [sample.item for sample in DicomReader(path=path, frames="first").read()] == [f"{name}#0"]
    assert [sample.item for sample in DicomReader(path=path, frames="middle").read()] == [f"{name}#15"]


def test_one_bit_masks() -> None:
    path = example("liver_1frame.dcm")
    np.testing.assert_array_equal(image(path)[0], pydicom.dcmread(path).pixel_array)


def test_folder_leaves_out_what_is_no_image_and_counts_it(tmp_path: Path) -> None:
    for name in ("MR_small.dcm", "rtplan.dcm", "test-SR.dcm"):
        shutil.copy(example(name), tmp_path / name)
    shutil.copy(example("CT_small.dcm"), tmp_path / "no_suffix")
    (tmp_path / "notes.txt").write_text("hello")
    reader = DicomReader(path=tmp_path)
    assert len(list(reader.read())) == 2
    assert reader.notes() == (
        "1 files that are not DICOM were left out.",
        "2 DICOM files without pixels were left out.",
    )
    assert len(list(DicomReader(path=tmp_path, pattern="MR*").read())) == 1
    assert len(list(DicomReader(path=tmp_path, files=("no_suffix",)).read())) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("test-SR.dcm", "without pixels"),
        ("zipMR.gz", "not a DICOM file"),
        ("MR_truncated.dcm", "corrupt or truncated"),
        ("JPEGLSNearLossless_08.dcm", "JPEG-LS Lossy .* needs a plugin; install pylibjpeg"),
        ("SC_rgb_jpeg_gdcm.dcm", "JPEG Lossless.* needs a plugin; install pylibjpeg.*libjpeg"),
        ("JPEG-lossy.dcm", "JPEG Extended .* needs another plugin: install pylibjpeg"),
    ],
)
def test_what_cannot_be_read_is_said(name: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        list(DicomReader(path=example(name)).read())
    assert name in str(caught.value)


def test_unknown_photometric_interpretation_and_bad_window(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.dcm.*HSV is not supported"):
        image(write(tmp_path / "a.dcm", RAMP, PhotometricInterpretation="HSV"))
    with pytest.raises(DataError, match=r"b\.dcm.*width 0"):
        image(write(tmp_path / "b.dcm", RAMP, WindowCenter=10, WindowWidth=0))


def test_missing_pixels_are_a_truncated_file(tmp_path: Path) -> None:
    dataset = pydicom.dcmread(example("MR_small.dcm"))
    del dataset.PixelData
    dataset.save_as(tmp_path / "a.dcm")
    with pytest.raises(DataError, match=r"a\.dcm.*no pixel data"):
        list(DicomReader(path=tmp_path).read())


def test_floating_point_pixels_with_nan_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", RAMP)
    dataset = pydicom.dcmread(path)
    values = RAMP.astype(np.float32)
    values[2, 3] = np.nan
    del dataset.PixelData
    dataset.FloatPixelData = values.tobytes()
    dataset.BitsAllocated = 32
    dataset.save_as(path)
    with pytest.raises(DataError, match=r"a\.dcm.*1 of 120 pixels are NaN"):
        list(DicomReader(path=path).read())


def test_constant_frames_are_black(tmp_path: Path) -> None:
    np.testing.assert_array_equal(image(write(tmp_path / "a.dcm", np.full((4, 5), 700, np.uint16))), 0)


def test_sub_folders_are_classes(tmp_path: Path) -> None:
    write(tmp_path / "tumor" / "1.dcm", RAMP, PatientID="A")
    write(tmp_path / "healthy" / "x" / "2.dcm", RAMP, PatientID="B")
    reader = DicomReader(path=tmp_path)
    assert reader.class_names() == ("healthy", "tumor")
    assert [sample.label for sample in reader.read()] == [0, 1]
    assert DicomReader(path=tmp_path, labels="none").class_names() == ("unlabeled",)


@pytest.mark.parametrize("folder", ["PAT-17", "Doe_Jane", "jane doe"])
def test_sub_folders_named_after_patients_are_no_classes(folder: str, tmp_path: Path) -> None:
    write(tmp_path / folder / "1.dcm", RAMP, PatientID="PAT17", PatientName="Doe^Jane")
    with pytest.raises(DataError, match="labels: none"):
        DicomReader(path=tmp_path).class_names()
    (sample,) = DicomReader(path=tmp_path, labels="none").read()
    assert sample.label == 0


def pseudonyms(folder: Path) -> dict[str, tuple[str | None, str | None]]:
    return {sample.item: (sample.patient, sample.site) for sample in DicomReader(path=folder).read()}


def test_pseudonyms_group_patients_and_depend_on_the_files(tmp_path: Path) -> None:
    for number, patient in enumerate(("A", "A", "B")):
        write(tmp_path / "one" / f"{number}.dcm", RAMP + number, PatientID=patient, InstitutionName="Clinic")
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    assert pseudonyms(tmp_path / "one") == pseudonyms(tmp_path / "copy")
    (a, site), (also_a, _), (b, _) = pseudonyms(tmp_path / "one").values()
    assert a == also_a != b
    assert site not in (None, "Clinic")
    write(tmp_path / "copy" / "3.dcm", RAMP, PatientID="A")
    assert not set(pseudonyms(tmp_path / "one")) & set(pseudonyms(tmp_path / "copy"))


def test_patients_without_id_are_grouped_by_study(tmp_path: Path) -> None:
    study = generate_uid()
    for number, uid in enumerate((study, study, generate_uid())):
        write(tmp_path / f"{number}.dcm", RAMP, StudyInstanceUID=uid)
    first, second, third = (sample.patient for sample in DicomReader(path=tmp_path).read())
    assert first == second != third


def test_patients_can_be_studies_or_files(tmp_path: Path) -> None:
    study = generate_uid()
    for number, uid in enumerate((study, study, generate_uid())):
        write(tmp_path / f"{number}.dcm", np.stack([RAMP, RAMP]), StudyInstanceUID=uid, PatientID="ANONYMOUS")

    def count(patients: str) -> int:
        return len({sample.patient for sample in DicomReader(path=tmp_path, patients=patients).read()})  # type: ignore[arg-type]

    assert [count(patients) for patients in ("id", "study", "file")] == [1, 2, 3]


def test_warnings_of_pydicom_do_not_leak_values(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.dcm", RAMP, PatientID="SECRET-ID", PatientName="Doe^Jane", WindowCenter=5, WindowWidth=9)
    data = path.read_bytes().replace(b"SECRET-ID", b"SECR\\T\x80ID")
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(DicomReader(path=path).read())
    assert not caplog.records


def test_options_are_checked() -> None:
    for options in ({"percentiles": (90, 10)}, {"window": (40, 0)}, {"window": "brain"}, {"frames": "last"}):
        with pytest.raises(ValueError):
            DicomReader(path=Path("x"), **options)
