"""What the attacker assumes about images: total variation, small values, and the median filter of Geiping et al."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from medpfl.core.functional import per_channel, total_variation

Prior = Callable[[Tensor], Tensor]
"""Images (N, C, *spatial) of one candidate -> scalar."""


def no_prior(images: Tensor) -> Tensor:
    """Every image is as likely as any other."""
    return images.new_zeros(())


VariationForm = Literal["absolute", "length", "rounded"]
"""Forms of total variation: absolute differences along the axes, the same without the kink at zero, which line searches
need, or lengths of the vectors that they make."""

ROUNDED_BELOW = 0.03
"""Differences of neighbors below which `rounded` grows with their square."""

FLAT = 1e-12
"""Added under the square root of a squared difference, so that flat images have a derivative."""


def smooth(weight: float, form: VariationForm = "absolute") -> Prior:
    """`weight` times the mean total variation of a candidate's images, in any number of spatial dimensions.

    `absolute` is `total_variation`; `length` is `variation_length`; `rounded` is `rounded_variation`.
    """
    variation = {"absolute": total_variation, "length": variation_length, "rounded": rounded_variation}[form]

    def penalty(images: Tensor) -> Tensor:
        return weight * variation(images).mean()

    return penalty if weight else no_prior


def variation_length(images: Tensor) -> Tensor:
    """Isotropic total variation per image: mean length of the vector of differences to the next neighbors.

    (N, C, *spatial) -> (N,). Every pixel that has a neighbor along every axis counts.

    >>> ramps = torch.tensor([[[[0.0, 3.0], [4.0, 7.0]]]])
    >>> round(float(variation_length(ramps)), 4)
    5.0
    """
    axes = [axis for axis in range(2, images.ndim) if images.shape[axis] > 1]
    square = images.new_zeros(())
    for axis in axes:
        change = images.diff(dim=axis)
        for other in axes:
            change = change.narrow(other, 0, images.shape[other] - 1)
        square = square + change.square()
    return (square + FLAT).sqrt().expand(len(images), *square.shape[1:]).flatten(1).mean(1)


def rounded_variation(images: Tensor) -> Tensor:
    """Mean of sqrt(d^2 + r^2) - r over the differences d along each axis, summed over axes; r is `ROUNDED_BELOW`.

    (N, C, *spatial) -> (N,).

    >>> round(float(rounded_variation(torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]]))), 2)
    0.97
    """
    total = images.new_zeros(len(images))
    for axis in range(2, images.ndim):
        if images.shape[axis] > 1:
            squares = images.diff(dim=axis).square()
            total = total + ((squares + ROUNDED_BELOW**2).sqrt() - ROUNDED_BELOW).flatten(1).mean(1)
    return total


def small(weight: float, mean: Sequence[float], std: Sequence[float]) -> Prior:
    """`weight` times the mean square of the model's input, (image - mean) / std per channel.

    >>> float(small(2.0, (0.5,), (0.25,))(torch.ones(1, 1, 2, 2)))
    8.0
    """

    def penalty(images: Tensor) -> Tensor:
        return weight * ((images - per_channel(mean, images)) / per_channel(std, images)).square().mean()

    return penalty if weight else no_prior


def outside(weight: float) -> Prior:
    """`weight` times the mean squared distance of pixels to [0, 1].

    >>> float(outside(1.0)(torch.tensor([[[[1.5, 0.5]]]])))
    0.125
    """

    def penalty(images: Tensor) -> Tensor:
        return weight * (images - images.clamp(0.0, 1.0)).square().mean()

    return penalty if weight else no_prior


def together(*priors: Prior) -> Prior:
    """The sum of several priors."""
    chosen = [prior for prior in priors if prior is not no_prior]

    def penalty(images: Tensor) -> Tensor:
        return torch.stack([prior(images) for prior in chosen]).sum()

    return penalty if len(chosen) > 1 else chosen[0] if chosen else no_prior


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
