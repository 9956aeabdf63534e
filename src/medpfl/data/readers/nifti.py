"""NIfTI volumes, whole or as slices along an anatomical axis."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from medpfl.core.config import STRICT
from medpfl.core.domain import Sample
from medpfl.core.errors import DataError
from medpfl.data.base import READERS, Reader, spread_evenly
from medpfl.data.listing import Found, classes_of, find_files
from medpfl.data.masks import TWO_CLASSES, check_settings, class_numbers, mask_file
from medpfl.data.pixels import Array, FloatArray, apply_window, percentile_window, to_image, to_volume
from medpfl.data.pseudonyms import derive_key, patient_key, pseudonym
from medpfl.data.volumes import load_volume

_BIDS_SUBJECT = re.compile(r"(?:^|/)(sub-[A-Za-z0-9]+)")

_VISIBLE = 0.1


@READERS.register(
    "nifti",
    summary="NIfTI volumes (.nii, .nii.gz), whole or as slices along an anatomical axis, in canonical (RAS+) orientation",
    limits="no color or complex volumes; voxels are taken as square, or cubes",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class NiftiReader(Reader):
    """Reads slices of every volume under `path`, in the order of the file names and along the axis.

    With `whole`, each volume is one image (1, depth, height, width): the chosen slices one behind the other, whatever
    their content. Volumes are turned to the closest canonical orientation; a slice lies with anterior (axis 2) or superior (axes
    0 and 1) up. Intensities between two percentiles of the volume become [0, 1]. The item is a keyed pseudonym and
    the slice, the patient a pseudonym of the file, or of the BIDS subject (`sub-01`) in its name.
    """

    path: Annotated[Path, Field(description="a .nii or .nii.gz file, or a folder with such files")]
    pattern: Annotated[str, Field(description="which files, for instance '*_T1w.nii.gz'")] = "*"
    files: Annotated[tuple[str, ...], Field(description="these files of the folder only; default: all")] = ()
    labels: Annotated[Literal["folder", "none"], Field(description="class from the first sub-folder, or none")] = (
        "folder"
    )
    whole: Annotated[bool, Field(description="each volume as one three-dimensional image instead of its slices")] = (
        False
    )
    axis: Annotated[Literal[0, 1, 2], Field(description="0 sagittal, 1 coronal, 2 axial slices")] = 2
    slices: Annotated[
        tuple[int | float, int | float, int],
        Field(description="start, stop, step; start and stop as slice numbers, or as fractions with a decimal point"),
    ] = (0.0, 1.0, 1)
    volume: Annotated[int, Field(ge=0, description="which volume of a 4D file")] = 0
    percentiles: Annotated[
        tuple[float, float], Field(description="intensities at these percentiles become black and white")
    ] = (0.5, 99.5)
    minimum_content: Annotated[
        float, Field(ge=0, le=1, description="leaves out slices with a smaller share of pixels above 0.1")
    ] = 0.05
    mask_path: Annotated[
        Path | None,
        Field(description="folder of label volumes, each with its volume's relative name, or the file for one"),
    ] = None
    mask_classes: Annotated[
        tuple[str, ...],
        Field(description="names of mask values 0, 1, ...; default: background and, for any other value, foreground"),
    ] = ()

    def __post_init__(self) -> None:
        check_settings(self.mask_path, self.mask_classes)
        start, stop, step = self.slices
        fractions = isinstance(start, float) or isinstance(stop, float)
        if step < 1 or not 0 <= start < stop or (fractions and stop > 1):
            raise ValueError(
                f"slices {list(self.slices)}: expected start, stop, step such as [10, 40, 2] or [0.2, 0.8, 2]"
            )
        low, high = self.percentiles
        if not 0 <= low < high <= 100:
            raise ValueError(f"percentiles {list(self.percentiles)}: expected two rising numbers from 0 to 100")

    def class_names(self) -> tuple[str, ...]:
        """Names of the sub-folders with volumes, sorted."""
        return self._listed()[1]

    def mask_names(self) -> tuple[str, ...]:
        """Given names, or background and foreground; none without masks."""
        return () if self.mask_path is None else self.mask_classes or TWO_CLASSES

    def read(self, maximum: int | None = None) -> Iterator[Sample]:
        """In the order of the file names and along the axis. With a maximum of slices, volumes are read twice."""
        files, _, labels = self._listed()
        found = False
        key = derive_key(file.path for file in files)
        if self.whole:
            for position in spread_evenly(labels, maximum):
                file = files[position]
                mask = self._mask(file)
                yield Sample(
                    self._whole(file.path),
                    labels[position],
                    pseudonym(key, "item", file.name),
                    _patient(file),
                    mask=None if mask is None else torch.stack([mask[number] for number in self._numbers(len(mask))]),
                )
            return
        chosen: list[list[int]] | None = None
        if maximum is not None:
            kept = [self._kept(self._volume(file.path)) for file in files]
            flat = [(position, number) for position, numbers in enumerate(kept) for number in numbers]
            wanted = [flat[entry] for entry in spread_evenly([labels[position] for position, _ in flat], maximum)]
            chosen = [[number for owner, number in wanted if owner == position] for position in range(len(files))]
        for position, (file, label) in enumerate(zip(files, labels, strict=True)):
            if chosen is not None and not chosen[position]:
                continue
            volume, mask = self._volume(file.path), self._mask(file)
            name = pseudonym(key, "item", file.name)
            for number in self._kept(volume) if chosen is None else chosen[position]:
                found = True
                image = to_image(self._slice(volume, number), f"'{file.path}', slice {number}")
                shown = None if mask is None else mask[number]
                yield Sample(image, label, f"{name}#{number}", _patient(file), mask=shown)
        if not found:
            raise DataError(
                f"'{self.path}': no slice of {list(self.slices)} has a share of {self.minimum_content:g} visible pixels; "
                "choose other slices, another axis or a smaller minimum_content"
            )

    def _listed(self) -> tuple[list[Found], tuple[str, ...], list[int]]:
        suffixes = (".nii", ".nii.gz")
        files = find_files(self.path, suffixes=suffixes, pattern=self.pattern, names=self.files, without=self.mask_path)
        names, labels = classes_of(files, labels=self.labels, root=self.path)
        if any(_BIDS_SUBJECT.search(name) for name in names):
            raise DataError(f"'{self.path}': its sub-folders are subjects, not classes; set labels: none")
        return files, names, labels

    def _volume(self, path: Path) -> FloatArray:
        """The volume (x, y, z) with its intensity window mapped to [0, 1]."""
        values = load_volume(path, self.volume)
        return apply_window(values, *percentile_window(values, self.percentiles))

    def _mask(self, file: Found) -> Tensor | None:
        """Classes (slices, *spatial) of all slices, each lying as the image does; None without masks."""
        if self.mask_path is None:
            return None
        path = mask_file(self.mask_path, file.name, (".nii.gz", ".nii"))
        labels, volume = load_volume(path, 0), load_volume(file.path, self.volume)
        if labels.shape != volume.shape:
            raise DataError(f"'{path}' has shape {labels.shape} and its volume {volume.shape}; expected the same")
        classes = class_numbers(labels, self.mask_names(), f"'{path}'").numpy()
        slices = [self._slice(classes, number) for number in range(classes.shape[self.axis])]
        return torch.from_numpy(np.ascontiguousarray(np.stack(slices)))

    def _whole(self, path: Path) -> Tensor:
        """The chosen slices as (1, depth, height, width)."""
        volume = self._volume(path)
        numbers = self._numbers(volume.shape[self.axis])
        if not numbers:
            raise DataError(f"'{path}' has {volume.shape[self.axis]} slices, none of them in {list(self.slices)}")
        return to_volume(np.stack([self._slice(volume, number) for number in numbers]), f"'{path}'")

    def _slice(self, volume: Array, number: int) -> Array:
        return np.rot90(np.take(volume, number, axis=self.axis))

    def _kept(self, volume: FloatArray) -> list[int]:
        """Numbers of the slices that are wanted and not nearly empty."""
        content = (volume > _VISIBLE).mean(axis=tuple(axis for axis in range(3) if axis != self.axis))
        return [number for number in self._numbers(len(content)) if content[number] >= self.minimum_content]

    def _numbers(self, count: int) -> range:
        start, stop, step = self.slices
        if isinstance(start, float) or isinstance(stop, float):
            start, stop = (int(round(bound * count, 6)) for bound in (start, stop))
        return range(count)[int(start) : int(stop) : step]


def _patient(file: Found) -> str:
    """The BIDS subject inside its data set, that is, beside the folders of the other subjects; else the file."""
    subject = _BIDS_SUBJECT.search(file.name)
    if subject is None:
        return patient_key("", within=file.path)
    beside = Path(file.path.as_posix().removesuffix(file.name[subject.start(1) :]))
    folder = next((folder for folder in (beside, *beside.parents) if folder.name == subject[1]), None)
    return patient_key(subject[1], within=beside if folder is None else folder.parent)
