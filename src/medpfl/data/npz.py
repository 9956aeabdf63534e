"""The published key layout of MedMNIST files, opened without unpickling anything."""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medpfl.core.errors import DataError
from medpfl.data.paths import require_file

SplitName = Literal["train", "val", "test"]

SPLITS: tuple[SplitName, ...] = ("train", "val", "test")

_BROKEN = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    SyntaxError,
    MemoryError,
    NotImplementedError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)


def npz_keys(path: Path) -> list[str]:
    """Names of the arrays in the file. Raises DataError if it is not a readable npz file."""
    require_file(path, "npz")
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except _BROKEN as error:
        raise _unreadable(path, error) from None


def npz_array(path: Path, key: str) -> NDArray[Any]:
    """One array of the file. Raises DataError if it is missing, corrupt or holds Python objects."""
    keys = npz_keys(path)
    if key not in keys:
        there = [split for split in SPLITS if f"{split}_labels" in keys]
        hint = f"; set splits: [{', '.join(there)}]" if there and key.endswith("_labels") else ""
        raise DataError(f"'{path}' has no array '{key}'; it has {', '.join(sorted(keys)) or 'none'}{hint}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            array: object = archive[key]
    except _BROKEN as error:
        raise _unreadable(path, error) from None
    if not isinstance(array, np.ndarray):
        raise DataError(f"'{path}': '{key}' is not an array; the file is corrupt")
    return array


def split_labels(path: Path, split: str) -> NDArray[np.uint8]:
    """Labels of one split as uint8 (N, 1), or (N, classes) of 0 and 1. Raises DataError for other layouts."""
    labels = npz_array(path, f"{split}_labels")
    if labels.ndim == 1:
        labels = labels[:, np.newaxis]
    if labels.dtype.kind not in "iu" or labels.ndim != 2 or not labels.shape[1]:
        raise DataError(
            f"'{path}': {split}_labels is {labels.dtype} {labels.shape}; expected integers of shape (N, 1), or "
            "(N, classes) for several labels"
        )
    if labels.size and (int(labels.min()) < 0 or int(labels.max()) > (255 if labels.shape[1] == 1 else 1)):
        raise DataError(
            f"'{path}': {split}_labels lie in {labels.min()}..{labels.max()}; expected classes 0, 1, 2, ..., "
            "or 0 and 1 for several labels"
        )
    return labels.astype(np.uint8)


def holds_volumes(images: NDArray[np.uint8]) -> bool:
    """Whether these are the cubes (N, S, S, S) of a 3D set."""
    return images.ndim == 4 and images.shape[-1] > 3 and len(set(images.shape[1:])) == 1


def split_images(path: Path, split: str) -> NDArray[np.uint8]:
    """Images of one split: uint8 (N, H, W), (N, H, W, 3) or cubes (N, S, S, S). Raises DataError for other layouts."""
    images = npz_array(path, f"{split}_images")
    if images.dtype != np.uint8:
        raise DataError(f"'{path}': {split}_images is {images.dtype}; expected uint8")
    if images.ndim != 3 and not (images.ndim == 4 and (images.shape[-1] == 3 or holds_volumes(images))):
        raise DataError(
            f"'{path}': {split}_images is {images.shape}; expected (N, H, W), (N, H, W, 3) or cubes (N, S, S, S)"
        )
    return images


def _unreadable(path: Path, error: BaseException) -> DataError:
    reason = "it holds Python objects, which could contain code" if "pickle" in str(error) else type(error).__name__
    return DataError(f"'{path}' is not a readable npz file ({reason}); it is corrupt, truncated or another format")
