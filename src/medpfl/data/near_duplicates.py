"""Images that show nearly the same: Pearson correlation of gray thumbnails."""

from __future__ import annotations

import torch
from torch import Tensor

from medpfl.data.resizing import resize, to_channels

THUMBNAIL = 64
"""Pixels per axis of a thumbnail; smaller images are compared as they are."""

_CHUNK = 4096
_CONSTANT = 1e-4


def near_duplicates_of(images: Tensor, reference: Tensor, threshold: float = 0.95) -> Tensor:
    """Bool (N,): which of `images` (N, C, *spatial) correlate above `threshold` with any `reference` (M, C, *spatial).

    Both become gray thumbnails of one size: 64 pixels per axis, or the smaller of the two sizes where one is smaller.
    Images with one value in all pixels are compared with each other by brightness and correlate with nothing else.
    Sizes and channels may differ between the two sets, not the number of spatial axes.
    """
    duplicates = torch.zeros(images.shape[0], dtype=torch.bool)
    if images.shape[0] == 0 or reference.shape[0] == 0:
        return duplicates
    pairs = zip(images.shape[2:], reference.shape[2:], strict=True)
    size = tuple(min(THUMBNAIL, *pair) for pair in pairs)
    known = _thumbnails(reference, size)
    for start in range(0, images.shape[0], _CHUNK):
        part = _thumbnails(images[start : start + _CHUNK], size)
        duplicates[start : start + _CHUNK] = (part @ known.T).amax(dim=1) > threshold
    return duplicates


def _thumbnails(images: Tensor, size: tuple[int, ...]) -> Tensor:
    """(N, pixels + 2) unit vectors whose products are correlations; the last two entries turn with the brightness."""
    gray = resize(to_channels(images.movedim(1, 0), 1, "thumbnail")[0], size).flatten(1).double()
    mean = gray.mean(dim=1, keepdim=True)
    centered = gray - mean
    norm = centered.norm(dim=1, keepdim=True)
    constant = norm <= _CONSTANT * gray.shape[1] ** 0.5
    unit = torch.where(constant, torch.zeros_like(centered), centered / norm.clamp_min(1e-30))
    brightness = torch.cat([torch.cos(torch.pi * mean), torch.sin(torch.pi * mean)], dim=1)
    return torch.cat([unit, brightness * constant], dim=1)
