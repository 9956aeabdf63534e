"""Epsilon of composed releases, by the library dp-accounting (extra `privacy`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import log_ndtr

from medpfl.core.errors import MissingExtra
from medpfl.core.guarantees import Release
from medpfl.metrics.privacy.releases import merged, single_gaussian
from medpfl.metrics.privacy.renyi import ORDERS, renyi_divergences

MOST_DISTINCT = 24
"""Different releases whose privacy losses are composed exactly; beyond, Renyi divergences are added up."""

MOST_PURE = 500.0
"""Pure epsilons beyond are added up: nothing finer would matter."""

FINEST = 1e-4
"""Width of the steps into which privacy losses are rounded up, where they are not large."""

STEPS_PER_LOSS = 5e4
"""Steps per range of one release's privacy loss, where that is large."""


@dataclass(frozen=True)
class PrivacyCurve:
    """What releases reveal: `delta(epsilon)` for any real epsilon, and `epsilon(delta)`, both upper bounds.

    accountant: how it was computed, for the report.
    """

    delta: Callable[[float], float]
    epsilon: Callable[[float], float]
    accountant: str


def privacy_curve(releases: Sequence[Release]) -> PrivacyCurve:
    """The privacy curve of all releases together, in either direction of adding or removing one unit.

    Gaussian releases about every unit have a closed form (Balle and Wang 2018, Theorem 8; Dong et al. 2022); others are
    composed as privacy loss distributions, or as Renyi divergences where more than `MOST_DISTINCT` differ.
    Raises MissingExtra without dp-accounting, unless a closed form is all that is needed.

    >>> curve = privacy_curve([Release("gaussian", 1.0)])
    >>> round(curve.epsilon(1e-5), 3)
    4.377
    """
    releases = merged(map(_amplified, releases))
    if not releases:
        return PrivacyCurve(lambda epsilon: max(0.0, -math.expm1(epsilon)), lambda _: 0.0, "nothing is released")
    if any(release.scale == 0 and release.kind != "randomized_response" for release in releases):
        return PrivacyCurve(lambda _: 1.0, lambda _: math.inf, "no noise")
    if (noise := single_gaussian(releases)) is not None:
        return _gaussian_curve(noise)
    if all(release.kind != "gaussian" for release in releases):
        pure = sum(_loss_range(release) * release.count for release in releases)
        if pure > MOST_PURE or all(release.kind == "randomized_response" for release in releases):
            return _pure_curve(pure)
    return _composed_curve(releases)


def group_epsilon(curve: PrivacyCurve, size: int, delta: float) -> float:
    """Epsilon at `delta` for `size` units at once, such as all images of one patient, by group privacy.

    From epsilon and delta_1 of one unit follow size * epsilon and delta_1 (e^(size epsilon) - 1) / (e^epsilon - 1)
    (Vadhan 2017, Lemma 2.2). The smallest epsilon whose delta fits is returned; infinity where none below 1e6 does.

    >>> curve = privacy_curve([Release("gaussian", 10.0)])
    >>> group_epsilon(curve, 1, 1e-5) == curve.epsilon(1e-5)
    True
    """
    if size == 1:
        return curve.epsilon(delta)

    def excess(epsilon: float) -> float:
        found = curve.delta(epsilon)
        if found <= 0:
            return -1.0
        factor = (size - 1) * epsilon + math.log(-math.expm1(-size * epsilon) / -math.expm1(-epsilon))
        return math.log(found) + factor - math.log(delta)

    low = high = max(curve.epsilon(delta), 1e-9)
    while excess(high) > 0:
        low, high = high, high * 2
        if high > 1e6:
            return math.inf
    return size * (high if excess(low) <= 0 else float(brentq(excess, low, high, xtol=1e-9)))


def _amplified(release: Release) -> Release:
    """A randomized response among sampled units as one about all of them: log(1 + q (e^epsilon - 1))."""
    if release.kind != "randomized_response" or release.sampling_rate == 1:
        return release
    if release.scale > MOST_PURE:
        return replace(release, sampling_rate=1.0)
    epsilon = math.log1p(release.sampling_rate * math.expm1(release.scale))
    return replace(release, scale=epsilon, sampling_rate=1.0)


def _gaussian_curve(noise: float) -> PrivacyCurve:
    """Of one Gaussian release with this noise multiplier, stable for any epsilon."""

    def delta(epsilon: float) -> float:
        first = float(log_ndtr(0.5 / noise - epsilon * noise))
        second = epsilon + float(log_ndtr(-0.5 / noise - epsilon * noise))
        return max(0.0, math.exp(first) * -math.expm1(min(0.0, second - first)))

    def epsilon(wanted: float) -> float:
        if delta(0.0) <= wanted:
            return 0.0
        high = 1.0
        while delta(high) > wanted:
            high *= 2
        return float(brentq(lambda tried: delta(tried) - wanted, 0.0, high, xtol=1e-12, rtol=1e-12))

    return PrivacyCurve(delta, epsilon, "closed form of the Gaussian mechanism")


def _pure_curve(total: float) -> PrivacyCurve:
    """Of releases with a pure epsilon that adds up; the delta is that of randomized response with this epsilon."""

    def delta(epsilon: float) -> float:
        if epsilon >= total:
            return 0.0
        if epsilon <= -total:
            return -math.expm1(epsilon)
        return math.exp(-np.logaddexp(0.0, -total)) * -math.expm1(epsilon - total)

    def epsilon(wanted: float) -> float:
        low = total + math.log1p(-min(1.0, wanted * (1 + math.exp(-total)))) if wanted < 1 else 0.0
        return max(0.0, low)

    return PrivacyCurve(delta, epsilon, "pure epsilons added up")


def _composed_curve(releases: Sequence[Release]) -> PrivacyCurve:
    library = dp_accounting()
    if len(releases) > MOST_DISTINCT:
        divergences = renyi_divergences(releases)
        convert = library.rdp.rdp_privacy_accountant
        return PrivacyCurve(
            lambda epsilon: float(min(1.0, convert.compute_delta(ORDERS, divergences, epsilon)[0])),
            lambda delta: float(convert.compute_epsilon(ORDERS, divergences, delta)[0]),
            "Renyi divergences added up (dp-accounting)",
        )
    interval = max(FINEST, max(map(_loss_range, releases)) / STEPS_PER_LOSS)
    accountant = library.pld.PLDAccountant(value_discretization_interval=interval)
    for release in releases:
        accountant.compose(_event(release), release.count)
    return PrivacyCurve(
        lambda epsilon: float(min(1.0, accountant.get_delta(epsilon))),
        lambda delta: float(accountant.get_epsilon(delta)),
        "privacy loss distributions composed (dp-accounting)",
    )


def _event(release: Release) -> Any:
    library = dp_accounting()
    if release.kind == "gaussian":
        event = library.GaussianDpEvent(release.scale)
    elif release.kind == "laplace":
        event = library.LaplaceDpEvent(release.scale)
    else:  # two answers, each true with probability e^epsilon / (1 + e^epsilon), dominate any pure epsilon
        event = library.RandomizedResponseDpEvent(noise_parameter=2 / (1 + math.exp(release.scale)), num_buckets=2)
    return event if release.sampling_rate == 1 else library.PoissonSampledDpEvent(release.sampling_rate, event)


def _loss_range(release: Release) -> float:
    """About the largest privacy loss of one release."""
    if release.kind == "gaussian":
        return 0.5 / release.scale**2 + 8 / release.scale
    return 1 / release.scale if release.kind == "laplace" else release.scale


def dp_accounting() -> Any:
    """The library, imported when it is needed. Raises MissingExtra."""
    try:
        import dp_accounting.pld
        import dp_accounting.rdp
    except ModuleNotFoundError:
        raise MissingExtra(
            "epsilon over subsampled or mixed releases needs dp-accounting: install it with "
            "`pip install 'medpfl[privacy]'`"
        ) from None
    return dp_accounting
