"""Linear measurements of images that a crafted module sorts them by."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

CELLS = 6
"""Random values per axis that a smooth query runs through."""

INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}

QueryName = Literal["mean", "dct", "random"]

DCT_MODE = 32
"""Which cosine of the flattened image `dct` takes, unless it is told another."""


def linear_query(
    name: QueryName, image_shape: tuple[int, ...], generator: torch.Generator, mode: int = DCT_MODE
) -> Tensor:
    """Weights (D,), float64, of the flattened image: its mean value, one of its cosines, or random weights of norm 1.

    Rows of Fowl et al.'s public code: the cosine is 4 m / D * cos(pi / D * (i + 1/2) * m) of `mode` m over the place i of a
    value in memory; random weights are normal, with their mean taken off.

    >>> linear_query("mean", (1, 2, 2), torch.Generator()).tolist()
    [0.25, 0.25, 0.25, 0.25]
    """
    inputs = torch.Size(image_shape).numel()
    if name == "mean":
        return torch.full((inputs,), 1 / inputs, dtype=torch.float64)
    if name == "dct":
        places = torch.arange(inputs, dtype=torch.float64) + 0.5
        return 4 * mode / inputs * torch.cos(math.pi / inputs * places * mode)
    weights = torch.randn(inputs, dtype=torch.float64, generator=generator)
    weights = weights - weights.mean()
    scaled: Tensor = weights / weights.norm()
    return scaled


def smooth_query(image_shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Weights (D,), float64, that run smoothly through normal random values on a coarse grid, for each color its own."""
    sides = [min(CELLS, side) for side in image_shape[1:]]
    cells = torch.randn((1, image_shape[0], *sides), dtype=torch.float64, generator=generator)
    mode = INTERPOLATION[len(image_shape) - 1]
    return interpolate(cells, size=image_shape[1:], mode=mode, align_corners=True).flatten()


def color_query(image_shape: tuple[int, ...], weights: Tensor) -> Tensor:
    """The mean values of the colors (C,), weighed: (D,), float64."""
    pixels = torch.Size(image_shape[1:]).numel()
    return (weights.double() / pixels)[:, None].expand(-1, pixels).flatten()


def query_values(images: Tensor, query: Tensor) -> Tensor:
    """What the weights (D,) measure of images (N, C, *spatial), float64 (N,); (N, Q) of weights (D, Q)."""
    return images.double().flatten(1) @ query.to(images.device)


def below_all(query: Tensor) -> float:
    """A value that no image in [0, 1] measures as low, by 5% of what images can span.

    >>> below_all(torch.tensor([0.5, 0.5]))
    -0.05
    """
    lowest, highest = float(query.clamp_max(0).sum()), float(query.clamp_min(0).sum())
    return lowest - 0.05 * (highest - lowest)
