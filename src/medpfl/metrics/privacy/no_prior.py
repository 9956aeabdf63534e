"""What an attacker without any prior can read of a noised gradient, even if it chose the model.

Bounds of this kind are far below the reconstruction-robustness curve, because they assume that nothing is known of the
images. Medical images are alike, and an attacker who has public ones may do better.
"""

from __future__ import annotations

from collections.abc import Sequence

from scipy.stats import chi2

from medpfl.core.guarantees import Release
from medpfl.metrics.privacy.releases import single_gaussian


def read_out_variance(releases: Sequence[Release], squared_norm: float) -> float | None:
    """Variance per pixel of the best read-out from scratch, of an image with that sum of squared pixels.

    The best that can be seen of an image X in one gradient that was clipped and noised with multiplier s is
    X + N(0, s^2 |X|^2) per pixel (arXiv 2402.12861v2); several such releases are averaged. None where the releases
    are not all Gaussian about every unit.

    >>> round(read_out_variance([Release("gaussian", 0.01)], 28 * 28 * 0.25), 4)
    0.0196
    """
    noise = single_gaussian(releases)
    return None if noise is None else noise**2 * squared_norm


def success_without_prior(variance: float, pixels: int, mean_squared_error: float) -> float:
    """How often such a read-out has at most this mean squared error: a chi-square law with a degree per pixel.

    >>> round(success_without_prior(0.01, 784, 0.01), 2)
    0.51
    """
    return float(chi2.cdf(pixels * mean_squared_error / variance, pixels)) if variance > 0 else 1.0
