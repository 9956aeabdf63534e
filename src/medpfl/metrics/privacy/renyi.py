"""Renyi divergences of noisy releases at integer orders, and the bounds that follow from them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, logsumexp

from medpfl.core.guarantees import Release

Floats = NDArray[np.float64]

ORDERS: Floats = np.array([*range(2, 65), *range(72, 513, 8)], dtype=np.float64)
"""The orders at which divergences are computed."""


def renyi_divergences(releases: Sequence[Release], orders: Floats = ORDERS) -> Floats:
    """Divergences of all releases together, one per integer order from 2 on, added up.

    Gaussian: a / (2 s^2), and with Poisson sampling the sum of Mironov, Talwar, Zhang (arXiv 1908.10530), section 3.3.
    Laplace: Mironov (CSF 2017), table II, of the release without sampling, which is an upper bound. Randomized
    response: at most its epsilon, and at most a epsilon^2 / 2 (Bun and Steinke 2016, Proposition 3.3).

    >>> renyi_divergences([Release("gaussian", 2.0)], np.array([2.0])).tolist()
    [0.25]
    """
    total = np.zeros_like(orders)
    for release in releases:
        total += release.count * _divergences(release, orders)
    return total


def renyi_bound(prior_success: float, releases: Sequence[Release]) -> float:
    """Reconstruction robustness from Renyi divergences: (kappa e^rho)^((a-1)/a) at the best order a.

    Balle, Cherubin, Hayes (arXiv 2201.04845), Theorem 3. Looser than `reconstruction_bound`.

    >>> round(renyi_bound(0.01, [Release("gaussian", 1.0)]), 3)
    0.126
    """
    exponents = (np.log(prior_success) + renyi_divergences(releases)) * (ORDERS - 1) / ORDERS
    return float(np.exp(min(0.0, float(exponents.min()))))


def unbiased_error_bound(releases: Sequence[Release]) -> float:
    """The least mean squared error per pixel in [0, 1] of any UNBIASED attacker: 1 / (4 (e^rho - 1)), rho at order 2.

    Guo, Karrer, Chaudhuri, van der Maaten: Bounding Training Data Reconstruction in Private (Deep) Learning, ICML 2022
    (arXiv 2201.12383), Theorem 1 with images of diameter 1 per pixel. An attacker with a prior is biased and may have
    a lower error; above the variance of the images the bound says nothing, because a constant guess does better.

    >>> round(unbiased_error_bound([Release("gaussian", 2.0)]), 2)
    0.88
    """
    divergence = float(renyi_divergences(releases, np.array([2.0]))[0])
    return float(0.25 / np.expm1(divergence)) if divergence > 0 else float("inf")


def _divergences(release: Release, orders: Floats) -> Floats:
    scale, rate = release.scale, release.sampling_rate
    if release.kind == "randomized_response":
        return np.minimum(scale, orders * scale**2 / 2)
    if scale == 0:
        return np.full_like(orders, np.inf)
    if release.kind == "laplace":
        first = np.log(orders / (2 * orders - 1)) + (orders - 1) / scale
        second = np.log((orders - 1) / (2 * orders - 1)) - orders / scale
        return np.asarray(np.logaddexp(first, second) / (orders - 1), dtype=np.float64)
    if rate == 1:
        return orders / (2 * scale**2)
    return np.array([_subsampled_gaussian(int(order), scale, rate) for order in orders])


def _subsampled_gaussian(order: int, noise: float, rate: float) -> float:
    terms = np.arange(order + 1)
    binomial = gammaln(order + 1) - gammaln(terms + 1) - gammaln(order - terms + 1)
    logs = binomial + (order - terms) * np.log1p(-rate) + terms * np.log(rate) + terms * (terms - 1) / (2 * noise**2)
    return float(logsumexp(logs) / (order - 1))
