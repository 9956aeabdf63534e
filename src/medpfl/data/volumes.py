"""Volumes in canonical orientation from NIfTI files."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.imageglobals import logger as nibabel_logger
from nibabel.orientations import OrientationError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from medpfl.core.errors import DataError
from medpfl.data.pixels import FloatArray, check_values

_nibabel: Any = nibabel  # annotated in parts only

_BROKEN = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    TypeError,
    IndexError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    np.linalg.LinAlgError,
    ImageFileError,
    HeaderDataError,
    OrientationError,
    WrapStructError,
)


def load_volume(path: Path, number: int) -> FloatArray:
    """Volume `number` of a three- or four-axis NIfTI file as (x, y, z) towards right, anterior, superior (RAS+).

    Raises DataError that names the file if it is corrupt, truncated, no gray NIfTI volume, or has NaN or infinite
    voxels.
    """
    logging_before = nibabel_logger.disabled
    try:
        nibabel_logger.disabled = True  # it prints what it repairs in a header
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = _nibabel.load(path, mmap=False)
            _require_gray_volume(image, path)
            image = _nibabel.squeeze_image(image)
            if len(image.shape) == 4:
                _ = image.dataobj[-1, -1, -1, -1]  # a truncated file fails here, whichever volume is wanted
                image = image.slicer[..., _require_volume(number, image.shape[3], path)]
            values: FloatArray = _nibabel.as_closest_canonical(image).get_fdata(caching="unchanged")
    except _BROKEN as error:
        raise DataError(
            f"'{path}' is not a readable NIfTI file ({type(error).__name__}); it is corrupt, truncated or no volume"
        ) from None
    finally:
        nibabel_logger.disabled = logging_before
    check_values(values, f"'{path}'")
    return values


def _require_gray_volume(image: Any, path: Path) -> None:
    if not isinstance(image, nibabel.Nifti1Image):
        raise DataError(f"'{path}' holds {type(image).__name__}; expected a NIfTI volume with three or four axes")
    kind = image.get_data_dtype().kind  # type: ignore[no-untyped-call]
    if kind not in "iuf":
        raise DataError(f"'{path}' holds {'complex' if kind == 'c' else 'color'} voxels; expected plain numbers")
    axes = len(image.shape)
    while axes > 3 and image.shape[axes - 1] == 1:
        axes -= 1
    if axes not in (3, 4) or 0 in image.shape:
        raise DataError(f"'{path}' has shape {image.shape}; expected three or four axes of at least one voxel")


def _require_volume(number: int, count: int, path: Path) -> int:
    if number >= count:
        raise DataError(f"'{path}' has {count} volumes; volume {number} was asked for and the last one is {count - 1}")
    return number
