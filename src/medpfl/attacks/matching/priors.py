"""What the attacker assumes about images: total variation, and the median filter of Geiping et al.'s recipe."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from medpfl.core.functional import total_variation

Prior = Callable[[Tensor], Tensor]
"""Images (N, C, *spatial) of one candidate -> scalar."""


def no_prior(images: Tensor) -> Tensor:
    """Every image is as likely as any other."""
    return images.new_zeros(())


def smooth(weight: float) -> Prior:
    """`weight` times the mean total variation of a candidate's images, in any number of spatial dimensions."""

    def penalty(images: Tensor) -> Tensor:
        return weight * total_variation(images).mean()

    return penalty if weight else no_prior


def median_filter(images: Tensor, spatial: int) -> Tensor:
    """Replaces every value with the median of its 3 x ... x 3 neighborhood, edges reflected: (..., *spatial).

    >>> image = torch.zeros(1, 1, 3, 3)
    >>> image[0, 0, 1, 1] = 1.0
    >>> float(median_filter(image, 2).max())
    0.0
    """
    shape = images.shape[-spatial:]
    padded = images.reshape(-1, 1, *shape)
    for axis in range(2, 2 + spatial):
        padded = _reflect(padded, axis)
    windows = padded
    for axis in range(2, 2 + spatial):
        windows = windows.unfold(axis, 3, 1)
    return windows.flatten(2 + spatial).median(dim=-1).values.reshape(images.shape)


def _reflect(images: Tensor, axis: int) -> Tensor:
    """One entry more at both ends of an axis: mirrored without the edge, or the edge itself where there is no more."""
    size = images.shape[axis]
    inside = min(1, size - 1)
    return torch.cat([images.narrow(axis, inside, 1), images, images.narrow(axis, size - 1 - inside, 1)], dim=axis)
