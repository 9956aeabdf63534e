"""From arrays of any type to images: checks, intensity windows, and PNG and JPEG files."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from medpfl.core.errors import DataError

Array = NDArray[Any]
FloatArray = NDArray[np.float64]

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png")

_BROKEN_IMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, MemoryError, IndexError)


def to_image(values: Array, where: str) -> Tensor:
    """Gray (H, W) or color (H, W, C) values in [0, 1] as a float32 image (C, H, W).

    Raises DataError that names `where` for size 0, NaN or infinite values.
    """
    check_values(values, where)
    planes = values[np.newaxis] if values.ndim == 2 else np.moveaxis(values, -1, 0)
    return torch.from_numpy(np.ascontiguousarray(planes, dtype=np.float32)).clamp_(0.0, 1.0)


def to_volume(values: Array, where: str) -> Tensor:
    """Gray (D, H, W) values in [0, 1] as a float32 image (1, D, H, W). Raises DataError as `to_image` does."""
    check_values(values, where)
    return torch.from_numpy(np.ascontiguousarray(values[np.newaxis], dtype=np.float32)).clamp_(0.0, 1.0)


def check_values(values: Array, where: str) -> None:
    """Raises DataError that names `where` if there is no pixel or one is NaN or infinite."""
    if values.size == 0:
        raise DataError(f"{where}: the image has size 0 {tuple(values.shape)}; remove it")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise DataError(f"{where}: {bad} of {values.size} pixels are NaN or infinite; replace them or remove the file")


def full_scale(values: Array) -> FloatArray:
    """Unsigned integers divided by the greatest value of their type.

    >>> full_scale(np.array([0, 255], dtype=np.uint8)).tolist()
    [0.0, 1.0]
    """
    return values.astype(np.float64) / np.iinfo(values.dtype).max


def percentile_window(values: Array, percentiles: tuple[float, float]) -> tuple[float, float]:
    """The lower and upper intensity at two percentiles; least and greatest value where these coincide."""
    low, high = (float(bound) for bound in np.percentile(values, percentiles))
    return (low, high) if high > low else (float(values.min()), float(values.max()))


def apply_window(values: Array, low: float, high: float) -> FloatArray:
    """Maps [low, high] to [0, 1] and clips; all zero where the window is empty.

    >>> apply_window(np.array([-1.0, 0.0, 5.0, 20.0]), 0.0, 10.0).tolist()
    [0.0, 0.0, 0.5, 1.0]
    """
    if high <= low:
        return np.zeros(values.shape)
    return np.clip((values.astype(np.float64) - low) / (high - low), 0.0, 1.0)


def read_image_file(path: Path) -> Tensor:
    """A PNG or JPEG file as float32 (1, H, W) or (3, H, W) in [0, 1].

    Gray files give 1 channel (8 and 16 bit; 16-bit color is reduced to 8 bit by Pillow), color and palette files 3.
    Transparent images are composited on black. The EXIF orientation is applied. Raises DataError that names the file
    if it is corrupt, truncated, neither PNG nor JPEG, or larger than Pillow's limit for decompression bombs.
    """
    return to_image(decode(path, ("PNG", "JPEG"), _image_values), f"'{path}'")


def decode(path: Path, formats: tuple[str, ...], values: Callable[[Image.Image], Array]) -> Array:
    """What `values` makes of an image file of one of these formats, upright. Raises DataError that names the file."""
    kinds = " or ".join(formats)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=formats) as image:
                image.load()
                return values(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise DataError(
            f"'{path}' has more than {Image.MAX_IMAGE_PIXELS} pixels and could be a decompression bomb; "
            "reduce the image before the audit"
        ) from None
    except _BROKEN_IMAGE as error:
        raise DataError(
            f"'{path}' is not a readable {kinds} file ({_reason(error)}); it is corrupt, truncated or another format"
        ) from None


def _reason(error: BaseException) -> str:
    text = (error.strerror if isinstance(error, OSError) else None) or str(error).split("\n", 1)[0]
    if isinstance(error, UnidentifiedImageError) or not text:
        return "unknown format" if text else type(error).__name__
    return text


def _image_values(image: Image.Image) -> FloatArray:
    """Gray (H, W) or color (H, W, 3) values in [0, 1] of an opened PNG or JPEG image."""
    if image.mode.startswith("I"):  # 16-bit gray; older versions of Pillow call it "I"
        return np.asarray(image).astype(np.float64) / 65535.0
    gray = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        values = full_scale(np.asarray(image.convert("LA" if gray else "RGBA")))
        opaque = values[..., :-1] * values[..., -1:]
        return opaque[..., 0] if gray else opaque
    return full_scale(np.asarray(image.convert("L" if gray else "RGB")))
