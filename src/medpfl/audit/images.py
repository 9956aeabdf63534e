"""Truth and reconstruction on disk: an 8-bit PNG to look at and a float32 `.npz` beside it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from medpfl.core.files import write_atomically

Values = NDArray[Any]

MOST_SLICES = 16
"""Slices of a volume that are shown."""

GAP = 1
"""Black pixels between two slices."""


def write_image(path: Path, image: Tensor) -> None:
    """Writes (C, *spatial) in [0, 1], C 1 or 3, as `path` (PNG) and beside it, in full, as `.npz` with the key `image`.

    A volume (C, D, H, W) is shown as a montage of its slices.
    """
    array = image.detach().float().cpu().numpy()
    _write(path, array, {"image": array})


def write_mask(path: Path, mask: Tensor, classes: int) -> None:
    """Writes classes (*spatial) as grey levels, black for 0, and beside it, as they are, as `.npz` with the key `mask`."""
    array = mask.detach().cpu().numpy().astype(np.int64)
    _write(path, array[np.newaxis] / max(1, classes - 1), {"mask": array})


def _write(path: Path, array: Values, full: Mapping[str, Values]) -> None:
    packed = io.BytesIO()
    np.savez_compressed(packed, allow_pickle=False, **full)
    pixels = np.round(_flat(array).clip(0, 1) * 255).astype(np.uint8)
    picture = Image.fromarray(pixels[0]) if pixels.shape[0] == 1 else Image.fromarray(pixels.transpose(1, 2, 0))
    png = io.BytesIO()
    picture.save(png, format="PNG")
    write_atomically(path, png.getvalue())
    write_atomically(path.with_suffix(".npz"), packed.getvalue())


def montage(volume: Values) -> Values:
    """At most `MOST_SLICES` evenly spaced slices of (C, D, H, W) in rows from left to right: (C, height, width).

    >>> montage(np.zeros((1, 16, 8, 10))).shape
    (1, 35, 43)
    """
    channels, depth, height, width = volume.shape
    count = min(depth, MOST_SLICES)
    columns = ceil(sqrt(count))
    rows = ceil(count / columns)
    sheet = np.zeros((channels, rows * (height + GAP) - GAP, columns * (width + GAP) - GAP), dtype=volume.dtype)
    for place in range(count):
        top, left = (place // columns) * (height + GAP), (place % columns) * (width + GAP)
        sheet[:, top : top + height, left : left + width] = volume[:, (2 * place + 1) * depth // (2 * count)]
    return sheet


def _flat(array: Values) -> Values:
    """Something that can be looked at: (C, height, width)."""
    while array.ndim > 4:
        array = array[:, array.shape[1] // 2]
    if array.ndim == 4:
        return montage(array)
    return array if array.ndim == 3 else array[:, np.newaxis]
