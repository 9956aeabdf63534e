"""Where the bins of a leakage module begin: quantiles of how bright the attacker's own images are."""

from __future__ import annotations

import torch
from torch import Tensor

BELOW_ALL = -0.05
"""The first edge where all images are to be in a bin: no mean of values in [0, 1] is as low."""

GRID = 8192
"""Places at which the smoothed distribution is computed."""

PUBLISHED_LEVELS = (0.001, 0.999)
"""First and last quantile of the published recipe."""


def brightness(images: Tensor) -> Tensor:
    """Mean value of each image (N, C, *spatial), float64 (N,).

    >>> brightness(torch.tensor([[[[0.0, 1.0]]], [[[0.5, 0.5]]]])).tolist()
    [0.5, 0.5]
    """
    return images.double().flatten(1).mean(dim=1)


def gaussian_edges(values: Tensor, bins: int) -> Tensor:
    """Quantiles, evenly spaced from 0.001 to 0.999, of the normal distribution with the mean and deviation of values."""
    levels = torch.linspace(*PUBLISHED_LEVELS, bins, dtype=torch.float64)
    values = values.double().cpu()
    edges: Tensor = values.mean() + values.std().clamp_min(1e-6) * torch.special.ndtri(levels)
    return edges


def empirical_edges(values: Tensor, bins: int, first: float = BELOW_ALL) -> Tensor:
    """Edges of bins of equal mass 1 / bins under the values themselves, interpolated; the `first` is below all images.

    >>> empirical_edges(torch.tensor([0.25, 0.5, 0.75]), 2).tolist()
    [-0.05, 0.5]
    """
    levels = torch.arange(1, bins, dtype=torch.float64) / bins
    return torch.cat([torch.tensor([first], dtype=torch.float64), values.double().cpu().quantile(levels)])


def smoothed_edges(values: Tensor, bins: int, first: float = BELOW_ALL) -> Tensor:
    """Edges of bins of equal mass 1 / bins under a smoothed distribution of the values; the `first` is below all images.

    The distribution is the values' own, smoothed by normal kernels of Silverman's width, so that there can be more
    bins than values.
    """
    values = values.double().cpu()
    width = kernel_width(values)
    grid = torch.linspace(float(values.min()) - 4 * width, float(values.max()) + 4 * width, GRID, dtype=torch.float64)
    cumulative = _smoothed(values, grid, width)
    levels = torch.arange(1, bins, dtype=torch.float64) / bins
    above = torch.searchsorted(cumulative, levels).clamp(1, GRID - 1)
    low, high = cumulative[above - 1], cumulative[above]
    share = ((levels - low) / (high - low).clamp_min(1e-300)).clamp(0, 1)
    inner = grid[above - 1] + share * (grid[above] - grid[above - 1])
    return torch.cat([torch.tensor([first], dtype=torch.float64), inner])


def bins_of(values: Tensor, edges: Tensor) -> Tensor:
    """The bin of each value (N,), -1 below the first edge. Bin k holds what is above edge k and not above edge k + 1.

    >>> bins_of(torch.tensor([0.0, 0.2, 0.9]), torch.tensor([0.1, 0.5])).tolist()
    [-1, 0, 1]
    """
    return torch.searchsorted(edges, values.to(edges)) - 1


def bin_counts(values: Tensor, edges: Tensor) -> Tensor:
    """How many of the values are in each bin (K,)."""
    bins = bins_of(values, edges)
    return torch.bincount(bins[bins >= 0], minlength=len(edges))


def alone(values: Tensor, edges: Tensor) -> Tensor:
    """Which values are the only ones in their bin, bool (N,): those of images that a read-out can give back."""
    bins, counts = bins_of(values, edges), bin_counts(values, edges)
    return (bins >= 0) & (counts[bins.clamp_min(0)] == 1)


def _smoothed(values: Tensor, grid: Tensor, width: float) -> Tensor:
    """The distribution function of the values, smoothed by normal kernels, at all places of an even grid around them.

    Each value is shared between the two places beside it, which makes the sum over kernels one convolution.
    """
    step = float(grid[1] - grid[0])
    position = ((values - grid[0]) / step).clamp(0, len(grid) - 2)
    left, right_share = position.long(), position - position.floor()
    mass = torch.zeros_like(grid).index_add_(0, left, 1 - right_share).index_add_(0, left + 1, right_share)
    kernel = torch.special.ndtr(torch.arange(1 - len(grid), len(grid), dtype=torch.float64) * step / width)
    length = 4 * len(grid)
    product = torch.fft.rfft(mass, length) * torch.fft.rfft(kernel, length)
    cumulative: Tensor = torch.fft.irfft(product, length)[len(grid) - 1 : 2 * len(grid) - 1]
    return cumulative / len(values)


def kernel_width(values: Tensor) -> float:
    """Kernel width 0.9 min(deviation, interquartile range / 1.34) n^(-1/5) (Silverman 1986, equation 3.31)."""
    quartiles = values.quantile(torch.tensor([0.25, 0.75], dtype=torch.float64))
    spread = min(float(values.std()), float(quartiles[1] - quartiles[0]) / 1.34) or float(values.std())
    return max(0.9 * spread / float(len(values) ** 0.2), 1e-6)
