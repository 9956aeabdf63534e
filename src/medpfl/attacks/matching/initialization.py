"""Where a search starts: one function per rule, images (K, C, *spatial) from the observation's own generator."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

import torch
from torch import Tensor

from medpfl.core.domain import GlobalModel
from medpfl.models import Normalize

Initialization = Callable[[tuple[int, ...], torch.Generator], Tensor]
"""Shape (K, C, *spatial) and generator -> float64 images; they may lie outside [0, 1]."""

GREY = 0.5
"""The middle of the range of images."""

TILE = 16
"""Side of the random patch that CPL repeats over the image."""


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard normal noise (DLG, iDLG, Geiping et al.)."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform noise in [0, 1)."""
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def tiled(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """One uniform patch of side 16 per image, repeated along every spatial axis and cropped (Wei et al. 2020, CPL).

    >>> image = tiled((1, 3, 32, 20), torch.Generator().manual_seed(0))
    >>> image.shape, bool((image[..., :16, :16] == image[..., 16:, :16]).all())
    (torch.Size([1, 3, 32, 20]), True)
    """
    spatial = shape[2:]
    patch = torch.rand((*shape[:2], *(TILE for _ in spatial)), generator=generator, dtype=torch.float64)
    image = patch.repeat(1, 1, *(ceil(size / TILE) for size in spatial))
    return image[(slice(None), slice(None), *(slice(size) for size in spatial))].contiguous()


def constant(value: float) -> Initialization:
    """The same grey everywhere; draws nothing."""

    def start(shape: tuple[int, ...], _generator: torch.Generator) -> Tensor:
        return torch.full(shape, value, dtype=torch.float64)

    return start


def near(value: float, deviation: float) -> Initialization:
    """The same grey everywhere, and normal noise of this standard deviation."""

    def start(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return value + deviation * normal(shape, generator)

    return start


def input_units(model: GlobalModel) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The model's own mean and standard deviation per channel; zeros and ones if it does not normalize."""
    for layer in model.module.modules():
        if isinstance(layer, Normalize):
            return tuple(layer.mean), tuple(layer.std)
    channels = model.image_shape[0]
    return (0.0,) * channels, (1.0,) * channels


def normalized_start(mean: tuple[float, ...], std: tuple[float, ...]) -> Initialization:
    """Normal noise in the normalized input, as images."""

    def start(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        broadcast = (1, -1, *(1 for _ in shape[2:]))
        units = torch.tensor(std, dtype=torch.float64).reshape(broadcast)
        return torch.tensor(mean, dtype=torch.float64).reshape(broadcast) + units * normal(shape, generator)

    return start


def picture(image: Tensor, noise: float = 0.0) -> Initialization:
    """An image (C, *spatial), for instance the mean of the adversary's own, plus normal noise of this deviation.

    >>> picture(torch.full((1, 2, 2), 0.25))((3, 1, 2, 2), torch.Generator()).unique().tolist()
    [0.25]
    """

    def start(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        same = image.to("cpu", torch.float64).expand(shape)
        return same + noise * normal(shape, generator) if noise else same.clone()

    return start


INITIALIZATIONS: dict[str, Initialization] = {
    "normal": normal,
    "uniform": uniform,
    "tiled": tiled,
    "grey": constant(GREY),
    "black": constant(0.0),
    "white": constant(1.0),
}
"""Starts by the names used in specs."""
