"""Which image shapes a model takes, and layers by number of spatial dimensions."""

from __future__ import annotations

from torch import nn

from medpfl.core.errors import ModelError

CONVOLUTIONS: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
"""Spatial dimensions -> convolution."""

MAX_POOLINGS: dict[int, type[nn.MaxPool2d] | type[nn.MaxPool3d]] = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
"""Spatial dimensions -> max pooling."""

TRANSPOSED_CONVOLUTIONS: dict[int, type[nn.ConvTranspose2d] | type[nn.ConvTranspose3d]] = {
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}
"""Spatial dimensions -> transposed convolution."""

_MEANINGS = {2: "(channels, height, width)", 3: "(channels, depth, height, width)"}


def check_spatial(
    name: str, image_shape: tuple[int, ...], dimensions: tuple[int, ...] = (2,), smallest: int = 1
) -> tuple[int, ...]:
    """`image_shape` if it has one of these numbers of spatial dimensions, each at least `smallest` pixels.

    Raises `ModelError` that names the model otherwise.
    """
    found = tuple(image_shape)
    if len(found) - 1 not in dimensions or min(found) < 1:
        expected = " or ".join(_MEANINGS[number] for number in dimensions)
        raise ModelError(f"model '{name}' takes images of shape {expected}, found {found}")
    if min(found[1:]) < smallest:
        raise ModelError(
            f"model '{name}' needs at least {smallest} pixels along every axis, found {found[1:]}: "
            "choose a larger size or another model"
        )
    return found


def check_divisible(name: str, image_shape: tuple[int, ...], divisor: int) -> None:
    """Raises `ModelError` that names the model unless every side of (C, *spatial) can be divided by `divisor`."""
    if any(side % divisor for side in image_shape[1:]):
        raise ModelError(
            f"model '{name}' needs sides that {divisor} divides, found {tuple(image_shape[1:])}: choose another size"
        )
