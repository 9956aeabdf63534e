"""Segmentation masks beside images: where the mask of an image lies, and which class a value means."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from medpfl.core.errors import DataError
from medpfl.data.paths import require_access
from medpfl.data.pixels import Array, decode

TWO_CLASSES = ("background", "foreground")
"""The classes of masks whose classes are not named."""

_NUMBERED = ("1", "L", "P", "I", "I;16")
"""Pillow's modes whose pixels are numbers."""


def check_settings(mask_path: Path | None, mask_classes: Sequence[str]) -> None:
    """Raises ValueError for class names without masks, and for a single one."""
    if mask_classes and mask_path is None:
        raise ValueError("mask_classes without mask_path: say where the masks lie")
    if len(mask_classes) == 1:
        raise ValueError("mask_classes: expected the background and at least one class more")


def mask_file(masks: Path, name: str, suffixes: Sequence[str]) -> Path:
    """The mask of the image with the relative name `name`: the same name below `masks`, with one of these suffixes.

    `masks` may be a file, for a single image. Raises DataError that names the image.
    """
    if require_access(masks).is_file():
        return masks
    whole = PurePosixPath(name)
    stem = whole.name.split(".", 1)[0] if name.lower().endswith(".nii.gz") else whole.stem
    tried = [masks / whole.with_name(f"{stem}{suffix}") for suffix in suffixes]
    found = next((path for path in tried if path.is_file()), None)
    if found is None:
        raise DataError(f"'{name}' has no mask: there is no file '{tried[0]}'; masks have the names of their images")
    return found


def read_mask_file(path: Path, classes: Sequence[str]) -> Tensor:
    """A PNG file of class numbers as int64 (H, W). Gray, palette (by index) and color whose channels are equal.

    Raises DataError that names the file.
    """
    values = decode(path, ("PNG",), _numbers)
    if values.ndim != 2:
        raise DataError(f"'{path}' is a color image; a mask holds class numbers, 0 for the background")
    return class_numbers(values, classes, f"'{path}'")


def class_numbers(values: Array, classes: Sequence[str], where: str) -> Tensor:
    """Mask values as classes, int64; of two classes every other value than 0 may stand for the second, as 255 does.

    Raises DataError that names `where` for values that are no class.

    >>> class_numbers(np.array([[0, 255]]), TWO_CLASSES, "a.png").tolist()
    [[0, 1]]
    """
    found = np.unique(values)
    if found.size == 0:
        raise DataError(f"{where}: the mask has size 0; remove the image and its mask")
    numbers = found.astype(np.float64)
    known = (numbers >= 0) & (numbers < len(classes)) & (numbers == np.rint(numbers))
    if known.all():
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))
    if len(classes) == 2 and (numbers > 0).sum() == 1 and (numbers >= 0).all():
        return torch.from_numpy(np.ascontiguousarray(values != 0, dtype=np.int64))
    raise DataError(
        f"{where}: mask value {numbers[~known][0]:g} is no class; expected 0 to {len(classes) - 1} "
        f"({', '.join(classes)}): name all classes in mask_classes"
    )


def _numbers(image: Image.Image) -> Array:
    """Class numbers (H, W), or color (H, W, channels) where the channels differ."""
    if image.mode in _NUMBERED:
        return np.asarray(image)
    color = np.asarray(image)
    alike = color.ndim == 3 and image.mode == "RGB" and bool((color == color[..., :1]).all())
    return color[..., 0] if alike else color
