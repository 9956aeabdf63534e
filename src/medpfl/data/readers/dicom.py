"""DICOM files: nothing but pixels, a label and pseudonyms leaves this module."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from pydicom import dcmread
from pydicom.config import logger as pydicom_logger
from pydicom.dataset import FileDataset
from pydicom.errors import BytesLengthException, InvalidDicomError
from torch import Tensor

from medpfl.core.config import STRICT
from medpfl.core.domain import Sample
from medpfl.core.errors import DataError
from medpfl.data.base import READERS, Reader, pick
from medpfl.data.dicom_pixels import Window, frame_values, install_hint, undecodable
from medpfl.data.listing import Found, classes_of, find_files
from medpfl.data.pixels import to_image
from medpfl.data.pseudonyms import derive_key, patient_key, pseudonym

_SUFFIXES = (".dcm", ".dicom", ".ima")

_HEADER = [
    "SOPClassUID",
    "PatientID",
    "PatientName",
    "StudyInstanceUID",
    "InstitutionName",
    "Rows",
    "Columns",
    "NumberOfFrames",
]

_BROKEN = (
    InvalidDicomError,
    BytesLengthException,
    OSError,
    ValueError,
    EOFError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    OverflowError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
)


@plain_dataclass(frozen=True)
class _Header:
    """What the reader keeps of a file's header; the texts stay in this module."""

    found: Found
    frames: int
    patient: str
    study: str
    site: str
    names: frozenset[str]


@READERS.register(
    "dicom",
    summary="DICOM files of any modality, gray or color, one or many frames, with rescale and window",
    limits="no video; JPEG-LS, lossless JPEG and HTJ2K need plugins of pydicom; overlays are not drawn",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class DicomReader(Reader):
    """Reads the frames of every DICOM file under `path`, in the order of the file names.

    Folders may hold other files: those that are not DICOM, or have no pixels, are left out and counted. Gray pixels
    go through modality LUT or rescale, then the window. The item is a keyed pseudonym of the file and the frame; the
    patient one of the PatientID, else of the study, else of the file. Names, ids and dates never leave the reader.
    """

    path: Annotated[Path, Field(description="a DICOM file, or a folder that is searched with its sub-folders")]
    pattern: Annotated[str, Field(description="which files, for instance '*.dcm'")] = "*"
    files: Annotated[tuple[str, ...], Field(description="these files of the folder only; default: all")] = ()
    labels: Annotated[
        Literal["folder", "none"],
        Field(description="class from the first sub-folder; none for trees of patients and studies"),
    ] = "folder"
    patients: Annotated[
        Literal["id", "study", "file"],
        Field(description="who belongs together: id (PatientID, else study), study (where all have one id), file"),
    ] = "id"
    frames: Annotated[Literal["all", "first", "middle"], Field(description="which frames of a multi-frame file")] = (
        "all"
    )
    window: Annotated[
        Window, Field(description="auto (the file's, else percentiles), voi, percentile, or [center, width]")
    ] = "auto"
    percentiles: Annotated[
        tuple[float, float], Field(description="intensities at these percentiles become black and white")
    ] = (0.5, 99.5)

    def __post_init__(self) -> None:
        low, high = self.percentiles
        if not 0 <= low < high <= 100:
            raise ValueError(f"percentiles {list(self.percentiles)}: expected two rising numbers from 0 to 100")
        if isinstance(self.window, tuple) and self.window[1] <= 0:
            raise ValueError(f"window {list(self.window)}: expected [center, width] with a positive width")

    def class_names(self) -> tuple[str, ...]:
        """Names of the sub-folders with images, sorted."""
        headers, _ = self._headers()
        return self._classes(headers)[0]

    def notes(self) -> tuple[str, ...]:
        """How many files of the folder were left out, and why."""
        return self._headers()[1]

    def read(self, maximum: int | None = None) -> Iterator[Sample]:
        """Frames in the order of the file names."""
        headers, _ = self._headers()
        _, labels = self._classes(headers)
        key = derive_key(header.found.path for header in headers)
        frames = [
            (header, frame, label)
            for header, label in zip(headers, labels, strict=True)
            for frame in self._frames(header.frames)
        ]
        opened: tuple[Path, FileDataset] | None = None
        for header, frame, label in pick(frames, [label for *_, label in frames], maximum):
            path = header.found.path
            if opened is None or opened[0] != path:
                opened = (path, _open(path))
            name = pseudonym(key, "item", header.found.name)
            patient = {"id": header.patient or header.study, "study": header.study, "file": ""}[self.patients]
            yield Sample(
                image=self._image(opened[1], frame, path),
                label=label,
                item=f"{name}#{frame}",
                patient=patient_key(patient) if patient else patient_key("", within=path),
                site=pseudonym(key, "site", header.site) if header.site else None,
            )

    def _frames(self, count: int) -> range:
        return {"all": range(count), "first": range(1), "middle": range(count // 2, count // 2 + 1)}[self.frames]

    def _headers(self) -> tuple[list[_Header], tuple[str, ...]]:
        """Headers of the files with pixels, and what was left out."""
        found = find_files(self.path, pattern=self.pattern, names=self.files)
        named = self.path.is_file() or bool(self.files)
        headers: list[_Header] = []
        foreign = without_pixels = 0
        for file in found:
            if not (named or file.name.lower().endswith(_SUFFIXES) or _has_prefix(file.path)):
                foreign += 1
                continue
            header = _read_header(file)
            if header is not None:
                headers.append(header)
            elif named:
                raise DataError(f"'{file.path}' is a DICOM file without pixels; name image files only")
            else:
                without_pixels += 1
        if not headers:
            raise DataError(f"'{self.path}' holds no DICOM image among its {len(found)} files; point at the images")
        notes = []
        if foreign:
            notes.append(f"{foreign} files that are not DICOM were left out.")
        if without_pixels:
            notes.append(f"{without_pixels} DICOM files without pixels were left out.")
        return headers, tuple(notes)

    def _classes(self, headers: list[_Header]) -> tuple[tuple[str, ...], list[int]]:
        """Classes from sub-folders, refused where a sub-folder is called like a patient."""
        names, labels = classes_of([header.found for header in headers], labels=self.labels, root=self.path)
        for header in headers:
            folder = header.found.folder
            if self.labels == "folder" and folder is not None and _plain(folder) in header.names:
                raise DataError(
                    f"'{self.path}': its sub-folders are called like patients, so they are no classes; set labels: none"
                )
        return names, labels

    def _image(self, dataset: FileDataset, frame: int, path: Path) -> Tensor:
        where = f"'{path}'"
        with _reading(path):
            reason = undecodable(dataset)
        if reason is not None:
            raise DataError(f"{where}: {reason}")
        try:
            with _reading(path):
                return to_image(frame_values(dataset, frame, self.window, self.percentiles, where), where)
        except _Unreadable as error:
            if not dataset.file_meta.TransferSyntaxUID.is_encapsulated:
                raise
            syntax = dataset.file_meta.TransferSyntaxUID.name
            raise DataError(
                f"{error}, or {syntax} in a form that needs another plugin: {install_hint(dataset)}"
            ) from None


class _Unreadable(DataError):
    """A file that pydicom cannot read."""


def _open(path: Path) -> FileDataset:
    with _reading(path):
        dataset = dcmread(path)
        if "TransferSyntaxUID" not in dataset.file_meta:
            raise DataError(f"'{path}' does not say its transfer syntax; it is corrupt or no DICOM image")
        if "PixelData" not in dataset and "FloatPixelData" not in dataset and "DoubleFloatPixelData" not in dataset:
            raise DataError(f"'{path}' has no pixel data; it is truncated")
        return dataset


def _has_prefix(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror}") from None


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what a broken file makes pydicom raise into one message; its warnings quote values and are dropped."""
    logging_before = pydicom_logger.disabled
    try:
        pydicom_logger.disabled = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except InvalidDicomError:
        raise DataError(f"'{path}' is not a DICOM file (no 'DICM' prefix); remove it or set a pattern") from None
    except _BROKEN as error:
        raise _Unreadable(
            f"'{path}' is not a readable DICOM image ({type(error).__name__}); it is corrupt or truncated"
        ) from None
    finally:
        pydicom_logger.disabled = logging_before


def _read_header(file: Found) -> _Header | None:
    """The header of a file with pixels, None for DICOM files of other kinds. Raises DataError for a broken file."""
    with _reading(file.path):
        header = dcmread(file.path, stop_before_pixels=True, specific_tags=[*_HEADER])
        said = header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID")
        if not said and "Rows" not in header:
            raise DataError(f"'{file.path}' does not say what it holds; it is truncated or corrupt")
        keyword = getattr(said, "keyword", "")
        is_image = "Rows" in header or "ImageStorage" in keyword or keyword == "SegmentationStorage"
        if not is_image:
            return None
        frames = int(header.get("NumberOfFrames") or 1)
        if frames < 1 or int(header.Rows) < 1 or int(header.Columns) < 1:
            raise DataError(f"'{file.path}' has size {header.Rows}x{header.Columns}x{frames}; remove it")
        patient, study = (str(header.get(name) or "").strip() for name in ("PatientID", "StudyInstanceUID"))
        site = str(header.get("InstitutionName") or "").strip()
        name = str(header.get("PatientName") or "")
    return _Header(
        found=file,
        frames=frames,
        patient=patient,
        study=study,
        site=site,
        names=frozenset({_plain(patient), _plain(name), _plain("".join(reversed(name.split("^"))))} - {""}),
    )


def _plain(text: str) -> str:
    return "".join(character for character in text.casefold() if character.isalnum())
