"""Numbers about images that both attacks and scoring need: PSNR, MSE, SSIM, total variation, assignment.

Images are (N, C, *spatial) with one or more spatial dimensions. Everything but `assignment` is differentiable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from medpfl.core.errors import InputError

MSE_FLOOR = 1e-10
"""Mean squared errors below this count as this in PSNR, so that an exact copy has 100 dB instead of infinity."""

BLOCK = 2**16
"""Entries that are compared at once: few enough to stay in a core's own cache."""

SSIM_WINDOW = 11
"""Side of SSIM's Gaussian window, and the smallest spatial size that SSIM is defined for."""

SSIM_SIGMA = 1.5
"""Standard deviation of SSIM's Gaussian window, in pixels."""


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is infinite or NaN, without a copy: in one pass over memory unless the sum overflows.

    >>> is_finite(torch.tensor([1.0, -2.0])), is_finite(torch.tensor([1.0, float("nan")])), is_finite(torch.zeros(0))
    (True, False, True)
    """
    if tensor.numel() == 0 or math.isfinite(float(tensor.sum())):
        return True
    return all(math.isfinite(float(end)) for end in torch.aminmax(tensor))


def differs(a: Tensor, b: Tensor) -> bool:
    """Whether any entry differs, in blocks up to the first one that does.

    >>> differs(torch.zeros(3), torch.zeros(3, dtype=torch.float64)), differs(torch.zeros(3), torch.tensor([0.0, 0, 1]))
    (False, True)
    """
    parts = zip(torch.split(a.flatten(), BLOCK), torch.split(b.flatten(), BLOCK), strict=True)
    return any(bool((one != other).any()) for one, other in parts)


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error per image: (N, C, *spatial) twice -> (N,), float64.

    >>> mse(torch.zeros(2, 1, 4, 4), torch.full((2, 1, 4, 4), 0.5)).tolist()
    [0.25, 0.25]
    """
    _require_same_shape(a, b)
    return (a.double() - b.double()).square().flatten(1).mean(1)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per image in dB for range 1: (N, C, *spatial) twice -> (N,), float64.

    The mean squared error is floored at 1e-10, so equal images have 100 dB.

    >>> psnr(torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), 0.1)).round(decimals=4).tolist()
    [20.0]
    """
    return -10.0 * torch.log10(mse(a, b).clamp_min(MSE_FLOOR))


def ssim(a: Tensor, b: Tensor, *, data_range: float = 1.0) -> Tensor:
    """Structural similarity per image: (N, C, *spatial) twice -> (N,), float64, at most 1.

    Wang, Bovik, Sheikh, Simoncelli 2004, equation 13: Gaussian window of 11 pixels along every spatial axis with
    sigma 1.5, K1 = 0.01, K2 = 0.03, population covariance, only positions where the window fits (scikit-image's
    border crop), mean over positions and channels. Any number of spatial dimensions, computed in float64 as banded
    matrix products. `data_range` 0 leaves both stabilizers out, and the result is NaN where 0/0 appears.

    Raises InputError where a spatial size is below 11 pixels.

    >>> image = torch.rand(2, 3, 16, 16)
    >>> ssim(image, image).tolist()
    [1.0, 1.0]
    """
    _require_same_shape(a, b)
    require_ssim_size(tuple(a.shape[2:]))
    x, y = a.double(), b.double()
    maps = torch.stack([x, y, x * x, y * y, x * y])
    for axis in range(3, maps.ndim):
        band = _gaussian_band(maps.shape[axis], maps.device)
        maps = torch.matmul(maps.transpose(axis, -1), band.T).transpose(axis, -1)
    mean_x, mean_y, square_x, square_y, product = maps.unbind()
    variances = (square_x - mean_x.square()) + (square_y - mean_y.square())
    covariance = product - mean_x * mean_y
    first, second = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2.0 * mean_x * mean_y + first) / (mean_x.square() + mean_y.square() + first)
    structure = (2.0 * covariance + second) / (variances + second)
    return (luminance * structure).flatten(1).mean(1)


def require_ssim_size(spatial: tuple[int, ...]) -> None:
    """Raises InputError unless images of this spatial shape can be scored with SSIM.

    >>> require_ssim_size((8, 32))
    Traceback (most recent call last):
    ...
    medpfl.core.errors.InputError: images of size 8x32 cannot be scored: SSIM needs at least 11 pixels along every \
spatial axis (its window has 11); choose a larger size
    """
    if not spatial or min(spatial) < SSIM_WINDOW:
        found = "x".join(str(size) for size in spatial) or "no spatial axis"
        raise InputError(
            f"images of size {found} cannot be scored: SSIM needs at least {SSIM_WINDOW} pixels along every "
            f"spatial axis (its window has {SSIM_WINDOW}); choose a larger size"
        )


def total_variation(images: Tensor) -> Tensor:
    """Anisotropic total variation per image: (N, C, *spatial) -> (N,), in the precision of `images`.

    For every spatial axis the mean absolute difference of neighbors along it, summed over the axes (Geiping et al.
    2020, whose weights for this prior refer to this scale). An axis with a single entry adds nothing.

    >>> total_variation(torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]])).tolist()
    [1.0]
    """
    total = images.new_zeros(images.shape[0])
    for axis in range(2, images.ndim):
        if images.shape[axis] > 1:
            total = total + images.diff(dim=axis).abs().flatten(1).mean(1)
    return total


def per_channel(values: Sequence[float], images: Tensor) -> Tensor:
    """One number per channel in the shape in which it broadcasts against images (N, C, *spatial), where they live.

    >>> per_channel((0.5, 0.25), torch.zeros(3, 2, 4)).tolist()
    [[[0.5], [0.25]]]
    """
    numbers = torch.cat([images.new_full((1,), value) for value in values])  # filled there: no copy that is waited for
    return numbers.view([1, -1] + [1] * (images.dim() - 2))


def assignment(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs rows with columns so that the summed cost is least: (R, C) -> two int64 tensors of length min(R, C).

    Rows come back in ascending order. Raises ValueError on a cost that is not finite.

    >>> rows, columns = assignment(torch.tensor([[4.0, 1.0, 3.0], [2.0, 0.0, 5.0]]))
    >>> rows.tolist(), columns.tolist()
    ([0, 1], [1, 0])
    """
    if not bool(torch.isfinite(cost).all()):
        raise ValueError("assignment needs finite costs")
    rows, columns = linear_sum_assignment(cost.detach().cpu().double().numpy())
    return torch.from_numpy(rows).long(), torch.from_numpy(columns).long()


def _gaussian_band(size: int, device: torch.device) -> Tensor:
    """The Gaussian window at every position where it fits, as a matrix (size - 10, size)."""
    half = SSIM_WINDOW // 2
    weights = [math.exp(-(offset**2) / (2.0 * SSIM_SIGMA**2)) for offset in range(-half, half + 1)]
    window = torch.tensor(weights, dtype=torch.float64, device=device)
    window = window / window.sum()
    positions = size - SSIM_WINDOW + 1
    columns = torch.arange(positions, device=device)[:, None] + torch.arange(SSIM_WINDOW, device=device)
    band = torch.zeros(positions, size, dtype=torch.float64, device=device)
    return band.scatter(1, columns, window.expand(positions, SSIM_WINDOW))


def _require_same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim < 2:
        raise ValueError(f"images of the same shape (N, C, *spatial) are compared, found {a.shape} and {b.shape}")
