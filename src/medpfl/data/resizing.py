"""One size and one number of channels for all images of a data set."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from medpfl.core.errors import DataError

Aspect = Literal["squash", "crop", "pad"]

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in a gray value (ITU-R BT.601, as Pillow's mode "L")."""

_LOBES = 3


def resize(image: Tensor, size: tuple[int, ...], aspect: Aspect = "squash") -> Tensor:
    """(..., *spatial) in [0, 1] to (..., *size) by separable, antialiased Lanczos-3 interpolation, clamped to [0, 1].

    `squash` ignores the aspect, `crop` first cuts the largest centered part that has the new aspect, `pad` fits the
    whole image and fills the rest with black. An image that has the size already is returned unchanged. Any number of
    spatial dimensions.
    """
    dimensions = len(size)
    spatial = tuple(image.shape[-dimensions:])
    if spatial == size:
        return image
    if aspect == "crop":
        image = _center_crop(image, _largest_inside(size, spatial))
    inner = _largest_inside(spatial, size) if aspect == "pad" else size
    for axis, new in enumerate(inner, start=image.ndim - dimensions):
        old = image.shape[axis]
        if old != new:
            weights = _lanczos_matrix(old, new)
            image = torch.movedim(torch.tensordot(image.double(), weights, dims=([axis], [1])), -1, axis)
    image = image.float().clamp(0.0, 1.0)
    return F.pad(image, _margins(inner, size)) if inner != size else image


def resize_mask(mask: Tensor, size: tuple[int, ...], aspect: Aspect = "squash") -> Tensor:
    """(*spatial) classes to (*size), placed as `resize` places the image: nearest neighbor, never a value in between.

    `pad` fills with 0, the background.

    >>> resize_mask(torch.tensor([[0, 7]]), (2, 4)).tolist()
    [[0, 0, 7, 7], [0, 0, 7, 7]]
    """
    spatial = tuple(mask.shape)
    if spatial == size:
        return mask
    if aspect == "crop":
        mask = _center_crop(mask, _largest_inside(size, spatial))
    inner = _largest_inside(spatial, size) if aspect == "pad" else size
    for axis, new in enumerate(inner):
        centers = (torch.arange(new, dtype=torch.float64) + 0.5) * (mask.shape[axis] / new)
        mask = mask.index_select(axis, centers.long().clamp_max(mask.shape[axis] - 1))
    return F.pad(mask, _margins(inner, size)) if inner != size else mask


def to_channels(image: Tensor, channels: int, where: str) -> Tensor:
    """(C, *spatial) to (`channels`, *spatial): gray is repeated, color is weighted by `LUMA`.

    Raises DataError that names `where` for a number of channels other than 1 and 3.
    """
    if image.shape[0] == channels:
        return image
    if image.shape[0] == 1 and channels == 3:
        return image.expand(3, *image.shape[1:]).clone()
    if image.shape[0] == 3 and channels == 1:
        luma: Tensor = torch.tensordot(torch.tensor(LUMA), image, dims=([0], [0]))
        return luma.unsqueeze(0).clamp_(0.0, 1.0)
    raise DataError(f"{where}: {image.shape[0]} channels cannot become {channels}; expected gray (1) or color (3)")


@lru_cache(maxsize=64)
def _lanczos_matrix(old: int, new: int) -> Tensor:
    """(new, old) float64: rows of a Lanczos-3 kernel that is widened by the reduction, each with sum 1."""
    scale = old / new
    width = max(scale, 1.0)
    centers = (torch.arange(new, dtype=torch.float64) + 0.5) * scale
    distance = (torch.arange(old, dtype=torch.float64) + 0.5 - centers[:, None]) / width
    kernel = torch.sinc(distance) * torch.sinc(distance / _LOBES) * (distance.abs() < _LOBES)
    return kernel / kernel.sum(dim=1, keepdim=True)


def _largest_inside(shape: tuple[int, ...], bounds: tuple[int, ...]) -> tuple[int, ...]:
    """The largest whole size with the aspect of `shape` that fits into `bounds`."""
    scale = min(bound / length for bound, length in zip(bounds, shape, strict=True))
    return tuple(min(bound, max(1, round(length * scale))) for bound, length in zip(bounds, shape, strict=True))


def _center_crop(image: Tensor, size: tuple[int, ...]) -> Tensor:
    for axis, length in enumerate(size, start=image.ndim - len(size)):
        image = image.narrow(axis, (image.shape[axis] - length) // 2, length)
    return image


def _margins(inner: tuple[int, ...], outer: tuple[int, ...]) -> list[int]:
    """Padding for `torch.nn.functional.pad`: last dimension first, the odd pixel at the end."""
    margins: list[int] = []
    for length, total in zip(reversed(inner), reversed(outer), strict=True):
        before = (total - length) // 2
        margins += [before, total - length - before]
    return margins
