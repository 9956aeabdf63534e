"""From a DICOM data set to one frame's pixels in [0, 1]: modality, window, photometric interpretation.

Attributes of enhanced multi-frame objects are looked up in their per-frame and shared functional groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi
from pydicom.pixels.utils import pixel_array

from medpfl.core.errors import DataError
from medpfl.data.pixels import Array, FloatArray, apply_window, check_values, percentile_window

Window = Literal["auto", "voi", "percentile"] | tuple[float, float]

GRAY = ("MONOCHROME1", "MONOCHROME2")
COLOR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "PALETTE COLOR")

_MODALITY = ("ModalityLUTSequence", "RescaleSlope", "RescaleIntercept")
_VOI = ("VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction")


def undecodable(dataset: Dataset) -> str | None:
    """Why no installed plugin decodes the transfer syntax, with what to install; None if one does."""
    syntax = dataset.file_meta.TransferSyntaxUID
    if not syntax.is_compressed or syntax.is_deflated:
        return None
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        return f"transfer syntax {syntax.name} is not supported; convert it to an uncompressed one"
    if decoder.is_available:
        return None
    return f"transfer syntax {syntax.name} needs a plugin; {install_hint(dataset)}"


def install_hint(dataset: Dataset) -> str:
    """Which packages decode the transfer syntax of the data set."""
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        missing = get_decoder(syntax).missing_dependencies
    except NotImplementedError:
        missing = []
    plugins = [text.split("requires ", 1)[-1] for text in missing if "pylibjpeg" in text or "pyjpegls" in text]
    return f"install {' or '.join(plugins)}" if plugins else "convert it to an uncompressed transfer syntax"


def frame_values(
    dataset: Dataset, frame: int, window: Window, percentiles: tuple[float, float], where: str
) -> FloatArray:
    """One frame as gray (H, W) or color (H, W, 3) values in [0, 1].

    Gray frames go through the modality LUT or rescale and a window: `auto` (the file's first VOI LUT or window, else
    percentiles), `voi` (the file's, or DataError), `percentile`, or center and width. MONOCHROME1 is inverted.
    Raises DataError that names `where` for a photometric interpretation or window that cannot be used.
    """
    photometric = dataset.PhotometricInterpretation
    stored = pixel_array(dataset, index=frame)
    check_values(stored, where)
    if photometric == "PALETTE COLOR":
        return _palette_values(stored, dataset)
    if photometric in COLOR:
        return np.clip(stored.astype(np.float64) / (2.0 ** int(dataset.BitsStored) - 1.0), 0.0, 1.0)
    if photometric not in GRAY:
        raise DataError(
            f"{where}: photometric interpretation {photometric} is not supported; expected {', '.join(GRAY + COLOR)}"
        )
    settings = _frame_settings(dataset, frame)
    values = apply_modality_lut(stored, settings)
    if isinstance(window, tuple):
        visible = linear_window(values, *window)
    elif window == "percentile" or (window == "auto" and not _has_voi(settings)):
        inside = values[~_padding(stored, dataset)]
        visible = apply_window(values, *percentile_window(inside if inside.size else values, percentiles))
    else:
        visible = _voi_values(values, settings, where)
    return 1.0 - visible if photometric == "MONOCHROME1" else visible


def _has_voi(settings: Dataset) -> bool:
    return bool(settings.get("VOILUTSequence")) or settings.get("WindowCenter") is not None


def _voi_values(values: Array, settings: Dataset, where: str) -> FloatArray:
    """The file's own first VOI LUT or window, output range [0, 1]."""
    if not _has_voi(settings):
        raise DataError(f"{where} has no VOI window; set window: percentile, or give [center, width]")
    if settings.get("VOILUTSequence"):
        depth = int(settings.VOILUTSequence[0].LUTDescriptor[2])
        return np.clip(apply_voi(np.rint(values).astype(np.int64), settings) / (2.0**depth - 1.0), 0.0, 1.0)
    center, width = _first(settings.WindowCenter), _first(settings.WindowWidth)
    if width <= 0:
        raise DataError(f"{where}: its VOI window has width {width:g}; set window: percentile")
    function = str(settings.get("VOILUTFunction", "LINEAR")).upper()
    if function == "SIGMOID":
        return 1.0 / (1.0 + np.exp(np.clip(-4.0 * (values - center) / width, -700.0, 700.0)))
    if function == "LINEAR_EXACT":
        return np.clip((values - center) / width + 0.5, 0.0, 1.0)
    return linear_window(values, center, width)


def linear_window(values: Array, center: float, width: float) -> FloatArray:
    """DICOM PS3.3 C.11.2.1.2.1: the LINEAR window function with output range [0, 1].

    >>> linear_window(np.array([-1.0, 0.0, 2.0, 5.0]), 2.5, 5.0).tolist()
    [0.0, 0.0, 0.5, 1.0]
    """
    low, high = center - 0.5 - (width - 1.0) / 2.0, center - 0.5 + (width - 1.0) / 2.0
    return apply_window(values, low, high) if high > low else (values > low).astype(np.float64)


def _frame_settings(dataset: Dataset, frame: int) -> Dataset:
    """Modality and VOI attributes that hold for one frame."""
    settings = Dataset()
    settings.file_meta = dataset.get("file_meta", FileMetaDataset())
    shared = list(dataset.get("SharedFunctionalGroupsSequence") or ())[:1]
    per_frame = list(dataset.get("PerFrameFunctionalGroupsSequence") or ())[frame : frame + 1]
    _copy(dataset, settings, _MODALITY + _VOI)
    for group in (*shared, *per_frame):
        for sequence, keywords in (("PixelValueTransformationSequence", _MODALITY), ("FrameVOILUTSequence", _VOI)):
            for item in list(group.get(sequence) or ())[:1]:
                _copy(item, settings, keywords)
    return settings


def _copy(source: Dataset, target: Dataset, keywords: tuple[str, ...]) -> None:
    for keyword in keywords:
        if source.get(keyword) is not None:
            target[keyword] = source[keyword]


def _padding(stored: Array, dataset: Dataset) -> Array:
    """Where a pixel is padding outside the imaged region."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, dtype=bool)
    limit = dataset.get("PixelPaddingRangeLimit", value)
    inside: Array = (stored >= min(value, limit)) & (stored <= max(value, limit))
    return inside


def _first(value: object) -> float:
    """The first value of an attribute that may have several."""
    return float(value[0]) if isinstance(value, Sequence) and not isinstance(value, str) else float(str(value))


def _palette_values(stored: Array, dataset: Dataset) -> FloatArray:
    """Palette color as (H, W, 3) in [0, 1]; some files say 8 bits per entry and store 16, or the other way round."""
    color = apply_color_lut(stored, dataset)[..., :3]
    top = 2 ** int(dataset.RedPaletteColorLookupTableDescriptor[2]) - 1
    return color / float(top if color.max() <= top else np.iinfo(color.dtype).max)
