"""The tight reconstruction bound of DP-SGD by simulation, with an interval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta, binom

from medpfl.core.guarantees import Release
from medpfl.metrics.statistics import Interval

Floats = NDArray[np.float64]


def simulated_bound(
    releases: Sequence[Release], prior_success: float, *, samples: int = 100_000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Best power at false-positive rate `prior_success`, of telling the releases with a unit from those without it.

    Hayes, Mahloujifar, Balle (arXiv 2302.07225), Theorem 2: without the unit each Gaussian release is N(0, s^2), with
    it N(1, s^2) with the sampling rate and N(0, s^2) otherwise. `samples` of each are drawn; the cut-off of the
    likelihood ratio comes from those without the unit, the power from those with it. The interval holds for both
    together: order statistics around the cut-off (half of the error) and Clopper and Pearson's for the power.
    Raises ValueError for releases that are not Gaussian.

    >>> interval = simulated_bound([Release("gaussian", 1.0)], 0.05, samples=20_000)
    >>> interval.low < 0.2595 < interval.high
    True
    """
    if any(release.kind != "gaussian" or release.scale <= 0 for release in releases):
        raise ValueError("the simulation needs Gaussian releases with noise")
    draws = np.random.default_rng(seed)
    without = np.sort(_losses(releases, samples, False, draws))[::-1]
    present = _losses(releases, samples, True, draws)
    tail = (1 - level) / 4
    places = [round(prior_success * samples), binom.ppf(tail, samples, prior_success), 0]
    places[2] = binom.ppf(1 - tail, samples, prior_success)
    middle, few, many = (int(np.clip(place, 1, samples - 1)) for place in places)
    power = [int((present > without[place]).sum()) for place in (middle, few, many)]
    return Interval(
        mean=power[0] / samples,
        low=float(beta.ppf(tail, power[1], samples - power[1] + 1)) if power[1] else 0.0,
        high=float(beta.ppf(1 - tail, power[2] + 1, samples - power[2])) if power[2] < samples else 1.0,
    )


def _losses(releases: Sequence[Release], samples: int, present: bool, draws: np.random.Generator) -> Floats:
    """Logarithms of the likelihood ratio of all releases, (samples,)."""
    total = np.zeros(samples)
    for release in releases:
        noise, rate = release.scale, release.sampling_rate
        for _ in range(release.count):
            seen = noise * draws.standard_normal(samples)
            if present:
                seen += draws.random(samples) < rate
            exponent = (2 * seen - 1) / (2 * noise**2)
            total += exponent if rate == 1 else np.logaddexp(np.log1p(-rate), np.log(rate) + exponent)
    return total
